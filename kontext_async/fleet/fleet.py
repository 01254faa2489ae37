"""Tasks for many workers, and their outcomes, in one PostgreSQL database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Final, Self

from procrastinate.types import JSONDict

from kontext_async.batch import check_source, each_of
from kontext_async.client import KontextClient
from kontext_async.errors import ConfigurationError
from kontext_async.fleet.database import (
    AWAY,
    CHANNEL,
    LEFT,
    QUEUE,
    Connection,
    Database,
    Row,
    translate_errors,
)
from kontext_async.fleet.shared_limit import SharedLimit, check_limit, lease
from kontext_async.fleet.status import FleetStatus, read_status
from kontext_async.fleet.worker import CHUNK_TASK, Worker
from kontext_async.pacing import RateLimit
from kontext_async.polling import check_count, check_seconds
from kontext_async.results.images import ImageSaver
from kontext_async.results.ledger.rows import LedgerEntry, entry_of
from kontext_async.wire import check_task_id

__all__ = ["DEFAULT_CHUNK", "DEFAULT_HEARTBEAT", "DEFAULT_MAX_CHUNKS", "Fleet"]

DEFAULT_CHUNK: Final = 200
DEFAULT_HEARTBEAT: Final = 5.0
DEFAULT_MAX_CHUNKS: Final = 20

_GROUP = 10_000  # ids in one transaction of `submit`
_PAGE = 1000  # outcomes read or deleted at once
_POLL = 5.0  # s after which `outcomes` reads again without a notification
_RETRY_AFTER = 1.0  # s, while the database is away

# In the order of the ids, so that two programs that submit the same ones never block each other.
_ADD = """
    INSERT INTO kontext_tasks (task_id) SELECT DISTINCT unnest(%s::text[]) ORDER BY 1
    ON CONFLICT (task_id) DO UPDATE
    SET state = 'waiting', error = NULL, position = NULL, updated_at = now()
    WHERE kontext_tasks.state IN ('unfinished', 'error')
    RETURNING task_id
"""
_ENDED = """
    SELECT position, task_id, state, attempts, record, error, saved_path, sha256, size,
        extract(epoch FROM created_at)::float8, extract(epoch FROM updated_at)::float8
    FROM kontext_tasks WHERE position > %s ORDER BY position LIMIT %s
"""
# The index of positions leads to old outcomes, as tasks have them in the order of their ends. A
# row that somebody else is changing is left alone, so that nobody waits for this or blocks it.
_PRUNE = """
    WITH page AS (
        SELECT task_id, position, updated_at < %s AS is_old
        FROM kontext_tasks WHERE position > %s ORDER BY position LIMIT %s
    ), free AS (
        SELECT task_id FROM kontext_tasks JOIN page USING (task_id, position)
        WHERE is_old FOR UPDATE OF kontext_tasks SKIP LOCKED
    ), deleted AS (
        DELETE FROM kontext_tasks USING free WHERE kontext_tasks.task_id = free.task_id RETURNING 1
    )
    SELECT max(position) FILTER (WHERE is_old), (SELECT count(*) FROM deleted) FROM page
"""
_BEFORE = "SELECT now() - make_interval(secs => %s)"
_LISTEN = f"LISTEN {CHANNEL}"


class Fleet:
    """Tasks for many workers on one PostgreSQL database: an async context manager.

    ``dsn``: a connection string of PostgreSQL 13 or newer. The database holds ids, records and
    outcomes, and never the API key.

    Entering raises `FleetError` if the database cannot be reached, and the constructor
    `ConfigurationError` if ``dsn`` is not a connection string.
    """

    def __init__(self, dsn: str) -> None:
        self._database = Database(dsn)

    def __repr__(self) -> str:
        return f"<Fleet {'open' if self._database.is_open else 'closed'}>"

    async def __aenter__(self) -> Self:
        await self._database.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. Idempotent."""
        await self._database.close()

    async def init(self) -> None:
        """Create the tables that are missing. Idempotent."""
        await self._database.create_tables()

    async def submit(
        self, task_ids: Iterable[str] | AsyncIterable[str], *, chunk: int = DEFAULT_CHUNK
    ) -> int:
        """Add tasks for the workers, and return how many are new.

        ``chunk``: the most ids that a worker takes at once. Known ids are dropped, except those
        whose wait timed out or met an error: they are waited for again. Ids are added in groups
        of 10,000, each with its chunks in one transaction.

        Raises `ConfigurationError` for an invalid id, with the groups before it added.
        """
        check_source(task_ids)
        check_count("chunk", chunk)
        added = 0
        group: list[str] = []
        async with aclosing(each_of(task_ids)) as ids:
            async for task_id in ids:
                group.append(check_task_id(task_id))
                if len(group) == _GROUP:
                    added += await self._add(group, chunk)
                    group = []
        return added + (await self._add(group, chunk) if group else 0)

    async def _add(self, task_ids: list[str], chunk: int) -> int:
        with translate_errors():
            async with self._database.connection() as connection, connection.transaction():
                cursor = await connection.execute(_ADD, (task_ids,))
                new = [str(row[0]) for row in await cursor.fetchall()]
                queue = self._database.app.configure_task(
                    CHUNK_TASK, queue=QUEUE, connection=connection
                )
                chunks: list[JSONDict] = [
                    {"task_ids": [*new[first : first + chunk]]}
                    for first in range(0, len(new), chunk)
                ]
                if chunks:
                    await queue.batch_defer_async(*chunks)
        return len(new)

    async def work(
        self,
        client: KontextClient,
        *,
        saver: ImageSaver | None = None,
        max_chunks: int = DEFAULT_MAX_CHUNKS,
        heartbeat: float = DEFAULT_HEARTBEAT,
        until_done: bool = False,
    ) -> None:
        """Take chunks and wait for their tasks, until cancelled.

        Each outcome is in the database before its chunk is acknowledged. If this worker dies,
        another takes its chunks over after five heartbeats at most. While the database is away,
        the worker waits. Cancelled, it puts back what does not end within 5 seconds, or within two
        heartbeats if those are shorter.

        - ``saver``: saves the images of this worker's tasks too.
        - ``max_chunks``: the most chunks at a time.
        - ``heartbeat``: seconds between two signs of life; give all workers the same.
        - ``until_done``: return when no chunk is left in the queue or with a worker.

        Raises `AuthenticationError` if the API refuses the key; the tasks are put back.
        """
        check_count("max_chunks", max_chunks)
        check_seconds("heartbeat", heartbeat)
        if not heartbeat:
            raise ConfigurationError("heartbeat must be more than 0 seconds")
        worker = Worker(
            self._database,
            client,
            saver=saver,
            max_chunks=max_chunks,
            heartbeat=heartbeat,
            until_done=until_done,
        )
        with translate_errors():
            await self._database.fetch(LEFT)  # are there tables?
            await worker.run()

    @asynccontextmanager
    async def shared_limit(
        self, limit: RateLimit, *, name: str = "default"
    ) -> AsyncGenerator[SharedLimit, None]:
        """Share a known rate limit exactly with all workers that give the same ``name``.

        Pass the value as ``rate_limit`` to one `KontextClient`. Each process that wants to send
        has an equal share of the limit, as a lease that it renews every second. While the
        database is away, it keeps its last share.

        ``name``: one for each account. Raises `ConfigurationError` if another process shares a
        different limit under this name.
        """
        check_limit(limit)
        async with lease(self._database, limit, name) as shared:
            yield shared

    async def outcomes(self) -> AsyncGenerator[LedgerEntry, None]:
        """Iterate over the tasks that have an outcome, then over others as they end.

        It ends when no task is waiting. While the database is away, it waits. Use
        ``contextlib.aclosing`` where you may leave early.
        """
        position = 0
        with translate_errors():
            while True:
                try:
                    async with await self._database.connect() as listener:
                        async for row in self._rows_after(position, listener):
                            position = row[0]
                            yield entry_of(row[1:])
                except AWAY as exc:
                    self._database.warn_away(exc)
                    await asyncio.sleep(_RETRY_AFTER)
                else:
                    return

    async def _rows_after(self, position: int, listener: Connection) -> AsyncGenerator[Row, None]:
        """Yield the rows of tasks that ended after a position, until no task is waiting."""
        await listener.execute(_LISTEN)
        while True:
            is_done = not await self._database.fetch(LEFT)
            while page := await self._database.fetch(_ENDED, (position, _PAGE)):
                for row in page:
                    yield row
                position = page[-1][0]
            if is_done:
                return
            async for _ in listener.notifies(timeout=_POLL, stop_after=1):
                pass

    async def prune(self, *, older_than: float) -> int:
        """Delete the outcomes that are older than some seconds, and return their number.

        It deletes 1,000 in a transaction and blocks nobody. Tasks without an outcome stay. A
        deleted id is unknown: it may be submitted again, and is then polled again.
        """
        check_seconds("older_than", older_than)
        pruned = 0
        position: int | None = 0
        with translate_errors():
            ((before,),) = await self._database.fetch(_BEFORE, (older_than,))
            while position is not None:
                values = (before, position, _PAGE)
                ((position, deleted),) = await self._database.fetch(_PRUNE, values)
                pruned += deleted
        return pruned

    async def status(self) -> FleetStatus:
        """Count tasks and chunks, and describe the workers."""
        with translate_errors():
            return await read_status(self._database)
