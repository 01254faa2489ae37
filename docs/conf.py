"""How the documentation is built, and the pages' parts that come from the program itself."""

from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent.parent))

from kontext_async import TaskStatus, __version__
from kontext_async.cli.app import app as kontext

project = "kontext-async"
author = "kontext-async contributors"
project_copyright = author
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest"]
exclude_patterns = ["_build"]
html_theme = "furo"
man_pages = [("cli", "kontext", "create image-generation tasks and wait for them", author, 1)]
html_title = f"{project} {release}"
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
default_role = "py:obj"
# No inventories of other projects: the documentation builds without a network.
nitpick_ignore_regex = [
    ("py:class", r"_asyncio\.Future"),  # as Python 3.11 names it
    ("py:class", r".*\.Saver"),  # a protocol that `ImageSaver` implements
    ("py:class", r".*\.(SharedLimit|SlidingWindow)"),  # values that are only passed on
    (
        "py:.*",
        r"(aiohttp|asyncio|collections|datetime|logging|os|pathlib|random|tenacity|types|typing)\..*",
    ),
]


def link_from_the_top(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """Link a name in a docstring by where users import it from."""
    if node.get("refdomain") != "py":
        return None
    python = env.get_domain("py")
    names = ("", ".results", ".callbacks", ".fleet")
    for package in [f"kontext_async{name}" for name in names]:
        found = python.resolve_xref(
            env,
            node["refdoc"],
            app.builder,
            node["reftype"],
            f"{package}.{node['reftarget']}",
            node,
            text,
        )
        if found is not None:
            return found
    return None


class StatusTable(SphinxDirective):
    """The API's status flags, from `TaskStatus`."""

    def run(self) -> list[nodes.Node]:
        rows = [
            f"| {flag.value} | `{flag.name}` | {flag.phase} | {flag.meaning} |"
            for flag in TaskStatus
        ]
        head = ["| flag | status | phase | meaning |", "|---|---|---|---|"]
        return self.parse_text_to_nodes("\n".join(head + rows))


class CliHelp(SphinxDirective):
    """What the command says of itself, one section for each of its commands."""

    def run(self) -> list[nodes.Node]:
        runner = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
        commands = [[c.name or c.callback.__name__] for c in kontext.registered_commands]
        for group in kontext.registered_groups:
            inner = group.typer_instance.registered_commands
            commands += [[group.name, c.name or c.callback.__name__] for c in inner]
        parts = []
        for arguments in ([], *commands):
            said = runner.invoke(kontext, [*arguments, "--help"], prog_name="kontext")
            title = " ".join(["kontext", *arguments])
            parts.append(f"## {title}\n\n```text\n{said.stdout.strip()}\n```\n")
        return self.parse_text_to_nodes("\n".join(parts), allow_section_headings=True)


def setup(app: Sphinx) -> None:
    """Register the directives and the links."""
    app.connect("missing-reference", link_from_the_top)
    app.add_directive("status-table", StatusTable)
    app.add_directive("cli-help", CliHelp)
