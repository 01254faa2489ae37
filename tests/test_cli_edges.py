"""The command's edges, each called by itself: signals, streams, proxies, odd input."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import signal
import sys
import threading
from datetime import UTC, datetime, timedelta

import pytest
import typer

from kontext_async import (
    CompletedTask,
    ErrorOutcome,
    KontextClient,
    ResultOutcome,
    TaskRecord,
    TaskStatus,
    TransportError,
)
from kontext_async.cli import app, output, progress, running
from kontext_async.cli import input as cli_input
from kontext_async.cli.connection import Connection, connection
from kontext_async.cli.output import Exit, OutputError
from kontext_async.cli.requests import RequestTally
from kontext_async.cli.tally import BatchTally, Part, Tally
from kontext_async.client import DEFAULT_BASE_URL
from kontext_async.polling import PollEvent
from kontext_async.results import Ledger, SubmissionEntry
from kontext_async.wire import ImageRequest


def code_of(main, on_interrupt=lambda: None):
    with pytest.raises(typer.Exit) as caught:
        running.run(main, on_interrupt)
    return caught.value.exit_code


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, Exit.INTERRUPTED), (signal.SIGTERM, Exit.TERMINATED)]
)
def test_a_signal_cancels_the_command_and_says_what_is_left(number, code):
    """The one that came decides the exit code, and the handler from before is back."""
    said = []
    before = signal.getsignal(signal.SIGTERM)

    async def wait():
        signal.raise_signal(number)
        await asyncio.sleep(60)

    assert code_of(wait(), lambda: said.append("left")) is code
    assert said == ["left"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_that_a_script_starts_with_an_ampersand_heeds_sigterm():
    """Such a shell has Ctrl-C ignored, and it stays so."""

    async def wait():
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(0)
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(5)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert code_of(wait()) is Exit.TERMINATED
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_command_may_run_outside_the_main_thread():
    """There it handles no signals."""

    async def done():
        return Exit.DONE

    codes = []
    thread = threading.Thread(target=lambda: codes.append(code_of(done())))
    thread.start()
    thread.join()
    assert codes == [Exit.DONE]


def test_an_output_that_cannot_be_written_is_a_message_and_a_code(capsys):
    """The code is that of a failure."""

    async def fail():
        raise OutputError("No space left on device")

    assert code_of(fail()) is Exit.ERROR
    assert "cannot write to standard output: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "left"), [(130, [130]), (143, [143]), (0, []), (None, [])])
def test_only_an_interrupted_process_is_left_at_once(code, left, monkeypatch):
    """Without waiting for its threads."""
    found = []
    monkeypatch.setattr(os, "_exit", found.append)
    running.leave_at_once(code)
    assert found == left


class Broken(io.StringIO):
    """A stream that cannot be written."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


def test_standard_output_tells_a_reader_that_left_from_a_full_disk(monkeypatch):
    """The first is a broken pipe, everything else is named."""
    monkeypatch.setattr(sys, "stdout", Broken(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        output.write_line({})
    monkeypatch.setattr(sys, "stdout", Broken(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left"):
        output.write_line({})
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OutputError, match="it is closed"):
        output.write_line({})


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BrokenPipeError(), 141, ""),
        (OSError(28, "Full"), 4, "kontext: cannot write to standard output: Full\n"),
    ],
)
@pytest.mark.parametrize("words", ["--help", "--version", "wait --help", "status .", "unknown ."])
async def test_every_command_has_the_codes_of_an_output_that_cannot_be_written(
    words, error, code, message, monkeypatch, capsys, tmp_path
):
    """Help, the version, and what reads a ledger as well as what waits."""
    monkeypatch.chdir(tmp_path)
    async with Ledger("kontext.sqlite3") as ledger:
        await ledger.add(["task1"])
    entry = SubmissionEntry(
        key="boat",
        request=ImageRequest(prompt="a boat"),
        state="unknown",
        token="token",
        created_at=datetime.now(UTC),
        updated_at=datetime.now(UTC),
    )
    monkeypatch.setattr(Ledger, "read_submissions", lambda _: [entry])
    monkeypatch.setattr(sys, "stdout", Broken(error))
    with pytest.raises(SystemExit) as caught:
        app.app(words.split(), prog_name="kontext")
    assert caught.value.code == code
    assert capsys.readouterr().err.rpartition("┘\n")[2] == message


@pytest.mark.parametrize("has_stderr", [True, False])
def test_polls_are_logged_on_request(has_stderr, monkeypatch):
    """To standard error, if there is one."""
    log = logging.getLogger("kontext_async")
    level, handlers = log.level, log.handlers
    stream = io.StringIO() if has_stderr else None
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        output.log_polls(wanted=True)
        log.debug("a poll")
    finally:
        log.setLevel(level)
        log.handlers = handlers
    assert not has_stderr or stream.getvalue().endswith("DEBUG a poll\n")


def test_without_a_log_the_librarys_warnings_are_not_printed(monkeypatch, capsys):
    """Python would print them in the middle of the progress, which has the trouble anyway."""
    log = logging.getLogger("kontext_async")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", False)
    output.log_polls(wanted=False)
    log.warning("an outage")
    assert capsys.readouterr().err == ""
    assert not output.is_logging_polls()


async def test_a_proxy_gives_client_and_images_a_session(monkeypatch):
    """Without one, each has its own."""
    monkeypatch.setenv("APIKLEY_API_KEY", "key")
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    options = {"base_url": "https://api.example", "api_key_file": None, "allow_http": False}
    for proxy in (None, "http://127.0.0.1:9"):
        async with connection(proxy=proxy, **options).open() as (client, session):
            assert isinstance(client, KontextClient)
            assert (session is None) == (proxy is None)
    assert session.closed
    for proxy in ("socks5://127.0.0.1:9", "http://["):
        with pytest.raises(typer.Exit):
            connection(proxy=proxy, **options)


def test_a_file_of_one_byte_is_read_at_its_end():
    """Its encoding cannot be told before."""
    decoder = cli_input._Decoder("ids")
    assert decoder.decode(b"a") == ""
    assert decoder.decode(b"", final=True) == "a"


def test_text_with_zeros_is_not_text(capsys):
    """UTF-16 without its mark looks so."""
    with pytest.raises(typer.Exit):
        cli_input._Decoder("ids").decode("ab".encode("utf-16-le"), final=True)
    assert "cannot read ids: it is not text in UTF-8, or UTF-16 with its mark" in (
        capsys.readouterr().err
    )


class Stdin:
    """Standard input that waits until it may go on, and then reads or fails."""

    def __init__(self, result):
        self.buffer = self
        self.result = result
        self.may_go_on = threading.Event()
        self.has_ended = threading.Event()

    def read(self, size):
        self.may_go_on.wait(10)
        try:
            if isinstance(self.result, OSError):
                raise self.result
            return self.result
        finally:
            self.has_ended.set()


async def test_standard_input_that_cannot_be_read_is_wrong_usage(monkeypatch, capsys):
    """The message has the system's words."""
    stdin = Stdin(OSError(5, "Input/output error"))
    stdin.may_go_on.set()
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(typer.Exit):
        await cli_input._next_chunk()
    assert "cannot read standard input: Input/output error" in capsys.readouterr().err


@pytest.mark.parametrize("is_closed", [True, False])
def test_input_that_nobody_wants_any_more_is_dropped(is_closed, monkeypatch):
    """The wait was cancelled, and perhaps its loop is closed, before somebody wrote."""
    stdin = Stdin(b"task1\n")
    monkeypatch.setattr(sys, "stdin", stdin)

    async def leave():
        reading = asyncio.create_task(cli_input._next_chunk())
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        if not is_closed:
            stdin.may_go_on.set()
            await asyncio.to_thread(stdin.has_ended.wait, 10)
            await asyncio.sleep(0.05)

    asyncio.run(leave())
    stdin.may_go_on.set()
    for thread in threading.enumerate():
        if thread.name == "kontext-stdin":
            thread.join(10)
    assert stdin.has_ended.is_set()


def test_an_outcome_of_no_request_leaves_the_requests():
    """An id's outcome has no key."""
    tally = RequestTally(["key"])
    tally.count_outcome(ErrorOutcome(task_id="a", error=TransportError("reset")))
    assert list(tally.unfinished) == ["key"]


def texts(parts):
    return [part.text for part in parts]


def test_while_tasks_are_still_read_no_time_is_left():
    """Only the rate is known."""
    tally = Tally(["a", "b"])
    tally.is_complete = False
    assert list(tally.start(["a", "b"])) == ["a", "b"]
    assert texts(tally.progress(0.0))[2:] == ["2 in flight"]
    tally.count_outcome(ErrorOutcome(task_id="a", error=TransportError("reset")))
    assert texts(tally.progress(10.0))[2:] == ["0.1/s", "1 in flight"]
    tally.count_outcome(ErrorOutcome(task_id="b", error=TransportError("reset")))
    assert texts(tally.progress(10.0))[2:] == ["0.2/s", "0 in flight"]


async def test_images_that_are_being_saved_are_counted_last():
    """All tasks have ended, but the bar is not full, and no time is told."""
    tally = BatchTally(["a", "b"])
    for task_id in list(tally.unfinished):
        task = CompletedTask(task_id=task_id, result_image_url="https://example.com/a.png")
        tally.count_outcome(ResultOutcome(task_id=task_id, result=task))
        assert ("to save" in tally.counts()) == (task_id == "b")
    tally.count_image(TransportError("reset"))
    assert texts(tally.progress(10.0))[3:] == ["1 not saved", "1 to save"]
    async with KontextClient("key") as client:
        display = progress.Display(tally, client)
        display._draw([])
        (row,) = display._bar.tasks
        assert (row.completed, row.total) == (1, 2)
    tally.count_image(TransportError("reset"))
    assert tally.counts() == "2 done, 0 failed, 0 saved, 2 not saved"
    assert texts(tally.progress(10.0)) == tally.counts().split(", ")


MADE = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


class TestTimeLeft:
    """Never less than the tasks that run may take, by those that have ended."""

    def tally(self, *, ended=(), running=(), queued=0):
        """Return a tally at 10 s, with tasks of these durations and ages in seconds."""
        ids = [f"{kind}{n}" for kind, of in (("e", ended), ("r", running)) for n in range(len(of))]
        tally = Tally([*ids, *(f"q{n}" for n in range(queued))])
        tally.progress(0.0)
        for n, duration in enumerate(ended):
            tally.count_poll(polled(f"e{n}", 1.0))
            task = CompletedTask(
                task_id=f"e{n}",
                result_image_url="https://example.com/a.png",
                create_time=MADE,
                complete_time=MADE + timedelta(seconds=duration),
            )
            tally.count_outcome(ResultOutcome(task_id=f"e{n}", result=task))
        tally.progress(10.0)
        for n, age in enumerate(running):
            tally.count_poll(polled(f"r{n}", age))
        return tally

    def test_nothing_ran_yet(self):
        """The rate alone decides while no task was seen to run."""
        assert self.left(ended=[5.0] * 10, queued=20) == "0:00:20 left"

    def test_the_slowest_task_decides(self):
        """Of 12 ended and 3 that run, the second longest is as likely to be passed as not."""
        ended = [5.0] * 10 + [40.0, 45.0]
        assert self.left(ended=ended, running=[1.0, 2.0, 3.0]) == "0:00:39 left"
        assert self.left(ended=ended, running=[21.0, 30.0]) == "0:00:24 left"

    def test_queued_tasks_begin_before_they_end(self):
        """A new one is behind all that are queued."""
        assert self.left(ended=[5.0] * 10, running=[4.0], queued=20) == "0:00:25 left"

    @pytest.mark.parametrize(
        "running",
        [
            [20.0],  # none has ended at that age
            [1.0] * 11,  # more run than have ended
            [1.0] * 8 + [20.0],  # too many are older than any that has ended
        ],
    )
    def test_an_unknown_time_is_not_told(self, running):
        """The rate is."""
        assert self.left(ended=[5.0] * 10, running=running) == "1.0/s"

    def test_a_straggler_does_not_hide_the_time(self):
        """It is one of many."""
        running = [1.0] * 9 + [20.0]
        assert self.left(ended=[5.0] * 10, running=running) == "0:00:10 left"

    def test_a_task_is_as_old_as_its_record(self):
        """It may have run before the wait began."""
        tally = self.tally(ended=[40.0] * 10)
        tally.add(["r"])
        tally.count_poll(polled("r", 0.1, datetime.now(UTC) - timedelta(seconds=30)))
        assert texts(tally.progress(10.0))[2] == "0:00:10 left"

    def left(self, **tasks):
        return texts(self.tally(**tasks).progress(10.0))[2]


def polled(task_id, elapsed, created=None):
    generating = TaskRecord(task_id=task_id, status=TaskStatus.GENERATING, create_time=created)
    return PollEvent(
        task_id=task_id,
        attempt=1,
        elapsed=elapsed,
        record=generating,
        error=None,
        next_delay=1.0,
    )


LONG_COUNTS = [
    Part("99,871 of 100,000"),
    Part("87,988 done", 4),
    Part("11,871 failed", 1),
    Part("0:12:34 left", 2),
    Part("55.2/s", 5),
]
REFUSED = Part("127.0.0.1 cannot be reached: Connection refused")


@pytest.mark.parametrize(
    ("width", "parts", "shown"),
    [
        (24, LONG_COUNTS, "99,871 of…"),
        (15, LONG_COUNTS, ""),
        (40, LONG_COUNTS, "99,871 of 100,000, 55.2/s"),
        (60, LONG_COUNTS, "99,871 of 100,000, 11,871 failed, 0:12:34 left"),
        (80, LONG_COUNTS, "99,871 of 100,000, 87,988 done, 11,871 failed, 0:12:34 left"),
        (120, LONG_COUNTS, ", ".join(part.text for part in LONG_COUNTS)),
        (60, [LONG_COUNTS[0], REFUSED], "99,871 of 100,000, 127.0.0.1 cannot be reache…"),
        (60, [REFUSED, LONG_COUNTS[0]], "127.0.0.1 cannot be reached: Connection refus…"),
    ],
)
async def test_a_narrow_terminal_shows_the_most_important_parts(width, parts, shown):
    """Failures and the time left before other counts; the reason for trouble is cut at the end."""
    async with KontextClient("key") as client:
        display = progress.Display(Tally(["a"]), client)
        display._console.width = width
        assert display._fitting(parts) == shown
    assert len(shown) <= max(width - 14, 0)


def test_on_one_terminal_an_error_is_said_once(monkeypatch, capsys):
    """The row of the result has it already."""
    monkeypatch.setenv("APIKLEY_API_KEY", "key")
    monkeypatch.setattr(app, "is_one_terminal", lambda: True)
    with pytest.raises(typer.Exit):
        app.get("task1", base_url="http://127.0.0.1:9")
    assert capsys.readouterr().err == ""


def test_a_repetition_has_the_options_that_reach_the_api(tmp_path):
    """Not the default address, and no password."""
    key_file = tmp_path / "my key"
    key_file.write_text("key")
    options = {"base_url": DEFAULT_BASE_URL, "key": "key", "allow_http": False}
    assert Connection(**options, proxy=None).as_options() == ""
    assert Connection(**options, proxy="http://user:secret@127.0.0.1:9").as_options() == ""
    given = connection(
        base_url="http://10.0.0.1",
        api_key_file=key_file,
        allow_http=True,
        proxy="http://127.0.0.1:9",
    )
    assert given.as_options() == (
        "--base-url http://10.0.0.1 --allow-http "
        f"--api-key-file '{key_file}' --proxy http://127.0.0.1:9 "
    )


def test_messages_that_cannot_be_written_are_dropped_at_the_end(monkeypatch, tmp_path):
    """The interpreter would end with a code of its own, if its last flush failed."""
    with (tmp_path / "stderr").open("w") as file:

        class Full(io.StringIO):
            def flush(self):
                raise OSError(28, "No space left on device")

            def fileno(self):
                return file.fileno()

        monkeypatch.setattr(sys, "stderr", Full())
        output.drop_lost_messages()
        file.write("lost")
    assert (tmp_path / "stderr").read_text() == ""
    monkeypatch.setattr(sys, "stderr", None)
    output.drop_lost_messages()
