"""The CPU time and the speed of saving images, relative to a bare aiohttp loop with `fsync`.

All ways save the same images from a simulator in another process, in turn, a few at a time, so
that all meet the same load of the machine. The time is this process's, threads and kernel
included. The bare loop writes on the event loop as it reads. In its second form it keeps what
kontext-async keeps: a temporary name until the image is on disk, a synced folder, and a checksum.
Images are not decoded: with Pillow the cost depends on their pixels.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import aiohttp
from benchmarks.cpu import compared, on_cores, spread

from kontext_async import CompletedTask, KontextClient
from kontext_async.results import ImageSaver
from kontext_async.results.images import files as _files

_AT_A_TIME = 8

_IN_TURN = 50  # images saved in one way before it is the other's turn

Save = Callable[[CompletedTask], Awaitable[object]]


@contextlib.contextmanager
def _simulator(image_bytes: int) -> Iterator[str]:
    """Run a simulator in a process of its own, and yield its base URL."""
    command = [sys.executable, "-m", "kontext_async", "simulate", "--duration", "0"]
    command += ["--image-bytes", str(image_bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["baseUrl"]
        finally:
            process.terminate()


async def _each(tasks: Sequence[CompletedTask], save: Save) -> None:
    """Save the images of all tasks, `_AT_A_TIME` at once."""
    left = iter(tasks)

    async def one_after_the_other() -> None:
        for task in left:
            await save(task)

    await asyncio.gather(*(one_after_the_other() for _ in range(_AT_A_TIME)))


@contextlib.asynccontextmanager
async def _bare(_: str, folder: Path) -> AsyncIterator[Save]:
    async with aiohttp.ClientSession() as session:

        async def save(task: CompletedTask) -> None:
            async with session.get(task.result_image_url) as response:
                with (folder / f"{task.task_id}.png").open("wb") as file:
                    async for piece in response.content.iter_chunked(64 * 1024):
                        file.write(piece)
                    _sync(file)

        yield save


@contextlib.asynccontextmanager
async def _careful(_: str, folder: Path) -> AsyncIterator[Save]:
    async with aiohttp.ClientSession() as session:

        async def save(task: CompletedTask) -> str:
            digest = hashlib.sha256()
            path = folder / f"{task.task_id}.png"
            temporary = path.with_suffix(".part")
            async with session.get(task.result_image_url) as response:
                with temporary.open("xb") as file:
                    async for piece in response.content.iter_chunked(64 * 1024):
                        file.write(piece)
                        digest.update(piece)
                    _sync(file)
            temporary.rename(path)
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            return digest.hexdigest()

        yield save


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.asynccontextmanager
async def _ours(base_url: str, folder: Path) -> AsyncIterator[Save]:
    async with (
        KontextClient("a-benchmark-key", base_url=base_url) as client,
        ImageSaver(client, folder, max_concurrency=_AT_A_TIME) as saver,
    ):
        yield saver.save


WAYS: Mapping[str, Callable[[str, Path], contextlib.AbstractAsyncContextManager[Save]]] = {
    "bare aiohttp, fsync": _bare,
    "the same, as careful": _careful,
    "kontext-async": _ours,
}


async def _tasks(base_url: str, images: int) -> list[CompletedTask]:
    async with KontextClient("a-benchmark-key", base_url=base_url) as client:
        outcomes = await client.wait_for_results(f"task-{i}" for i in range(images))
    return [outcome.unwrap() for outcome in outcomes]


async def _round(
    base_url: str, tasks: Sequence[CompletedTask], into: Path
) -> dict[str, tuple[float, float]]:
    """Return the CPU time and the elapsed time of an image, in microseconds, for each way."""
    spent = dict.fromkeys(WAYS, (0.0, 0.0))
    async with contextlib.AsyncExitStack() as stack:
        saves: dict[str, Save] = {}
        for name, way in WAYS.items():
            folder = Path(tempfile.mkdtemp(dir=into))
            saves[name] = await stack.enter_async_context(way(base_url, folder))
        for number, start in enumerate(range(0, len(tasks), _IN_TURN)):
            for name in list(WAYS)[:: -1 if number % 2 else 1]:
                cpu, began = time.process_time(), time.perf_counter()
                await _each(tasks[start : start + _IN_TURN], saves[name])
                spent[name] = (
                    spent[name][0] + (time.process_time() - cpu) / len(tasks) * 1e6,
                    spent[name][1] + (time.perf_counter() - began) / len(tasks) * 1e6,
                )
    return spent


def run(*, images: int = 1000, image_bytes: int = 100_000, rounds: int = 9) -> list[dict[str, Any]]:
    """Return one row for each way to save images, on all cores and with this process on one."""
    rows = []
    # Kept to the end: ext4 makes new files slowly for some time after many were removed.
    with tempfile.TemporaryDirectory() as into:
        for cores in (len(os.sched_getaffinity(0)), 1):
            with _simulator(image_bytes) as base_url, on_cores(cores):
                spent = _rounds(base_url, images, rounds, Path(into))
            size = {"images": images, "image_bytes": image_bytes, "cores": cores}
            rows += [{"way": name, **size, **_measured(name, spent)} for name in WAYS]
    return rows


def _rounds(
    base_url: str, images: int, rounds: int, into: Path
) -> list[dict[str, tuple[float, float]]]:
    with mock.patch.object(_files, "_HAS_PILLOW", new=False):
        tasks = asyncio.run(_tasks(base_url, images))
        asyncio.run(_round(base_url, tasks[:_IN_TURN], into))  # to warm up
        return [asyncio.run(_round(base_url, tasks, into)) for _ in range(rounds)]


def _measured(name: str, spent: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, Any]:
    cpus, took = zip(*(each[name] for each in spent), strict=True)
    bare_cpus, bare_took = zip(*(each["bare aiohttp, fsync"] for each in spent), strict=True)
    return {
        "us_per_image": statistics.median(cpus),
        "us_elapsed": statistics.median(took),
        "cpu": compared(cpus, bare_cpus),
        "speed": compared(bare_took, took),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| cores | saved by | CPU of an image | to bare | images/s | to bare |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        cpu = f"{row['us_per_image']:.0f} µs | {spread(row['cpu'])}"
        speed = f"{1e6 / row['us_elapsed']:,.0f} | {spread(row['speed'])}"
        lines.append(f"| {row['cores']} | {row['way']} | {cpu} | {speed} |")
    return "\n".join(lines)
