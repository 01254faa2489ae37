"""The commands about a folder of results: files, output, messages and exit codes."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from pathlib import Path

import pytest
from background import serving
from command import Terminal
from typer.testing import CliRunner
from yarl import URL

from kontext_async import ErrorOutcome, TransportError
from kontext_async.cli import app, batch, local
from kontext_async.results import Ledger
from kontext_async.results.ledger.store import open_writer
from kontext_async.simulator import Failure

KEY = "marker-key-19ab"
LEDGER = "kontext.sqlite3"


@pytest.fixture(scope="module")
def simulator():
    with serving(api_key=KEY, log_limit=None) as running:
        yield running


@pytest.fixture
def kontext(simulator, monkeypatch, tmp_path):
    """Run the command in this process, in a folder of its own, against the simulator."""
    monkeypatch.setenv("APIKLEY_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)

    def invoke(command, *args, input=None):  # noqa: A002 - the runner's name for it
        if command in {"batch", "wait"}:
            args = (*args, "--base-url", simulator.base_url)
        return CliRunner().invoke(app.app, [command, *args], input=input, prog_name="kontext")

    return invoke


def lines(result):
    return {line["taskId"]: line for line in map(json.loads, result.stdout.splitlines())}


def add(simulator, count=1, **task):
    """Add finished tasks; return their ids as a list and as text."""
    known = {"duration": 0.0, "outcome": "success", **task}
    ids = [simulator.add_task(**known) for _ in range(count)]
    return ids, "\n".join(ids)


def requested(simulator, task_id):
    """Return the requests about a task: ``record-info``, or the name of its image."""
    return [r.path.rpartition("/")[2] for r in simulator.requests if r.task_id == task_id]


class TestBatch:
    def test_it_saves_the_images_and_records_the_rest(self, kontext, simulator):
        """Each success has a file; each task has a line and an entry in the ledger."""
        good, text = add(simulator, 3)
        (bad,), more = add(simulator, outcome=Failure(400, "It was flagged."))
        result = kontext("batch", "--from", "-", "--into", "out", input=f"{text}\n{more}\n")
        assert result.exit_code == 1
        printed = lines(result)
        assert set(printed) == {*good, bad}
        for task_id in good:
            assert printed[task_id]["outcome"] == "success"
            assert Path(printed[task_id]["file"]).read_bytes().startswith(b"\x89PNG")
        assert (printed[bad]["errorCode"], printed[bad]["file"]) == (400, None)
        states = {entry.task_id: entry.state for entry in Ledger.read(f"out/{LEDGER}")}
        assert states == {**dict.fromkeys(good, "done"), bad: "failed"}
        assert "3 done, 1 failed, 3 saved in " in result.stderr
        assert "It was flagged." in result.stderr

    def test_again_it_requests_only_what_is_missing(self, kontext, simulator):
        """The same lines come again; only the image that is damaged is downloaded again."""
        (saved, damaged), text = add(simulator, 2)
        first = kontext("batch", "--from", "-", "--into", "out", input=text)
        Path(lines(first)[damaged]["file"]).write_bytes(b"\x89PNG")
        again = kontext("batch", "--into", "out")
        assert again.exit_code == 0
        assert lines(again) == lines(first)
        assert requested(simulator, saved) == ["record-info", f"{saved}.png"]
        assert requested(simulator, damaged) == ["record-info", *[f"{damaged}.png"] * 2]

    def test_a_task_that_timed_out_is_polled_again(self, kontext, simulator):
        """The exit code is 3 until the task has ended."""
        (slow,), text = add(simulator, script=["generating", "success"])
        result = kontext("batch", "--from", "-", "--into", "out", "--timeout", "0", input=text)
        assert result.exit_code == 3
        result = kontext("batch", "--into", "out", "--timeout", "inf")
        assert result.exit_code == 0
        assert lines(result)[slow]["outcome"] == "success"

    @pytest.mark.parametrize("command", ["batch", "wait"])
    def test_the_batch_timeout(self, kontext, simulator, command):
        """Tasks that are unfinished when it passes have timed out, and the exit code is 3."""
        running = simulator.add_task(duration=math.inf)
        into = ("--into", "out") if command == "batch" else ()
        result = kontext(command, "--from", "-", *into, "--batch-timeout", "0.2", input=running)
        assert result.exit_code == 3
        assert lines(result)[running]["outcome"] == "timeout"

    def test_failed_generations_are_polled_again_only_on_demand(self, kontext, simulator):
        """A failure is final without --retry-failed."""
        (bad,), text = add(simulator, outcome="failure")
        for options in ((), (), ("--retry-failed",)):
            result = kontext("batch", "--from", "-", "--into", "out", *options, input=text)
            assert result.exit_code == 1
            assert lines(result)[bad]["outcome"] == "failed"
        assert requested(simulator, bad) == ["record-info"] * 2

    def test_an_image_that_cannot_be_saved_is_an_error_of_its_own(self, kontext, simulator):
        """The task is still a success, its line has the error, and the exit code is 4."""
        (broken,), text = add(simulator, image_script=["html_as_image"] * 9)
        (good,), more = add(simulator)
        result = kontext("batch", "--from", "-", "--into", "out", input=f"{text}\n{more}")
        assert result.exit_code == 4
        line = lines(result)[broken]
        assert (line["outcome"], line["error"], line["file"]) == ("success", "DownloadError", None)
        assert "is not an image" in line["message"]
        assert "2 done, 0 failed, 1 saved, 1 not saved" in result.stderr
        assert lines(result)[good]["file"]

    def test_it_ends_with_a_report(self, kontext, simulator):
        """--report prints the path of a page with the folder's images."""
        (task_id,), text = add(simulator)
        result = kontext("batch", "--from", "-", "--into", "out", "--report", input=text)
        assert result.exit_code == 0
        page = Path(result.stderr.rpartition("Report: ")[2].strip())
        assert page == Path("out/report.html").resolve()
        assert f"{task_id}.png" in page.read_text("utf-8")

    def test_a_bad_line_is_reported_before_any_request(self, kontext, simulator):
        """The message has the line's number, no folder is made, and the exit code is 2."""
        before = len(simulator.requests)
        Path("ids").write_text("task-1\n{}\n")
        result = kontext("batch", "--from", "ids", "--into", "out")
        assert result.exit_code == 2
        assert "ids, line 2: a JSON object without taskId" in result.stderr
        assert len(simulator.requests) == before
        assert not Path("out").exists()

    def test_without_ids_and_without_a_ledger_there_is_nothing_to_do(self, kontext):
        """The message names the option for ids, and the folder."""
        result = kontext("batch", "--into", "out")
        assert result.exit_code == 2
        assert "with --from; out holds no batch to continue" in result.stderr

    def test_a_folder_that_cannot_be_made_is_wrong_usage(self, kontext, tmp_path):
        """There is a file in the folder's place."""
        (tmp_path / "out").write_text("")
        result = kontext("batch", "--from", "-", "--into", "out", input="task-1")
        assert result.exit_code == 2
        assert "cannot use the folder out: it is a file" in result.stderr

    def test_a_folder_that_the_system_refuses_is_wrong_usage(self, kontext, tmp_path):
        """The message has the system's reason."""
        (tmp_path / "file").write_text("")
        result = kontext("batch", "--from", "-", "--into", "file/out", input="task-1")
        assert result.exit_code == 2
        assert "cannot use the folder file/out: Not a directory" in result.stderr

    @pytest.mark.parametrize("source", [(), ("--from", "-")])
    def test_a_file_that_is_not_a_ledger_is_left_as_it_is(self, kontext, tmp_path, source):
        """It may be a user's data."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / LEDGER).write_bytes(b"precious" * 100)
        result = kontext("batch", *source, "--into", "out", input="task-1")
        assert result.exit_code == 4
        assert "it is not a ledger; it has been left as it is" in result.stderr
        assert (tmp_path / "out" / LEDGER).read_bytes() == b"precious" * 100

    def test_one_batch_at_a_time(self, kontext, simulator, tmp_path):
        """A second one in the same folder ends with an error, and sends nothing."""
        (task_id,), text = add(simulator)
        (tmp_path / "out").mkdir()
        with contextlib.ExitStack() as writers:
            for connection in open_writer(tmp_path / "out" / LEDGER):
                writers.callback(connection.close)
            result = kontext("batch", "--from", "-", "--into", "out", input=text)
        assert result.exit_code == 4
        assert "it is open in another batch" in result.stderr
        assert requested(simulator, task_id) == []

    def test_a_report_without_its_extra_is_wrong_usage(self, kontext, simulator, monkeypatch):
        """The message names the extra, and nothing is sent."""
        monkeypatch.setattr(batch, "can_report", lambda: False)
        (task_id,), text = add(simulator)
        result = kontext("batch", "--from", "-", "--into", "out", "--report", input=text)
        assert result.exit_code == 2
        assert "pip install 'kontext-async[report]'" in result.stderr
        assert requested(simulator, task_id) == []

    def test_the_key_is_nowhere(self, kontext, simulator):
        """No output and no file of the folder holds it, however a task ends."""
        _, text = add(simulator, 2)
        _, more = add(simulator, outcome="failure")
        _, most = add(simulator, image_script=["redirect_host"] * 9)
        texts = f"{text}\n{more}\n{most}"
        result = kontext("batch", "--from", "-", "--into", "out", "--report", input=texts)
        assert KEY not in result.output
        for path in Path("out").rglob("*"):
            assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


class TestFolder:
    def test_status_counts(self, kontext, simulator):
        """It prints a line and a table, and has the exit code of the batch."""
        _, text = add(simulator, 2)
        _, more = add(simulator, outcome="failure")
        kontext("batch", "--from", "-", "--into", "out", input=f"{text}\n{more}")
        result = kontext("status", "out")
        assert result.exit_code == 1
        assert json.loads(result.stdout) == {
            "waiting": 0,
            "done": 2,
            "failed": 1,
            "unfinished": 0,
            "error": 0,
            "saved": 2,
            "notSaved": 0,
        }
        assert "images saved" in result.stderr
        assert "Count" in result.stderr

    def test_status_counts_images_that_are_missing(self, kontext, simulator):
        """A success without its file has exit code 4."""
        _, text = add(simulator, image_script=["html_as_image"] * 9)
        kontext("batch", "--from", "-", "--into", "out", input=text)
        result = kontext("status", "out")
        assert result.exit_code == 4
        assert json.loads(result.stdout)["notSaved"] == 1

    def test_status_on_a_terminal_is_the_table(self, kontext, simulator, monkeypatch, capsys):
        """On a terminal there is no JSON line, and standard error is not needed."""
        _, text = add(simulator)
        kontext("batch", "--from", "-", "--into", "out", input=text)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert batch.show_status(Path("out")) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        assert "done" in printed.out
        assert "{" not in printed.out

    @pytest.mark.parametrize("command", ["status", "report"])
    def test_a_folder_without_a_ledger_is_wrong_usage(self, kontext, tmp_path, command):
        """The message says what is missing."""
        result = kontext(command, str(tmp_path))
        assert result.exit_code == 2
        assert f"there is no {LEDGER} in it" in result.stderr

    @pytest.mark.parametrize("command", ["status", "report"])
    def test_a_damaged_ledger_is_an_error(self, kontext, tmp_path, command):
        """The message says that the file is not a ledger."""
        (tmp_path / LEDGER).write_bytes(b"x" * 5000)
        result = kontext(command, str(tmp_path))
        assert result.exit_code == 4
        assert "not a ledger" in result.stderr

    def test_a_report_can_be_made_at_any_time(self, kontext, simulator):
        """The command prints its path."""
        _, text = add(simulator)
        kontext("batch", "--from", "-", "--into", "out", input=text)
        result = kontext("report", "out")
        assert result.exit_code == 0
        assert result.stderr.strip().endswith("report.html")

    def test_a_report_that_cannot_be_written_is_an_error(self, kontext, simulator, tmp_path):
        """There is a folder in the page's place."""
        _, text = add(simulator)
        kontext("batch", "--from", "-", "--into", "out", input=text)
        (tmp_path / "out" / "report.html").mkdir()
        result = kontext("report", "out")
        assert result.exit_code == 4
        assert "cannot write the report into out: " in result.stderr


class TestDemo:
    @pytest.fixture(autouse=True)
    def _short_tasks(self, monkeypatch, tmp_path):
        tasks = [
            ("a lighthouse", 0.2, None),
            ("a face", 0.0, Failure(400, "It was flagged.")),
            (local._LOST, 0.2, None),
        ]
        monkeypatch.setattr(local, "_TASKS", tasks)
        monkeypatch.setattr(app.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
        monkeypatch.delenv("APIKLEY_API_KEY", raising=False)

    def test_it_ends_with_a_report(self, tmp_path, cache_folder):
        """It prints a table and JSON lines, saves the images, and writes a page."""
        result = CliRunner().invoke(app.app, ["demo"])
        assert result.exit_code == 0
        assert [line["outcome"] for line in lines(result).values()].count("success") == 2
        assert "2 done, 1 failed, 2 saved" in result.stderr
        assert "400: It was flagged." in result.stderr
        assert "its callback named the task" in result.stderr
        assert "3 prompts, 3 tasks paid for" in result.stderr
        assert "/images/" not in result.stderr  # the simulator and its addresses have ended
        saved = [Path(line["file"]).name for line in lines(result).values() if line["file"]]
        assert all(name in result.stderr for name in saved)
        page = tmp_path.resolve() / "demo" / "report.html"
        assert result.stderr.strip().endswith(str(page))
        assert page.exists()
        assert not cache_folder.exists()  # how long the demo's tasks take teaches nothing

    def test_without_the_extra_it_names_the_folder(self, monkeypatch, tmp_path):
        """The message says what a report needs."""
        monkeypatch.setattr(local, "can_report", lambda: False)
        result = CliRunner().invoke(app.app, ["demo"])
        assert result.exit_code == 0
        assert f"Images: {tmp_path / 'demo'}" in result.stderr
        assert "pip install 'kontext-async[images,report]'" in result.stderr

    async def test_on_a_terminal_it_is_a_table_with_links(self, monkeypatch, capsys, tmp_path):
        """The links open the images and the report, and there are no JSON lines."""
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("TERM", "xterm-256color")
        folder = tmp_path / "a folder"
        folder.mkdir()
        await local.demonstrate(folder)
        assert capsys.readouterr().out == ""
        said = screen.getvalue()
        assert local._LOST in said
        links = [URL(link) for link in re.findall(r"\x1b]8;[^;]*;(.+?)\x1b", said)]
        linked = {Path(link.path) for link in links if link.scheme == "file"}
        assert all(path.is_file() for path in linked)
        assert {path.suffix for path in linked} == {".jpg", ".html"}
        assert len(linked) == sum(failure is None for *_, failure in local._TASKS) + 1


@pytest.mark.parametrize("finished", [0, 2])
def test_an_interrupted_batch_says_how_to_continue(finished, capsys):
    """The message mentions unfinished tasks only if there are any."""
    tally = batch.BatchTally(["task-1", "task-2"])
    for task_id in ("task-1", "task-2")[:finished]:
        tally.count_outcome(
            ErrorOutcome(task_id=task_id, error=TransportError("reset", task_id=task_id))
        )
    batch.say_how_to_continue(tally, Path("out"), "--report ")
    said = capsys.readouterr().err
    assert ("2 tasks have not been seen yet" in said) is (finished == 0)
    assert said.endswith("kontext batch --report --into out\n")
