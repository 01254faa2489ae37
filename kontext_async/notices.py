"""Notices that a task has ended, on their way to the waits for it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

__all__ = ["Noticeboard", "Noticed"]

# Notices for tasks that nobody waits for yet: a callback may overtake the answer to the request
# that created its task.
_MAX_REMEMBERED = 1000
_REMEMBERED_FOR = 900.0  # s


class Noticed(Protocol):
    """A wait that polls soon after a notice."""

    def notice(self) -> None: ...


class Noticeboard:
    """The waits of one client by task, and the notices that came before their waits."""

    def __init__(self) -> None:
        self._waits: dict[str, tuple[Noticed, ...]] = {}
        self._remembered: OrderedDict[str, float] = OrderedDict()

    def watch(self, task_id: str, wait: Noticed, now: float) -> None:
        """Add a wait; a notice that came earlier reaches it at once. Times are in seconds."""
        self._waits[task_id] = (*self._waits.get(task_id, ()), wait)
        came_at = self._remembered.pop(task_id, None)
        if came_at is not None and now - came_at <= _REMEMBERED_FOR:
            wait.notice()

    def unwatch(self, task_id: str, wait: Noticed) -> None:
        """Remove a wait that has ended."""
        left = tuple(other for other in self._waits[task_id] if other is not wait)
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
        for wait in waits:
            wait.notice()
        return True
