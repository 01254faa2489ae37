from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import textwrap
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["tests", "lint", "typing", "docs"]

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def _install_wheel(session: nox.Session, extra: str) -> None:
    folder = Path(session.create_tmp()) / "wheel"
    session.run(
        "python", "-m", "pip", "wheel", ".", "--no-deps", "--quiet", "--wheel-dir", str(folder)
    )
    wheel = max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    session.install("--force-reinstall", "--no-deps", str(wheel))
    session.install(f"{wheel}[{extra}]")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests against the built wheel; coverage must be complete."""
    session.install("pip")
    _install_wheel(session, "test")
    # `pytest` and not `python -m pytest`, which would put the checkout before the wheel.
    session.run("pytest", "--cov", *session.posargs)


@nox.session
def debug(session: nox.Session) -> None:
    """Run the tests with asyncio's debug mode on."""
    session.install("-e", ".[test]")
    session.run("pytest", "--override-ini=asyncio_debug=true", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    session.install("ruff>=0.17,<0.18")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the package, a user's sample, the examples and the pages' programs, as a user would."""
    session.install(
        "-e", ".[test]", "django-stubs>=5.2", "mypy>=2.4,<3", "pyright[nodejs]>=1.1.414"
    )
    session.run("mypy")
    session.run("pyright")
    # A notebook's cells await at the top level: checked as the body of one coroutine.
    notebook = json.loads(Path("docs/examples/notebook.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    programs = ["async def notebook() -> None:\n" + textwrap.indent("\n".join(cells), "    ")]
    for page in (Path("README.md"), *Path("docs").rglob("*.md")):
        blocks = re.findall(
            r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
        )
        programs += [block for block in blocks if "kontext_async" in block]
    folder = Path(session.create_tmp())
    files = [folder / f"program{number}.py" for number in range(len(programs))]
    for file, program in zip(files, programs, strict=True):
        file.write_text(f"# pyright: strict\n{program}\n", encoding="utf-8")
    session.run("mypy", *map(str, files))
    session.run("pyright", *map(str, files))


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation without a warning, and run its examples."""
    session.install("-e", ".[docs]")
    build = ("sphinx-build", "-nW", "--keep-going")
    for builder in ("html", "doctest", "man"):
        session.run(*build, "-b", builder, "docs", f"docs/_build/{builder}")


@nox.session
def pictures(session: nox.Session) -> None:
    """Make the pictures of the README and the documentation anew."""
    session.install("-e", ".[cli,images,report,docs]")
    session.run("python", "docs/pictures.py")


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks; with `--docs`, make the tables and plots of the documentation anew."""
    session.install("-e", ".[bench]")
    session.run("python", "tests/benchmarks/run.py", *session.posargs)


@nox.session
def crash(session: nox.Session) -> None:
    """Kill and restart twenty batches, where the tests have three."""
    session.install("-e", ".[test]")
    environment = {"KONTEXT_CRASHES": "20"}
    files = ("tests/test_crash.py", "tests/test_crash_generate.py")
    session.run("pytest", *files, *session.posargs, env=environment)


@nox.session
def chaos(session: nox.Session) -> None:
    """Meet two hundred seeds of every fault at once, where the tests meet three."""
    session.install("-e", ".[test]")
    session.run("pytest", "tests/test_chaos.py", *session.posargs, env={"KONTEXT_CHAOS": "200"})


@nox.session
def fleet(session: nox.Session) -> None:
    """Kill two of three workers in twenty runs of ten thousand tasks."""
    session.install("-e", ".[test]")
    environment = {"KONTEXT_FLEET_RUNS": "20", "KONTEXT_FLEET_TASKS": "10000"}
    session.run("pytest", "tests/test_fleet_crash.py", *session.posargs, env=environment)


@nox.session
def gateways(session: nox.Session) -> None:
    """Wait behind nginx and HAProxy, which limit what passes; a missing one is skipped by name."""
    session.install("-e", ".[test]")
    command = ("pytest", "-rs", "-s", "tests/test_gateways.py", *session.posargs)
    session.run(*command, env={"KONTEXT_GATEWAYS": "1"})


@nox.session(venv_backend="none")
def debian(session: nox.Session) -> None:
    """Run the README's two commands on fresh Debian systems: trixie and sid, or those named."""
    if os.geteuid() or not shutil.which("debootstrap"):
        session.error("This needs root, and debootstrap: apt-get install debootstrap")
    # What is mounted in the folder is seen nowhere outside these namespaces, and gone with them:
    # so the folder may be removed however a run ends.
    isolated = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
    for suite in session.posargs or ["trixie", "sid"]:
        with tempfile.TemporaryDirectory() as folder:
            command = (*isolated, "tests/debian.sh", suite, f"{folder}/{suite}")
            session.run(*command, external=True, interrupt_timeout=60)
