"""A notice that a task has ended brings its next poll forward, and nothing more."""

from __future__ import annotations

import asyncio

import pytest
from client_world import UNBOUND, error_of, make_client, run_on_virtual_time
from tenacity import wait_fixed

from kontext_async import (
    ClientStateError,
    ConfigurationError,
    KontextClient,
    RateLimit,
    TransportError,
    WaitTimeoutError,
)
from kontext_async.simulator import Simulator

pytestmark = pytest.mark.virtual_time

SLOW = wait_fixed(100)


def polls(simulator):
    return [round(request.time, 2) for request in simulator.requests if request.method == "GET"]


async def test_a_notice_ends_the_sleep_of_a_wait():
    """The task is polled at once, and its result is there."""
    async with Simulator() as simulator, make_client(simulator) as client:
        task_id = simulator.add_task(duration=7.0, outcome="success")
        waiting = asyncio.create_task(client.wait_for_result(task_id, wait=SLOW))
        await asyncio.sleep(7.5)
        assert client.notice(task_id)
        await waiting
        assert polls(simulator) == [0.0, 7.5]


async def test_two_more_polls_follow_a_notice_that_came_too_early():
    """After 1 and 3 seconds; then the schedule goes on."""
    async with Simulator() as simulator, make_client(simulator) as client:
        task_id = simulator.add_task(duration=110.0, outcome="success")
        waiting = asyncio.create_task(client.wait_for_result(task_id, wait=SLOW))
        await asyncio.sleep(5)
        client.notice(task_id)
        await waiting
        assert polls(simulator) == [0.0, 5.0, 6.0, 9.0, 109.0, 209.0]


async def test_any_number_of_notices_is_one_notice():
    """At once, or over time; for as many waits as there are."""
    async with Simulator() as simulator, make_client(simulator) as client:
        task_id = simulator.add_task(duration=50.0, outcome="success")
        waits = [asyncio.create_task(client.wait_for_result(task_id, wait=SLOW)) for _ in range(2)]
        for _ in range(400):
            await asyncio.sleep(0.1)
            assert client.notice(task_id)
        await asyncio.sleep(100)
        await asyncio.gather(*waits)
        # The first one, the one of the notice, two more, and one by the schedule.
        assert len(polls(simulator)) == 2 * 5


async def test_a_notice_before_the_wait_is_remembered():
    """For 15 minutes, and for the last 1,000 tasks."""
    async with Simulator() as simulator, make_client(simulator) as client:
        ids = [simulator.add_task(duration=5000.5, outcome="success") for _ in range(3)]
        assert not client.notice(ids[0])
        await asyncio.sleep(1000)
        assert not client.notice(ids[1])
        assert not client.notice(ids[2])
        for number in range(999):
            client.notice(f"other {number}")
        began = simulator.now
        for task_id, expected in ((ids[0], 1), (ids[1], 1), (ids[2], 3)):
            before = len(polls(simulator))
            waiting = client.wait_for_result(task_id, wait=SLOW, timeout=50)
            await error_of(waiting, WaitTimeoutError)
            # With the last one before the deadline.
            assert len(polls(simulator)) - before == expected + 1
        assert simulator.now - began == pytest.approx(150)


async def test_a_notice_during_a_poll_brings_another_one():
    """The answer under way may have been made just before the task ended."""
    async with Simulator(latency=2.0) as simulator, make_client(simulator) as client:
        task_id = simulator.add_task(duration=2.5, outcome="success")
        waiting = asyncio.create_task(client.wait_for_result(task_id, wait=SLOW))
        await asyncio.sleep(1)
        assert client.notice(task_id)
        await waiting
        assert polls(simulator) == [0.0, 2.0]


async def test_a_notice_waits_for_its_turn():
    """In the client's rate limit; and a wait that was not polled yet keeps its place."""
    limit = RateLimit(1, 10.0)
    async with Simulator() as simulator, make_client(simulator, rate_limit=limit) as client:
        ids = [simulator.add_task(duration=1.0, outcome="success") for _ in range(3)]
        waits = [asyncio.create_task(client.wait_for_result(i, wait=SLOW)) for i in ids]
        await asyncio.sleep(1)
        client.notice(ids[1])
        client.notice(ids[0])
        await asyncio.gather(*waits)
        polled = [request.task_id for request in simulator.requests]
        assert polled == [ids[0], ids[0], ids[1], ids[2]]
        assert polls(simulator)[1] == pytest.approx(10, abs=0.1)


async def test_a_notice_does_not_hide_a_cancellation():
    """Both at the same moment, in either order: the wait is cancelled."""
    async with Simulator() as simulator, make_client(simulator) as client:
        task_id = simulator.add_task(duration=50.0)
        for first in (True, False):
            waiting = asyncio.create_task(client.wait_for_result(task_id, wait=SLOW))
            await asyncio.sleep(1)
            if first:
                waiting.cancel()
            client.notice(task_id)
            if not first:
                waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert waiting.cancelled()
        assert client.stats.waits == client.stats.in_flight == 0


async def test_a_notice_leaves_the_callers_own_timeout_alone():
    """`asyncio.timeout` around a wait still ends it, and only it."""
    async with Simulator() as simulator, make_client(simulator) as client:
        task_id = simulator.add_task(duration=500.0)
        asyncio.get_running_loop().call_later(5, client.notice, task_id)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.wait_for_result(task_id, wait=SLOW), 20)
        assert simulator.now == pytest.approx(20)
        assert asyncio.current_task().cancelling() == 0


async def test_notices_reach_the_waits_of_a_batch():
    async with Simulator() as simulator, make_client(simulator) as client:
        ids = [simulator.add_task(duration=7.0, outcome="success") for _ in range(50)]
        batch = asyncio.create_task(client.wait_for_results(ids, wait=SLOW))
        await asyncio.sleep(8)
        assert all(client.notice(task_id) for task_id in ids)
        outcomes = await batch
        assert all(outcome.result for outcome in outcomes)
        assert simulator.now == pytest.approx(8, abs=0.1)
        assert len(polls(simulator)) == 100


async def test_a_notice_does_not_end_a_pause():
    async with Simulator() as simulator, make_client(simulator) as client:
        task_id = simulator.add_task(
            script=["generating", (429, {"Retry-After": "30"}, b"")], outcome="success"
        )
        waiting = asyncio.create_task(client.wait_for_result(task_id, wait=wait_fixed(2)))
        await asyncio.sleep(3)
        client.notice(task_id)
        await waiting
        assert polls(simulator) == [0.0, 2.0, 32.0]


async def test_a_notice_that_is_none_is_refused():
    async with Simulator() as simulator:
        client = make_client(simulator)
        with pytest.raises(ConfigurationError):
            client.notice(" ")
        await client.aclose()
        with pytest.raises(ClientStateError):
            client.notice("task")


def test_a_wait_that_has_ended_is_forgotten():
    """However it ended; nothing is kept for it."""

    async def main():
        async with Simulator() as simulator, make_client(simulator) as client:
            good = simulator.add_task(duration=1.0, outcome="success")
            await asyncio.gather(*(client.wait_for_result(good) for _ in range(3)))
            await error_of(client.wait_for_result(simulator.add_task(), timeout=0))
            board = client._transport.notices
            assert board._waits == {}
        async with KontextClient("key", base_url="http://127.0.0.1:1", rate_limit=UNBOUND) as dead:
            await error_of(dead.wait_for_result("t", error_grace=0), TransportError)
            assert dead._transport.notices._waits == {}

    run_on_virtual_time(main)
