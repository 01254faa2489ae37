"""A wait that is cancelled ends at once and leaves nothing, in any of its states."""

from __future__ import annotations

import asyncio
import functools
import itertools
import types

import aiohttp
import pytest
from client_world import make_client, turns
from tenacity import wait_fixed

from kontext_async import CompletedTask, RateLimit, WaitTimeoutError
from kontext_async.simulator import Simulator
from kontext_async.simulator.replies import refused

pytestmark = [pytest.mark.virtual_time, pytest.mark.usefixtures("fetcher")]


@types.coroutine
def _cancelling(count, coroutine, answered):
    go_on = functools.partial(coroutine.send, None)
    for number in itertools.count(1):
        try:
            awaited = go_on()
        except StopIteration as stop:
            return stop.value
        if number == count:
            cancel = asyncio.current_task().cancel
            if answered and awaited is not None:
                awaited.add_done_callback(lambda _, cancel=cancel: cancel())
            else:
                cancel()
        try:
            yield awaited
        except BaseException as exc:  # noqa: BLE001  # it is the coroutine's to handle
            go_on = functools.partial(coroutine.throw, exc)
        else:
            go_on = functools.partial(coroutine.send, None)


async def cancelled_at(count, coroutine, *, answered):
    """Await a coroutine, and cancel the task at its ``count``-th suspension.

    ``answered`` cancels it only when what it awaits is done, just before it resumes.
    """
    return await _cancelling(count, coroutine, answered)


class _SlowResolver(aiohttp.abc.AbstractResolver):
    async def resolve(self, host, port=0, family=0):
        await asyncio.sleep(0.01)
        found = {"hostname": host, "host": "127.0.0.1", "port": port}
        return [{**found, "family": 2, "proto": 0, "flags": 0}]

    async def close(self):
        """Nothing to close."""


PAUSE = refused(429, status=429, retry_after=1)
LIVES = {
    # The script of the task, and the options of the client.
    "good": (["generating", "success"], {}),
    "failures": (["http_500", "truncated", "not_found", "success"], {}),
    "resent": (["reset", "generating", "success"], {}),
    "in_pieces": (["slow"], {}),
    "stalled": (["stall_mid_body", "success"], {"request_timeout": 2.0}),
    "paused": ([PAUSE, "success"], {}),
    "rate_limit": (["generating", "success"], {"rate_limit": RateLimit(1, 2.0)}),
    "timed_out": (["generating"] * 9, {}),
    "concurrency": (["generating", "success"], {"max_concurrency": 1}),
    "pool": (["generating", "success"], {"pool": {"limit": 1}}),
    "names": (["generating", "success"], {"pool": {"resolver": _SlowResolver()}}),
}


def ours_left(simulator):
    """Return the tasks and timers that are neither this test's nor the server's."""
    loop = asyncio.get_running_loop()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    timers = (handle._callback for handle in loop._scheduled if not handle.cancelled())
    owners = (type(getattr(callback, "__self__", None)).__module__ for callback in timers)
    return [t for t in tasks if not t.get_coro().__qualname__.startswith("RequestHandler")] + [
        owner for owner in owners if owner.startswith(("kontext_async", "asyncio.timeouts"))
    ]


class _Life:
    """A simulator, a client, and a wait that is cancelled at some point."""

    def __init__(self, simulator, *, pool=None, **options):
        self.simulator = simulator
        self.session = None
        base_url = simulator.base_url
        if pool is not None:
            self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(**pool))
        if pool and "resolver" in pool:
            base_url = base_url.replace("127.0.0.1", "localhost")
        self.client = make_client(simulator, base_url=base_url, session=self.session, **options)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        await self.client.aclose()
        if self.session is not None:
            await self.session.close()

    async def assert_nothing_left(self):
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(0.05)
        assert not ours_left(self.simulator)
        assert not self.simulator._running
        stats = self.client.stats
        assert (stats.in_flight, stats.waits) == (0, 0)
        connector = self.client._transport._session.connector
        assert not connector._acquired
        assert not connector._waiters
        assert asyncio.get_running_loop().time() == pytest.approx(began + 0.05)

    async def assert_usable(self):
        """Assert that the client has all its permits."""
        tasks = [self.simulator.add_task(duration=0.0) for _ in range(3)]
        await asyncio.gather(*map(self.client.wait_for_result, tasks))


@pytest.fixture(autouse=True)
async def complaints(caplog):
    """Assert that nothing is reported to the loop or to a log."""
    heard = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context))
    yield
    await asyncio.sleep(0)
    assert not heard
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]


async def live(life, script, *, busy, count, answered):
    """Return True if the wait was cancelled before its end."""
    task_id = life.simulator.add_task(script=script)
    waiting = life.client.wait_for_result(task_id, wait=wait_fixed(0.5), timeout=8.2)
    others = []
    if busy:
        other = life.simulator.add_task(script=["slow"])
        others = [asyncio.create_task(life.client.record_info(other))]
        await asyncio.sleep(0)
    task = asyncio.create_task(cancelled_at(count, waiting, answered=answered))
    (ended,) = await asyncio.gather(task, return_exceptions=True)
    await asyncio.gather(*others)
    if isinstance(ended, (CompletedTask, WaitTimeoutError)):
        return False
    assert isinstance(ended, asyncio.CancelledError)
    assert task.cancelled()
    return True


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("name", LIVES)
async def test_cancelling_at_any_await_ends_a_wait_and_leaves_nothing(name, answered):
    """No task, timer, connection or permit, and nothing in the log."""
    script, options = LIVES[name]
    for count in itertools.count(1):
        async with Simulator() as simulator, _Life(simulator, **options) as life:
            busy = name in ("concurrency", "pool")
            cancelled = await live(life, script, busy=busy, count=count, answered=answered)
            await life.assert_nothing_left()
            await life.assert_usable()
        if not cancelled:
            break
        assert count < 100
    assert count > 3


@pytest.mark.parametrize("moment", range(0, 80, 2))
async def test_cancelling_in_any_turn_of_the_loop_leaves_nothing(moment):
    """Several waits at once, each in another state."""
    async with Simulator() as simulator, _Life(simulator, max_concurrency=2) as life:
        waits = [
            asyncio.create_task(
                life.client.wait_for_result(
                    simulator.add_task(script=["generating", "http_500"] * 9), wait=wait_fixed(0)
                )
            )
            for _ in range(5)
        ]
        await turns(moment)
        for wait in waits:
            wait.cancel()
        ended = await asyncio.gather(*waits, return_exceptions=True)
        assert {type(error) for error in ended} == {asyncio.CancelledError}
        life.client._transport.check_open()
        await life.assert_nothing_left()
        await life.assert_usable()


async def test_a_cancelled_record_info_leaves_nothing():
    """In flight and in its queue."""
    async with Simulator() as simulator, _Life(simulator, max_concurrency=1) as life:
        task_id = simulator.add_task(script=["stall"])
        polls = [asyncio.create_task(life.client.record_info(task_id)) for _ in range(3)]
        await asyncio.sleep(1)
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
        await life.assert_nothing_left()
        await life.assert_usable()


async def test_a_callers_own_timeout_is_not_mistaken_for_the_deadline():
    """asyncio.timeout around a wait ends as it always does; so does a deadline inside of it."""
    async with Simulator() as simulator, _Life(simulator) as life:
        task_id = simulator.add_task(script=["stall"] * 2)
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(3):
                await life.client.wait_for_result(task_id)
        assert not isinstance(caught.value, WaitTimeoutError)
        assert asyncio.get_running_loop().time() == pytest.approx(3)
        with pytest.raises(WaitTimeoutError):
            async with asyncio.timeout(3):
                await life.client.wait_for_result(task_id, timeout=2)
        await life.assert_nothing_left()


async def test_the_first_error_in_a_task_group_ends_its_other_waits():
    """The group raises that error alone."""
    async with Simulator() as simulator, _Life(simulator) as life:
        failing = simulator.add_task(script=["generating", "failed"])
        others = [simulator.add_task(script=["generating", "stall"]) for _ in range(3)]

        async def wait_for_all():
            async with asyncio.TaskGroup() as group:
                for task_id in (*others, failing):
                    group.create_task(life.client.wait_for_result(task_id, wait=wait_fixed(1)))

        with pytest.raises(ExceptionGroup) as caught:
            await wait_for_all()
        assert len(caught.value.exceptions) == 1
        await life.assert_nothing_left()
