"""CPU time that a ledger adds to a task, against SQLite writing the same rows at once.

A batch whose tasks succeed at their first poll runs with `Ledger.as_completed`, then also with
`Ledger.save_outcomes` and a saver that does nothing. The time of the same loops without a ledger is
subtracted. Beside it is `executemany` in one transaction, of the rows that the ledger then has.
The time is this process's, threads and kernel included; each file is new.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.cpu import compared, on_cores, spread

from kontext_async import (
    CompletedTask,
    DurationModel,
    Journal,
    Stream,
    TaskOutcome,
    TaskRecord,
    TaskStatus,
    wait_learned,
)
from kontext_async.batch import outcome_stream
from kontext_async.notices import Noticeboard
from kontext_async.pacing import RequestBudget
from kontext_async.polling import WaitPolicy
from kontext_async.results import Ledger, SavedImage, save_outcomes

_NOW = datetime.now(UTC)
_PARAMS = json.dumps({"prompt": "A lighthouse at dusk, " * 8, "model": "flux-kontext-pro"})


class _Instant:
    """A client, and its transport, with which every task succeeds at its first poll."""

    request_timeout = 30.0

    def __init__(self) -> None:
        self.budget = RequestBudget(max_concurrency=1, rate_limit=None)
        self.durations = DurationModel()
        self.notices = Noticeboard()
        self.open_scopes: set[Any] = set()

    def as_completed(
        self, task_ids: Sequence[str], journal: Journal | None = None, **_: Any
    ) -> Stream[TaskOutcome]:
        policy = WaitPolicy(
            timeout=None,
            wait=wait_learned(self.durations),
            error_grace=None,
            not_found_grace=None,
            on_event=None,
        )
        transport: Any = self
        return outcome_stream(
            task_ids, policy, transport, max_in_flight=10_000, batch_timeout=None, journal=journal
        )

    def check_open(self) -> None:
        pass

    async def acquire(self, at: float, **_: Any) -> float:
        return at

    async def poll(self, task_id: str, sent: float, **_: Any) -> tuple[TaskRecord, None]:
        url = f"https://images.example.com/results/{task_id}.png"
        record = TaskRecord(
            task_id=task_id,
            status=TaskStatus.SUCCESS,
            param_json=_PARAMS,
            create_time=_NOW,
            complete_time=_NOW,
            origin_image_url=url,
            result_image_url=url,
        )
        return record, None


class _Idle:
    """Stands for a saver: every image is saved at once."""

    max_concurrency = 8

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def find(self, task_id: str) -> None:
        return None

    async def save(self, task: CompletedTask) -> SavedImage:
        path = self._folder / f"{task.task_id}.png"
        return SavedImage(path=path, size=100_000, sha256="0" * 64, kind="png")


async def _batch(
    task_ids: Sequence[str], folder: Path, ledger: Ledger | None, *, images: bool
) -> None:
    client: Any = _Instant()
    saver: Any = _Idle(folder)
    waiting = ledger.as_completed(client, task_ids) if ledger else client.as_completed(task_ids)
    save = ledger.save_outcomes if ledger else save_outcomes
    async with waiting as outcomes:
        async for _ in save(outcomes, saver) if images else outcomes:
            pass


async def _recorded(task_ids: Sequence[str], path: Path, *, images: bool) -> None:
    async with Ledger(path) as ledger:
        await _batch(task_ids, path.parent, ledger, images=images)


def _written_at_once(path: Path, layout: str, rows: Sequence[Sequence[Any]]) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(layout)
        marks = ",".join("?" * len(rows[0]))
        connection.executemany(f"INSERT INTO tasks VALUES ({marks})", rows)


def _cpu(work: Callable[[], None]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _round(task_ids: Sequence[str], *, images: bool) -> list[float]:
    """Microseconds for a task: without a ledger, with one, and by SQLite alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kontext.sqlite3"
        without = _cpu(lambda: asyncio.run(_batch(task_ids, path.parent, None, images=images)))
        recorded = _cpu(lambda: asyncio.run(_recorded(task_ids, path, images=images)))
        with contextlib.closing(sqlite3.connect(path)) as connection:
            [layout] = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'tasks'")
            rows = connection.execute("SELECT * FROM tasks").fetchall()
        plain = path.with_name("plain.sqlite3")
        alone = _cpu(lambda: _written_at_once(plain, *layout, rows))
    return [seconds / len(task_ids) * 1e6 for seconds in (without, recorded, alone)]


def run(*, tasks: int = 5_000, rounds: int = 9) -> list[dict[str, Any]]:
    """Return one row for each thing that is recorded, on all cores and with this process on one.

    ``us_per_task`` is what the ledger adds.
    """
    task_ids = [f"{number * 2654435761 % 2**32:032x}" for number in range(tasks)]
    kinds = {"outcomes": False, "outcomes and images": True}
    rows = []
    for cores in (len(os.sched_getaffinity(0)), 1):
        taken: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
        with on_cores(cores):
            for round_number in range(-1, rounds):  # the first is to warm up
                for kind, images in kinds.items():
                    three = _round(task_ids, images=images)
                    if round_number >= 0:
                        taken[kind].append(three)
        size = {"tasks": tasks, "cores": cores}
        rows += [{"recorded": kind, **size, **_measured(taken[kind])} for kind in kinds]
    return rows


def _measured(taken: Sequence[Sequence[float]]) -> dict[str, Any]:
    added = [recorded - without for without, recorded, _ in taken]
    without, recorded, alone = zip(*taken, strict=True)
    return {
        "us_without": statistics.median(without),
        "us_with": statistics.median(recorded),
        "us_per_task": statistics.median(added),
        "us_sqlite": statistics.median(alone),
        **compared(added, alone),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = "| cores | recorded | without a ledger | with one | added | SQLite alone | to that |"
    lines = [head, "|--:|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        parts = ("us_without", "us_with", "us_per_task", "us_sqlite")
        times = " | ".join(f"{row[part]:.0f} µs" for part in parts)
        lines.append(f"| {row['cores']} | {row['recorded']} | {times} | {spread(row)} |")
    return "\n".join(lines)
