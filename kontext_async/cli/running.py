"""Running a command to its exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

import typer

from kontext_async.cli.output import Exit, OutputError, say, silence
from kontext_async.errors import ConfigurationError, KontextError

_STOPPED = {Exit.INTERRUPTED, Exit.TERMINATED}


@contextmanager
def exit_on_error() -> Generator[None]:
    """Turn an error of the library into its message and an exit code."""
    try:
        yield
    except KontextError as error:
        # The library's advice is an argument of its client; the command has an option for it.
        say(f"kontext: {error}".replace("pass allow_http=True", "add --allow-http"))
        is_usage = isinstance(error, ConfigurationError)
        raise typer.Exit(Exit.USAGE if is_usage else Exit.ERROR) from error


@contextmanager
def exit_on_output_error() -> Generator[None]:
    """Exit with its code where standard output cannot be written."""
    try:
        yield
    except BrokenPipeError:
        silence(sys.stdout)
        raise typer.Exit(Exit.BROKEN_PIPE) from None
    except OutputError as error:
        silence(sys.stdout)
        say(f"kontext: cannot write to standard output: {error}")
        raise typer.Exit(Exit.ERROR) from error


def run(
    main: Coroutine[Any, Any, Exit], on_interrupt: Callable[[], None] = lambda: None
) -> NoReturn:
    """Run a command and exit with its code; call ``on_interrupt`` after Ctrl-C or SIGTERM."""
    with exit_on_output_error(), exit_on_error(), asyncio.Runner() as runner:
        try:
            code = runner.run(_until_sigterm(main))
        except KeyboardInterrupt:
            code = Exit.INTERRUPTED
        if code in _STOPPED:
            on_interrupt()
            # The threads of name resolution cannot be interrupted; closing would await them.
            runner.get_loop().set_default_executor(ThreadPoolExecutor(1))
    raise typer.Exit(code)


async def _until_sigterm(main: Coroutine[Any, Any, Exit]) -> Exit:
    """Run a command; SIGTERM cancels it.

    A handler of our own is heeded as process 1 of a container too, where the system's is not.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None, "coroutines run in tasks"
    is_terminated = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal is_terminated
        is_terminated = True
        loop.call_soon_threadsafe(task.cancel)

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not in the main thread
        return await main
    try:
        return await main
    except asyncio.CancelledError:
        if is_terminated:
            return Exit.TERMINATED
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def leave_at_once(code: object) -> None:
    """End the process if it was interrupted, without waiting for threads that hang."""
    if code in _STOPPED:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(int(code))  # type: ignore[call-overload]
