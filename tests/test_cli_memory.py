"""Durations that one run of the command learns, and the next starts from."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest
from background import serving
from command import COMMAND, environment
from typer.testing import CliRunner

from kontext_async import DurationModel
from kontext_async.cli import app
from kontext_async.cli.memory import remembered

KEY = "marker-key-3c90"


@pytest.fixture(scope="module")
def simulator():
    with serving(api_key=KEY, durations=0.0) as running:
        yield running


@pytest.fixture
def kontext(simulator, monkeypatch):
    """Run the command in this process, against the simulator."""
    monkeypatch.setenv("APIKLEY_API_KEY", KEY)

    def invoke(*args):
        words = [*map(str, args), "--base-url", simulator.base_url]
        return CliRunner().invoke(app.app, words, prog_name="kontext")

    return invoke


@pytest.fixture
def start(simulator):
    """Start the command in processes that end with the test."""
    variables = environment(APIKLEY_API_KEY=KEY, KONTEXT_BASE_URL=simulator.base_url)
    with contextlib.ExitStack() as stack:

        def start(*args):
            streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            process = subprocess.Popen([*COMMAND, *args], env=variables, text=True, **streams)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def ended(simulator, count=1, duration=4.0):
    """Return tasks that ended a while ago, so that a poll shows how long they took."""
    return [
        simulator.add_task(duration=duration, outcome="success", age=60.0) for _ in range(count)
    ]


def finished(model):
    return json.loads(model.to_json())["finished"]


def learn(base_url="https://api.example", **options):
    """Learn one duration, and return how many were known before."""
    with remembered(base_url, **{"wanted": True, **options}) as model:
        known = finished(model)
        model.observe("task", 5.0, 5.0)
    return known


# What a run gains


def test_the_next_run_sees_the_end_with_fewer_polls(start, simulator):
    """It polls again when the task has ended. One without memory guesses, and polls twice more."""
    learned = start("wait", *ended(simulator, 12))
    assert learned.wait(timeout=20) == 0
    runs = [start("wait", "--from", "-", *words) for words in ([], ["--no-memory"])]
    tasks = []
    for run in runs:
        assert run.stderr.readline() == "Waiting for the tasks on standard input\n"
        tasks.append(simulator.add_task(duration=4.0, outcome="success"))
        run.stdin.write(tasks[-1])
        run.stdin.close()
    for run in runs:
        assert run.wait(timeout=20) == 0
    assert [simulator.polls(task_id) for task_id in tasks] == [2, 3]


# Which commands


def saved(folder):
    """The number of durations in the only file of a folder."""
    (file,) = folder.iterdir()
    return finished(DurationModel.from_json(file.read_text()))


def test_commands_that_wait_remember(kontext, simulator, cache_folder, tmp_path):
    """Each adds to what the others have learned."""
    (tmp_path / "ids").write_text("\n".join(ended(simulator, 3)))
    into = ("--into", tmp_path / "a")
    for words, known in [
        (("wait", *ended(simulator)), 1),
        (("batch", "--from", tmp_path / "ids", *into), 4),
        (("generate", "a cat", *into), 5),
        (("edit", "https://images.example/cat.png", "red", *into), 6),
    ]:
        assert kontext(*words).exit_code == 0
        assert saved(cache_folder) == known


def test_without_memory_nothing_is_read_or_written(kontext, simulator, cache_folder, tmp_path):
    """Each of these commands has the option."""
    (tmp_path / "ids").write_text("\n".join(ended(simulator)))
    into = ("--into", tmp_path / "a")
    for words in [
        ("wait", *ended(simulator)),
        ("batch", "--from", tmp_path / "ids", *into),
        ("generate", "a cat", *into),
        ("edit", "https://images.example/cat.png", "red", *into),
    ]:
        assert kontext(*words, "--no-memory").exit_code == 0
    assert not cache_folder.exists()


def test_a_single_poll_learns_nothing(kontext, simulator, cache_folder):
    """It has no schedule either."""
    assert kontext("get", *ended(simulator)).exit_code == 0
    assert not cache_folder.exists()


# When it is written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_an_interrupted_run_has_learned_is_saved(number, start, simulator, cache_folder):
    """Ctrl-C and SIGTERM are ways to end a wait."""
    run = start("wait", *ended(simulator, 3), simulator.add_task(duration=math.inf))
    for _ in range(3):
        run.stdout.readline()
    run.send_signal(number)
    assert run.wait(timeout=5) == 128 + number
    assert saved(cache_folder) == 3


@pytest.mark.parametrize(
    ("error", "is_saved"), [(asyncio.CancelledError, True), (ZeroDivisionError, False)]
)
def test_a_cancelled_run_is_saved_and_one_that_fails_is_not(error, is_saved, cache_folder):
    """A defect may have learned wrong durations too."""

    def end():
        with remembered("https://api.example", wanted=True) as model:
            model.observe("task", 5.0, 5.0)
            raise error

    with pytest.raises(error):
        end()
    assert cache_folder.exists() == is_saved


def test_a_run_that_learns_nothing_writes_nothing(cache_folder):
    """Neither a first file, nor an old one again."""
    with remembered("https://api.example", wanted=True):
        pass
    assert not cache_folder.exists()
    learn()
    (file,) = cache_folder.iterdir()
    os.utime(file, (1, 1))
    with remembered("https://api.example", wanted=True):
        pass
    assert file.stat().st_mtime == 1


# What is in it, and where


def test_the_file_is_private_and_holds_the_model_alone(kontext, simulator, cache_folder):
    """No key, id or address; none but the user may read it, whatever the umask."""
    before = os.umask(0)
    try:
        (task_id,) = ended(simulator)
        kontext("wait", task_id)
    finally:
        os.umask(before)
    (file,) = cache_folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text()).keys() == {"version", "finished", "ended", "reached"}


@pytest.mark.parametrize(
    ("base_url", "name"),
    [
        ("https://api.example", "https-api.example-443.json"),
        ("https://API.example:443/v1/", "https-api.example-443.json"),
        ("https://user:secret@api.example", "https-api.example-443.json"),
        ("http://127.0.0.1:8080", "http-127.0.0.1-8080.json"),
        ("http://[::1]:8080/", "http-__1-8080.json"),
        ("https://b\xfccher.example", "https-xn--bcher-kva.example-443.json"),
    ],
    ids=ascii,
)
def test_each_origin_has_a_file(base_url, name, cache_folder):
    """Of safe characters, and without a path or a password."""
    learn(base_url)
    assert [file.name for file in cache_folder.iterdir()] == [name]
    assert learn(base_url) == 1
    assert learn("https://other.example") == 0


def test_what_is_not_a_url_is_left_to_the_client(kontext, cache_folder):
    """It has the message."""
    assert learn("https://[") == 0
    assert not cache_folder.exists()


# What may be wrong with it


@pytest.mark.parametrize("is_file", [False, True])
def test_a_home_that_does_not_exist_is_not_made(is_file, monkeypatch, caplog, tmp_path):
    """Nothing is remembered, and a line for --verbose says why."""
    if is_file:
        (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / ".cache"))
    with caplog.at_level(logging.DEBUG, "kontext_async"):
        assert [learn(), learn()] == [0, 0]
    assert "Durations are not saved in" in caplog.text
    assert (tmp_path / "home").exists() == is_file


@pytest.mark.parametrize("folder", [RuntimeError("no home folder"), Path("~/.cache")])
def test_without_a_home_folder_nothing_is_remembered(folder, monkeypatch, tmp_path):
    """platformdirs raises an error, or names a folder that is relative to the current one."""

    def user_cache_path(*args, **kwargs):
        if isinstance(folder, Exception):
            raise folder
        return folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platformdirs.user_cache_path", user_cache_path)
    assert [learn(), learn()] == [0, 0]
    assert not list(tmp_path.iterdir())


def broken(content):
    def make(file):
        file.write_bytes(content)

    return make


def huge(file):
    file.touch()
    os.truncate(file, 1 << 40)  # sparse: larger than the memory, but not on the disk


def unreadable(file):
    file.write_text(DurationModel().to_json())
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("a superuser reads any file")


@pytest.mark.parametrize(
    "make",
    [
        broken(b""),
        broken(b"{"),
        broken(b"\xff\xfe"),
        broken(b"[1, 2]"),
        broken(b'{"version": 1}'),
        broken(b'{"version": 2, "finished": NaN, "ended": [], "reached": []}'),
        broken(DurationModel().to_json().encode() + b" " * 1_000_000),
        huge,
        os.mkfifo,
        unreadable,
    ],
)
def test_a_file_that_is_not_a_model_is_ignored_and_replaced(make, cache_folder):
    """No matter what has written it."""
    cache_folder.mkdir(parents=True)
    make(cache_folder / "https-api.example-443.json")
    assert learn() == 0
    assert learn() == 1
    assert len(list(cache_folder.iterdir())) == 1  # nothing temporary either


def test_a_folder_in_its_place_is_left_alone(cache_folder):
    """Nothing is remembered then."""
    (cache_folder / "https-api.example-443.json" / "x").mkdir(parents=True)
    assert [learn(), learn()] == [0, 0]
    assert len(list(cache_folder.iterdir())) == 1


def test_a_host_whose_name_is_too_long_for_a_file_is_not_remembered(cache_folder):
    """The longest names that DNS permits."""
    base_url = f"https://{'.'.join(['a' * 63] * 4)[:253]}"
    assert [learn(base_url), learn(base_url)] == [0, 0]
    assert not list(cache_folder.iterdir())


def test_of_two_runs_at_once_both_are_saved(cache_folder):
    """The one that ends later merges what the other has saved."""
    with remembered("https://api.example", wanted=True) as longer:
        with remembered("https://api.example", wanted=True) as shorter:
            shorter.observe("task1", 5.0, 5.0)
        longer.observe("task2", 70.0, 70.0)
    (file,) = cache_folder.iterdir()
    ended = json.loads(file.read_text())["ended"]
    assert sum(tasks > 0.1 for tasks in ended) == 2  # of the bins of age


def test_a_run_alone_is_not_merged_with_what_it_began_with(cache_folder):
    """Its model has that already."""
    learn()
    with remembered("https://api.example", wanted=True) as model:
        model.observe("task", 70.0, 70.0)
        learned = model.to_json()
    (file,) = cache_folder.iterdir()
    assert file.read_text() == learned
