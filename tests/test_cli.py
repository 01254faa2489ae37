"""The command line: help texts, output, messages and exit codes."""

from __future__ import annotations

import asyncio
import json
import math
import re
import runpy
import shlex
import signal
import sys
from datetime import datetime, timedelta

import pytest
import typer
from background import serving
from command import Terminal
from typer.testing import CliRunner

from kontext_async import (
    ApiError,
    ConfigurationError,
    ErrorOutcome,
    GenerationFailedError,
    KontextClient,
    KontextError,
    PollEvent,
    TaskRecord,
    TaskStatus,
    TransportError,
    WaitTimeoutError,
)
from kontext_async.cli import app, local, main, progress, waiting
from kontext_async.cli.help import Command
from kontext_async.cli.output import (
    Exit,
    classify,
    exit_code,
    outcome_line,
    say,
    silence,
    write_result,
)
from kontext_async.cli.running import run
from kontext_async.cli.tally import Tally
from kontext_async.simulator import (
    Failure,
    FixedWindow,
    Simulator,
    SlidingWindow,
    TokenBucket,
)

KEY = "marker-key-5f1c"
ANSI = "\x1b"
GENERATING = TaskRecord(task_id="t", status=TaskStatus.GENERATING)


@pytest.fixture(scope="module")
def simulator():
    with serving(api_key=KEY) as running:
        yield running


@pytest.fixture
def kontext(simulator, monkeypatch):
    """Run the command in this process, against the simulator."""
    monkeypatch.setenv("APIKLEY_API_KEY", KEY)

    def invoke(*args, input=None):  # noqa: A002 - the runner's name for it
        return CliRunner().invoke(
            app.app, [*args, "--base-url", simulator.base_url], input=input, prog_name="kontext"
        )

    return invoke


def lines(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def polled(task_id, record, error=None):
    return PollEvent(
        task_id=task_id, attempt=1, elapsed=0.1, record=record, error=error, next_delay=1.0
    )


def failing(outcome=None, **task):
    return {"duration": 0.0, "outcome": outcome or Failure(400, "It was flagged."), **task}


def done(**task):
    return {"duration": 0.0, "outcome": "success", **task}


class TestGet:
    def test_a_finished_task_has_all_its_fields(self, kontext, simulator):
        """A success has its URLs, times, duration and expiry, and null for the rest."""
        task_id = simulator.add_task(duration=12.0, outcome="success", age=60.0)
        result = kontext("get", task_id)
        assert result.exit_code == 0
        (line,) = lines(result)
        assert line == {
            "taskId": task_id,
            "outcome": "success",
            "status": "SUCCESS",
            "resultImageUrl": line["resultImageUrl"],
            "originImageUrl": line["originImageUrl"],
            "createTime": line["createTime"],
            "completeTime": line["completeTime"],
            "duration": 12.0,
            "expiresAt": line["expiresAt"],
            "error": None,
            "errorCode": None,
            "message": None,
            "file": None,
        }
        assert line["resultImageUrl"].startswith(simulator.base_url)
        lifetime = datetime.fromisoformat(line["expiresAt"]) - datetime.fromisoformat(
            line["completeTime"]
        )
        assert lifetime == timedelta(days=14)

    def test_a_running_task_is_not_a_failure(self, kontext, simulator):
        """A poll of a task that is generating ends with exit code 0."""
        result = kontext("get", simulator.add_task(duration=math.inf))
        assert result.exit_code == 0
        assert [line["outcome"] for line in lines(result)] == ["generating"]

    def test_a_failed_task_is_a_line_and_exit_code_1(self, kontext, simulator):
        """The line has the code and the message of the record."""
        result = kontext("get", simulator.add_task(**failing()))
        assert result.exit_code == 1
        (line,) = lines(result)
        assert (line["outcome"], line["errorCode"], line["message"]) == (
            "failed",
            400,
            "It was flagged.",
        )

    def test_a_success_without_a_url_has_null(self, kontext, simulator):
        """One poll reports the record; only a wait needs the URL."""
        result = kontext("get", simulator.add_task(script=["success_no_url"]))
        assert [line["resultImageUrl"] for line in lines(result)] == [None]

    def test_an_unknown_task_is_an_error_of_the_api(self, kontext):
        """The refusal is a line on standard output, and a message on standard error."""
        result = kontext("get", "unknown-task")
        assert result.exit_code == 4
        (line,) = lines(result)
        assert (line["outcome"], line["error"]) == ("error", "TaskNotFoundError")
        assert "unknown-task" in result.stderr


class TestWait:
    def test_each_task_has_its_line(self, kontext, simulator):
        """Each id has one line, and the highest exit code counts."""
        good, bad = simulator.add_task(**done()), simulator.add_task(**failing())
        result = kontext("wait", good, bad, good)
        assert result.exit_code == 1
        assert {line["taskId"]: line["outcome"] for line in lines(result)} == {
            good: "success",
            bad: "failed",
        }
        assert "1 done, 1 failed" in result.stderr
        assert "It was flagged." in result.stderr

    def test_a_deadline_is_not_a_failure(self, kontext, simulator):
        """A task that is generating at its deadline has an outcome and exit code of its own."""
        result = kontext("wait", simulator.add_task(duration=math.inf), "--timeout", "0")
        assert result.exit_code == 3
        (line,) = lines(result)
        assert (line["outcome"], line["error"], line["status"]) == (
            "timeout",
            "WaitTimeoutError",
            "GENERATING",
        )
        assert "0 done, 0 failed, 1 timed out" in result.stderr

    def test_no_limit(self, kontext, simulator):
        """inf waits without a deadline."""
        assert kontext("wait", simulator.add_task(**done()), "--timeout", "inf").exit_code == 0

    @pytest.mark.parametrize("seconds", ["nan", "-1", "soon"])
    def test_a_timeout_is_a_number_of_seconds(self, kontext, seconds):
        """Other values are wrong usage."""
        assert kontext("wait", "task1", "--timeout", seconds).exit_code == 2

    def test_a_refused_key_is_the_outcome_of_all(self, kontext, simulator, monkeypatch):
        """Every id gets its line, with the API's code."""
        monkeypatch.setenv("APIKLEY_API_KEY", "another-key")
        result = kontext("wait", "task1", "task2")
        assert result.exit_code == 4
        assert [(line["error"], line["errorCode"]) for line in lines(result)] == [
            ("AuthenticationError", 401)
        ] * 2

    def test_ids_from_a_file(self, kontext, simulator, tmp_path):
        """Lines and JSON Lines mix; blank lines, comments and repetitions are skipped."""
        ids = [simulator.add_task(**done()) for _ in range(3)]
        file = tmp_path / "ids.txt"
        file.write_text(
            f"# made today\n\n{ids[0]}\n  {ids[1]}  \n"
            f'{{"taskId": "{ids[2]}", "other": 1}}\n{ids[0]}\n',
            encoding="utf-8-sig",
        )
        result = kontext("wait", "--from", str(file))
        assert result.exit_code == 0
        assert sorted(line["taskId"] for line in lines(result)) == sorted(ids)

    def test_results_are_ids_again(self, kontext, simulator):
        """The command reads its own output from standard input."""
        first = kontext("get", simulator.add_task(**done()))
        assert lines(kontext("wait", "--from", "-", input=first.stdout)) == lines(first)

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("{not json}", "not JSON: Expecting"),
            ('{"id": "x"}', "without taskId"),
            ('{"taskId": 5}', "must be a str"),
            ('{"taskId": " "}', "blank"),
            ("a\x07b", "printable"),
        ],
    )
    def test_a_bad_line_is_named_before_any_request(
        self, kontext, simulator, tmp_path, line, problem
    ):
        """The message has the line's number and the problem, and nothing is sent."""
        file = tmp_path / "ids.txt"
        file.write_text(f"task1\n{line}\n")
        requests = len(simulator.requests)
        result = kontext("wait", "--from", str(file))
        assert result.exit_code == 2
        assert "line 2" in result.stderr
        assert problem in result.stderr
        assert len(simulator.requests) == requests

    def test_only_a_newline_ends_a_line(self, kontext, simulator):
        """JSON may hold Unicode's other line separators unescaped."""
        task_id = simulator.add_task(**done())
        line = json.dumps({"note": "a\u2028b\u0085c", "taskId": task_id}, ensure_ascii=False)
        result = kontext("wait", "--from", "-", input=f"{line}\r\n")
        assert [line["taskId"] for line in lines(result)] == [task_id]

    def test_of_many_bad_lines_ten_are_named(self, kontext, tmp_path):
        """Each has a line of its own, and the rest are counted."""
        file = tmp_path / "ids.txt"
        file.write_text("{\n" * 15)
        result = kontext("wait", "--from", str(file))
        assert f"{file}, line 2: not JSON: " in result.stderr
        assert "line 10" in result.stderr
        assert "line 11" not in result.stderr
        assert "and 5 more" in result.stderr
        result = kontext("wait", "--from", "-", input="{\n" * 15)
        assert result.exit_code == 2
        assert "standard input, line 10: not JSON: " in result.stderr
        assert "line 11" not in result.stderr
        assert "5 more lines hold no id" in result.stderr

    def test_no_ids_is_wrong_usage(self, kontext, tmp_path):
        """A call without ids, or with an empty file, ends with exit code 2."""
        assert "give them as arguments" in kontext("wait").stderr
        (tmp_path / "empty").write_text("# none\n")
        result = kontext("wait", "--from", str(tmp_path / "empty"))
        assert result.exit_code == 2
        assert f"no task ids in {tmp_path / 'empty'}" in result.stderr
        assert kontext("wait").exit_code == 2
        assert kontext("wait", "--from", "-", input="# none\n").exit_code == 2

    def test_a_file_that_cannot_be_read_is_wrong_usage(self, kontext, tmp_path):
        """A missing file and one that is not text are reported by name."""
        assert kontext("wait", "--from", str(tmp_path / "missing")).exit_code == 2
        (tmp_path / "image").write_bytes(b"\xff\xd8\xff")
        result = kontext("wait", "--from", str(tmp_path / "image"))
        assert result.exit_code == 2
        assert "UTF-8" in result.stderr

    def test_the_summary_is_a_table_on_standard_error(self, kontext, simulator):
        """Standard output has the results alone."""
        ids = [simulator.add_task(duration=12.0, outcome="success", age=60.0) for _ in range(3)]
        result = kontext("wait", *ids, simulator.add_task(**failing()), "--summary")
        assert len(lines(result)) == 4
        for text in (
            "success",
            "GenerationFailedError 400",
            "12.0 s, 12.0 s",
            "polls per task",
            "lag",
        ):
            assert text in result.stderr

    def test_unknown_values_are_null(self, kontext, simulator):
        """A success may lack readable times, and a failure may lack a record."""
        timeless = simulator.add_task(script=["times_unreadable"])
        refused = simulator.add_task(script=["code_501"])
        result = kontext("wait", timeless, refused, "--summary")
        by_id = {line["taskId"]: line for line in lines(result)}
        assert by_id[timeless]["duration"] is None
        assert by_id[timeless]["outcome"] == "success"
        assert by_id[refused]["createTime"] is None
        assert by_id[refused]["outcome"] == "failed"

    def test_only_the_first_errors_are_shown(self, kontext, simulator):
        """One of each kind goes to standard error, and the others are counted by their kind."""
        ids = [simulator.add_task(**failing()) for _ in range(25)]
        broken = [simulator.add_task(**failing(Failure(501, f"no {n}"))) for n in range(2)]
        result = kontext("wait", *ids, *broken)
        assert len(lines(result)) == 27
        assert result.stderr.count("It was flagged.") == 1
        assert "24 more with GenerationFailedError 400: " in result.stderr
        assert "1 more with GenerationFailedError 501: " in result.stderr
        assert sum(task_id in result.stderr for task_id in ids) == 4

    def test_of_many_kinds_of_errors_ten_are_shown(self, kontext, simulator):
        """The results have them all."""
        failures = [Failure(500 + n, "no") for n in range(12)]
        result = kontext("wait", *(simulator.add_task(**failing(f)) for f in failures))
        assert len(lines(result)) == 12
        assert result.stderr.count("GENERATE_FAILED") == 10
        assert result.stderr.count("More errors are in the results") == 1

    def test_text_from_outside_is_not_interpreted(self, kontext, simulator):
        """Escape sequences are replaced, and markup in a message is shown as it is."""
        message = f"{ANSI}[31mred [bold]loud[/bold]\x07 [link=x]:smile:"
        result = kontext("wait", simulator.add_task(**failing(Failure(500, message))))
        assert lines(result)[0]["message"] == message
        for stream in (result.stdout, result.stderr):
            assert ANSI not in stream
            assert "\x07" not in stream
        assert "[bold]loud[/bold]" in result.stderr
        assert ":smile:" in result.stderr


class TestRows:
    """A terminal's lines for people."""

    ID = "fluxkontext_" + "0123456789abcdef" * 2
    URL = f"https://example.com/{ID}.png"

    @pytest.fixture
    def rows(self, monkeypatch):
        """Write rows to a terminal of this width, and return its lines."""

        def rows(width, *lines, prompt=None):
            screen = Terminal()
            monkeypatch.setattr(sys, "stdout", screen)
            monkeypatch.setenv("TERM", "xterm")
            monkeypatch.setenv("NO_COLOR", "1")
            monkeypatch.setenv("COLUMNS", str(width))
            for line in lines:
                write_result(line, prompt=prompt)
            text = re.sub(r"\x1b]8;.*?\x1b\\", "", screen.getvalue())
            return [line.rstrip() for line in text.splitlines()]

        return rows

    def row(self, task_id=ID, **fields):
        names = ("duration", "file", "resultImageUrl", "errorCode", "message")
        line = dict.fromkeys(names) | {"taskId": task_id, "outcome": "success"}
        return line | {"duration": timedelta(seconds=12)} | fields

    def test_columns_are_aligned(self, rows):
        """Short ids of like lengths have their links at the same column."""
        link = {"resultImageUrl": "https://example.com/a.png"}
        assert rows(
            80, self.row("task9", **link), self.row("task10", outcome="failed", **link)
        ) == [
            "success   12 s  task9   https://example.com/a.png",
            "failed    12 s  task10  https://example.com/a.png",
        ]

    def test_what_has_no_room_follows_below(self, rows):
        """A message is broken between words, and a link stays whole."""
        short = {"resultImageUrl": "https://example.com/a.png"}
        assert rows(60, self.row(**short)) == [
            f"success   12 s  {self.ID}",
            "                https://example.com/a.png",
        ]
        message = "The prompt was flagged as violating the content policies."
        failed = {"outcome": "failed", "errorCode": 400, "message": message}
        lines = rows(60, self.row(resultImageUrl=self.URL, **failed))
        assert lines == [
            f"failed    12 s  {self.ID}",
            f"  {self.URL}",
            "                400: The prompt was flagged as violating the",
            "                content policies.",
        ]

    def test_a_prompt_stands_in_place_of_the_id(self, rows):
        """It has one line; the id is beside it, or in the name of the file."""
        file = {"file": f"p/{self.ID}.png"}
        assert rows(80, self.row(**file), prompt="a boat\n at night") == [
            "success   12 s  a boat at night",
            f"                p/{self.ID}.png",
        ]
        assert rows(60, self.row(outcome="submitted"), prompt="a boat " * 9) == [
            "submitted 12 s  a boat a boat a boat a boat a boat a boat a…",
            f"                {self.ID}",
        ]

    def test_a_message_does_not_repeat_the_id_or_the_code(self, rows):
        """An error's own message has both, for where it stands alone."""
        error = ApiError("no such record", code=422, http_status=200, task_id="task9")
        line = outcome_line(ErrorOutcome(task_id="task9", error=error))
        assert rows(80, line) == ["error           task9   code 422 (HTTP 200): no such record"]

    def test_messages_break_between_words(self, monkeypatch):
        """A command to copy stays whole."""
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "20")
        say("Look for each in the provider's log")
        say("To wait again: kontext wait task1", is_copied=True)
        assert screen.getvalue() == (
            "Look for each in the\nprovider's log\nTo wait again: kontext wait task1\n"
        )


class TestKey:
    def test_from_a_file(self, kontext, simulator, tmp_path, monkeypatch):
        """A key file may end in a newline."""
        monkeypatch.delenv("APIKLEY_API_KEY")
        (tmp_path / "key").write_text(f"{KEY}\n")
        task_id = simulator.add_task(**done())
        assert kontext("get", task_id, "--api-key-file", str(tmp_path / "key")).exit_code == 0

    def test_missing(self, kontext, monkeypatch):
        """The message names both sources of a key, and what needs none."""
        monkeypatch.delenv("APIKLEY_API_KEY")
        result = kontext("wait", "task1")
        assert result.exit_code == 2
        assert "kontext demo" in result.stderr
        assert "APIKLEY_API_KEY" in result.stderr
        assert "--api-key-file" in result.stderr

    def test_file_missing(self, kontext, tmp_path):
        """A key file that cannot be read is wrong usage."""
        result = kontext("get", "task1", "--api-key-file", str(tmp_path / "none"))
        assert result.exit_code == 2
        assert f"cannot read {tmp_path / 'none'}: No such file" in result.stderr

    def test_unusable(self, kontext, monkeypatch):
        """A key that cannot be a header is refused without being shown."""
        monkeypatch.setenv("APIKLEY_API_KEY", f"{KEY} two words")
        result = kontext("get", "task1")
        assert result.exit_code == 2
        assert KEY not in result.output

    def test_never_shown(self, kontext, simulator):
        """No output holds the key, however a task ends."""
        looping = simulator.add_task(script=["code_401", "html_502", "data_text"], duration=0.0)
        for task_id in (looping, simulator.add_task(**done()), "unknown"):
            assert KEY not in kontext("wait", task_id, "--timeout", "0").output


class TestExitCodes:
    @pytest.mark.parametrize(
        ("error", "outcome", "code"),
        [
            (None, "success", 0),
            (GenerationFailedError(task_id="t", status=TaskStatus.GENERATE_FAILED), "failed", 1),
            (WaitTimeoutError(task_id="t", elapsed=1.0, polls=1), "timeout", 3),
            (ApiError("no", code=402), "error", 4),
            (TransportError("reset"), "error", 4),
            (KontextError("?"), "error", 4),
        ],
    )
    def test_each_outcome_has_its_own(self, error, outcome, code):
        """The outcome and its exit code follow from the error."""
        assert classify(error) == outcome
        assert exit_code([outcome]) == code

    @pytest.mark.parametrize(
        ("outcomes", "code"),
        [
            ([], 0),
            (["success", "success"], 0),
            (["success", "failed"], 1),
            (["failed", "timeout", "success"], 3),
            (["failed", "timeout", "error"], 4),
            (["unfinished", "notSaved", "done"], 4),
            (["waiting", "done"], 3),
        ],
    )
    def test_the_highest_counts(self, outcomes, code):
        """API and network count before deadlines, and deadlines before failures."""
        assert exit_code(outcomes) == code

    @pytest.mark.parametrize(
        ("error", "code"), [(ConfigurationError("bad"), 2), (TransportError("reset"), 4)]
    )
    def test_an_error_of_the_whole_command(self, error, code, capsys):
        """The message is printed; wrong usage has an exit code of its own."""

        async def broken():
            raise error

        with pytest.raises(typer.Exit) as caught:
            run(broken())
        assert caught.value.exit_code == code
        assert capsys.readouterr().err == f"kontext: {error}\n"

    def test_an_error_without_a_record_has_a_line(self):
        """Unknown values are null."""
        line = outcome_line(ErrorOutcome(task_id="t", error=TransportError("reset", task_id="t")))
        assert (line["error"], line["status"], line["errorCode"]) == ("TransportError", None, None)
        assert "reset" in line["message"]


class TestRunning:
    def test_ctrl_c_calls_on_interrupt(self):
        """An interrupt ends with 130, after the command's own message."""
        calls = []

        async def interrupted():
            raise KeyboardInterrupt

        with pytest.raises(typer.Exit) as caught:
            run(interrupted(), on_interrupt=lambda: calls.append("resume"))
        assert caught.value.exit_code == 130
        assert calls == ["resume"]

    def test_a_broken_pipe_ends_quietly(self, monkeypatch, tmp_path):
        """There is no message, and nothing more is written."""
        with (tmp_path / "stdout").open("w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)

            async def broken():
                raise BrokenPipeError

            with pytest.raises(typer.Exit) as caught:
                run(broken())
            print("lost")  # noqa: T201
        assert caught.value.exit_code == 141
        assert (tmp_path / "stdout").read_text() == ""

    def test_stdout_can_be_silenced_twice(self, monkeypatch, tmp_path):
        """The descriptor stays open."""
        with (tmp_path / "stdout").open("w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            silence(stdout)
            silence(stdout)


class TestAdvice:
    """Messages name the command's options."""

    @pytest.mark.parametrize("command", ["get", "wait", "credits"])
    def test_plain_http_names_the_option(self, command, monkeypatch):
        """A user of the command has no argument to pass."""
        monkeypatch.setenv("APIKLEY_API_KEY", KEY)
        ids = [] if command == "credits" else ["task1"]
        result = CliRunner().invoke(app.app, [command, *ids, "--base-url", "http://example.com"])
        assert result.exit_code == 2
        assert "use https, or add --allow-http" in result.stderr
        assert "allow_http" not in result.stderr

    @pytest.mark.parametrize(
        ("proxy", "is_named"),
        [("http://proxy.example:3128", True), ("http://user:secret@proxy.example:3128", False)],
    )
    def test_the_hint_after_ctrl_c_keeps_the_options(self, proxy, is_named, monkeypatch, tmp_path):
        """All that reach the API are named, but not a proxy's password."""
        (tmp_path / "key").write_text(KEY)
        (tmp_path / "ids").write_text("task1\n")

        def interrupted(main, on_interrupt):
            main.close()
            on_interrupt()
            raise typer.Exit(130)

        monkeypatch.setattr(app, "run", interrupted)
        reached = f"--base-url http://example.com --allow-http --api-key-file {tmp_path}/key "
        through = f"--proxy {proxy} "
        options = f"{reached}{through}--no-memory".split()
        into = f"--into {tmp_path}/out"
        saving = f"batch --from {tmp_path}/ids --allow-private --report {into}".split()
        hint = reached + (through if is_named else "") + "--no-memory "
        result = CliRunner().invoke(app.app, ["wait", "task1", *options])
        assert f"To wait again: kontext wait {hint}task1\n" in result.stderr
        result = CliRunner().invoke(app.app, [*saving, *options])
        assert (
            f"To continue: kontext batch {hint}--allow-private --report {into}\n" in result.stderr
        )
        assert "secret" not in result.stderr


class TestWrongUsage:
    """Nothing is sent, and the message has the words of every other."""

    @pytest.mark.parametrize(
        ("words", "said", "command"),
        [
            (
                "wait task1 --rate-limit x",
                "invalid value for '--rate-limit': give REQUESTS/SECONDS, such as 20/10",
                "wait",
            ),
            ("get", "missing argument 'ID'", "get"),
            ("batch", "missing option '--into'", "batch"),
            ("batch --into", "option '--into' requires an argument", "batch"),
            ("status --nope folder", "no such option: --nope", "status"),
            ("--nope", "no such option: --nope", ""),
            ("wait --form a", "no such option: --form. Did you mean --from?", "wait"),
            ("get a b", "too many arguments: b", "get"),
            ("wiat", "no such command 'wiat'. Did you mean 'wait'?", ""),
            ("fleet nope", "no such command 'nope'", "fleet"),
        ],
    )
    def test_is_a_message_and_where_to_look(self, words, said, command):
        """The second line has the command whose help page tells more."""
        result = CliRunner().invoke(app.app, words.split(), prog_name="kontext")
        where = " ".join(f"kontext {command} -h".split())
        assert result.exit_code == 2
        assert result.stderr == f"kontext: {said}\nFor help: {where}\n"

    @pytest.mark.parametrize(
        ("words", "now", "before"),
        [
            ("wait task1 --timeout x", "--timeout must be a valid number", "'x' is not a valid"),
            ("simulate --port 70000", "--port must be less than or equal to 65535", "70000 is not"),
        ],
    )
    def test_a_value_that_cannot_be_used_is_named_with_its_option(self, words, now, before):
        """In our words, or in those of a Typer older than 0.29."""
        result = CliRunner().invoke(app.app, words.split(), prog_name="kontext")
        option = next(word for word in words.split() if word.startswith("--"))
        said, _ = result.stderr.splitlines()
        assert result.exit_code == 2
        assert said == f"kontext: {now}" or said.startswith(
            f"kontext: invalid value for '{option}': {before}"
        )

    @pytest.mark.parametrize("words", [[], ["fleet"]])
    def test_without_words_a_group_shows_its_help_page(self, words):
        """It is no message."""
        result = CliRunner().invoke(app.app, words, prog_name="kontext")
        assert result.exit_code == 2
        assert result.output.startswith("Usage: kontext")


class TestResuming:
    def test_few_ids_are_all_named(self, capsys):
        """The command that resumes can be copied."""
        tally = Tally(["task 1", "task2"])
        for task_id in tally.unfinished:
            tally.count_poll(polled(task_id, GENERATING))
        waiting.say_how_to_resume(tally, None, "--base-url http://127.0.0.1:1 ")
        said = capsys.readouterr().err
        assert "Still generating: task 1, task2\nThey are paid for.\n" in said
        assert "kontext wait --base-url http://127.0.0.1:1 'task 1' task2" in said

    def test_nothing_is_said_of_payment_for_ids_that_nobody_has_seen(self, capsys):
        """While the API is down, an id may be anything."""
        tally = Tally(["task1", "task2"])
        tally.count_poll(polled("task1", None, TransportError("refused")))
        waiting.say_how_to_resume(tally, None, "")
        said = capsys.readouterr().err
        assert said.startswith("2 tasks have not been seen yet.\n")
        assert "paid" not in said

    def test_an_id_is_not_taken_for_an_option(self, capsys):
        """Two dashes come before ids of which one begins with a dash."""
        waiting.say_how_to_resume(Tally(["-x1", "task2"]), None, "")
        assert "kontext wait -- -x1 task2" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("source", "file"), [(None, "FILE"), ("-", "FILE"), ("my ids.txt", "'my ids.txt'")]
    )
    def test_many_ids_are_named_in_part(self, capsys, source, file):
        """The first twenty are named, and the command reads all from a file."""
        tally = Tally(f"task{n}" for n in range(1000))
        for task_id in tally.unfinished:
            tally.count_poll(polled(task_id, GENERATING))
        waiting.say_how_to_resume(tally, source, "")
        said = capsys.readouterr().err
        assert "task19 and 980 more" in said
        assert f"kontext wait --from {file}" in said

    def test_nothing_is_left_to_resume(self, capsys):
        """An interrupt after the last outcome prints nothing."""
        waiting.say_how_to_resume(Tally([]), None, "")
        assert capsys.readouterr().err == ""


class TestProgress:
    @pytest.fixture
    async def near(self):
        """Give a simulator and a client on the test's own loop."""
        async with (
            Simulator() as simulator,
            KontextClient("any", base_url=simulator.base_url) as client,
        ):
            yield simulator, client

    @pytest.mark.virtual_time
    async def test_plain_lines_without_a_terminal(self, near, capsys):
        """A line comes every ten seconds, without cursor movements."""
        simulator, client = near
        ids = [simulator.add_task(duration=d, outcome="success") for d in (5.0, 15.0, 25.0)]
        outcomes = []
        tally = Tally(ids)
        code = await waiting.wait_for_all(client, tally, outcomes.append, timeout=60.0)
        assert code == 0
        said = capsys.readouterr().err
        assert said.startswith("Waiting for 3 tasks\n")
        assert "1 of 3, 1 done, 0 failed, 0.1/s, 2 in flight\n" in said
        assert said.splitlines()[-1].startswith("3 done, 0 failed in ")
        assert ANSI not in said
        assert len(tally.lags) == 3

    @pytest.mark.virtual_time
    async def test_a_live_bar_on_a_terminal(self, near, monkeypatch):
        """A bar is redrawn, hidden while results are written, and removed at the end."""
        simulator, client = near
        monkeypatch.setenv("TERM", "xterm-256color")
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(sys, "stdout", screen)
        task_id = simulator.add_task(duration=20.0, outcome="success")
        tally = Tally([task_id])
        await waiting.wait_for_all(
            client, tally, lambda o: screen.write(f"<{o.task_id}>\n"), timeout=60.0
        )
        said = screen.getvalue()
        assert "Waiting for 1 task\n" in said
        first_frame = said.partition("Waiting for 1 task\n")[2].partition("\n")[0]
        assert "0 of 1, 0 done, 0 failed, 0 in flight" in first_frame.partition("\r")[0]
        assert "0 of 1, 0 done, 0 failed, 1 in flight" in said
        assert f"\x1b[2K<{task_id}>\n" in said

    async def test_wrong_usage_is_said_without_the_bar(self, near, monkeypatch):
        """The message does not continue the bar's line."""
        _, client = near
        screen = Terminal()
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setattr(sys, "stderr", screen)
        display = progress.Display(Tally(), client)
        with display.shown(), pytest.raises(typer.Exit):
            display.fail("no task ids on standard input")
        before, _, after = screen.getvalue().partition("kontext: no task ids on standard input\n")
        assert before.endswith("\x1b[2K")
        assert "in flight" not in after

    @pytest.mark.virtual_time
    async def test_a_terminal_with_a_log_has_no_bar(self, near, monkeypatch):
        """The bar would cut through the log's lines."""
        simulator, client = near
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(progress, "is_logging_polls", lambda: True)
        tally = Tally([simulator.add_task(duration=20.0, outcome="success")])
        await waiting.wait_for_all(client, tally, lambda o: None, timeout=60.0)
        assert "0 of 1, 0 done, 0 failed, 1 in flight\n" in screen.getvalue()
        assert ANSI not in screen.getvalue()

    @pytest.mark.virtual_time
    async def test_a_terminal_with_the_results_has_an_error_once(self, near, monkeypatch):
        """The result says it, so that the message need not."""
        simulator, client = near
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(sys, "stdout", screen)
        tally = Tally([simulator.add_task(**failing()) for _ in range(3)])
        await waiting.wait_for_all(
            client, tally, lambda o: write_result(outcome_line(o)), timeout=60.0
        )
        assert screen.getvalue().count("It was flagged.") == 3
        assert "more with" not in screen.getvalue()

    @pytest.mark.virtual_time
    @pytest.mark.parametrize(
        ("height", "kinds", "is_counted"), [("27", 11, True), ("28", 11, False), ("7", 1, True)]
    )
    async def test_errors_that_have_scrolled_off_are_counted_at_the_end(
        self, near, monkeypatch, height, kinds, is_counted
    ):
        """Each kind with its message, where a terminal is not high enough for the results."""
        simulator, client = near
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setenv("LINES", height)
        monkeypatch.setenv("COLUMNS", "80")
        failures = [Failure(500 + n, f"no {n}") for n in (*range(kinds), 0, 0)]
        tally = Tally([simulator.add_task(**failing(failure)) for failure in failures])
        tally.add([simulator.add_task(**done())])
        await waiting.wait_for_all(client, tally, lambda o: None, timeout=60.0)
        said = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", screen.getvalue()).splitlines()
        assert ("3 with GenerationFailedError 500: no 0" in said) is is_counted
        assert ("1 with other errors" in said) is (is_counted and kinds > 10)
        shown = sum(" with GenerationFailedError " in line for line in said)
        assert shown == min(kinds, 10) * is_counted

    @pytest.mark.virtual_time
    async def test_a_live_bar_beside_a_pipe(self, near, monkeypatch, capsys):
        """The bar stays while results go to a pipe."""
        simulator, client = near
        screen = Terminal()
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setattr(sys, "stderr", screen)
        tally = Tally([simulator.add_task(**done())])
        await waiting.wait_for_all(client, tally, lambda o: None, timeout=60.0)
        assert "1 done, 0 failed in" in screen.getvalue()

    @pytest.mark.virtual_time
    async def test_a_pause_is_shown(self, near, capsys, monkeypatch):
        """The line has the seconds until the service's pause is over."""
        simulator, client = near
        monkeypatch.setattr(progress, "_LINE_INTERVAL", 1.0)
        limited = ("rate_limited_until", "success")
        tally = Tally([simulator.add_task(script=limited)])
        await waiting.wait_for_all(client, tally, lambda o: None, timeout=60.0)
        assert "paused for " in capsys.readouterr().err


class TestThumbnails:
    """Two thousand thumbnails take a while."""

    def test_a_terminal_has_them_counted_live(self, monkeypatch):
        """The last number is on the screen before it is removed."""
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setenv("TERM", "xterm")
        with progress.thumbnails_shown() as show:
            show(1200, 2000)
        assert "thumbnails 1,200 of 2,000" in screen.getvalue()

    def test_without_a_terminal_a_line_comes_at_times(self, monkeypatch, capsys):
        """Nothing is said before the first interval is over."""
        with progress.thumbnails_shown() as show:
            show(1, 2000)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress, "_LINE_INTERVAL", 0.0)
        with progress.thumbnails_shown() as show:
            show(1200, 2000)
        assert capsys.readouterr().err == "thumbnails 1,200 of 2,000\n"


class TestLocal:
    async def test_simulate_serves_until_sigterm(self, capsys):
        """The address is a line for programs; people get a command to try."""
        serving = asyncio.create_task(local.serve(Simulator()))
        while not (said := capsys.readouterr()).out:  # noqa: ASYNC110 - output has no event
            await asyncio.sleep(0.01)
        address = json.loads(said.out)["baseUrl"]
        assert f"--base-url {address}" in said.err
        signal.raise_signal(signal.SIGTERM)
        assert await serving is Exit.DONE

    @pytest.fixture
    def built(self, monkeypatch):
        """The options that `simulate` gives its simulator, which does not serve."""
        built = {}

        async def serve(simulator):
            return Exit.DONE

        monkeypatch.setattr(local, "Simulator", lambda **options: built.update(options))
        monkeypatch.setattr(local, "serve", serve)
        return built

    def test_simulate_takes_its_options(self, built):
        """The options reach the simulator."""
        options = "--port 0 --duration 3 --spread 0 --failure-rate 0.5 --image-bytes 9 --seed 7"
        result = CliRunner().invoke(app.app, ["simulate", *options.split(), "--no-auto-create"])
        assert result.exit_code == 0
        assert (built["failure_rate"], built["seed"], built["auto_create"]) == (0.5, 7, False)
        assert (built["image_bytes"], built["rate_limit"]) == (9, None)

    @pytest.mark.parametrize(
        ("text", "limit"),
        [
            ("20/10", SlidingWindow(20, 10.0)),
            ("20", SlidingWindow(20, 1.0)),
            ("sliding:5/0.5", SlidingWindow(5, 0.5)),
            ("fixed:20/10", FixedWindow(20, 10.0)),
            ("bucket:20/10", TokenBucket(20, 2.0)),
        ],
    )
    def test_a_rate_limit_is_one_of_three_kinds(self, built, text, limit):
        """Requests and seconds stand on either side of a slash, the kind before a colon."""
        assert CliRunner().invoke(app.app, ["simulate", "--rate-limit", text]).exit_code == 0
        assert repr(built["rate_limit"]) == repr(limit)

    @pytest.mark.parametrize(
        "text", ["", "often", "0/10", "5/0", "5/x", "fixed:", "bucket:5/0", "odd:5/1"]
    )
    def test_an_invalid_rate_limit_is_wrong_usage(self, text):
        """The message shows the three kinds."""
        result = CliRunner().invoke(app.app, ["simulate", "--rate-limit", text])
        assert result.exit_code == 2
        assert "such as 20/10, fixed:20/10 or bucket:20/10" in " ".join(result.stderr.split())

    def test_a_port_in_use_is_wrong_usage(self, simulator):
        """The message names the port and what to do."""
        port = simulator.base_url.rpartition(":")[2]
        result = CliRunner().invoke(app.app, ["simulate", "--port", port])
        assert result.exit_code == 2
        assert f"port {port}: it is in use. Choose another --port" in result.stderr

    def test_another_failure_of_the_system_is_not_hidden(self, monkeypatch):
        """Only a port that cannot be used is wrong usage."""

        async def serve(simulator):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(local, "serve", serve)
        result = CliRunner().invoke(app.app, ["simulate"])
        assert isinstance(result.exception, OSError)


class TestMain:
    @pytest.mark.parametrize(
        "run_main", [main, lambda: runpy.run_module("kontext_async", run_name="__main__")]
    )
    def test_version(self, run_main, monkeypatch, capsys):
        """The installed version, alone, from `kontext` and from `python -m kontext_async`."""
        monkeypatch.setattr(sys, "argv", ["kontext", "--version"])
        with pytest.raises(SystemExit) as caught:
            run_main()
        assert caught.value.code == 0
        assert capsys.readouterr().out.strip()[0].isdigit()

    @pytest.mark.parametrize("missing", ["platformdirs", "typer"])
    def test_without_its_extra_it_says_what_to_install(self, missing, monkeypatch):
        """A plain installation has the command without its libraries."""
        for name in [name for name in sys.modules if name.startswith("kontext_async.cli.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(SystemExit, match=r"pip install 'kontext-async\[cli\]'"):
            main()

    def test_another_missing_module_is_not_taken_for_the_extra(self, monkeypatch):
        """The error of a broken installation names the module."""
        monkeypatch.setitem(sys.modules, "kontext_async.cli.app", None)
        with pytest.raises(ModuleNotFoundError, match=r"cli\.app"):
            main()

    def test_no_option_takes_the_key_itself(self):
        """Process lists and shell histories would show it."""
        for command in ("get", "wait"):
            text = CliRunner().invoke(app.app, [command, "--help"]).output
            assert "--api-key-file" in text
            assert "--api-key " not in text


UNCLEAR = re.compile(
    r"""
    ^(what|how|whether|why|where|when|before|after|of)\b  # not a noun phrase or a sentence
    | \b(looks?|mends?|told|kept|gravest|fates?|dear|else|whither|but\ for|so\ many|of\ late)\b
    | \b(that|which|who)\ (of|to|in|for|from)\b  # a word is missing
    """,
    re.IGNORECASE | re.VERBOSE,
)


def problems_of(text):
    """Return the rules that a help text breaks."""
    rules = {
        "is empty": not text,
        "does not end with a full stop": not text.endswith(".") or text.endswith(".."),
        "does not begin with a capital or a digit": not re.match(r"[A-Z0-9]", text),
        "has fewer than two words": len(text.split()) < 2,
        "is too long": len(text) > 300,
        "has unbalanced brackets": any(
            text.count(a) != text.count(b) for a, b in ("()", "[]", "{}")
        ),
        "has unbalanced quotes": any(text.count(quote) % 2 for quote in '`"'),
        "is unclear": UNCLEAR.search(text),
    }
    return [problem for problem, found in rules.items() if found]


def test_a_hidden_option_is_not_in_help():
    """It works all the same."""
    hiding = typer.Typer(rich_markup_mode=None, add_completion=False)

    def run(secret: int = typer.Option(0, hidden=True)) -> None:
        typer.echo(secret)

    hiding.command(cls=Command)(run)
    assert "secret" not in CliRunner().invoke(hiding, ["--help"]).output
    assert CliRunner().invoke(hiding, ["--secret", "3"]).output == "3\n"


class TestHelp:
    GROUP = typer.main.get_command(app.app)

    @pytest.mark.parametrize("name", [None, *GROUP.commands])
    def test_every_command_and_option_has_a_clear_help_text(self, name):
        """Each text is a whole sentence or noun phrase, and `--help` shows all of it."""
        command = self.GROUP.commands[name] if name else self.GROUP
        page = CliRunner().invoke(app.app, [name, "--help"] if name else ["--help"]).output
        texts = {f"<{name}>": command.help} | {p.name: p.help for p in command.params}
        assert "..." not in page.replace("]...", "")
        assert not re.search("<[a-z]|{[A-Z]", page), "Typer's own words for values"
        assert all(len(line) <= 80 for line in page.splitlines())
        for parameter, text in texts.items():
            for paragraph in (text or "").split("\n\n"):
                assert not problems_of(paragraph), f"{parameter}: {paragraph}"
            assert "".join(text.split()) in "".join(page.split())

    @pytest.mark.parametrize("words", [[], ["wait"], ["fleet"], ["fleet", "status"]])
    def test_the_word_help_shows_the_same_page(self, words):
        """Before the name of a command, as the option does behind it."""
        pages = [
            CliRunner().invoke(app.app, line, prog_name="kontext").stdout
            for line in (["help", *words], [*words, "--help"])
        ]
        assert pages[0] == pages[1] != ""

    @pytest.mark.parametrize(
        "command",
        [*GROUP.commands.values(), *GROUP.commands["fleet"].commands.values()],
        ids=lambda command: command.name,
    )
    def test_examples_can_be_run(self, command):
        """Each example of a help page has arguments and options that the command takes."""
        for example in (command.epilog or "").splitlines():
            _, _, words = example.partition(f" {command.name} ")
            command.make_context(command.name, shlex.split(words.partition(" > ")[0]))

    def test_of_a_default_only_the_value_is_shown(self):
        """Limits of numbers go without saying, and whole seconds are whole."""
        page = CliRunner().invoke(app.app, ["simulate", "--help"]).output
        assert "[default: 12]" in page
        assert "[default: 0.3]" in page
        assert "x>" not in page
        assert "<=x" not in page

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "Seconds.",
            "Seconds to wait for each",
            "seconds to wait.",
            "Seconds to wait for...",
            "Seconds to wait (0 polls once.",
            "Seconds as `kontext wait takes them.",
            "Fraction that of 1.",
            "Tasks that of 1.",
            "What half the tasks take.",
            "Before each answer.",
            "Seconds from the first look.",
            "Seconds to wait, " * 20 + "at most.",
        ],
    )
    def test_an_unclear_help_text_is_found(self, text):
        """Empty, truncated and broken texts break a rule."""
        assert problems_of(text)
