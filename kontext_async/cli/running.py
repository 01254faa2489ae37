"""From what a command does to its exit code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from kontext_async.cli.output import Exit, kind, say, silence_stdout
from kontext_async.errors import KontextError


@contextmanager
def errors_told() -> Generator[None]:
    """End the command where the block raises one of our errors: with what it says, and its code."""
    try:
        yield
    except KontextError as error:
        say(f"kontext: {error}")
        raise typer.Exit(kind(error)[1]) from error


def run(
    main: Coroutine[Any, Any, Exit], interrupted: Callable[[], None] = lambda: None
) -> NoReturn:
    """Run a command and exit with its code; ``interrupted`` has the last word after Ctrl-C."""
    try:
        with errors_told():
            code = asyncio.run(main)
    except KeyboardInterrupt:
        interrupted()
        code = Exit.INTERRUPTED
    except BrokenPipeError:
        silence_stdout()
        code = Exit.BROKEN_PIPE
    raise typer.Exit(code)
