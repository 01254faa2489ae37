"""Times at which waits and requests end, with one timer of the event loop for all of them."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["Deadline", "Expiries", "time_out"]

_T = TypeVar("_T")

_MAX_EXPIRED = 500  # that one callback ends, so that it ends soon
_MAX_STALE = 1000  # entries of those that are gone and kept, beyond a quarter of those waiting


def time_out(future: asyncio.Future[float]) -> None:
    """End a future with `TimeoutError`, unless it has ended."""
    if not future.done():
        future.set_exception(TimeoutError())


class Deadline:
    """A block that `expire` ends with `TimeoutError`, as `asyncio.timeout` does."""

    __slots__ = ("_cancelling", "_task", "expired")

    def __init__(self) -> None:
        self.expired = False
        self._task: asyncio.Task[object] | None = None  # while it is in the block

    def expire(self) -> None:
        """End the block; once it has ended, this has no effect."""
        if self._task is not None and not self.expired:
            self.expired = True
            self._task.cancel()

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        assert self._task is not None, "coroutines run in tasks"
        self._cancelling = self._task.cancelling()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        assert task is not None, "it was entered"
        # As in asyncio's own: a cancellation by somebody else takes precedence.
        is_ours = self.expired and task.uncancel() <= self._cancelling
        if is_ours and exc_type is asyncio.CancelledError:
            raise TimeoutError from exc


class Expiries(Generic[_T]):
    """Calls ``expire`` with what waits, each at its own time; iterating gives all that wait.

    ``expire`` may add the same again.
    """

    def __init__(self, expire: Callable[[_T], object]) -> None:
        self._expire = expire
        self._waiting: set[_T] = set()
        self._heap: list[tuple[float, int, _T]] = []
        self._order = itertools.count()
        self._timer: asyncio.Handle | None = None
        self._wakes_at = math.inf  # not all loops have timers that know it

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, item: _T) -> bool:
        return item in self._waiting

    def __iter__(self) -> Iterator[_T]:
        return iter(self._waiting)

    def add(self, item: _T, until: float) -> None:
        """Let an item end at ``until`` on the loop's clock, unless that is infinity."""
        self._waiting.add(item)
        if until < math.inf:
            heapq.heappush(self._heap, (until, next(self._order), item))
            if until < self._wakes_at:
                self._wake_at(until)

    def discard(self, item: _T) -> None:
        """Forget an item that nobody waits for any longer."""
        self._waiting.discard(item)
        if not self._waiting:
            self._heap.clear()
            self._cancel_timer()
        elif len(self._heap) > 1.25 * len(self._waiting) + _MAX_STALE:
            self._heap = [entry for entry in self._heap if entry[2] in self._waiting]
            heapq.heapify(self._heap)

    def _wake_at(self, when: float) -> None:
        self._cancel_timer()
        self._wakes_at = when
        self._timer = asyncio.get_running_loop().call_at(when, self._wake, when)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._wakes_at = math.inf

    def _wake(self, when: float) -> None:
        self._cancel_timer()
        now = max(when, asyncio.get_running_loop().time())  # the loop may call a clock tick early
        for _ in range(_MAX_EXPIRED):
            if not self._heap or self._heap[0][0] > now:
                break
            item = heapq.heappop(self._heap)[2]
            if item in self._waiting:
                self._expire(item)
        if self._heap:
            self._wake_at(self._heap[0][0])
