"""Commands whose help pages and usage errors are in the words of the rest."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from kontext_async.cli.output import fail

__all__ = ["Command", "Group"]

_BAD_VALUE = re.compile(r"Invalid value for '(.+)': Input should (be [^,]+).*")


@contextmanager
def _checking(ctx: Any) -> Generator[None]:
    """Exit with a message where words of the command line are wrong."""
    try:
        yield
    except typer.TyperException as error:
        problem = _BAD_VALUE.sub(r"\1 must \2", error.format_message()).removesuffix(".")
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
            if parameter.param_type_name == "argument":
                name = parameter.metavar or str(parameter.name).upper()
                sections["Arguments"].append((name, record[1]))
            else:
                sections["Options"].append(record)
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


class Group(TyperGroup):
    """A group of commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options before the command's name; without any words, show the help page."""
        if not args:
            return super().parse_args(ctx, args)
        with _checking(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the words name, and the words that are left for it."""
        with _checking(ctx):
            return super().resolve_command(ctx, args)
