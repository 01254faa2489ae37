"""The waiters that are due: the order in which they get permits, and who probes."""

from __future__ import annotations

import asyncio
import itertools
import sys

from kontext_async.pacing.due import Due, DueQueue

_ORDER = itertools.count()


def due(deadline, *, wanted_at=0.0, failing=0):
    permit = asyncio.get_running_loop().create_future()
    return Due(deadline, next(_ORDER), wanted_at, permit, failing)


def queue_of(*entries):
    queue = DueQueue()
    for entry in entries:
        queue.push(entry)
    return queue


def taken(queue):
    """Return all waiters in their order."""
    found = []
    while (first := queue.first()) is not None:
        queue.remove_first(first)
        found.append(first)
    return found


async def test_the_earliest_deadline_is_first_whether_or_not_the_task_fails():
    late, early, middle = due(30.0), due(10.0, failing=2), due(20.0, failing=1)
    assert taken(queue_of(late, early, middle)) == [early, middle, late]


async def test_equal_deadlines_are_first_come_first_served():
    entries = [due(10.0, failing=n % 3) for n in range(9)]
    assert taken(queue_of(*entries)) == entries


async def test_a_waiter_whose_permit_is_done_is_gone():
    gone, stays = due(10.0), due(20.0)
    queue = queue_of(gone, stays)
    gone.permit.cancel()
    assert queue.first() is stays
    assert queue
    stays.permit.set_result(0.0)
    assert not queue
    assert queue.entries == 0


async def test_the_healthiest_probes_and_among_those_the_one_that_waited_longest():
    """Deadlines do not matter: the earliest may be that of a task that always fails."""
    expected = [
        due(50.0, wanted_at=1.0),
        due(40.0, wanted_at=2.0),
        due(30.0, wanted_at=0.0, failing=1),
        due(10.0, wanted_at=0.5, failing=1),
        due(20.0, wanted_at=0.0, failing=2),
    ]
    queue = queue_of(*reversed(expected))
    assert queue.has_healthy()
    for probing in expected:
        assert queue.prober() is probing
        probing.permit.set_result(0.0)
    assert not queue


async def test_no_task_is_healthy_once_all_of_them_fail():
    healthy = due(10.0)
    queue = queue_of(due(20.0, failing=1), healthy)
    healthy.permit.cancel()
    assert not queue.has_healthy()


async def test_who_probes_is_found_among_thousands_without_asking_all():
    queue = queue_of(*(due(float(n), wanted_at=float(-n)) for n in range(5000)))
    asked = 0

    def count(frame, event, arg):
        nonlocal asked
        asked += event == "c_call" and arg.__name__ == "done"

    sys.setprofile(count)
    try:
        queue.prober()
    finally:
        sys.setprofile(None)
    assert 1000 <= asked < 1100
