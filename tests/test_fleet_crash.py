"""Workers killed at random moments, and a database that restarts: nothing is lost.

Set ``KONTEXT_FLEET_RUNS`` and ``KONTEXT_FLEET_TASKS`` for more than the usual three runs of a few
hundred tasks: ``nox -s fleet`` does.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from background import serving
from postgres import cluster

import kontext_async
from kontext_async.fleet import Fleet
from kontext_async.simulator import Failure

RUNS = int(os.environ.get("KONTEXT_FLEET_RUNS", "3"))
TASKS = int(os.environ.get("KONTEXT_FLEET_TASKS", "600"))
HEARTBEAT = 0.4

WORKER = f"""
import asyncio, sys
from kontext_async import DurationModel, KontextClient
from kontext_async.fleet import Fleet

async def main(dsn, base_url):
    often = DurationModel(cost_per_request=0.05)
    client = KontextClient("key", base_url=base_url, durations=often)
    async with Fleet(dsn) as fleet, client:
        print("ready", flush=True)
        await fleet.work(client, heartbeat={HEARTBEAT})

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def durable():
    """A cluster that syncs to the disk, as in production."""
    with cluster(fsync=True) as running:
        yield running


@pytest.fixture
def simulator():
    with serving() as running:
        yield running


class Workers:
    """Processes that work, all ended with the block."""

    def __init__(self, dsn, simulator, count):
        # Not a pipe, which would stop a worker if nobody reads it.
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__
        environment = os.environ | {"PYTHONPATH": str(Path(kontext_async.__file__).parent.parent)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-c", WORKER, dsn, simulator.base_url],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=self.errors,
            )
            for _ in range(count)
        ]

    def __enter__(self):
        for process in self.processes:
            assert process.stdout.readline() == b"ready\n", self.said()
        return self

    def said(self):
        self.errors.seek(0)
        return self.errors.read().decode()[-5000:]

    def __exit__(self, *exc_info):
        for process in self.processes:
            process.kill()
            process.communicate()
        self.errors.close()


def params(task_id):
    return {"prompt": f"The image of {task_id}"}


def make_tasks(simulator, chance):
    """Add tasks to the simulator; return for each if it fails."""
    fates = {f"task-{n:05}": chance.random() < 0.05 for n in range(TASKS)}
    for task_id, fails in fates.items():
        outcome = Failure(500, "It failed.") if fails else "success"
        simulator.add_task(
            task_id, duration=chance.uniform(1, 4), outcome=outcome, params=params(task_id)
        )
    return fates


async def check(fleet, fates):
    """Assert that each task has one outcome, and that it is its own."""
    entries = [entry async for entry in fleet.outcomes()]
    assert len(entries) == len(fates)
    assert {entry.task_id: entry.state for entry in entries} == {
        task_id: "failed" if fails else "done" for task_id, fails in fates.items()
    }
    for entry in entries:
        assert entry.attempts == 1, f"{entry.task_id} has had several outcomes"
        assert entry.record.params == params(entry.task_id)


@pytest.mark.parametrize("seed", range(RUNS))
@pytest.mark.timeout(180)
async def test_two_of_three_workers_are_killed_and_nothing_is_lost(seed, durable, simulator):
    """The third takes over, and each task has its one outcome."""
    chance = random.Random(seed)
    dsn = durable.create()
    async with Fleet(dsn) as fleet:
        await fleet.init()
        with Workers(dsn, simulator, 3) as workers:
            fates = make_tasks(simulator, chance)
            await fleet.submit(fates, chunk=50)
            reading = asyncio.create_task(check(fleet, fates))
            for process in workers.processes[:2]:
                await asyncio.sleep(chance.uniform(0, 1.5))
                process.kill()
            left = (await fleet.status()).tasks["waiting"]
            await asyncio.wait_for(reading, 150)
            assert left, "the workers were killed too late"
            assert [process.poll() for process in workers.processes] == [-9, -9, None]


async def test_workers_and_readers_wait_for_a_database_that_restarts(durable, simulator):
    """A crash of the database in the middle costs time, and no outcome."""
    dsn = durable.create()
    async with Fleet(dsn) as fleet:
        await fleet.init()
        with Workers(dsn, simulator, 2) as workers:
            fates = make_tasks(simulator, random.Random(7))
            await fleet.submit(fates, chunk=50)
            reading = asyncio.create_task(check(fleet, fates))
            await asyncio.sleep(2.5)
            await asyncio.to_thread(durable.stop, signal.SIGQUIT)
            await asyncio.sleep(1)
            durable.start()  # it ends with its thread
            assert (await fleet.status()).tasks["waiting"]
            await asyncio.wait_for(reading, 40)
            assert [process.poll() for process in workers.processes] == [None, None]
