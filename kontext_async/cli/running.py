"""Running a command to its exit code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from kontext_async.cli.output import Exit, say, silence_stdout
from kontext_async.errors import ConfigurationError, KontextError


@contextmanager
def exit_on_error() -> Generator[None]:
    """Turn an error of the library into its message and an exit code."""
    try:
        yield
    except KontextError as error:
        say(f"kontext: {error}")
        is_usage = isinstance(error, ConfigurationError)
        raise typer.Exit(Exit.USAGE if is_usage else Exit.ERROR) from error


def run(
    main: Coroutine[Any, Any, Exit], on_interrupt: Callable[[], None] = lambda: None
) -> NoReturn:
    """Run a command and exit with its code; call ``on_interrupt`` after Ctrl-C."""
    try:
        with exit_on_error():
            code = asyncio.run(main)
    except KeyboardInterrupt:
        on_interrupt()
        code = Exit.INTERRUPTED
    except BrokenPipeError:
        silence_stdout()
        code = Exit.BROKEN_PIPE
    raise typer.Exit(code)
