"""Work in threads, which a cancellation waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, TypeVarTuple, Unpack

__all__ = ["run_in_thread", "uncancellable", "until_ended"]

_Args = TypeVarTuple("_Args")
_T = TypeVar("_T")


async def run_in_thread(function: Callable[[Unpack[_Args]], _T], *args: *_Args) -> _T:
    """Run a function in a thread; a cancellation is raised when the thread has finished it."""
    return await uncancellable(asyncio.get_running_loop().run_in_executor(None, function, *args))


async def uncancellable(work: asyncio.Future[_T]) -> _T:
    """Wait for a thread's work; a cancellation is raised when the work has ended."""
    try:
        await asyncio.wait([work])
    except asyncio.CancelledError:
        await until_ended(work)
        if not work.cancelled():
            work.exception()  # retrieved, so that asyncio does not log it
        raise
    return work.result()


async def until_ended(work: asyncio.Future[Any]) -> None:
    """Wait for a thread's work despite cancellations, so that no thread writes afterwards."""
    while not work.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([work])
