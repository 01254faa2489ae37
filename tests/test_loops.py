"""Event loops other than asyncio's own."""

from __future__ import annotations

import asyncio
import math

import pytest
from client_world import make_client

from kontext_async.pacing import RequestBudget
from kontext_async.simulator import Simulator
from kontext_async.transport.expiries import Expiries, time_out

uvloop = pytest.importorskip("uvloop")


def run(main):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def test_a_batch_ends_on_uvloop():
    """Polls move to times that have come, where its timers are not timers."""

    async def main():
        async with Simulator(durations=0.3) as simulator, make_client(simulator) as client:
            ids = [simulator.add_task() for _ in range(1000)]
            return await client.wait_for_results(ids, timeout=30.0)

    assert all(outcome.result for outcome in run(main))


def test_many_polls_are_planned_again_on_uvloop():
    """More than one turn of the loop plans."""

    async def main():
        budget = RequestBudget(max_concurrency=64, rate_limit=None)
        now = asyncio.get_running_loop().time()

        def waiter(delay):
            return asyncio.create_task(budget.acquire(now + delay, seen=True, deadline=math.inf))

        waits = [waiter(60.0) for _ in range(1000)]
        await asyncio.sleep(0)
        budget.replan(1)
        soon = waiter(0.05)
        assert await soon >= now + 0.05
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    run(main)


def test_waiters_give_up_on_uvloop():
    """One whose time has come, and one whose time comes."""

    async def main():
        loop, expiries = asyncio.get_running_loop(), Expiries(time_out)
        futures = [loop.create_future() for _ in range(2)]
        for future, delay in zip(futures, (0.0, 0.05), strict=True):
            expiries.add(future, loop.time() + delay)
        errors = await asyncio.gather(*futures, return_exceptions=True)
        assert [type(error) for error in errors] == [TimeoutError, TimeoutError]

    run(main)
