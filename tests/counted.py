"""A source of ids, for the tests of backpressure."""

from __future__ import annotations


class Counted:
    """An iterable that remembers how much of it was read."""

    def __init__(self, task_ids):
        self.ids = iter(task_ids)
        self.read = 0

    def __iter__(self):
        for task_id in self.ids:
            self.read += 1
            yield task_id
