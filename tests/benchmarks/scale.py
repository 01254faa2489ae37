"""A hundred thousand tasks at once: memory, time until each was polled, time to cancel them.

The tasks do not end, and a fast server in another process answers for them. Each measurement has a
process of its own. Beside `as_completed` stands what a user would write: a task and a loop with a
fixed sleep for each id, and a semaphore.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
from benchmarks.fast_server import serving

from kontext_async import KontextClient, PollEvent

_IN_FLIGHT = 64  # requests, of either
_INTERVAL = 3.0  # s between the plain loop's polls of a task
_LIMIT = 300.0  # s, after which a measurement is given up

Waiting = contextlib.AbstractAsyncContextManager[None]
# Called at each poll, with its number among the polls of its task, from 1 on.
OnPoll = Callable[[int], None]
Way = Callable[[str, Sequence[str], OnPoll], Waiting]


@contextlib.asynccontextmanager
async def _as_completed(
    base_url: str, task_ids: Sequence[str], on_poll: OnPoll
) -> AsyncIterator[None]:
    """All tasks waited for inside the block."""

    def on_event(event: PollEvent) -> None:
        on_poll(event.attempt)

    async with (
        KontextClient("a-benchmark-key", base_url=base_url, max_concurrency=_IN_FLIGHT) as client,
        client.as_completed(task_ids, max_in_flight=len(task_ids), on_event=on_event),
    ):
        yield


@contextlib.asynccontextmanager
async def _plain(base_url: str, task_ids: Sequence[str], on_poll: OnPoll) -> AsyncIterator[None]:
    """The same with a loop for each."""
    url = f"{base_url}/api/v1/flux/kontext/record-info"
    permits = asyncio.Semaphore(_IN_FLIGHT)
    headers = {"Authorization": "Bearer a-benchmark-key"}
    async with aiohttp.ClientSession(headers=headers) as session:

        async def poll(task_id: str) -> int:
            async with permits, session.get(url, params={"taskId": task_id}) as response:
                data = json.loads(await response.read())["data"]
            return int(data["successFlag"])

        async def wait(task_id: str) -> None:
            for number in itertools.count(1):
                flag = await poll(task_id)
                on_poll(number)
                if flag != 0:
                    break
                await asyncio.sleep(_INTERVAL)

        waits = [asyncio.create_task(wait(task_id)) for task_id in task_ids]
        try:
            yield
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


WAYS: Mapping[str, Way] = {"kontext-async": _as_completed, "a plain loop each": _plain}


class _Collections:
    """Seconds of garbage collection so far."""

    def __init__(self) -> None:
        self.spent = self.longest = self._began = 0.0
        gc.callbacks.append(self._on_collection)

    def _on_collection(self, phase: str, info: Mapping[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        else:
            took = time.perf_counter() - self._began
            self.spent += took
            self.longest = max(self.longest, took)


class _Callbacks:
    """The longest that one callback has held the loop, garbage collection aside.

    In CPU time of this thread, so that what other processes take does not count.
    """

    def __init__(self, collections: _Collections) -> None:
        self.longest = 0.0
        self.name = ""
        self._collections = collections
        self._run = asyncio.Handle._run
        callbacks = self

        def timed(handle: asyncio.Handle) -> None:
            callbacks.time(handle)

        asyncio.Handle._run = timed  # type: ignore[method-assign]

    def time(self, handle: asyncio.Handle) -> None:
        collected, began = self._collections.spent, time.thread_time()
        callback = handle._callback  # type: ignore[attr-defined]  # gone after some runs
        self._run(handle)
        held = time.thread_time() - began
        if held > self.longest:
            held -= self._collections.spent - collected
            if held > self.longest:
                self.longest, self.name = held, _name(callback)


def _name(callback: Any) -> str:
    """Return the owner of a callback: its coroutine if it is a step of a task."""
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return getattr(owner.get_coro(), "__qualname__", "")
    return getattr(callback, "__qualname__", repr(callback))


async def _heartbeat(late: list[float]) -> None:
    """Note by how much the loop is late, every 5 ms."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + 0.005
        await asyncio.sleep(0.005)
        late.append(loop.time() - due)


def _resident() -> int:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


async def _measure(base_url: str, way: Way, count: int, *, watched: bool) -> dict[str, Any]:
    # New ones each time: the server has seen those of the measurement before.
    task_ids = [f"never-{watched:d}-{i:032x}" for i in range(count)]
    all_polled, left, polls = asyncio.Event(), count, 0
    late: list[float] = []
    collections = _Collections()
    async with way(base_url, ["done-1"], lambda _: all_polled.set()):  # loads what is used first
        await all_polled.wait()
    all_polled.clear()

    def on_poll(number: int) -> None:
        nonlocal left, polls
        polls += 1
        left -= number == 1
        if not left:
            all_polled.set()

    callbacks = _Callbacks(collections) if watched else None
    heart = asyncio.create_task(_heartbeat(late))
    gc.collect()
    await asyncio.sleep(0)  # from here on it is no longer the step that made the ids
    collected = collections.spent
    before, began, cpu = _resident(), time.perf_counter(), time.process_time()
    async with asyncio.timeout(_LIMIT), way(base_url, task_ids, on_poll):
        await all_polled.wait()
        polls_sent = polls
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        memory, collected = _resident() - before, collections.spent - collected
        beats = len(late)
        began, left_cpu = time.perf_counter(), time.process_time()
    left_after, left_cpu = time.perf_counter() - began, time.process_time() - left_cpu
    await asyncio.sleep(0.01)  # one beat more
    heart.cancel()
    if callbacks:
        return {"longest_callback_s": callbacks.longest, "longest_callback": callbacks.name}
    return {
        "bytes_per_task": memory / count,
        "polls": polls_sent,
        "polled_s": took,
        "polled_cpu_s": cpu,
        "cancelled_s": left_after,
        "cancelled_cpu_s": left_cpu,
        "latest_beat_s": max(late),
        "latest_beat_leaving_s": max(late[beats:]),
        "collecting_s": collected,
        "longest_collection_s": collections.longest,
    }


def _in_child(base_url: str, name: str, count: int, *, watched: bool) -> dict[str, Any]:
    return asyncio.run(_measure(base_url, WAYS[name], count, watched=watched))


def _alone(base_url: str, name: str, count: int, *, watched: bool) -> dict[str, Any]:
    """Measure in a process that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_in_child, base_url, name, count, watched=watched).result()


def run(
    *,
    counts: Sequence[int] = (10_000, 100_000),
    names: Sequence[str] = tuple(WAYS),
    rounds: int = 3,
) -> list[dict[str, Any]]:
    """Return one row for each number of tasks and way to wait: medians, in seconds and bytes."""
    rows = []
    for count in counts:
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                with serving() as base_url:
                    measured[name].append(_alone(base_url, name, count, watched=False))
        for name, several in measured.items():
            with serving() as base_url:  # watching costs time, so it is done on its own
                watched = _alone(base_url, name, count, watched=True)
            rows.append({"tasks": count, "way": name, **_medians(several), **watched})
    return rows


def _medians(several: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in several) for name in several[0]}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = (
        "| tasks | | memory of a task | all polled once | of it collection | all cancelled "
        "| longest callback | longest collection |\n|--:|---|--:|--:|--:|--:|--:|--:|"
    )
    lines = [
        f"| {row['tasks']:,} | {row['way']} | {row['bytes_per_task'] / 1e3:.1f} KB "
        f"| {row['polled_s']:.1f} s | {row['collecting_s']:.1f} s | {row['cancelled_s']:.2f} s "
        f"| {row['longest_callback_s'] * 1e3:.0f} ms "
        f"| {row['longest_collection_s'] * 1e3:.0f} ms |"
        for row in rows
    ]
    return "\n".join([head, *lines])


def run_wide(
    *, counts: Sequence[int] = (30_000, 100_000, 300_000), rounds: int = 3
) -> list[dict[str, Any]]:
    """Return one row for each number of tasks: the CPU time of a poll, which should not grow."""
    measured: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            with serving() as base_url:
                measured[count].append(_alone(base_url, "kontext-async", count, watched=False))
    return [{"tasks": count, **_medians(several)} for count, several in measured.items()]


def us_per_poll(row: Mapping[str, Any]) -> float:
    """Return the CPU time of a poll until each task was polled once, in microseconds."""
    return float(row["polled_cpu_s"] / row["polls"] * 1e6)


def wide_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = (
        "| tasks | polls until each was polled | CPU of a poll | of it collection "
        "| CPU of cancelling a task | memory of a task |\n|--:|--:|--:|--:|--:|--:|"
    )
    lines = []
    for row in rows:
        collecting = row["collecting_s"] / row["polls"] * 1e6
        cancelling = row["cancelled_cpu_s"] / row["tasks"] * 1e6
        lines.append(
            f"| {row['tasks']:,} | {row['polls']:,.0f} | {us_per_poll(row):.0f} µs "
            f"| {collecting:.0f} µs | {cancelling:.0f} µs | {row['bytes_per_task'] / 1e3:.1f} KB |"
        )
    return "\n".join([head, *lines])
