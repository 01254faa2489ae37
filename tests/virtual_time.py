"""An event loop whose clock jumps to the next timer instead of sleeping.

Sockets within the process still work: whatever the kernel has ready goes first, and time moves
on only when nothing is. While a thread of `run_in_executor` works, the clock stands still.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any


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
        self._jumping.threads += 1
        work.add_done_callback(self._thread_ended)
        return work

    def _thread_ended(self, _: object = None) -> None:
        self._jumping.threads -= 1

    async def shutdown_default_executor(self, *timeout: float | None) -> None:
        """Wait for the thread that joins the others; Python 3.12 gives it a timeout."""
        self._jumping.threads += 1
        try:
            await super().shutdown_default_executor(*timeout)
        finally:
            self._thread_ended()
