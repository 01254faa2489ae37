"""The state of a fleet, as its database knows it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import attrs

from kontext_async.fleet.database import QUEUE, Database

__all__ = ["FleetStatus", "WorkerStatus", "read_status"]

_STATES = ("waiting", "done", "failed", "unfinished", "error")
_TASKS = "SELECT state, count(*) FROM kontext_tasks GROUP BY state"
_CHUNKS = """
    SELECT count(*) FILTER (WHERE status = 'todo'), count(*) FILTER (WHERE status = 'doing')
    FROM procrastinate_jobs WHERE queue_name = %s
"""
_WORKERS = """
    SELECT name, waits, rate, seen_at, extract(epoch FROM now() - seen_at)::float8
    FROM kontext_workers ORDER BY name
"""


@attrs.frozen(kw_only=True)
class WorkerStatus:
    """A worker, as it described itself at its last sign of life.

    - ``waits``: the tasks it waits for.
    - ``rate``: its requests per second since the sign before.
    - ``seen_at``: the last sign of life, by the database's clock, and ``seconds_ago`` its age.
    """

    name: str
    waits: int
    rate: float
    seen_at: datetime
    seconds_ago: float


@attrs.frozen(kw_only=True)
class FleetStatus:
    """Counts of tasks by state and of chunks, and the workers.

    The states are those of `LedgerEntry`. ``queued_chunks`` wait for a worker, and
    ``running_chunks`` have one. A worker that was killed stays in ``workers`` for a day.
    """

    tasks: Mapping[str, int]
    queued_chunks: int
    running_chunks: int
    workers: tuple[WorkerStatus, ...]


async def read_status(database: Database) -> FleetStatus:
    """Read the state of a fleet."""
    counts = {str(state): int(count) for state, count in await database.fetch(_TASKS)}
    tasks = {state: counts.get(state, 0) for state in _STATES}
    ((queued, running),) = await database.fetch(_CHUNKS, (QUEUE,))
    workers = tuple(
        WorkerStatus(name=name, waits=waits, rate=rate, seen_at=seen_at, seconds_ago=ago)
        for name, waits, rate, seen_at, ago in await database.fetch(_WORKERS)
    )
    return FleetStatus(tasks=tasks, queued_chunks=queued, running_chunks=running, workers=workers)
