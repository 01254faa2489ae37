"""Work in threads, which a cancellation waits for."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar, TypeVarTuple, Unpack

__all__ = ["Threads", "run_in_thread", "uncancellable", "until_ended"]

_Args = TypeVarTuple("_Args")
_T = TypeVar("_T")

_MOST = min(32, (os.cpu_count() or 1) + 4)  # as many as an executor has by default


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


class Threads:
    """Threads that work for the running event loop alone, started as they are needed.

    To hand work over takes half the time that it takes with an executor, whose futures and locks
    are Python code in both threads. They contend for Python's lock as long as it runs.
    """

    def __init__(self) -> None:
        self._pending = 0  # pieces of work that have not ended
        self._loop = asyncio.get_running_loop()
        self._work: SimpleQueue[Callable[[], Callable[[], object]] | None] = SimpleQueue()
        self._alive = 0  # threads that will take work
        self._is_closed = False

    def start(self, work: Callable[[], Callable[[], object]]) -> None:
        """Do work in a thread, and then call on the event loop what it returns.

        The work must not raise. Raises `RuntimeError` if there is no thread and none can be
        started.
        """
        if self._pending >= self._alive < _MOST:
            self._start_thread()
        self._pending += 1
        self._work.put(work)
        if self._is_closed:
            self._end_threads()

    def close(self) -> None:
        """Let each thread end after its work; work that is started later has its own thread."""
        self._is_closed = True
        self._end_threads()

    def _start_thread(self) -> None:
        try:
            # A daemon, because what is left open must not keep the interpreter from its end.
            threading.Thread(target=self._run, name="kontext-async", daemon=True).start()
        except RuntimeError:
            if not self._alive:
                raise
        else:
            self._alive += 1

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            end = work()
            try:
                self._loop.call_soon_threadsafe(self._end, end)
            except RuntimeError:  # the event loop was closed: nobody waits
                return
            del work, end  # which keep what they work on

    def _end(self, end: Callable[[], object]) -> None:
        self._pending -= 1
        end()

    def _end_threads(self) -> None:
        for _ in range(self._alive):
            self._work.put(None)
        self._alive = 0
