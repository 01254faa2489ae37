"""An event loop whose clock jumps to the next timer instead of sleeping.

Sockets within the process still work: whatever the kernel has ready goes first, and time moves
on only when nothing is. While a thread of `run_in_executor` or `Threads` works, the clock stands
still.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

from kontext_async.results.threads import Threads


class _JumpingSelector:
    """A selector that turns waiting into a jump of the loop's clock."""

    # A loopback write is readable at once, but its reader may need a second look to see it.
    _GRACE = 0.0005

    def __init__(self) -> None:
        self._real = selectors.DefaultSelector()
        self.now = 0.0
        self.threads = 0  # at work for the loop; each wakes it at its end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or (timeout > 0 and self.threads):
            return self._real.select(None)
        has_sockets = len(self._real.get_map()) > 1  # one is the loop's own wake-up pipe
        ready = self._real.select(min(timeout, self._GRACE) if has_sockets else 0)
        if not ready:
            self.now += max(timeout, 0.0)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Keeps virtual time, from 0; timers fire in order and without delay."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)  # type: ignore[arg-type]  # a selector by duck typing

    def time(self) -> float:
        return self._jumping.now

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:
        work = super().run_in_executor(executor, func, *args)
        self.thread_began()
        work.add_done_callback(self.thread_ended)
        return work

    def thread_began(self) -> None:
        self._jumping.threads += 1

    def thread_ended(self, _: object = None) -> None:
        self._jumping.threads -= 1

    async def shutdown_default_executor(self, *timeout: float | None) -> None:
        """Wait for the thread that joins the others; Python 3.12 gives it a timeout."""
        self.thread_began()
        try:
            await super().shutdown_default_executor(*timeout)
        finally:
            self.thread_ended()


def _start(
    threads: Threads, work: Callable[[], Callable[[], object]], start: Any = Threads.start
) -> None:
    """Start work as `Threads` does, which tells the event loop only at its end."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, VirtualTimeLoop):
        return start(threads, work)

    def counted() -> Callable[[], object]:
        end = work()

        def ended() -> None:
            loop.thread_ended()
            end()

        return ended

    start(threads, counted)
    return loop.thread_began()


Threads.start = _start  # type: ignore[method-assign]
