"""The command in a process of its own: signals, pipes, terminals, start-up."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from background import serving
from command import COMMAND, environment

from kontext_async.cli import main
from kontext_async.results import Ledger
from kontext_async.simulator import Failure

KEY = "marker-key-77aa"
IMPORTS = "import aiohttp, attrs, cattrs, platformdirs, rich.progress, rich.table, tenacity, typer"


@pytest.fixture(scope="module")
def simulator():
    with serving() as running:
        yield running


@pytest.fixture
def start():
    """Start the command in processes that end with the test."""
    variables = environment(APIKLEY_API_KEY=KEY)
    with contextlib.ExitStack() as stack:

        def start(*args, command=COMMAND, **options):
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
            process = subprocess.Popen([*command, *args], env=variables, text=True, **streams)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def wait_until_polled(simulator, *task_ids):
    """Wait until each task has been polled."""
    end = time.monotonic() + 20
    while not all(simulator.polls(task_id) for task_id in task_ids):
        assert time.monotonic() < end, "never polled"
        time.sleep(0.01)


def test_help_answers_quickly(start):
    """`--help` costs little more computing than to import what the command is built on."""

    def cost(process):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out, _ = process.communicate(timeout=20)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process.returncode == 0
        assert "wait" in out or process.args[-1] == IMPORTS
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # By turns, and the best of each: how fast the machine is, and how busy, cancels out.
    imports = [sys.executable, "-P", "-c", IMPORTS]
    pairs = [(cost(start("--help")), cost(start(command=imports))) for _ in range(4)]
    helping, importing = map(min, zip(*pairs, strict=True))
    assert helping < 1.75 * importing


def test_help_does_not_load_what_keeps_results(start):
    """It costs a tenth of the start, and most commands do without it."""
    code = (
        "import sys\n"
        "from kontext_async.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    print([name for name in sys.modules if name.startswith('kontext_async.results')])\n"
    )
    out, _ = start("--help", command=[sys.executable, "-P", "-c", code]).communicate(timeout=20)
    assert out.endswith("\n[]\n")


def test_results_and_exit_code(start, simulator):
    """Standard output has the results alone, and the highest exit code counts."""
    good = simulator.add_task(duration=0.0, outcome="success")
    bad = simulator.add_task(duration=0.0, outcome="failure")
    process = start("wait", good, bad, "--base-url", simulator.base_url)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert {json.loads(line)["taskId"] for line in out.splitlines()} == {good, bad}
    assert KEY not in out + err


def test_results_come_as_tasks_end(start, simulator):
    """The line of a finished task comes while another is generating."""
    done = simulator.add_task(duration=0.0, outcome="success")
    process = start(
        "wait", simulator.add_task(duration=math.inf), done, "--base-url", simulator.base_url
    )
    assert json.loads(process.stdout.readline())["taskId"] == done
    assert process.poll() is None


def test_ctrl_c_names_the_unfinished_tasks(start, simulator):
    """It ends at once with 130 and the command that resumes."""
    done = simulator.add_task(duration=0.0, outcome="success")
    running = [simulator.add_task(duration=math.inf) for _ in range(2)]
    process = start("wait", done, *running, "--base-url", simulator.base_url)
    process.stdout.readline()
    wait_until_polled(simulator, *running)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 130
    assert f"kontext wait --base-url {simulator.base_url} {running[0]} {running[1]}" in err
    assert done not in err
    assert "Traceback" not in err


def test_ctrl_c_says_how_to_continue_a_batch(start, simulator, tmp_path):
    """It ends at once with 130; the results so far are in the folder."""
    good = simulator.add_task(duration=0.0, outcome="success")
    running = simulator.add_task(duration=math.inf)
    (tmp_path / "ids.txt").write_text(f"{good}\n{running}\n")
    folder = tmp_path / "my results"
    files = ("--from", tmp_path / "ids.txt", "--into", folder)
    process = start("batch", *files, "--base-url", simulator.base_url)
    assert json.loads(process.stdout.readline())["taskId"] == good
    wait_until_polled(simulator, running)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "1 done, 0 failed, 1 saved, of 2 tasks" in err
    assert f"kontext batch --base-url {simulator.base_url} --into '{folder}'" in err
    assert "Traceback" not in err
    states = {entry.task_id: entry.state for entry in Ledger.read(folder / "kontext.sqlite3")}
    assert states == {good: "done", running: "waiting"}


def test_a_closed_pipe_ends_it_without_a_message(start, simulator):
    """As with `| head -1`, the exit code is that of SIGPIPE."""
    ids = [simulator.add_task(duration=0.0, outcome="success") for _ in range(3)]
    process = start("wait", *ids, "--base-url", simulator.base_url)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=20) == 141
    assert "Traceback" not in err
    assert "Broken" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_simulate_serves_until_a_signal(start, number, code):
    """Its address is on standard output, and the command can wait there."""
    server = start("simulate", "--duration", "0")
    address = json.loads(server.stdout.readline())["baseUrl"]
    waiting = start("wait", "any-task", "--base-url", address)
    out, _ = waiting.communicate(timeout=20)
    assert json.loads(out)["outcome"] == "success"
    server.send_signal(number)
    _, err = server.communicate(timeout=5)
    assert server.returncode == code
    assert "kontext wait --base-url" in err
    assert "Traceback" not in err


def test_a_terminal_gets_a_live_bar(start, simulator):
    """On a pseudo-terminal the bar is drawn, and removed at the end."""
    screen, end = pty.openpty()
    task_id = simulator.add_task(duration=0.0, outcome="success")
    process = start("wait", task_id, "--base-url", simulator.base_url, stderr=end)
    os.close(end)
    out, _ = process.communicate(timeout=20)
    drawn = os.read(screen, 4096).decode(errors="replace")
    os.close(screen)
    assert process.returncode == 0
    assert json.loads(out)["outcome"] == "success"
    assert "\x1b[?25l" in drawn
    assert "1 done, 0 failed in" in drawn


def test_a_crash_shows_no_locals(start, simulator):
    """The traceback of a defect has no values of variables."""
    crash = (
        "import kontext_async.cli.app as app, kontext_async.cli.connection as connection\n"
        "def broken(*args, **kwargs):\n"
        "    secret = args[0]\n"
        "    raise ZeroDivisionError\n"
        "connection.KontextClient = broken\n"
        "app.app()\n"
    )
    process = start("get", "task1", command=[sys.executable, "-P", "-c", crash])
    out, err = process.communicate(timeout=20)
    assert "ZeroDivisionError" in err
    assert KEY not in out + err


def test_ids_are_polled_while_standard_input_is_still_being_written(start, simulator, tmp_path):
    """The first result comes before the second id, and a bad line is named at once."""
    first, second = (simulator.add_task(duration=0.0, outcome="success") for _ in range(2))
    options = ("--from", "-", "--into", tmp_path / "out", "--base-url", simulator.base_url)
    process = start("batch", *options, stdin=subprocess.PIPE)
    process.stdin.write(f"{first}\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["taskId"] == first
    process.stdin.write(f"{second}\nx,y\n{first}\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["taskId"] == second
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (2, "")
    assert "standard input, line 3: several columns" in err
    assert "2 done, 0 failed, 2 saved in" in err
    entries = Ledger.read(tmp_path / "out" / "kontext.sqlite3")
    assert [entry.task_id for entry in entries] == [first, second]


def test_an_interrupt_does_not_wait_for_standard_input(start, simulator):
    """Nobody writes, and Ctrl-C ends it."""
    running = simulator.add_task(duration=math.inf)
    process = start(
        "wait", running, "--from", "-", "--base-url", simulator.base_url, stdin=subprocess.PIPE
    )
    wait_until_polled(simulator, running)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 130
    assert "Traceback" not in process.stderr.read()
    process.stdin.close()


def test_standard_input_without_ids_is_wrong_usage(start, simulator):
    """The message says so."""
    process = start(
        "wait", "--from", "-", "--base-url", simulator.base_url, stdin=subprocess.DEVNULL
    )
    _, err = process.communicate(timeout=10)
    assert process.returncode == 2
    assert "no task ids on standard input" in err


def test_sigterm_says_what_is_left(start, simulator):
    """As Ctrl-C does, with an exit code of its own."""
    running = simulator.add_task(duration=math.inf)
    process = start("wait", running, "--verbose", "--base-url", simulator.base_url)
    assert any("GENERATING" in line for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 143
    assert f"Still generating: {running}\n" in err
    assert "Traceback" not in err


AS_PID_1 = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]


def can_be_pid_1():
    return shutil.which("unshare") is not None and not subprocess.call(
        [*AS_PID_1, "true"], stderr=subprocess.DEVNULL
    )


@pytest.mark.skipif(not can_be_pid_1(), reason="unshare cannot make a PID namespace here")
def test_sigterm_ends_the_command_as_pid_1_of_a_container(start, simulator):
    """The kernel ignores it there if nothing handles it."""
    running = simulator.add_task(duration=math.inf)
    process = start(
        "wait", running, "--base-url", simulator.base_url, command=[*AS_PID_1, *COMMAND]
    )
    wait_until_polled(simulator, running)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    inside = Path(f"/proc/{children.strip()}/status").read_text()
    assert re.search(r"^NSpid:.*\t1$", inside, re.MULTILINE)
    os.kill(int(children), signal.SIGTERM)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 143
    assert f"Still generating: {running}\n" in err


HANGING_RESOLVER = """
import socket, sys, time
socket.getaddrinfo = lambda *args, **options: (print("asked", flush=True), time.sleep(60))
from kontext_async.cli import main
main()
"""


def test_ctrl_c_does_not_wait_for_name_resolution(start):
    """The thread that resolves a name cannot be interrupted, so it is left behind."""
    process = start(
        *("wait", "task1", "--base-url", "https://api.invalid"),
        command=[sys.executable, "-P", "-c", HANGING_RESOLVER],
    )
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 130
    assert "1 task has not been seen yet" in err
    assert "paid" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")  # noqa: PTH110
def test_a_full_disk_is_named(start, simulator):
    """A message and exit code 4, without a traceback."""
    task_id = simulator.add_task(duration=0.0, outcome="success")
    with open("/dev/full", "w") as full:  # noqa: PTH123
        process = start("wait", task_id, "--base-url", simulator.base_url, stdout=full)
        err = process.stderr.read()
    assert process.wait(timeout=20) == 4
    assert "kontext: cannot write to standard output: No space left on device\n" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("closed", "code"), [(">&-", 4), ("2>&-", 0), ("2>/dev/full", 0)])
def test_a_closed_stream_is_named_or_does_not_matter(closed, code, simulator):
    """Results need standard output; messages are lost where they cannot be written."""
    task_id = simulator.add_task(duration=0.0, outcome="success")
    command = f"{shlex.join(COMMAND)} wait {task_id} --summary {closed}"
    done = subprocess.run(
        ["sh", "-c", command],
        env=environment(KONTEXT_BASE_URL=simulator.base_url),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert (closed == ">&-") == ("cannot write to standard output: it is closed" in done.stderr)
    assert (task_id in done.stdout) == (code == 0)


def test_a_terminal_gets_a_line_for_people(start, simulator):
    """The address is a link, and with --json a terminal gets what a pipe gets."""
    task_id = simulator.add_task(duration=12.0, outcome="success", age=60.0)
    flagged = simulator.add_task(duration=1.0, outcome=Failure(400, "flagged"), age=60.0)
    written = {}
    for option in ("--json", "--quiet"):
        screen, end = pty.openpty()
        ids = (task_id, flagged, option, "--base-url", simulator.base_url)
        process = start("wait", *ids, stdout=end)
        os.close(end)
        assert process.wait(timeout=20) == 1
        written[option] = os.read(screen, 65536).decode()
        os.close(screen)
    assert {json.loads(line)["taskId"] for line in written["--json"].splitlines()} == {
        task_id,
        flagged,
    }
    url = f"{simulator.base_url}/images/{task_id}"
    assert f" 12 s  {task_id}" in written["--quiet"]
    assert "\x1b]8;id=" in written["--quiet"]
    assert f";{url}" in written["--quiet"]
    assert f"  1 s  {flagged}" in written["--quiet"]
    assert "400: flagged" in written["--quiet"]


def test_zsh_completes_at_the_first_tab(tmp_path, monkeypatch, capfd):
    """The first Tab loads the installed file, which then completes; installed again, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    monkeypatch.setattr(sys, "argv", ["kontext", "--install-completion", "zsh"])
    for _ in range(2):
        with pytest.raises(SystemExit):
            main()
    assert (tmp_path / ".zfunc" / "_kontext").read_text().count("loadautofunc") == 1
    if shutil.which("zsh") is None:
        pytest.skip("no zsh")
    command = tmp_path / "kontext"
    command.write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    command.chmod(0o755)
    capfd.readouterr()
    # What zsh does at the first Tab, with functions that show what can be inserted.
    script = """
        fpath=(~/.zfunc $fpath); autoload -Uz _kontext
        compdef() { }; _arguments() { print -r -- "$@" }
        words=(kontext wai); CURRENT=2; _kontext
    """
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["zsh", "-fc", script], env=environment(PATH=path), check=True)
    assert '"wait"' in capfd.readouterr().out


def test_completion_of_other_shells_is_left_alone(tmp_path, monkeypatch):
    """Only zsh loads its file at a Tab."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    monkeypatch.setattr(sys, "argv", ["kontext", "--install-completion", "fish"])
    with pytest.raises(SystemExit):
        main()
    assert not (tmp_path / ".zfunc").exists()
