"""Helpers that the tests of a ledger have in common."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from tenacity import wait_fixed

from kontext_async.results import Ledger

NOBODY = 65534

# Polls so frequent that a test need not wait, and a single poll for each id.
SOON = wait_fixed(0.02)
AT_ONCE = {"timeout": 0, "error_grace": 0, "not_found_grace": 0}


async def collected(ledger, client, task_ids, **keywords):
    """Return the outcomes of a batch with the ledger, by id; assert that no id has two."""
    found = {}
    async with ledger.as_completed(client, task_ids, **{"wait": SOON, **keywords}) as outcomes:
        async for outcome in outcomes:
            assert outcome.task_id not in found
            found[outcome.task_id] = outcome
    return found


async def run(path, client, task_ids, **keywords):
    """Open a ledger and run a batch with it, as one run of a program does."""
    async with Ledger(path) as ledger:
        return await collected(ledger, client, task_ids, **keywords)


def entries(path):
    return {entry.task_id: entry for entry in Ledger.read(path)}


def states(path):
    return {entry.task_id: entry.state for entry in Ledger.read(path)}


def errors(outcomes):
    return {task_id: type(outcome.error) for task_id, outcome in outcomes.items()}


def fill_disk(store):
    """Stop the growth of an open store's file, as on a full disk."""
    connection = store._connections[0]
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")


def free_disk(store):
    store._connections[0].execute("PRAGMA max_page_count = 1000000")


@contextlib.contextmanager
def busy_disk(store):
    """Block an open store's writes within the block."""
    free = threading.Event()
    store._thread.submit(free.wait)
    try:
        yield
    finally:
        free.set()


async def until(condition):
    """Wait until a condition is true."""
    for _ in range(5_000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise TimeoutError


def open_files(folder):
    """Return the names of the files in a folder that this process has open."""
    found = []
    for link in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            target = Path(os.readlink(link))  # noqa: PTH115  # as it is
            if target.parent == folder.resolve():
                found.append(target.name)
    return found


def ledger_threads():
    return [t for t in threading.enumerate() if t.name.startswith("kontext-ledger")]


def ours_running():
    """Return the tasks and timers of the library in this loop."""
    tasks = {task: task.get_coro().cr_code.co_filename for task in asyncio.all_tasks()}
    timers = (h._callback for h in asyncio.get_running_loop()._scheduled if not h.cancelled())
    owners = (type(getattr(callback, "__self__", None)).__module__ for callback in timers)
    return [
        *(task for task, file in tasks.items() if "kontext_async" in file and "sim" not in file),
        *(name for name in owners if name.startswith(("kontext_async.res", "asyncio.timeouts"))),
    ]


async def assert_nothing_left(folder, client=None):
    """Assert that no task, timer, thread, request or open file is left."""
    await until(lambda: not ours_running() and not ledger_threads())
    assert open_files(folder) == []
    if client is not None:
        assert (client.stats.waits, client.stats.in_flight) == (0, 0)


@contextlib.contextmanager
def read_only_folder(make):
    """Yield a read-only folder that ``make`` has filled.

    Root can write everywhere, so the process is another user in the block.
    """
    if not hasattr(os, "geteuid"):
        pytest.skip("folders are not read-only here")
    folder = Path(tempfile.mkdtemp())
    try:
        make(folder)
        folder.chmod(0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(NOBODY)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o755)
    finally:
        shutil.rmtree(folder)
