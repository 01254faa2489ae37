"""The discovery of an unknown rate limit: batches against the simulator, on virtual time.

The simulator enforces a limit that the client is not told. Counted is what its log shows from the
first refusal on: answered requests as a share of what the limit allows, and the share of requests
answered 429. Beside the client stands what a user would write for the same tasks: `asyncio.gather`
over loops with a fixed sleep, also after a 429. And an explicit `RateLimit`, which must meet none.

Several clients may share a limit, each of which discovers it alone: of interest is then how much of
it they use together, and how equally.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

import aiohttp
import attrs
from benchmarks import in_process

from kontext_async import KontextClient, RateLimit
from kontext_async.simulator import (
    FixedWindow,
    Limit,
    LoggedRequest,
    Simulator,
    SlidingWindow,
    TokenBucket,
)

# What is asked of the client, by period: the least share answered, the largest share refused.
BARS = {1: (0.90, 0.03), 10: (0.85, 0.05), 60: (0.70, 0.10)}

_INTERVAL = 3.0  # s between the plain loop's polls, the usual choice of hand-written ones
_LATENCY = 0.05  # s that the simulator takes for an answer
_PHASE = 0.3  # of a window that has passed when the client begins
# How long there is work for in the end, beyond what is counted, in windows.
_MARGIN = 5
# Of clients that share a limit: seconds between those that begin at once, seconds until each has
# had time to find its part, and for how long they are counted from then on.
_AT_ONCE = 0.013
_SETTLED = 60.0
_COUNTED = 60.0
_PHASES = (0.1, 0.4, 0.7)  # of a window that have passed at the beginning, one run for each


@attrs.frozen
class Case:
    """A limit of the service, and for how many windows to count."""

    requests: int
    period: int
    kind: str
    windows: int

    def limit(self) -> Limit:
        """The simulator's limit of that kind."""
        if self.kind == "bucket":
            return TokenBucket(self.requests, self.requests / self.period)
        kind = {"window": FixedWindow, "sliding": SlidingWindow}[self.kind]
        return kind(self.requests, float(self.period))

    @property
    def until(self) -> float:
        """Seconds for which work is needed."""
        return float((self.windows + _MARGIN) * self.period)

    @property
    def tasks(self) -> int:
        """Tasks that are work enough, at two polls a task or more."""
        return int(self.until / self.period * self.requests / 2) + 1


def cases(*, short: int = 100, long: int = 40) -> list[Case]:
    """All of them; ``short`` windows of a second, ``long`` of the longer ones."""
    limits = [(10, 1), (40, 1), (200, 1), (20, 10), (100, 60)]
    return [
        Case(requests, period, kind, short if period == 1 else long)
        for (requests, period), kind in itertools.product(limits, ("window", "bucket"))
    ]


async def _batch(base_url: str, task_ids: Iterable[str], rate_limit: RateLimit | None) -> None:
    async with (
        KontextClient("a-benchmark-key", base_url=base_url, rate_limit=rate_limit) as client,
        client.as_completed(task_ids) as outcomes,
    ):
        async for _ in outcomes:
            pass


async def _gather(base_url: str, task_ids: Iterable[str]) -> None:
    url = f"{base_url}/api/v1/flux/kontext/record-info"
    headers = {"Authorization": "Bearer a-benchmark-key"}
    async with aiohttp.ClientSession(headers=headers) as session:

        async def wait(task_id: str) -> object:
            while True:
                async with session.get(url, params={"taskId": task_id}) as response:
                    envelope = json.loads(await response.read())
                if envelope["code"] == 200 and envelope["data"]["successFlag"] != 0:
                    return envelope["data"]
                await asyncio.sleep(_INTERVAL)

        await asyncio.gather(*(wait(task_id) for task_id in task_ids))


async def _log(
    case: Case, work: Callable[[str], Coroutine[Any, Any, None]], phase: float = _PHASE
) -> list[LoggedRequest]:
    """The simulator's log of some work over a span of time."""
    simulator = Simulator(
        rate_limit=case.limit(), auto_create=True, latency=_LATENCY, log_limit=None
    )
    async with simulator:
        await asyncio.sleep(phase * case.period)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(case.until):
                await work(simulator.base_url)
        return list(simulator.requests)


def _told(case: Case) -> Case:
    """The same with a limit that counts as a `RateLimit` does: any period, not those of a clock."""
    return attrs.evolve(case, kind="sliding", windows=min(case.windows, 40))


def _ways(case: Case) -> dict[str, tuple[Case, Callable[[str], Coroutine[Any, Any, None]]]]:
    task_ids = [f"task-{i}" for i in range(case.tasks)]
    explicit = RateLimit(case.requests, float(case.period))
    # The plain loop asks so often, and in vain, that a few windows of it are enough.
    few = attrs.evolve(case, windows=min(case.windows, 20))
    return {
        "kontext-async": (case, lambda url: _batch(url, task_ids, None)),
        "gather": (few, lambda url: _gather(url, task_ids[: few.tasks])),
        "kontext-async, told": (_told(case), lambda url: _batch(url, task_ids, explicit)),
    }


def _row(case: Case, way: str, log: Sequence[LoggedRequest]) -> dict[str, Any]:
    """Count from the first refusal on, or from the start if there is none."""
    first = next((request.time for request in log if request.code == 429), 0.0)
    until = first + case.windows * case.period
    counted = [request for request in log if first <= request.time < until]
    refused = sum(request.code == 429 for request in counted)
    share, most = BARS[case.period]
    return {
        "limit": f"{case.requests} per {case.period} s",
        "kind": case.kind,
        "way": way,
        "windows": case.windows,
        "answered": (len(counted) - refused) / (case.windows * case.requests),
        "refused": refused / len(counted),
        "refusals": refused,
        "asked_to_the_end": log[-1].time >= until - case.period,
        "bars": [share, most],
    }


def run(chosen: Sequence[Case] | None = None) -> list[dict[str, Any]]:
    """One row for each limit and way; the told one only where the limit is a window."""
    rows = []
    for case in cases() if chosen is None else chosen:
        for way, (counted, work) in _ways(case).items():
            if case.kind == "window" or counted.kind != "sliding":
                log = in_process.run(_log(counted, work))
                rows.append(_row(counted, way, log))
    return rows


async def _deadlines(tasks: int) -> dict[str, Any]:
    """Tasks done 3 s after their first poll, 20 requests a second, and 10 s for each."""
    limit = RateLimit(20, 1.0)
    simulator = Simulator(durations=3.0, rate_limit=SlidingWindow(20, 1.0), auto_create=True)
    task_ids = [f"task-{i}" for i in range(tasks)]
    async with (
        simulator,
        KontextClient("a-key", base_url=simulator.base_url, rate_limit=limit) as client,
    ):
        outcomes = await client.wait_for_results(task_ids, timeout=10.0)
        took = asyncio.get_running_loop().time()
    results = sum(outcome.result is not None for outcome in outcomes)
    return {"tasks": tasks, "results": results, "refusals": simulator.refused, "took_s": took}


def run_deadlines(*, tasks: int = 1000) -> dict[str, Any]:
    """Count the tasks with results within ``timeout=10`` under a narrow explicit limit."""
    return in_process.run(_deadlines(tasks))


def deadlines_table(result: Mapping[str, Any]) -> str:
    """Return the result as a Markdown table."""
    cells = "{tasks:,} | {results:,} | {refusals} | {took_s:.0f} s".format_map(result)
    return f"| tasks | results in time | requests refused | took |\n{'|--:' * 4}|\n| {cells} |"


@attrs.frozen
class Sharing:
    """Clients that begin so many seconds apart, and share a limit that none of them is told."""

    requests: int
    period: int
    kind: str
    clients: int
    apart: float

    def case(self) -> Case:
        """The limit, until the end of what is counted."""
        seconds = self.counted_from + _COUNTED
        return Case(self.requests, self.period, self.kind, math.ceil(seconds / self.period))

    def began(self, client: int) -> float:
        """Return when a client begins: at once means a few ms apart, as processes are."""
        return client * (self.apart or _AT_ONCE)

    @property
    def counted_from(self) -> float:
        """The time from which to count: the last client has settled, or all begin at once."""
        return self.began(self.clients - 1) + (_SETTLED if self.apart else 0.0)


def sharings() -> list[Sharing]:
    """Two clients, of which one is late, under several limits; four and eight under one."""
    late = [(10, 1), (40, 1), (200, 1), (20, 10)]
    limits = [(requests, period, 2, 30.0) for requests, period in late]
    limits += [(40, 1, 4, 30.0), (40, 1, 8, 0.0)]
    return [
        Sharing(requests, period, kind, clients, apart)
        for requests, period, clients, apart in limits
        for kind in ("window", "bucket")
    ]


async def _share(sharing: Sharing, phase: float) -> list[LoggedRequest]:
    """The simulator's log of all clients; the ids of a client's tasks begin with its number."""
    case = sharing.case()

    async def client(number: int, base_url: str) -> None:
        await asyncio.sleep(sharing.began(number))
        await _batch(base_url, [f"{number}-{i}" for i in range(case.tasks)], None)

    async def work(base_url: str) -> None:
        await asyncio.gather(*(client(number, base_url) for number in range(sharing.clients)))

    return await _log(case, work, phase)


def _shares(sharing: Sharing, log: Sequence[LoggedRequest], phase: float) -> dict[str, float]:
    """Return what one run shows. A client's part is an equal share of the limit."""
    began = phase * sharing.period
    last, settled = began + sharing.began(sharing.clients - 1), began + sharing.counted_from
    rate = sharing.requests / sharing.period

    def parts(begins: float, seconds: float) -> list[float]:
        answered = Counter(
            int(str(request.task_id).partition("-")[0])
            for request in log
            if request.code != 429 and begins <= request.time < begins + seconds
        )
        part = rate * seconds / sharing.clients
        return [answered[number] / part for number in range(sharing.clients)]

    since = [request for request in log if last <= request.time < settled + _COUNTED]
    counted = parts(settled, _COUNTED)
    return {
        "answered": sum(counted) / sharing.clients,
        "refused": sum(request.code == 429 for request in since) / len(since),
        "fairness": min(counted) / max(counted),
        "late": parts(last + _SETTLED / 2, _SETTLED / 2)[-1],
        "least": min(counted),
    }


def run_sharing(
    chosen: Sequence[Sharing] | None = None, phases: Sequence[float] = _PHASES
) -> list[dict[str, Any]]:
    """One row for each, with the worst of several runs."""
    rows = []
    for sharing in sharings() if chosen is None else chosen:
        runs = [_shares(sharing, in_process.run(_share(sharing, phase)), phase) for phase in phases]
        worst = {name: min(run[name] for run in runs) for name in runs[0]}
        worst["refused"] = max(run["refused"] for run in runs)
        rows.append(attrs.asdict(sharing) | worst)
    return rows


def sharing_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = [
        "| clients | limit | kind | answered | refused | least/most | late client | least client |",
        "|--:|---|---|--:|--:|--:|--:|--:|",
    ]
    lines = [
        f"| {row['clients']} | {row['requests']} in {row['period']} s | {row['kind']} "
        f"| {100 * row['answered']:.1f} % | {100 * row['refused']:.1f} % | {row['fairness']:.2f} "
        f"| {row['late']:.2f} | {row['least']:.2f} |"
        for row in rows
    ]
    return "\n".join(head + lines)


# Columns of the table: a kind of limit as it is counted, and a way to meet it.
_COLUMNS = {
    "window": ("window", "kontext-async"),
    "bucket": ("bucket", "kontext-async"),
    "gather, window": ("window", "gather"),
    "known, any period": ("sliding", "kontext-async, told"),
}


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the shares answered and refused, by limit and way."""
    cells = {(row["limit"], row["kind"], row["way"]): row for row in rows}
    lines = ["| limit | " + " | ".join(_COLUMNS) + " |", "|---" + "|--:" * len(_COLUMNS) + "|"]
    for limit in dict.fromkeys(limit for limit, _, _ in cells):
        found = (cells.get((limit, *column)) for column in _COLUMNS.values())
        lines.append(f"| {limit} | {' | '.join(map(_cell, found))} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    refused = f"{row['refused']:.1%}" if row["refusals"] else "0"
    return f"{row['answered']:.1%} · {refused}".replace("%", "\N{NO-BREAK SPACE}%")


def by_second(*, requests: int = 40, windows: int = 60) -> list[dict[str, Any]]:
    """Count the answered and the refused requests of each second, for the client and for gather."""
    case = Case(requests, 1, "window", windows)
    task_ids = [f"task-{i}" for i in range(case.tasks)]
    ways: dict[str, Callable[[str], Coroutine[Any, Any, None]]] = {
        "kontext-async": lambda url: _batch(url, task_ids, None),
        "gather": lambda url: _gather(url, task_ids),
    }
    rows = []
    for way, work in ways.items():
        log = in_process.run(_log(case, work))
        answered, refused = (
            Counter(int(request.time) for request in log if (request.code == 429) == is_refused)
            for is_refused in (False, True)
        )
        rows.append(
            {
                "way": way,
                "limit": requests,
                "answered": [answered[k] for k in range(windows)],
                "refused": [refused[k] for k in range(windows)],
            }
        )
    return rows
