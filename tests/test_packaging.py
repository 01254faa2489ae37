"""The layout: who imports whom, what is public, what importing loads, and what ships."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import kontext_async
from kontext_async._version import __version__

PACKAGE = Path(kontext_async.__file__).parent
CHECKOUT = Path(__file__).parent.parent

CORE = {"errors", "models"}
WAITING = CORE | {"pacing", "polling", "schedule", "transport", "wire"}
CLIENT = WAITING | {"batch", "client"}

# A module, or a sub-package: which of the others it may import. "" is the package itself.
ALLOWED = {
    "_version": set(),
    "models": set(),
    "errors": {"models"},
    "wire": CORE,
    "schedule": CORE,
    "pacing": CORE,
    "transport": CORE | {"_version", "pacing", "schedule", "wire"},
    "polling": CORE | {"schedule"},
    "batch": CORE | {"polling", "transport", "wire"},
    "client": WAITING | {"batch"},
    "": CLIENT | {"_version"},
    "simulator": {"models"},
    "testing": {"", "client", "simulator"},
    "results": {"", "_version", *CLIENT},
    "cli": {"", "_version", *CLIENT, "results", "simulator"},
    "__main__": {"cli"},
}
PURE = ["errors.py", "models.py", "pacing/limits.py", "schedule.py", "wire/records.py"]
IMPURE = {"aiohttp", "asyncio", "random", "sqlite3", "time"}


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def unit(path):
    """The row of the table that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").removeprefix("__init__")


def imported(path):
    """The dotted names a file imports anywhere in it, with what it takes from each."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name):
    """The row that an imported name of ours belongs to."""
    part = [*name.split("."), ""][1]
    return part if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists() else ""


def public_modules():
    found = pkgutil.walk_packages([str(PACKAGE)], "kontext_async.")
    return ["kontext_async", *(m.name for m in found if "._" not in m.name)]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_import_only_upward_in_the_layout(path):
    """Each file imports only those of our modules that its row of the table allows."""
    ours = {own(name) for name in imported(path) if name.split(".")[0] == "kontext_async"}
    assert ours - {unit(path)} <= ALLOWED[unit(path)]


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_no_clock_loop_network_or_chance(name):
    """Decoding, models, errors and schedules are functions of their arguments."""
    tops = {module.split(".")[0] for module in imported(PACKAGE / name)}
    assert not tops & IMPURE


@pytest.mark.parametrize("name", public_modules())
def test_every_public_module_lists_what_it_offers(name):
    """``__all__`` exists, is true, and complete for what the module itself defines."""
    module = importlib.import_module(name)
    if name == "kontext_async.testing":
        # pytest wants to be the first to import a plugin, in the tests of this one.
        del sys.modules[name]
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, attribute) for attribute in module.__all__)
    defined = {
        attribute
        for attribute, value in vars(module).items()
        if not attribute.startswith("_")
        and getattr(value, "__module__", None) == name
        and (inspect.isclass(value) or inspect.isroutine(value))
    }
    assert defined <= set(module.__all__)


def public_members():
    for name in kontext_async.__all__:
        thing = getattr(kontext_async, name)
        yield name, thing
        if inspect.isclass(thing):
            yield from (
                (f"{name}.{attribute}", value)
                for attribute, value in vars(thing).items()
                if not attribute.startswith("_")
                and (inspect.isroutine(value) or isinstance(value, property))
            )


def test_everything_public_says_what_it_is():
    """Classes, functions, methods and properties of the public face have docstrings."""
    assert not [
        name
        for name, thing in public_members()
        if not isinstance(thing, str) and not inspect.getdoc(thing)
    ]


def test_public_classes_belong_to_the_package_in_reprs_and_docs():
    """The errors and models are importable from the top, whatever file they live in."""
    for name in ("errors", "models"):
        module = importlib.import_module(f"kontext_async.{name}")
        assert set(module.__all__) <= set(kontext_async.__all__)


def test_importing_the_package_loads_nothing_that_an_extra_brings():
    """`import kontext_async` is light: no CLI, simulator, database, image or template library."""
    heavy = ["typer", "rich", "click", "sqlite3", "PIL", "jinja2", "pytest", "tenacity.tornadoweb"]
    ours = ["cli", "simulator", "testing", "results"]
    code = (
        "import sys, kontext_async;"
        f"print([m for m in {heavy + [f'kontext_async.{o}' for o in ours]} if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=CHECKOUT,
        capture_output=True,
        check=True,
    )
    return folder


def test_the_wheel_holds_the_package_its_types_and_its_command(distributions):
    """Every source file and `py.typed` are in the wheel, with nothing beside the package."""
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (n for n in names if n.endswith("entry_points.txt"))
        assert "kontext = kontext_async.cli:main" in archive.read(entry_points).decode()
    assert "kontext_async/py.typed" in names
    templates = (PACKAGE / "results" / "report" / "templates").iterdir()
    assert {str(p.relative_to(PACKAGE.parent)) for p in (*sources(), *templates)} <= names
    assert {n.split("/")[0] for n in names} == {
        "kontext_async",
        f"kontext_async-{__version__}.dist-info",
    }


def test_the_sdist_holds_what_it_takes_to_build_and_test(distributions):
    """The source distribution has the listed contents and nothing that lies about."""
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "tests/conftest.py"} <= names
    assert "kontext_async/results/report/templates/report.html.j2" in names
    assert {n.split("/")[0] for n in names} <= {
        "CHANGELOG.md",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        ".gitignore",
        "docs",
        "kontext_async",
        "noxfile.py",
        "pyproject.toml",
        "tests",
    }
    assert not [n for n in names if "__pycache__" in n or "_build" in n]
