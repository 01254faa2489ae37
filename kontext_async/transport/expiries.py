"""Times at which waiters give up, with one timer of the event loop for all of them."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Iterator

__all__ = ["Expiries"]

_MAX_EXPIRED = 500  # waiters that one callback ends, so that it ends soon
_MAX_STALE = 1000  # entries of waiters that are gone and kept, beyond a quarter of those waiting


class Expiries:
    """Ends futures with `TimeoutError` at their times; iterating gives the waiting ones."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[float]] = set()
        self._heap: list[tuple[float, int, asyncio.Future[float]]] = []
        self._order = itertools.count()
        self._timer: asyncio.Handle | None = None
        self._wakes_at = math.inf  # not all loops have timers that know it

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[asyncio.Future[float]]:
        return iter(self._waiting)

    def add(self, future: asyncio.Future[float], until: float) -> None:
        """Let a future end at ``until`` on the loop's clock, unless that is infinity."""
        self._waiting.add(future)
        if until < math.inf:
            heapq.heappush(self._heap, (until, next(self._order), future))
            self._wake_at(self._heap[0][0])

    def discard(self, future: asyncio.Future[float]) -> None:
        """Forget a future that nobody awaits any longer."""
        self._waiting.discard(future)
        if not self._waiting:
            self._heap.clear()
            self._cancel_timer()
        elif len(self._heap) > 1.25 * len(self._waiting) + _MAX_STALE:
            self._heap = [entry for entry in self._heap if entry[2] in self._waiting]
            heapq.heapify(self._heap)

    def _wake_at(self, when: float) -> None:
        if self._wakes_at <= when:
            return
        self._cancel_timer()
        self._wakes_at = when
        self._timer = asyncio.get_running_loop().call_at(when, self._expire, when)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._wakes_at = math.inf

    def _expire(self, when: float) -> None:
        self._cancel_timer()
        now = max(when, asyncio.get_running_loop().time())  # the loop may call a clock tick early
        for _ in range(_MAX_EXPIRED):
            if not self._heap or self._heap[0][0] > now:
                break
            future = heapq.heappop(self._heap)[2]
            if not future.done():
                future.set_exception(TimeoutError())
        if self._heap:
            self._wake_at(self._heap[0][0])
