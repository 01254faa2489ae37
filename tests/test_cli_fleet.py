"""The commands of a fleet, from an empty database to outcomes."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys

import psycopg
import pytest
from background import serving
from command import COMMAND, environment
from typer.testing import CliRunner

from kontext_async.cli import output
from kontext_async.cli.app import app

KEY = "secret-key"


@pytest.fixture
def simulator():
    with serving(durations=0.2, auto_create=True) as running:
        yield running


@pytest.fixture(autouse=True)
def logger(monkeypatch):
    """Restore the library's logger, which a worker makes write to standard error."""
    log = logging.getLogger("kontext_async")
    monkeypatch.setattr(log, "handlers", [])
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture
def kontext(dsn, simulator, monkeypatch):
    """Run a command with a key, a database and a simulator in its environment."""
    monkeypatch.setenv("APIKLEY_API_KEY", KEY)
    monkeypatch.setenv("KONTEXT_FLEET_DSN", dsn)
    monkeypatch.setenv("KONTEXT_BASE_URL", simulator.base_url)

    def run(*words, code=0, **keywords):
        done = CliRunner().invoke(app, words, **keywords)
        assert done.exit_code == code, done.output
        return done

    return run


def state(kontext):
    return json.loads(kontext("fleet", "status").stdout)


def test_from_an_empty_database_to_outcomes(kontext, tmp_path):
    """The four commands in their order; the worker saves the images."""
    (tmp_path / "ids.txt").write_text("a\nb\nc\nb\n")
    kontext("fleet", "init")
    added = kontext("submit", "--from", str(tmp_path / "ids.txt"), "--chunk", "2")
    assert "3 new tasks" in added.stderr
    before = state(kontext)
    assert (before["waiting"], before["queuedChunks"], before["workers"]) == (3, 2, [])
    kontext("worker", "--until-done", "--heartbeat", "0.3", "--into", str(tmp_path / "images"))
    after = state(kontext)
    assert (after["done"], after["waiting"], after["runningChunks"]) == (3, 0, 0)
    assert len(list((tmp_path / "images").iterdir())) == 3


def test_a_worker_needs_no_folder_and_shares_a_limit(kontext, cache_folder):
    """Outcomes alone, within a known limit; durations are in the database, not in a file."""
    kontext("fleet", "init")
    kontext("submit", "--from", "-", input="a\n")
    kontext("worker", "--until-done", "--heartbeat", "0.3", "--rate-limit", "20/1")
    assert state(kontext)["done"] == 1
    assert not cache_folder.exists()


@pytest.mark.parametrize(("option", "levels"), [("-q", set()), ("-v", {"INFO", "DEBUG"})])
def test_a_worker_says_less_or_more_on_request(kontext, option, levels):
    """Warnings only, or each poll."""
    kontext("fleet", "init")
    kontext("submit", "--from", "-", input="a\n")
    said = kontext("worker", "--until-done", "--heartbeat", "0.3", option).stderr
    assert {line.split()[2] for line in said.splitlines()} == levels


def test_people_have_a_table_of_workers(kontext, dsn, monkeypatch):
    """A terminal has no line for programs."""
    kontext("fleet", "init")
    with psycopg.connect(dsn) as connection:
        connection.execute("INSERT INTO kontext_workers (name, waits, rate) VALUES ('w1', 7, 2.5)")
    (worker,) = state(kontext)["workers"]
    assert (worker["name"], worker["waits"], worker["rate"]) == ("w1", 7, 2.5)
    monkeypatch.setattr(output, "is_for_people", lambda: True)
    done = kontext("fleet", "status")
    assert done.stderr == ""
    assert "{" not in done.stdout
    assert all(text in done.stdout for text in ("Count", "w1", "7", "2.5", "0 s ago"))


def test_ids_come_from_standard_input_too(kontext):
    """Lines that hold no id are named, and the others are added."""
    kontext("fleet", "init")
    done = kontext("submit", "--from", "-", input="a\n[1]\n", code=2)
    assert "1 new task\n" in done.stderr
    assert "standard input, line 2" in done.stderr


def test_submitting_needs_ids(kontext):
    assert "--from" in kontext("submit", code=2).stderr


def test_old_outcomes_are_deleted_by_their_age(kontext):
    """The age has a unit; nothing is deleted without one."""
    kontext("fleet", "init")
    kontext("submit", "--from", "-", input="a\n")
    kontext("worker", "--until-done", "--heartbeat", "0.3")
    assert "0 outcomes deleted" in kontext("fleet", "prune", "--older-than", "1h").stderr
    assert "1 outcome deleted" in kontext("fleet", "prune", "--older-than", "0d").stderr
    assert state(kontext)["done"] == 0
    for words in ((), ("--older-than", "7"), ("--older-than", "-1d")):
        assert "--older-than" in kontext("fleet", "prune", *words, code=2).stderr


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("fleet init", "argument 'DSN'"),
        ("fleet status", "argument 'DSN'"),
        ("fleet prune --older-than 1d", "argument 'DSN'"),
        ("submit --from -", "option '--dsn'"),
        ("worker", "option '--dsn'"),
    ],
)
def test_a_missing_address_is_named_with_its_variable(words, what, value, monkeypatch):
    """An empty variable is not an address."""
    monkeypatch.delenv("KONTEXT_FLEET_DSN", raising=False)
    if value is not None:
        monkeypatch.setenv("KONTEXT_FLEET_DSN", value)
    done = CliRunner().invoke(app, words.split(), prog_name="kontext")
    problem = f"missing {what}: give it, or set KONTEXT_FLEET_DSN"
    assert done.stderr.startswith(f"kontext: {problem}\nFor help: kontext {words.split()[0]}")
    assert done.exit_code == 2


def test_a_missing_table_is_a_message(kontext):
    assert "kontext fleet init" in kontext("fleet", "status", code=4).stderr


def test_a_missing_extra_is_named(kontext, monkeypatch):
    """The command says what to install."""
    for name in [name for name in sys.modules if name.startswith("kontext_async.fleet")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "procrastinate", None)
    assert "kontext-async[fleet]" in kontext("fleet", "init", code=2).stderr


def test_a_broken_installation_is_not_taken_for_a_missing_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("kontext_async.fleet")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kontext_async.fleet.status", None)
    with pytest.raises(ModuleNotFoundError, match=r"kontext_async\.fleet\.status"):
        __import__("kontext_async.fleet")


def test_sigterm_puts_the_rest_back_within_ten_seconds(kontext, simulator):
    """The worker is in the status while it works, and gone after it."""
    simulator.add_task("slow", duration=600.0)
    kontext("fleet", "init")
    kontext("submit", "--from", "-", input="slow\nquick\n")
    words = ["worker", "--heartbeat", "0.3", "--rate-limit", "20/1"]
    with subprocess.Popen(
        [*COMMAND, *words], env=environment(APIKLEY_API_KEY=KEY), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while not (seen := state(kontext))["done"]:
                assert process.poll() is None
            assert seen["workers"][0]["waits"] >= 0
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=10)
        finally:
            process.kill()
    assert process.returncode == 143, errors
    assert KEY not in errors
    limit, start, stop = [line.split(" INFO ")[1] for line in errors.splitlines()]
    assert limit == "a limit of 20 requests in 1 s is shared"
    assert re.fullmatch(r"worker \S+ starts, with the database at /\S+:5432", start)
    assert re.fullmatch(r"worker \S+ stops: 1 tasks ended, 1 left for other workers", stop)
    after = state(kontext)
    assert (after["waiting"], after["queuedChunks"], after["runningChunks"]) == (1, 1, 0)
    assert after["workers"] == []
