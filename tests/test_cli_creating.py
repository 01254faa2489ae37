"""`kontext generate`, `edit`, `unknown`, `resolve` and `credits`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from background import serving
from command import COMMAND, Terminal, environment
from typer.testing import CliRunner

from kontext_async.cli import requests
from kontext_async.cli.app import app
from kontext_async.cli.requests import RequestTally
from kontext_async.results import Ledger

ENVIRONMENT = {"APIKLEY_API_KEY": "key"}


@pytest.fixture
def simulator():
    with serving(durations=0.0) as simulator:
        yield simulator


@pytest.fixture
def kontext(simulator, tmp_path, monkeypatch):
    """Run a command with the simulator's address, and return its code, lines and messages."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, address=True, stdin=None):
        where = ["--base-url", simulator.base_url] if address else []
        done = CliRunner(env=ENVIRONMENT).invoke(app, [*map(str, arguments), *where], input=stdin)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        return done.exit_code, lines, done.stderr

    return run


def test_a_prompt_becomes_an_image(kontext, simulator, tmp_path):
    """The id is on standard output at submission, and the result when the image is saved."""
    code, (submitted, done), _ = kontext("generate", "a lighthouse", "--into", "pictures")
    assert code == 0
    assert [submitted["taskId"], done["taskId"]] == simulator.created * 2
    assert (submitted["outcome"], done["outcome"]) == ("submitted", "success")
    assert (tmp_path / done["file"]).exists()
    assert done["key"].endswith("#1")
    assert "lighthouse" not in json.dumps([submitted, done])


def test_a_terminal_has_the_prompt_of_each_task(simulator, tmp_path, monkeypatch):
    """When it is created, and when its image is saved."""
    screen = Terminal()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, screen)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("APIKLEY_API_KEY", "key")
    words = ("generate", "a boat", "--into", str(tmp_path), "--base-url", simulator.base_url)
    with pytest.raises(SystemExit):
        app(words)
    lines = [line.split() for line in screen.getvalue().splitlines()]
    assert [words[0] for words in lines if "boat" in words] == ["submitted", "success"]


def test_a_terminal_has_words_and_a_table_for_people(kontext, simulator, tmp_path, monkeypatch):
    """The balance, and the requests that may have been paid for."""
    simulator._generate_script = iter([lambda r: (r.default_reply(), _closed())[1]])
    kontext("generate", "a boat\n at night", "--into", "p")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("APIKLEY_API_KEY", "key")
    monkeypatch.setenv("COLUMNS", "120")
    for words in ("credits", "--base-url", simulator.base_url), ("unknown", "p"):
        with pytest.raises(SystemExit):
            app(words)
    said = screen.getvalue()
    assert said.startswith("1,000,000 credits\n")
    assert "a boat at night" in said
    assert "{" not in said


def test_a_file_of_prompts_is_paid_for_once(kontext, simulator, tmp_path):
    """As text or as objects, with options for all; the results can be read as ids."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '# comment\n\na lighthouse\n{"prompt": "a boat", "aspectRatio": "1:1", "key": "boat"}\n'
    )
    arguments = ("generate", "--from", prompts, "--into", "pictures", "--model", "flux-kontext-max")
    code, lines, _ = kontext(*arguments)
    assert code == 0
    assert len(simulator.created) == 2
    entries = {
        entry.key: entry.request for entry in Ledger.read_submissions("pictures/kontext.sqlite3")
    }
    assert entries["boat"].aspect_ratio == "1:1"
    assert {request.model for request in entries.values()} == {"flux-kontext-max"}
    again, lines, _ = kontext(*arguments, "--report")
    assert again == 0
    assert len(simulator.created) == 2
    assert {line["outcome"] for line in lines} == {"success"}
    assert (tmp_path / "pictures" / "report.html").exists()
    results = "\n".join(json.dumps(line) for line in [*lines, {**lines[0], "taskId": None}])
    code, waited, _ = kontext("wait", "--from", "-", stdin=results)
    assert {line["taskId"] for line in waited} == set(simulator.created)


def test_prompts_may_come_from_standard_input(kontext, simulator):
    code, _, _ = kontext("generate", "--from", "-", "--into", "p", stdin="a\nb\n")
    assert code == 0
    assert len(simulator.created) == 2


def test_an_edit_has_an_input(kontext, simulator):
    url = "https://example.com/day.png"
    code, _, _ = kontext("edit", url, "make it night", "--into", "p", "--output-format", "png")
    assert code == 0
    params = json.loads(simulator._store[simulator.created[0]].param_json)
    assert params == {"prompt": "make it night", "inputImage": url, "outputFormat": "png"}


def test_the_whole_input_is_checked_before_anything_is_paid_for(kontext, simulator, tmp_path):
    """Each bad line is named, without its prompt."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "a good one\n"
        '{"prompt": "secret", "aspect": "1:1", "aspectratio": "1:1"}\n'
        '{"prompt": "secret", "key": " "}\n'
        '{"prompt": "secret"\n'
    )
    code, _, said = kontext("generate", "--from", prompts, "--into", "p")
    assert code == 2
    assert "line 2: 'aspectratio' is not a field: did you mean 'aspectRatio'?" in said
    assert "line 3: a key must be" in said
    assert "line 4: not a JSON object" in said
    assert "secret" not in said
    assert simulator.created == []
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("generate", "--into", "p"), "no prompts: give them as arguments"),
        (("generate", "--into", "p", "--from", "-"), "no prompts in standard input"),
        (("generate", "--into", "p", "--from", os.devnull), f"no prompts in {os.devnull}"),
        (("generate", "a", "--into", "p", "--model", "flux"), "model must be one of"),
        (("edit", "day.png", "a", "--into", "p"), "input_image must be"),
        (("edit", "https://example.com/a", " ", "--into", "p"), "prompt must be"),
    ],
)
def test_wrong_usage_pays_for_nothing(kontext, simulator, arguments, says):
    code, _, said = kontext(*arguments)
    assert code == 2
    assert says in said
    assert not simulator.requests


def test_a_key_with_another_request_is_refused_before_anything_is_paid_for(kontext, simulator):
    for prompt, expected in (("a", 0), ("b", 2)):
        line = json.dumps({"prompt": prompt, "key": "one"})
        code, _, said = kontext("generate", "--from", "-", "--into", "p", stdin=f"new\n{line}")
        assert code == expected
    assert "key 'one' has another request already" in said
    lines = "\n".join(json.dumps({"prompt": prompt, "key": "two"}) for prompt in "ab")
    code, _, said = kontext("generate", "--from", "-", "--into", "p", stdin=lines)
    assert (code, len(simulator.created)) == (2, 2)


def test_a_dry_run_counts_and_pays_for_nothing(kontext, simulator):
    """Counts of new, known, refused and uncertain requests, and the balance."""
    simulator._generate_script = iter([lambda r: (r.default_reply(), _closed())[1]])
    kontext("generate", "a", "--into", "p")
    kontext("generate", "b", "--into", "p")
    code, (line,), said = kontext("generate", "a", "b", "c", "d", "--into", "p", "--dry-run")
    assert code == 0
    assert line == {
        "new": 2, "known": 1, "unknown": 1, "refused": 0, "abandoned": 0, "credits": 1_000_000
    }  # fmt: skip
    assert "credits" in said
    assert "Count" in said
    assert len(simulator.created) == 2
    code, (line,), _ = kontext("generate", "a", "--into", "fresh", "--dry-run")
    assert line["new"] == 1


def _closed():
    from kontext_async.simulator.creations import CREATION_STEPS

    return CREATION_STEPS["closed"](None)


def test_a_limit_leaves_prompts_for_another_run(kontext, simulator):
    code, _, _ = kontext("generate", *"abcde", "--into", "p", "--limit", 2)
    assert (code, len(simulator.created)) == (0, 2)
    code, _, _ = kontext("generate", *"abcde", "--into", "p")
    assert (code, len(simulator.created)) == (0, 5)


def test_an_uncertain_prompt_is_listed_and_decided(kontext, simulator):
    """By its task, whose image the next run saves; or it is given up."""
    simulator._generate_script = iter([lambda r: (r.default_reply(), _closed())[1]] * 2)
    code, lines, said = kontext("generate", "a", "b", "--into", "p", "--report")
    assert code == 4
    assert {(line["taskId"], line["error"]) for line in lines} == {(None, "SubmissionUnknownError")}
    assert "2 tasks may have been created without an answer" in said
    code, found, said = kontext("unknown", "p", address=False)
    assert code == 4
    assert [line["prompt"] for line in found] == ["a", "b"]
    assert "kontext resolve p KEY --task-id ID" in said
    keys = [line["key"] for line in found]
    task_id = {json.loads(simulator._store[t].param_json)["prompt"]: t for t in simulator.created}
    code, (line,), _ = kontext("resolve", "p", keys[0], "--task-id", task_id["a"], address=False)
    assert line == {"key": keys[0], "state": "submitted", "taskId": task_id["a"]}
    code, (line,), _ = kontext("resolve", "p", keys[1], "--abandon", address=False)
    assert line["state"] == "abandoned"
    assert kontext("unknown", "p", address=False) == (0, [], "No request is uncertain.\n")
    code, lines, _ = kontext("generate", "a", "--into", "p")
    assert (code, lines[-1]["taskId"]) == (0, task_id["a"])
    assert len(simulator.created) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("resolve", "p", "key", "--abandon"), 2, "there is no kontext.sqlite3 in it"),
        (("resolve", "p", "key"), 2, "give either --task-id or --abandon"),
        (("resolve", "p", "key", "--abandon", "--task-id", "t"), 2, "give either"),
        (("unknown", "p"), 2, "p holds no results"),
    ],
)
def test_what_cannot_be_decided_is_said(kontext, arguments, code, says):
    found, _, said = kontext(*arguments, address=False)
    assert found == code
    assert says in said


def test_one_uncertain_prompt_is_one_task(kontext, simulator):
    simulator._generate_script = iter([lambda r: (r.default_reply(), _closed())[1]])
    _, _, said = kontext("generate", "a", "--into", "p")
    assert "1 task may have been created" in said


def test_the_balance_is_printed(kontext, simulator):
    simulator._credits = 12
    assert kontext("credits")[:2] == (0, [{"credits": 12.0}])


def test_the_words_after_an_interruption(tmp_path, capsys):
    """The counts, and that the same command continues."""
    tally = RequestTally(["a", "b"])
    requests._say_how_to_continue(tally, tmp_path)
    said = capsys.readouterr().err
    assert "0 done, 0 failed, 0 saved, of 2 requests" in said
    assert "run the same command again" in said


def test_ctrl_c_says_how_to_continue(simulator, tmp_path):
    """The results so far are in the folder; nothing is paid for twice."""
    simulator._store._durations = 60.0
    arguments = ["generate", "a", "b", "--into", tmp_path / "p", "--base-url", simulator.base_url]
    with subprocess.Popen(
        [*COMMAND, *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for _ in range(2):
            assert json.loads(process.stdout.readline())["outcome"] == "submitted"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again" in said
    assert len(simulator.created) == 2


def test_callbacks_are_received_while_the_command_runs(kontext, simulator, tmp_path):
    """A task whose answer was lost is found again by the token of its callback."""
    simulator._generate_script = iter([lambda r: (r.default_reply(), _closed())[1]])
    simulator._callbacks._key = "callback-key"
    key = tmp_path / "key.txt"
    key.write_text("callback-key\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        arguments = ["generate", "a", "--into", "p", "--callback-key-file", key]
        arguments += ["--callback-url", f"http://127.0.0.1:{port}/done/{{token}}"]
        free.listen()
        code, _, said = kontext(*arguments, "--listen", port)
        assert code == 2
        assert f"cannot listen on port {port}" in said
        assert simulator.created == []
    code, (done,), _ = kontext(*arguments, "--listen", f"127.0.0.1:{port}")
    assert (code, [done["taskId"]]) == (0, simulator.created)
    assert [sent.status for sent in simulator.callbacks] == [200]
    code, _, _ = kontext(*arguments)
    assert code == 0
    assert len(simulator.created) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--listen", "80"], "need --callback-url"),
        (["--listen", "x", "--callback-url", "https://a.example/{token}"], "such as 8080"),
        (["--listen", "99999", "--callback-url", "https://a.example/{token}"], "such as 8080"),
        (["--callback-url", "a.example"], "callback_url must be"),
        (["--creation-limit", "many"], "such as 20/10"),
    ],
)
def test_wrong_options_of_callbacks_pay_for_nothing(kontext, simulator, options, says):
    code, _, said = kontext("generate", "a", "--into", "p", *options)
    assert code == 2
    assert says in said
    assert not simulator.requests


@pytest.mark.parametrize("command", [["generate"], ["edit", "https://example.com/a.png"]])
def test_images_at_a_private_address_may_be_allowed(command, kontext, simulator):
    """The images' origin is not the API's here; the error names the option that permits it."""
    api = simulator.base_url.replace("127.0.0.1", "localhost")
    into = ("a boat", "--into", "pictures", "--base-url", api)
    code, (_, refused), err = kontext(*command, *into, address=False)
    assert (code, refused["file"]) == (4, None)
    assert "--allow-private" in err
    code, (done,), _ = kontext(*command, *into, "--allow-private", address=False)
    assert code == 0
    assert done["file"]
    assert len(simulator.created) == 1
