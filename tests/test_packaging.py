"""The layout: who imports whom, what is public, what importing loads, and what ships."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
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
WAITING = CORE | {
    "fairness",
    "notices",
    "outcomes",
    "pacing",
    "polling",
    "schedule",
    "streams",
    "transport",
    "wire",
}
CLIENT = WAITING | {"batch", "client", "creation"}

# A module or package, and the others that it may import. "" is the package itself.
ALLOWED = {
    "_version": set(),
    "models": set(),
    "errors": {"models"},
    "fairness": set(),
    "notices": set(),
    "outcomes": CORE,
    "wire": CORE,
    "schedule": CORE,
    "pacing": {"errors"},
    "streams": {"errors"},
    "polling": CORE | {"notices", "outcomes", "schedule"},
    "transport": CORE | {"_version", "fairness", "notices", "pacing", "schedule", "wire"},
    "batch": CORE | {"fairness", "outcomes", "polling", "streams", "transport", "wire"},
    "creation": CORE | {"pacing", "transport", "wire"},
    "client": WAITING | {"batch", "creation"},
    "callbacks": CORE | {"wire"},
    "": CLIENT | {"_version"},
    "simulator": {"models"},
    "testing": {"", "client", "simulator"},
    "results/images": {"", "_version", "results", *CLIENT},
    "results/ledger": {"", "results", "results/images", *CLIENT},
    "results/report": {"", "results", "results/images", "results/ledger", *CLIENT},
    "results": {"errors", "results/images", "results/ledger", "results/report"},
    "fleet": {"", "results", "results/images", "results/ledger", *CLIENT},
    "cli": {"", "_version", "callbacks", *CLIENT, "fleet", "results", "simulator"},
    "__main__": {"cli"},
}
PURE = [
    "errors.py",
    "models.py",
    "outcomes.py",
    "pacing/limits.py",
    "pacing/pauses.py",
    "schedule.py",
    "wire",
]
IMPURE = {"aiohttp", "asyncio", "random", "sqlite3", "time"}


def sources(place=""):
    found = PACKAGE / place
    return sorted(found.rglob("*.py")) if found.is_dir() else [found]


def row(parts):
    """The row of the table that a file or a dotted name of ours belongs to."""
    name = "/".join(parts)
    return max((r for r in ALLOWED if f"{name}/".startswith(f"{r}/")), key=len, default="")


def imported(path):
    """The dotted names a file imports anywhere in it, with what it takes from each."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_of_ours(path):
    """The same for our own package, each name as its parts below it."""
    names = (name.split(".") for name in imported(path))
    return [parts[1:] for parts in names if parts[0] == "kontext_async"]


def of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts


EACH_FILE = pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))


def public_modules():
    found = pkgutil.walk_packages([str(PACKAGE)], "kontext_async.")
    names = (m.name for m in found if "._" not in m.name and ".cli." not in m.name)
    return ["kontext_async", *names]


@EACH_FILE
def test_modules_import_only_upward_in_the_layout(path):
    """Each file imports only the modules of ours that its row of the table allows."""
    own = row(of(path))
    assert {row(parts) for parts in imported_of_ours(path)} - {own} <= ALLOWED[own]


@EACH_FILE
def test_no_module_imports_a_private_name_of_another(path):
    """A name with an underscore stays in its file; the version is everybody's."""
    parts = {part for parts in imported_of_ours(path) for part in parts}
    assert not {part for part in parts if part.startswith("_")} - {"_version", "__version__"}


@pytest.mark.parametrize("path", [path for place in PURE for path in sources(place)])
def test_pure_modules_know_no_clock_loop_network_or_chance(path):
    """Decoding, models, errors and schedules are functions of their arguments."""
    assert not {module.split(".")[0] for module in imported(path)} & IMPURE


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
    heavy = [
        "typer",
        "rich",
        "click",
        "sqlite3",
        "PIL",
        "jinja2",
        "pytest",
        "psycopg",
        "procrastinate",
        "tenacity.tornadoweb",
    ]
    ours = ["cli", "fleet", "simulator", "testing", "results"]
    code = (
        "import sys, kontext_async;"
        f"print([m for m in {heavy + [f'kontext_async.{o}' for o in ours]} if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_core_needs_four_distributions():
    """Everything that is needed beyond these comes with an extra."""
    needed = importlib.metadata.requires("kontext-async")
    core = {re.match(r"[\w-]+", line)[0] for line in needed if "extra ==" not in line}
    assert core == {"aiohttp", "attrs", "cattrs", "tenacity"}


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


def test_the_hosted_ci_names_test_files_that_exist():
    """A renamed file would make its job fail, or run fewer tests."""
    workflow = CHECKOUT / ".github" / "workflows" / "ci.yml"
    if not workflow.exists():
        pytest.skip("not in a source distribution")
    named = re.findall(r"tests/\w+\.py", workflow.read_text(encoding="utf-8"))
    assert len(named) > 5
    assert all((CHECKOUT / name).is_file() for name in named)


# The packages that a module may import beside the core's and the standard library's: its extra's.
EXTRA_OF = {
    "cli": {"platformdirs", "rich", "typer"},
    "fleet": {"procrastinate", "psycopg", "psycopg_pool"},
    "results/images": {"PIL"},
    "results/report": {"PIL", "jinja2", "markupsafe"},
    "simulator": {"PIL"},
    "testing": {"pytest", "pytest_asyncio"},
}
# aiohttp brings multidict and yarl, whose types are part of its interface.
CORE_PACKAGES = {"aiohttp", "attr", "attrs", "cattrs", "multidict", "tenacity", "yarl"}


@pytest.mark.parametrize("path", sources(), ids=str)
def test_only_declared_dependencies_are_imported(path):
    known = CORE_PACKAGES | EXTRA_OF.get(
        row(path.relative_to(PACKAGE).with_suffix("").parts), set()
    )
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"kontext_async"} <= known
