"""One worker: it takes chunks from the queue and waits for their tasks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Final

import psycopg
from procrastinate import App, BaseRetryStrategy, RetryDecision
from procrastinate.exceptions import ConnectorException
from procrastinate.jobs import Job

from kontext_async.client import KontextClient
from kontext_async.errors import AuthenticationError, KontextError
from kontext_async.fleet.database import AWAY, QUEUE, Database, Row, reason
from kontext_async.fleet.durations import SharedDurations
from kontext_async.fleet.journal import OutcomeWriter, TableJournal
from kontext_async.fleet.names import new_name
from kontext_async.outcomes import TaskOutcome
from kontext_async.results.images import ImageSaver, SavedImage, save_outcomes
from kontext_async.results.ledger.rows import RECALLED, error_text, recalled

__all__ = ["CHUNK_TASK", "Worker"]

CHUNK_TASK: Final = "kontext_chunk"

_log = logging.getLogger("kontext_async")

_MISSED_BEATS = 3  # heartbeats after which a worker counts as dead
_GRACE = 5.0  # s for chunks that are ending when a worker has to stop
_FLUSH = 2.0  # s for outcomes that are still to be written then
_RETRY_AFTER = 1.0  # s, while the database is away
_CHUNK_RETRY_AFTER = 10  # s, for a chunk that failed
_SWEEP_LOCK: Final = 0x4B6E747A

_WAITING = "SELECT task_id FROM kontext_tasks WHERE task_id = ANY(%s) AND state = 'waiting'"
_UNSAVED = f"""
    SELECT {RECALLED} FROM kontext_tasks
    WHERE task_id = ANY(%s) AND state = 'done' AND saved_path IS NULL AND error IS NULL
"""  # noqa: S608  # our own names
_SAVED = """
    UPDATE kontext_tasks SET saved_path = %s, sha256 = %s, size = %s, kind = %s, updated_at = now()
    WHERE task_id = %s
"""
_NOT_SAVED = "UPDATE kontext_tasks SET error = %s, updated_at = now() WHERE task_id = %s"
_ALIVE = """
    INSERT INTO kontext_workers (name, waits, rate) VALUES (%s, %s, %s)
    ON CONFLICT (name) DO UPDATE
    SET waits = excluded.waits, rate = excluded.rate, seen_at = now()
"""
_GONE = "DELETE FROM kontext_workers WHERE name = %s OR seen_at < now() - interval '1 day'"


_QUEUED = """
    SELECT 1 FROM procrastinate_jobs WHERE queue_name = %s AND status IN ('todo', 'doing') LIMIT 1
"""


class _PutBack(BaseRetryStrategy):
    """Puts every chunk back that did not end: at once if its worker stops, else a little later."""

    def get_retry_decision(self, *, exception: BaseException, job: Job) -> RetryDecision:
        is_stopping = isinstance(exception, (asyncio.CancelledError, AuthenticationError))
        if not is_stopping and not isinstance(exception, AWAY):
            what = f"{type(exception).__name__}: {reason(exception)}"
            _log.warning("chunk %s failed, again in %d s: %s", job.id, _CHUNK_RETRY_AFTER, what)
        return RetryDecision(retry_in={"seconds": 0 if is_stopping else _CHUNK_RETRY_AFTER})


class Worker:
    """One call of `Fleet.work`."""

    def __init__(
        self,
        database: Database,
        client: KontextClient,
        *,
        saver: ImageSaver | None,
        max_chunks: int,
        heartbeat: float,
        until_done: bool,
    ) -> None:
        self.name: Final = new_name()
        self._database = database
        self._client = client
        self._saver = saver
        self._max_chunks = max_chunks
        self._heartbeat = heartbeat
        self._until_done = until_done
        self._writer = OutcomeWriter(database)
        self._durations = SharedDurations(database, client.durations)
        # An app of its own: a chunk is this worker's, with its client and its saver.
        self._app = App(connector=database.app.connector)
        self._app.task(name=CHUNK_TASK, queue=QUEUE, retry=_PutBack())(self._work_on)
        self._taken = 0  # tasks
        self._refusal: AuthenticationError | None = None
        self._stopping = asyncio.Event()
        self._chunk_ended = asyncio.Event()

    async def run(self) -> None:
        """Take chunks until cancelled, until the key is refused, or until nothing is left."""
        stop = self._stopping
        await self._durations.load()
        _log.info("worker %s starts, with the database at %s", self.name, self._database.address)
        async with _running(self._writer.run(), stop), _running(self._show_life(), stop):
            try:
                while not self._stopping.is_set():
                    await self._take_chunks()
            finally:
                await self._leave()
        if self._refusal is not None:
            raise self._refusal

    async def _take_chunks(self) -> None:
        """Let the engine run chunks until it is told to stop, or until it fails."""
        engine = asyncio.create_task(
            self._app.run_worker_async(
                queues=[QUEUE],
                name=self.name,
                concurrency=self._max_chunks,
                install_signal_handlers=False,
                delete_jobs="successful",
                fetch_job_polling_interval=self._heartbeat,  # nobody announces what is put back
                # Its heartbeat has stopped then, and its chunks must not pass for a dead worker's.
                shutdown_graceful_timeout=min(_GRACE, (_MISSED_BEATS - 1) * self._heartbeat),
                update_heartbeat_interval=self._heartbeat,
                stalled_worker_timeout=_MISSED_BEATS * self._heartbeat,
            )
        )
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({engine, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            engine.cancel()  # which lets its chunks end for a while, then puts them back
            await asyncio.wait({engine, stopping})
        if not engine.cancelled():
            try:
                engine.result()
            except AWAY as exc:
                self._database.warn_away(exc)
        if not self._stopping.is_set():
            await asyncio.sleep(_RETRY_AFTER)

    async def _leave(self) -> None:
        """Write what is still to be written, and leave the table of workers."""
        with contextlib.suppress(psycopg.Error, TimeoutError):
            async with asyncio.timeout(_FLUSH):
                await self._writer.flush()
                await self._durations.save()
                await self._database.fetch(_GONE, (self.name,))
        ended = self._writer.written
        counts = f"{ended} tasks ended, {self._taken - ended} left for other workers"
        _log.info("worker %s stops: %s", self.name, counts)

    async def _work_on(self, task_ids: list[str]) -> None:
        """Wait for the tasks of a chunk that have no outcome yet."""
        try:
            known = await self._known(task_ids)
            waiting = [row[0] for row in await self._database.fetch(_WAITING, (task_ids,))]
            self._taken += len(waiting)
            journal = TableJournal(self._writer, known)
            stream = self._client.as_completed([*known, *waiting], journal=journal)
            async with stream as outcomes:
                if self._saver is None:
                    async for _ in outcomes:
                        pass
                else:
                    await self._save(outcomes, self._saver)
        except AuthenticationError as error:
            self._refusal = error
            self._stopping.set()
            raise
        finally:
            self._chunk_ended.set()

    async def _known(self, task_ids: list[str]) -> dict[str, TaskOutcome]:
        """Return the outcomes of tasks whose images are still to be saved."""
        if self._saver is None:
            return {}
        rows = await self._database.fetch(_UNSAVED, (task_ids,))
        return {row[0]: recalled(row)[1] for row in rows}

    async def _save(self, outcomes: Any, saver: ImageSaver) -> None:
        async with save_outcomes(outcomes, saver) as saves:
            async for outcome, saved in saves:
                if isinstance(saved, SavedImage):
                    row: Row = (saved.path.name, saved.sha256, saved.size, saved.kind)
                    await self._database.fetch(_SAVED, (*row, outcome.task_id))
                elif isinstance(saved, KontextError):
                    values = (error_text(saved), outcome.task_id)
                    await self._database.fetch(_NOT_SAVED, values)

    async def _show_life(self) -> None:
        """Report at each heartbeat that this worker lives, and take over from those that do not."""
        requests = self._client.stats.requests
        loop = asyncio.get_running_loop()
        since = loop.time()
        while True:
            stats, now = self._client.stats, loop.time()
            rate = (stats.requests - requests) / max(now - since, 1e-3)
            requests, since = stats.requests, now
            try:
                async with asyncio.timeout(max(self._heartbeat, _RETRY_AFTER)):
                    await self._database.fetch(_ALIVE, (self.name, stats.waits, rate))
                    await self._sweep()
                    await self._durations.save()
                    if self._until_done and not await self._database.fetch(_QUEUED, (QUEUE,)):
                        self._stopping.set()
            except AWAY as exc:
                self._database.warn_away(exc)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat):
                    await self._chunk_ended.wait()
            self._chunk_ended.clear()

    async def _sweep(self) -> None:
        """Put the chunks of dead workers back, if no other worker is just doing it."""
        manager = self._app.job_manager
        async with self._database.connection() as connection, connection.transaction():
            lock = await connection.execute("SELECT pg_try_advisory_xact_lock(%s)", (_SWEEP_LOCK,))
            if await lock.fetchone() != (True,):
                return
            dead = _MISSED_BEATS * self._heartbeat
            for job in await manager.get_stalled_jobs(queue=QUEUE, seconds_since_heartbeat=dead):
                _log.warning("chunk %s had a worker that is dead: put back", job.id)
                with contextlib.suppress(ConnectorException):  # it has ended meanwhile
                    await manager.retry_job(job)


@contextlib.asynccontextmanager
async def _running(work: Coroutine[Any, Any, None], ended: asyncio.Event) -> AsyncGenerator[None]:
    """Run something beside the block, and end it with the block; set ``ended`` if it ends first."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda _: ended.set())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.result()
