"""The README and the documentation: every program in them runs, and every table is true."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import doctest
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import pytest
from background import serving
from command import COMMAND, environment
from typer.testing import CliRunner
from virtual_time import VirtualTimeLoop

import kontext_async
from kontext_async import ErrorOutcome, KontextClient, KontextError, errors
from kontext_async.cli.app import app
from kontext_async.cli.output import Exit, outcome_line
from kontext_async.client import DEFAULT_BASE_URL
from kontext_async.simulator import Failure, Simulator

CHECKOUT = Path(__file__).parent.parent
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TEXT = re.compile(r"^```\{code-block\} python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SESSION = re.compile(r"^```\{doctest\}\n(.*?)^```$", re.DOTALL | re.MULTILINE)


# Openers of docstrings that are neither an imperative verb nor a noun phrase.
OPENERS = ("What", "How", "Whether", "Why")
# Words that are not the field's terms or not plain English; none of them has an honest use here.
BANNED = re.compile(
    r"""\b(
        (last|first|next|every|each)\ looks? | looks?\ (again|once)
        | outliv\w+ | outlasts? | mend(s|ed|ing)? | anew | whither | dear | of\ late
        | so\ many | as\ things\ (are|stand) | but\ for | (it|this|that|which)\ is\ no
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)


def snippets(pages=PAGES):
    """Yield each Python block of each page, with the page's name and the block's line."""
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield pytest.param(match[1], id=f"{page.name}:{line}")


TUTORIAL = CHECKOUT / "docs" / "tutorial.md"
ADDRESS = "http://127.0.0.1:8765"


def is_for_fleet(code):
    return "kontext_async.fleet" in code


def is_for_pytest(code):
    return "def test_" in code or "pytest_plugins" in code


@pytest.fixture(scope="module")
def simulator():
    """Serve the tasks that the pages name."""
    with serving(durations=0.0) as running:
        for task_id in ("task12345", "task12346", "task12347"):
            running.add_task(task_id, duration=12.0, outcome="success", age=60.0)
        running.add_task("task-flagged", duration=1.0, outcome=Failure(400, "flagged"), age=60.0)
        yield running


@pytest.fixture
def user(simulator, monkeypatch, tmp_path):
    """Set up a user's folder and key; the default address is the simulator's."""
    monkeypatch.setenv("APIKLEY_API_KEY", "key")
    monkeypatch.setitem(KontextClient.__init__.__kwdefaults__, "base_url", simulator.base_url)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ids.txt").write_text("task12345\ntask12346\n")


def programs(*, for_fleet):
    pages = [page for page in PAGES if page != TUTORIAL]
    codes = [s for s in snippets(pages) if not is_for_pytest(s.values[0])]
    return [s for s in codes if is_for_fleet(s.values[0]) is for_fleet]


@pytest.mark.parametrize("code", programs(for_fleet=False))
def test_programs_run(code, user, simulator, monkeypatch):
    """Each program in the pages runs to its end, on virtual time if it has its own simulator."""
    if "Simulator(" in code:
        monkeypatch.setattr(asyncio.events, "new_event_loop", VirtualTimeLoop)
    code = code.replace(DEFAULT_BASE_URL, simulator.base_url)
    exec(compile(code, "<snippet>", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    ("script", "line", "error"),
    [
        (["html_502"], 2, aiohttp.ContentTypeError),
        (itertools.repeat("code_401"), 3, TimeoutError),
        (["failed"], 4, TimeoutError),
        (itertools.repeat("code_429"), 5, TimeoutError),
        (itertools.repeat("generating"), 6, TimeoutError),
    ],
)
def test_the_readmes_own_loop_fails_as_its_table_says(script, line, error, monkeypatch):
    """The loop that a user would write loses an image, or ends without naming the task."""
    (code,) = (code for (code,) in (s.values for s in snippets()) if f"# {line}" in code)
    names = {}

    async def main():
        async with Simulator() as simulator:
            code_here = code.replace(DEFAULT_BASE_URL, simulator.base_url)
            exec(code_here.rpartition("print(")[0], names)
            task_id = simulator.add_task(script=script)
            with pytest.raises(error) as caught:
                await names["wait"](task_id)
            assert error is not TimeoutError or task_id not in str(caught.value)

    monkeypatch.setenv("APIKLEY_API_KEY", "key")
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())


@contextlib.contextmanager
def simulating(command):
    """Run the tutorial's command that serves the simulator, on a free port; give its address."""
    arguments = shlex.split(command.replace("8765", "0"))[1:]
    with subprocess.Popen(
        [*COMMAND, *arguments, "--duration=0"], stdout=subprocess.PIPE, env=environment()
    ) as process:
        try:
            yield json.loads(process.stdout.readline())["baseUrl"]
        finally:
            process.terminate()


def test_the_tutorial_runs_as_it_stands(tmp_path):
    """Each program and command of the tutorial runs beside its simulator, without a key."""
    page = TUTORIAL.read_text(encoding="utf-8")
    _, serve, batch = CONSOLE.findall(page)
    (tmp_path / "kontext").write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    (tmp_path / "kontext").chmod(0o755)
    shell = environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    del shell["APIKLEY_API_KEY"]

    def run(arguments):
        return subprocess.run(
            arguments, cwd=tmp_path, env=shell, capture_output=True, text=True, check=True
        ).stdout

    with simulating(serve) as address, ThreadPoolExecutor() as pool:
        programs = [
            [sys.executable, "-c", code.replace(ADDRESS, address)] for code in BLOCK.findall(page)
        ]
        done = pool.map(run, [*programs, ["sh", "-ec", batch.replace(ADDRESS, address)]])
        created, submitted, polled, watched, several, saved, _ = done
    assert created.startswith("image: http")
    assert submitted.startswith("created: fluxkontext_")
    assert polled.startswith("SUCCESS")
    assert "s: SUCCESS" in watched
    assert [line.split()[0] for line in several.splitlines()] == [
        "task3",
        "task4",
        "task5",
        "task33",
    ]
    assert several.replace(address, ADDRESS) in page
    assert "task33: GENERATE_FAILED" in saved
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3
    assert len(list((tmp_path / "batch").glob("*.jpg"))) == 3
    assert (tmp_path / "batch" / "report.html").exists()


@pytest.mark.parametrize("text", TEXT.findall("\n".join(p.read_text("utf-8") for p in PAGES)))
def test_programs_for_other_engines_compile(text):
    """A program that needs what the tests do not install is Python, and names what exists."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("kontext_async"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("code", [s for s in snippets() if is_for_pytest(s.values[0])])
def test_example_tests_pass(code, tmp_path):
    """Each example of a test passes, in a project that has nothing more."""
    (tmp_path / "test_example.py").write_text(code)
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["kontext_async.testing"]\n')
    environment = os.environ | {"PYTHONPATH": str(Path(kontext_async.__file__).parent.parent)}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-o", "asyncio_default_fixture_loop_scope=function"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # 5: a block that holds only fixtures or settings, with no test to run.
    assert done.returncode == (0 if "def test_" in code else 5), done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sessions_give_what_they_show(page):
    """Each interactive session in the pages has the output that it shows."""
    text = "\n".join(SESSION.findall(page.read_text(encoding="utf-8")))
    session = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(session).failed == 0


def test_the_patterns_match():
    """There are programs, example tests and sessions in the pages."""
    assert len(list(snippets())) > 15
    assert any(is_for_pytest(snippet.values[0]) for snippet in snippets())
    assert any(SESSION.search(page.read_text(encoding="utf-8")) for page in PAGES)


def test_the_readme_has_the_two_commands():
    """One line installs and shows the client, one installs it and runs the tests."""
    lines = (CHECKOUT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "python -m pip install '.[cli,images,report]' && kontext demo" in lines
    assert sum(bool(re.match("python -m pip install .*python -m pytest", x)) for x in lines) == 1


def test_the_readmes_links_lead_to_pages():
    """Each link of the README to a file of the project names one that exists."""
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https:)(.*?)\)|(?:src|srcset)=\"(.*?)\"", text)
    assert len(links) > 10
    assert [link for link in map("".join, links) if not (CHECKOUT / link).is_file()] == []


def test_every_error_has_a_row():
    """The errors page explains each class that can be raised."""
    text = (CHECKOUT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| \{class\}`~kontext_async\.(\w+)`", text, re.MULTILINE))
    assert rows == set(errors.__all__) - {"Handling", "KontextError"}


def test_every_field_and_exit_code_has_a_row():
    """The command's page lists the fields of a result and the exit codes."""
    text = (CHECKOUT / "docs" / "cli.md").read_text(encoding="utf-8")
    fields = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text, re.MULTILINE)
    assert re.findall(r"\w+", " ".join(fields)) == list(
        outcome_line(ErrorOutcome(task_id="t", error=KontextError()))
    )
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)] == list(Exit)


def test_options_that_pages_name_exist():
    """The pages name only options that the command has."""
    (fleet,) = app.registered_groups
    groups = (([], app), (["fleet"], fleet.typer_instance))
    commands = (
        [*names, command.name or command.callback.__name__, "--help"]
        for names, group in groups
        for command in group.registered_commands
    )
    helps = "".join(CliRunner().invoke(app, command).output for command in commands)
    for page in PAGES:
        for line in re.findall(r"^(?:.*\| )?kontext .*$", page.read_text("utf-8"), re.MULTILINE):
            assert set(re.findall(r"--[a-z-]+", line)) <= set(re.findall(r"--[a-z-]+", helps))


def test_docstrings_begin_with_a_verb_or_a_noun():
    """Docstrings, also the tests', have no What, How, Whether or Why at their beginning."""
    found = []
    folders = Path(kontext_async.__file__).parent, Path(__file__).parent
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            # Docstrings, and the strings that document attributes.
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if is_text and str(node.value.value).startswith(tuple(f"{o} " for o in OPENERS)):
                found.append(f"{file}:{node.lineno}: {node.value.value.splitlines()[0]}")
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_in_plain_english(page):
    """No page has a word of `BANNED`."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found = [
        f"{page}:{number}: {match[0]!r} in: {line}"
        for number, line in enumerate(lines, 1)
        if (match := BANNED.search(line))
    ]
    assert not found, "\n" + "\n".join(found)
