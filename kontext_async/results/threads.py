"""Work in threads, which a cancellation waits for."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar, TypeVarTuple, Unpack

__all__ = ["Threads", "run_in_thread", "uncancellable", "until_ended"]

_Args = TypeVarTuple("_Args")
_T = TypeVar("_T")

# Work for a thread returns what remains to be done on the event loop.
_Work: TypeAlias = Callable[[], Callable[[], object]]
_Inbox: TypeAlias = "SimpleQueue[_Work | None]"  # of a thread; None ends it

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
    are Python code in both threads. The thread that ended its work last is the first to get more,
    because the processor's caches still hold what it needs.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._count = 0
        self._idle: list[_Inbox] = []
        self._waiting: deque[_Work] = deque()  # for a thread
        self._is_closed = False

    def start(self, work: _Work) -> None:
        """Do work in a thread, and then call on the event loop what it returns.

        The work must not raise. Raises `RuntimeError` if there is no thread and none can be
        started.
        """
        if not self._idle and self._count < _MOST:
            self._start_thread()
        if self._idle:
            self._idle.pop().put(work)
        else:
            self._waiting.append(work)

    def close(self) -> None:
        """Let each thread end after its work; work that is started later has its own thread."""
        self._is_closed = True
        while self._idle:
            self._end_thread(self._idle.pop())

    def _start_thread(self) -> None:
        inbox: _Inbox = SimpleQueue()
        try:
            # A daemon, because what is left open must not keep the interpreter from its end.
            threading.Thread(
                target=self._run, args=(inbox,), name="kontext-async", daemon=True
            ).start()
        except RuntimeError:
            if not self._count:
                raise
        else:
            self._count += 1
            self._idle.append(inbox)

    def _end_thread(self, inbox: _Inbox) -> None:
        self._count -= 1
        inbox.put(None)

    def _run(self, inbox: _Inbox) -> None:
        while (work := inbox.get()) is not None:
            end = work()
            try:
                self._loop.call_soon_threadsafe(self._end, inbox, end)
            except RuntimeError:  # the event loop was closed: nobody waits
                return
            del work, end  # which keep what they work on

    def _end(self, inbox: _Inbox, end: Callable[[], object]) -> None:
        if self._waiting:
            inbox.put(self._waiting.popleft())
        elif self._is_closed:
            self._end_thread(inbox)
        else:
            self._idle.append(inbox)
        end()
