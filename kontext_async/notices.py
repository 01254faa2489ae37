"""Notices that a task has ended, on their way to the waits for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

__all__ = ["Noticeboard"]

# Notices for tasks that nobody waits for yet: a callback may overtake the answer to the request
# that created its task.
_MAX_REMEMBERED = 1000
_REMEMBERED_FOR = 900.0  # s


class Noticeboard:
    """The waits of one client by task, and the notices that came before their waits."""

    def __init__(self) -> None:
        self._waits: dict[str, tuple[Callable[[], object], ...]] = {}
        self._remembered: OrderedDict[str, float] = OrderedDict()

    def watch(self, task_id: str, on_notice: Callable[[], object], now: float) -> None:
        """Call ``on_notice`` for each notice; for one that came earlier at once. Times in s."""
        self._waits[task_id] = (*self._waits.get(task_id, ()), on_notice)
        came_at = self._remembered.pop(task_id, None)
        if came_at is not None and now - came_at <= _REMEMBERED_FOR:
            on_notice()

    def unwatch(self, task_id: str, on_notice: Callable[[], object]) -> None:
        """Remove a wait that has ended."""
        left = tuple(other for other in self._waits[task_id] if other != on_notice)
        if left:
            self._waits[task_id] = left
        else:
            del self._waits[task_id]

    def notice(self, task_id: str, now: float) -> bool:
        """Pass a notice on; False if nobody waits for the task, and it is remembered instead."""
        waits = self._waits.get(task_id)
        if waits is None:
            self._remembered[task_id] = now
            self._remembered.move_to_end(task_id)
            if len(self._remembered) > _MAX_REMEMBERED:
                self._remembered.popitem(last=False)
            return False
        for on_notice in waits:
            on_notice()
        return True
