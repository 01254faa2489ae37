"""The CPU time of saving an image, relative to a bare aiohttp loop that writes the same bytes.

Each way saves the same images from a simulator in another process, in turn, into a new folder. The
time is this process's, threads and kernel included. The bare loop writes on the event loop as it
reads, without a check, a checksum or a temporary file, and with `fsync` only if its name says so.
Images are not decoded: with Pillow the cost depends on their pixels.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
from benchmarks.cpu import compared

from kontext_async import CompletedTask, KontextClient
from kontext_async.results import ImageSaver
from kontext_async.results.images import files as _files

_AT_A_TIME = 8

Save = Callable[[str, Sequence[CompletedTask], Path], Coroutine[Any, Any, None]]


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


async def _each(tasks: Sequence[CompletedTask], save: Callable[[CompletedTask], Any]) -> None:
    """Save the images of all tasks, `_AT_A_TIME` at once."""
    left = iter(tasks)

    async def one_after_the_other() -> None:
        for task in left:
            await save(task)

    await asyncio.gather(*(one_after_the_other() for _ in range(_AT_A_TIME)))


async def _bare(_: str, tasks: Sequence[CompletedTask], folder: Path, *, sync: bool) -> None:
    async with aiohttp.ClientSession() as session:

        async def save(task: CompletedTask) -> None:
            async with session.get(task.result_image_url) as response:
                with (folder / f"{task.task_id}.png").open("wb") as file:
                    async for piece in response.content.iter_chunked(64 * 1024):
                        file.write(piece)
                    if sync:
                        file.flush()
                        os.fsync(file.fileno())

        await _each(tasks, save)


async def _ours(base_url: str, tasks: Sequence[CompletedTask], folder: Path) -> None:
    async with (
        KontextClient("a-benchmark-key", base_url=base_url) as client,
        ImageSaver(client, folder, max_concurrency=_AT_A_TIME) as saver,
    ):
        await _each(tasks, saver.save)


WAYS: Mapping[str, Save] = {
    "kontext-async": _ours,
    "bare aiohttp": functools.partial(_bare, sync=False),
    "bare aiohttp, fsync": functools.partial(_bare, sync=True),
}


async def _tasks(base_url: str, images: int) -> list[CompletedTask]:
    async with KontextClient("a-benchmark-key", base_url=base_url) as client:
        outcomes = await client.wait_for_results(f"task-{i}" for i in range(images))
    return [outcome.unwrap() for outcome in outcomes]


def _microseconds(save: Save, base_url: str, tasks: Sequence[CompletedTask]) -> tuple[float, float]:
    """Return the CPU time and the elapsed time of an image."""
    with tempfile.TemporaryDirectory() as name:
        cpu, began = time.process_time(), time.perf_counter()
        asyncio.run(save(base_url, tasks, Path(name)))
        cpu, took = time.process_time() - cpu, time.perf_counter() - began
        assert len(list(Path(name).iterdir())) == len(tasks)
    return cpu / len(tasks) * 1e6, took / len(tasks) * 1e6


def run(*, images: int = 1000, image_bytes: int = 100_000, rounds: int = 7) -> list[dict[str, Any]]:
    """Return one row for each way to save images."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    with _simulator(image_bytes) as base_url, mock.patch.object(_files, "_HAS_PILLOW", new=False):
        tasks = asyncio.run(_tasks(base_url, images))
        for round_number in range(-1, rounds):  # the first is to warm up
            for name, save in WAYS.items():
                both = _microseconds(save, base_url, tasks)
                if round_number >= 0:
                    spent[name].append(both)
    cpus = {name: [cpu for cpu, _ in both] for name, both in spent.items()}
    return [
        {
            "way": name,
            "images": images,
            "image_bytes": image_bytes,
            "us_per_image": statistics.median(cpus[name]),
            "us_elapsed": statistics.median(took for _, took in spent[name]),
            **compared(cpus[name], cpus["bare aiohttp"]),
            "ratio_to_fsync": compared(cpus[name], cpus["bare aiohttp, fsync"])["ratio"],
        }
        for name in WAYS
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| saved by | images | of | CPU of each | to bare | middle half | to fsync | images/s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['way']} | {row['images']:,} | {row['image_bytes'] / 1e3:.0f} KB "
            f"| {row['us_per_image']:.0f} µs | {row['ratio']:.2f} | {low:.2f} to {high:.2f} "
            f"| {row['ratio_to_fsync']:.2f} | {1e6 / row['us_elapsed']:,.0f} |"
        )
    return "\n".join(lines)
