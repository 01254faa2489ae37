"""Every fault at once, at random: each id has one outcome, the right one, and in time.

Set ``KONTEXT_CHAOS`` to the number of seeds: ``nox -s chaos`` runs two hundred.
"""

from __future__ import annotations

import functools
import os
from collections import Counter

import pytest
from chaos import KINDS, Chaos, run_chaos
from client_world import run_on_virtual_time

from kontext_async import ResponseFormatError, ServerError, TransportError

TASKS = 2000
TROUBLE = (ServerError, TransportError, ResponseFormatError)
SEEDS = range(int(os.environ.get("KONTEXT_CHAOS", "3")))


@functools.cache
def undisturbed(world):
    """Return the ends of a world's tasks where all are healthy and no answer is a fault."""
    return run_on_virtual_time(lambda: run_chaos(Chaos(world, None, TASKS)))


@functools.cache
def disturbed(seed):
    """Return the world of a seed, and what became of its tasks."""
    chaos = Chaos(seed // 10, seed, TASKS)
    return chaos, run_on_virtual_time(lambda: run_chaos(chaos))


def wrong_end(task, outcome, *, has_outages):
    kind = KINDS[task.kind]
    if kind.error in TROUBLE and has_outages and isinstance(outcome.error, TROUBLE):
        return ""  # its last polls may have met the outage instead
    if kind.error is None:
        url = None if outcome.result is None else outcome.result.result_image_url
        return "" if url == task.url else f"{outcome.error!r} {outcome.error}"
    code = getattr(outcome.error, "error_code", getattr(outcome.error, "code", None))
    is_right = type(outcome.error) is kind.error and kind.code in (None, code)
    return "" if is_right else f"{outcome.error!r} {outcome.error} instead of {kind}"


def shown(problems):
    return f"{len(problems)} problems, such as\n" + "\n".join(problems[:10])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_task_has_its_own_outcome(seed):
    """One, and the right one, whatever happens around it."""
    chaos, ended = disturbed(seed)
    counts = Counter(outcome.task_id for outcome in ended.outcomes)
    problems = [
        f"{counts[name]} outcomes for {name!r}" for name in chaos.tasks if counts[name] != 1
    ]
    for outcome in ended.outcomes:
        task = chaos.tasks[outcome.task_id]
        if problem := wrong_end(task, outcome, has_outages=chaos.outage_seconds > 0):
            problems.append(f"{task.kind} {outcome.task_id} ({task.duration:.1f} s): {problem}")
    assert not problems, shown(problems)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
def test_healthy_tasks_come_within_three_times_their_undisturbed_time(seed):
    """Undisturbed, all tasks are healthy, and no answer is a fault.

    Seconds in which the service, or a poll of the task, had no answer count as undisturbed, and
    so do those of the rate limit that faults used up.
    """
    chaos, ended = disturbed(seed)
    calm = undisturbed(seed // 10)
    problems = []
    for task in chaos.tasks.values():
        if task.kind != "healthy":
            continue
        came = ended.times[task.task_id]
        lost = chaos.outage_seconds + task.withheld + chaos.spoiled_seconds(came)
        limit = 3 * (calm.times[task.task_id] + lost)
        if came > limit:
            problems.append(f"{task.task_id}: {came:.1f} s, not {limit:.1f} s")
    assert not problems, shown(problems)
