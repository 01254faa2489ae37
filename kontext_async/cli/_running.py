"""From a coroutine to an exit code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import typer

from kontext_async.cli._output import Exit, kind, say, silence_stdout
from kontext_async.errors import KontextError


def run(
    main: Coroutine[Any, Any, Exit], interrupted: Callable[[], None] = lambda: None
) -> NoReturn:
    """Run a command and exit with its code; ``interrupted`` has the last word after Ctrl-C."""
    try:
        code = asyncio.run(main)
    except KeyboardInterrupt:
        interrupted()
        code = Exit.INTERRUPTED
    except BrokenPipeError:
        silence_stdout()
        code = Exit.BROKEN_PIPE
    except KontextError as error:
        say(f"kontext: {error}")
        code = kind(error)[1]
    raise typer.Exit(code)
