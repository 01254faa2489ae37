"""Waiters for polls of known tasks that want a permit now, each class of them in a heap."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import operator
from typing import NamedTuple

__all__ = ["Due", "DueQueue"]

# Waiters among which a probe goes to the one that has waited longest. Tasks that have probed in
# vain leave their class or wait behind the others, so that no few of them probe every time.
_MAX_CANDIDATES = 1000


class Due(NamedTuple):
    """A waiter, ordered by the deadline of its wait."""

    deadline: float
    order: int
    wanted_at: float
    permit: asyncio.Future[float]
    failing: int  # 0 if the task's last poll was answered, 1 if it failed, 2 if none ever was


class DueQueue:
    """The waiters that are due, by deadline; entries whose permit is done count as gone.

    There is a heap for each value of ``failing``, because only healthy tasks should probe an outage
    as long as there are some.
    """

    def __init__(self) -> None:
        self._heaps: tuple[list[Due], ...] = ([], [], [])

    def __bool__(self) -> bool:
        return any(heap and _has_live(heap) for heap in self._heaps)

    @property
    def entries(self) -> int:
        """The number of entries, those that are done included."""
        return sum(map(len, self._heaps))

    def push(self, due: Due) -> None:
        heapq.heappush(self._heaps[due.failing], due)

    def first(self) -> Due | None:
        """Return the waiter with the earliest deadline, None if there is none."""
        first = None
        for heap in self._heaps:
            if heap and _has_live(heap) and (first is None or heap[0] < first):
                first = heap[0]
        return first

    def remove_first(self, first: Due) -> None:
        heapq.heappop(self._heaps[first.failing])

    def prober(self) -> Due:
        """Return a waiter of the healthiest class; its entry is dropped once its permit is done."""
        heap = next(heap for heap in self._heaps if _has_live(heap))
        live = (due for due in heap if not due.permit.done())
        return min(itertools.islice(live, _MAX_CANDIDATES), key=operator.attrgetter("wanted_at"))

    def has_healthy(self) -> bool:
        """Return True if the last poll of one of the tasks was answered."""
        return _has_live(self._heaps[0])

    def drop_done(self) -> None:
        """Drop all entries that are done, not only those at the front."""
        for heap in self._heaps:
            heap[:] = (due for due in heap if not due.permit.done())
            heapq.heapify(heap)

    def clear(self) -> None:
        for heap in self._heaps:
            heap.clear()


def _has_live(heap: list[Due]) -> bool:
    """Return True if a heap has an entry that is not done; drop those from the front that are."""
    while heap and heap[0].permit.done():
        heapq.heappop(heap)
    return bool(heap)
