"""The database as a batch's journal."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Final

import psycopg

from kontext_async.errors import AuthenticationError
from kontext_async.fleet.database import AWAY, CHANNEL, Database, reason
from kontext_async.fleet.errors import FleetError
from kontext_async.outcomes import TaskOutcome
from kontext_async.results.ledger.rows import error_text, record_text, state_of

__all__ = ["OutcomeWriter", "TableJournal"]

_RETRY_AFTER = 1.0  # s, while the database is away
_GROUP = 1000  # outcomes in one statement
_ORDER_LOCK: Final = 0x4B6E7479  # held until the commit, so that positions are in its order

# A task's first outcome stays: a chunk that two workers finish has one for each task. The arrays
# are binary: to escape those of text costs more than twice the time of all the rest.
_RECORD = """
    WITH ended AS (
        UPDATE kontext_tasks AS known
        SET state = new.state, record = coalesce(new.record, known.record), error = new.error,
            attempts = known.attempts + 1, position = nextval('kontext_position'),
            updated_at = now()
        FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[])
            AS new (task_id, state, record, error)
        WHERE known.task_id = new.task_id AND known.state = 'waiting'
        RETURNING 1
    )
    SELECT pg_notify(%s, '') FROM (SELECT 1 FROM ended LIMIT 1) AS any_ended
"""


class OutcomeWriter:
    """Writes the outcomes of one process, many in one statement.

    While the database is away it keeps them and tries again, so nothing that was polled is lost.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._pending: deque[tuple[TaskOutcome, asyncio.Future[None]]] = deque()
        self._arrived = asyncio.Event()
        self.written = 0

    def write(self, outcome: TaskOutcome) -> asyncio.Future[None]:
        """Write an outcome; the future is done when it is durable."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((outcome, written))
        self._arrived.set()
        return written

    async def flush(self) -> None:
        """Return when all outcomes so far are written, or have failed."""
        if pending := [written for _, written in self._pending]:
            await asyncio.wait(pending)

    async def run(self) -> None:
        """Write what arrives, until cancelled."""
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                while self._pending:
                    await self._write_group()
        finally:
            while self._pending:
                self._pending.popleft()[1].cancel()

    async def _write_group(self) -> None:
        group = [self._pending[i] for i in range(min(_GROUP, len(self._pending)))]
        outcomes = [outcome for outcome, _ in group]
        try:
            await self._insert(outcomes)
        except AWAY as exc:
            self._database.warn_away(exc)
            self._arrived.set()
            await asyncio.sleep(_RETRY_AFTER)
            return
        except psycopg.Error as exc:
            failure = FleetError(f"outcomes cannot be written: {reason(exc)}", retryable=False)
            for _, written in group:
                written.set_exception(failure)
        else:
            self.written += len(group)
            for _, written in group:
                written.set_result(None)
        for _ in group:
            self._pending.popleft()

    async def _insert(self, outcomes: list[TaskOutcome]) -> None:
        values = (
            [outcome.task_id for outcome in outcomes],
            [state_of(outcome.error) for outcome in outcomes],
            [record_text(outcome) for outcome in outcomes],
            [error_text(outcome.error) for outcome in outcomes],
            CHANNEL,
        )
        async with self._database.connection() as connection, connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_ORDER_LOCK,))
            await connection.execute(_RECORD, values)


class TableJournal:
    """A `kontext_async.Journal` over a fleet's table, for one chunk.

    ``known`` has the outcomes that are recorded already. A refused key is the worker's trouble
    and not the tasks': it is raised, and nothing is recorded.
    """

    def __init__(self, writer: OutcomeWriter, known: Mapping[str, TaskOutcome]) -> None:
        self._writer = writer
        self._known = known

    def begin(self, task_id: str) -> asyncio.Future[TaskOutcome | None]:
        """Return the recorded outcome of a task, None if it has none."""
        begun: asyncio.Future[TaskOutcome | None] = asyncio.get_running_loop().create_future()
        begun.set_result(self._known.get(task_id))
        return begun

    def record(self, outcome: TaskOutcome) -> asyncio.Future[None]:
        """Write an outcome to the table."""
        if isinstance(outcome.error, AuthenticationError):
            raise outcome.error
        return self._writer.write(outcome)
