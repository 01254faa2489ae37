"""Commands whose help pages and usage errors are in the words of the rest."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from kontext_async.cli.output import fail, translate_output_errors
from kontext_async.cli.running import exit_on_output_error

__all__ = ["Command", "Group", "add_commands"]

# The messages of Typer, and the same in the words of the rest.
_WORDINGS = (
    (re.compile(r"Invalid value for '(.+)': Input should (be [^,]+).*"), r"\1 must \2"),
    (re.compile(r" \(Possible options: (.+)\)"), r". Did you mean \1?"),
    (re.compile(r"Got unexpected extra argument(?:\(s\)|s)? \((.+)\)"), r"too many arguments: \1"),
)
_RANGE = re.compile(r"(?:; |  \[)[\d.]*<?=?x[<>]=[\d.]+(?=\])")
_WHOLE = re.compile(r"(\[default: \d+)\.0\b")

_EXAMPLES: Mapping[str, str] = {
    "generate": """
        kontext generate "a lighthouse at night" --into pictures
        kontext generate --from prompts.txt --into pictures --report
    """,
    "edit": """
        kontext edit https://example.com/day.png "make it night" --into pictures
    """,
    "wait": """
        kontext wait TASK1 TASK2
        kontext wait --from ids.txt --summary > results.jsonl
    """,
    "batch": """
        kontext batch --from ids.txt --into pictures --report
        kontext batch --into pictures --retry-failed
    """,
    "resolve": """
        kontext resolve pictures KEY --task-id TASK1
        kontext resolve pictures KEY --abandon
    """,
    "simulate": """
        kontext simulate --duration 3 --failure-rate 0.1 --rate-limit 20/10
    """,
    "submit": """
        kontext submit --from ids.txt --dsn postgresql://user@host/fleet
    """,
    "worker": """
        kontext worker --dsn postgresql://user@host/fleet --into pictures
    """,
    "prune": """
        kontext fleet prune postgresql://user@host/fleet --older-than 30d
    """,
}


def add_commands(
    app: typer.Typer, commands: Mapping[str, Mapping[str, Callable[..., None]]]
) -> None:
    """Add functions as commands, by heading and name."""
    for heading, functions in commands.items():
        for name, function in functions.items():
            app.command(
                name,
                cls=Command,
                rich_help_panel=heading,
                short_help=(function.__doc__ or "").partition("\n")[0],
                epilog=inspect.cleandoc(_EXAMPLES.get(name, "")),
            )(function)


@contextmanager
def _checking(ctx: Any) -> Generator[None]:
    """Exit with a message where words of the command line are wrong, or help cannot be written."""
    try:
        with exit_on_output_error(), translate_output_errors():
            yield
    except typer.TyperException as error:
        problem = error.format_message().removesuffix(".")
        for pattern, wording in _WORDINGS:
            problem = pattern.sub(wording, problem)
        variable = getattr(getattr(error, "param", None), "envvar", None)
        if variable and problem.startswith("Missing"):
            problem += f": give it, or set {variable}"
        fail(f"{problem[0].lower()}{problem[1:]}\nFor help: {ctx.command_path} -h")


class Command(TyperCommand):
    """A command whose help says ``ID``, where Typer says ``{ID}`` and ``ID <str>``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options and the arguments."""
        with _checking(ctx):
            return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and the options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            name, text = record[0], _WHOLE.sub(r"\1", _RANGE.sub("", record[1]))
            if parameter.param_type_name == "argument":
                name = parameter.metavar or str(parameter.name).upper()
                sections["Arguments"].append((name, text))
            else:
                sections["Options"].append((name, text))
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each on one line."""
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Group(TyperGroup):
    """A group of commands, which its help page has under headings."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands with their headings."""
        sections: dict[str, list[tuple[str, str]]] = {}
        width = max(map(len, self.commands))
        for name, command in self.commands.items():
            heading = str(getattr(command, "rich_help_panel", ""))
            row = (name.ljust(width), command.get_short_help_str(limit=formatter.width))
            sections.setdefault(heading, []).append(row)
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options before the command's name; without any words, show the help page.

        ``help`` before the name of a command is ``--help`` behind it.
        """
        if not args:
            return super().parse_args(ctx, args)
        if args[0] == "help":
            args = [*args[1:], "--help"]
        with _checking(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the words name, and the words that are left for it."""
        with _checking(ctx):
            return super().resolve_command(ctx, args)
