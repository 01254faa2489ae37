"""The CPU time of a wait, against the loop a user would write, and against other clients.

Every contestant asks the same fast server in another process. In each round each of them does the
same number of waits; what counts is its time over that of the bare loop in the same round, as the
median of all rounds, so that a machine that changes its pace meanwhile changes little.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import aiohttp
import tenacity
from benchmarks.fast_server import serving

from kontext_async import KontextClient

Wait = Callable[[str], Awaitable[object]]
Contestant = Callable[[str], contextlib.AbstractAsyncContextManager[Wait]]

_PATH = "/api/v1/flux/kontext/record-info"
_HEADERS = {"Authorization": "Bearer a-benchmark-key"}

# The polls of a wait, by what its id begins with.
_POLLS = {"done": 1, "third": 3}


@contextlib.asynccontextmanager
async def _ours(base_url: str) -> AsyncIterator[Wait]:
    async with KontextClient("a-benchmark-key", base_url=base_url) as client:
        # Without a pause between polls, as for all the others. It is not called at a first poll.
        yield functools.partial(client.wait_for_result, wait=tenacity.wait_none())


@contextlib.asynccontextmanager
async def _ours_with_a_session(base_url: str) -> AsyncIterator[Wait]:
    async with (
        aiohttp.ClientSession() as session,
        KontextClient("a-benchmark-key", base_url=base_url, session=session) as client,
    ):
        yield functools.partial(client.wait_for_result, wait=tenacity.wait_none())


@contextlib.asynccontextmanager
async def _bare(base_url: str) -> AsyncIterator[Wait]:
    url = base_url + _PATH

    async with aiohttp.ClientSession() as session:

        async def wait(task_id: str) -> object:
            while True:
                async with session.get(
                    url, params={"taskId": task_id}, headers=_HEADERS
                ) as response:
                    data = json.loads(await response.read())["data"]
                if data["successFlag"] != 0:
                    return data["response"]["resultImageUrl"]

        yield wait


@contextlib.asynccontextmanager
async def _httpx_and_tenacity(base_url: str) -> AsyncIterator[Wait]:
    import httpx

    url = base_url + _PATH
    async with httpx.AsyncClient(headers=_HEADERS) as client:

        async def poll(task_id: str) -> Any:
            response = await client.get(url, params={"taskId": task_id})
            return response.json()["data"]

        async def wait(task_id: str) -> object:
            retrying = tenacity.AsyncRetrying(
                retry=tenacity.retry_if_result(lambda data: data["successFlag"] == 0)
                | tenacity.retry_if_exception_type(httpx.TransportError),
                wait=tenacity.wait_none(),
                stop=tenacity.stop_after_delay(600),
            )
            data = await retrying(poll, task_id)
            return data["response"]["resultImageUrl"]

        yield wait


@contextlib.asynccontextmanager
async def _openai(base_url: str) -> AsyncIterator[Wait]:
    import openai

    async with openai.AsyncOpenAI(api_key="a-benchmark-key", base_url=f"{base_url}/v1") as client:
        yield functools.partial(client.videos.poll, poll_interval_ms=0)


@contextlib.asynccontextmanager
async def _fal(base_url: str) -> AsyncIterator[Wait]:
    import fal_client

    client = fal_client.AsyncClient(key="a-benchmark-key")
    # Its own setting takes a host, and always adds https.
    fal_client.client.QUEUE_URL_FORMAT = f"{base_url}/"

    async def wait(task_id: str) -> object:
        handle = await client.get_handle("benchmark/app", task_id)
        return await handle.get(interval=0)

    yield wait
    await (await client._client).aclose()


CONTESTANTS: Mapping[str, Contestant] = {
    "kontext-async": _ours,
    "kontext-async, your session": _ours_with_a_session,
    "bare aiohttp": _bare,
    "httpx + tenacity": _httpx_and_tenacity,
    "openai": _openai,
    "fal-client": _fal,
}


async def _spent(wait: Wait, task_ids: Sequence[str], concurrency: int) -> float:
    """Seconds of CPU time that waiting for all of these takes this process."""
    left = iter(task_ids)

    async def one_after_the_other() -> None:
        for task_id in left:
            await wait(task_id)

    gc.collect()  # what the others have left
    began = time.process_time()
    await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))
    return time.process_time() - began


async def _rounds(
    base_url: str, kind: str, names: Sequence[str], *, rounds: int, waits: int, concurrency: int
) -> dict[str, list[float]]:
    """Microseconds of CPU time for a wait, of each contestant in each round."""
    number = itertools.count()
    order = random.Random(3)
    async with contextlib.AsyncExitStack() as stack:
        ready = [
            (name, await stack.enter_async_context(CONTESTANTS[name](base_url))) for name in names
        ]
        taken: dict[str, list[float]] = {name: [] for name in names}
        for round_number in range(-1, rounds):  # the first is to warm up
            order.shuffle(ready)
            for name, wait in ready:
                task_ids = [f"{kind}-{next(number)}" for _ in range(waits)]
                seconds = await _spent(wait, task_ids, concurrency)
                if round_number >= 0:
                    taken[name].append(seconds / waits * 1e6)
    return taken


def run(
    *,
    names: Sequence[str] = tuple(CONTESTANTS),
    rounds: int = 25,
    waits: int = 200,
    concurrencies: Sequence[int] = (1, 64),
) -> list[dict[str, Any]]:
    """One row for each kind of task, concurrency and contestant."""
    rows = []
    with serving() as base_url:
        for kind, concurrency in itertools.product(_POLLS, concurrencies):
            taken = asyncio.run(
                _rounds(base_url, kind, names, rounds=rounds, waits=waits, concurrency=concurrency)
            )
            rows += [_row(name, kind, concurrency, taken) for name in names]
    return rows


def _row(
    name: str, kind: str, concurrency: int, taken: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    return {
        "client": name,
        "polls": _POLLS[kind],
        "concurrency": concurrency,
        "us_per_wait": statistics.median(taken[name]),
        **compared(taken[name], taken["bare aiohttp"]),
    }


def compared(mine: Sequence[float], its: Sequence[float]) -> dict[str, Any]:
    """Compare the times of each round: the median of the ratios, and where half of them lie."""
    ratios = [one / other for one, other in zip(mine, its, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ratio": statistics.median(ratios), "ratio_quartiles": [low, high]}


def spread(compared: Mapping[str, Any]) -> str:
    """Return a ratio in words, with the middle half of its rounds."""
    low, high = compared["ratio_quartiles"]
    if low == high == 1:
        return "1"
    return f"{compared['ratio']:.2f} ({low:.2f}\N{EN DASH}{high:.2f})"


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Keep this process, but not those that it has started, on some of its cores."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table: ratios, and the middle half of the rounds, for each kind of wait."""
    kinds = dict.fromkeys((row["polls"], row["concurrency"]) for row in rows)
    lines = [
        f"| | {' | '.join(f'polls: {polls}, at a time: {count}' for polls, count in kinds)} |",
        "|---" + "|--:" * len(kinds) + "|",
    ]
    for name in dict.fromkeys(row["client"] for row in rows):
        cells = " | ".join(_cell(row) for row in rows if row["client"] == name)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> str:
    if row["client"] == "bare aiohttp":
        return f"1 = {row['us_per_wait']:.0f} µs"
    return spread(row)
