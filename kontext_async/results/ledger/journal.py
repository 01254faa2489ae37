"""The ledger as a batch's journal."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Collection

from kontext_async.outcomes import TaskOutcome
from kontext_async.results.ledger.rows import (
    RECALLED,
    TaskState,
    error_text,
    readable,
    recalled,
    record_text,
    state_of,
)
from kontext_async.results.ledger.store import Row, Store

__all__ = ["LedgerJournal"]

_BEGIN = """
    INSERT INTO tasks (task_id, state, attempts, created_at, updated_at)
    VALUES (?, 'waiting', 1, ?, ?) ON CONFLICT (task_id) DO UPDATE SET
    state = 'waiting', attempts = attempts + 1, error = NULL, updated_at = excluded.updated_at
"""
_END = """
    UPDATE tasks SET state = ?, record = coalesce(?, record), error = ?, updated_at = ?
    WHERE task_id = ?
"""
_RECALL = f"SELECT {RECALLED} FROM tasks WHERE task_id = ?"  # noqa: S608  # our own names


class LedgerJournal:
    """A `kontext_async.Journal` over a ledger's file.

    ``final`` are the states whose tasks are not polled again. It keeps two tables of the ledger
    up to date: ``ended``, the tasks that are done or have failed, and ``images``, the image
    columns of the tasks it recalled.
    """

    def __init__(
        self,
        store: Store,
        ended: dict[str, TaskState],
        images: dict[str, Row | None],
        *,
        final: Collection[TaskState],
    ) -> None:
        self._store = store
        self._ended = ended
        self._images = images
        self._final = final

    def begin(self, task_id: str) -> asyncio.Future[TaskOutcome | None]:
        """Recall the outcome of a task in a final state, or note that a wait begins."""
        if self._ended.get(task_id) in self._final:
            return self._store.submit(
                _RECALL, (task_id,), functools.partial(self._recalled, task_id)
            )
        self._ended.pop(task_id, None)
        now = time.time()
        return self._store.submit(_BEGIN, (task_id, now, now), lambda _: None)

    def record(self, outcome: TaskOutcome) -> asyncio.Future[None]:
        """Write an outcome to the ledger."""
        state = state_of(outcome.error)
        values = (
            state,
            record_text(outcome),
            error_text(outcome.error),
            time.time(),
            outcome.task_id,
        )
        recorded = functools.partial(self._recorded, outcome.task_id, state)
        return self._store.submit(_END, values, recorded)

    def _recalled(self, task_id: str, rows: list[Row]) -> TaskOutcome | None:
        with readable(task_id):
            [row] = rows  # none, if the file's index is damaged
        image, outcome = recalled(row)
        if outcome.result is not None:
            self._images[outcome.task_id] = image
        return outcome

    def _recorded(self, task_id: str, state: TaskState, rows: list[Row]) -> None:
        if state in {"done", "failed"}:
            self._ended[task_id] = state
