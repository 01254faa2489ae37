"""An event loop whose clock jumps to the next timer instead of sleeping.

Sockets within the process still work: whatever the kernel has ready goes first, and time moves
on only when nothing is. A jump while a thread works would be too early, so keep threads out.
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

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
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
