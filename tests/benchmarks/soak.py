"""Twenty thousand tasks on a bad day: is each accounted for, once, and rightly?

A simulator on virtual time has tasks that succeed, fail and straggle, decided beforehand, and
sprinkles in every fault it knows: refusals, gateway pages, resets, stalls, cut bodies, 429 and
maintenance. Every outcome of one batch is compared with what was decided.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from benchmarks import in_process

from kontext_async import GenerationFailedError, KontextClient, TaskOutcome
from kontext_async.simulator import FAULTS, Failure, Simulator

_FAILING = 0.02
_STRAGGLING = 0.01  # 60 to 400 s; the others about 12 s
_IN_FLIGHT = 1000  # tasks; so most of them still run when they are first polled
_REASONS = (
    Failure(400, "The prompt was flagged as violating the content policies."),
    Failure(500, "Internal error, please try again later."),
    Failure(501),
)


@attrs.frozen
class Scripted:
    """The outcome that is scripted for a task."""

    duration: float
    failure: Failure | None
    straggler: bool


def scripts(tasks: int, seed: int) -> dict[str, Scripted]:
    """The outcome of each task."""
    draw = random.Random(seed)
    decided = {}
    for i in range(tasks):
        straggler = draw.random() < _STRAGGLING
        duration = draw.uniform(60, 400) if straggler else 12 * draw.lognormvariate(0, 0.3)
        failure = draw.choice(_REASONS) if draw.random() < _FAILING else None
        decided[f"task-{i:05}"] = Scripted(duration, failure, straggler)
    return decided


def is_right(outcome: TaskOutcome, scripted: Scripted, base_url: str) -> bool:
    """Return True if an outcome is the one that was scripted."""
    error = outcome.error
    if scripted.failure:
        return (
            isinstance(error, GenerationFailedError)
            and error.task_id == outcome.task_id
            and error.error_code == scripted.failure.error_code
            and error.error_message == scripted.failure.message
        )
    result = outcome.result
    if result is None or error is not None or result.duration is None:
        return False
    # Times are written in whole seconds.
    in_time = abs(result.duration.total_seconds() - scripted.duration) <= 1
    url = f"{base_url}/images/{outcome.task_id}.png"
    return in_time and result.task_id == outcome.task_id and result.result_image_url == url


def _created_as_read(simulator: Simulator, decided: Mapping[str, Scripted]) -> Iterator[str]:
    for task_id, scripted in decided.items():
        outcome = scripted.failure or "success"
        yield simulator.add_task(task_id, duration=scripted.duration, outcome=outcome)


async def _soak(tasks: int, fault_rate: float, seed: int) -> dict[str, Any]:
    decided = scripts(tasks, seed)
    seen: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    right = 0
    async with Simulator(fault_rate=fault_rate, seed=seed, log_limit=None) as simulator:
        url = simulator.base_url
        async with KontextClient("a-benchmark-key", base_url=url) as client:
            task_ids = _created_as_read(simulator, decided)
            async with client.as_completed(task_ids, max_in_flight=_IN_FLIGHT) as outcomes:
                async for outcome in outcomes:
                    seen[outcome.task_id] += 1
                    right += is_right(outcome, decided[outcome.task_id], url)
                    errors[type(outcome.error).__name__] += outcome.error is not None
            stats = client.stats
        statuses = Counter(f"{r.status}/{r.code}" for r in simulator.requests)
        return {
            "tasks": tasks,
            "failing": sum(scripted.failure is not None for scripted in decided.values()),
            "straggling": sum(scripted.straggler for scripted in decided.values()),
            "kinds_of_fault": len(FAULTS),
            "accounted_for": sum(count == 1 for count in seen.values()),
            "right": right,
            "errors": dict(+errors),
            "failed_polls": dict(stats.errors),
            "answers": dict(statuses),
            "requests": stats.requests,
            "virtual_s": asyncio.get_running_loop().time(),
        }


def run(*, tasks: int = 20_000, fault_rate: float = 0.02, seed: int = 5) -> dict[str, Any]:
    """Count the tasks that got exactly one outcome, and the right one."""
    began = time.perf_counter()
    result = in_process.run(_soak(tasks, fault_rate, seed))
    return {**result, "fault_rate": fault_rate, "took_s": time.perf_counter() - began}


def table(result: Mapping[str, Any]) -> str:
    """Return the result as a Markdown table."""
    counts = {
        "tasks": result["tasks"],
        "of them failing": result["failing"],
        "taking 60 to 400 s": result["straggling"],
        "one outcome each": result["accounted_for"],
        "the right one": result["right"],
        "polls that failed": sum(result["failed_polls"].values()),
        "requests": result["requests"],
        "seconds until all had ended": round(result["virtual_s"]),
    }
    cells = " | ".join(f"{count:,}" for count in counts.values())
    return f"| {' | '.join(counts)} |\n{'|--:' * len(counts)}|\n| {cells} |"
