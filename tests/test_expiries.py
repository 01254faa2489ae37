"""The times at which waiters give up."""

from __future__ import annotations

import asyncio
import math

import pytest

from kontext_async.transport.expiries import Expiries, time_out

pytestmark = pytest.mark.virtual_time


def waiters(expiries, *untils):
    futures = [asyncio.get_running_loop().create_future() for _ in untils]
    for future, until in zip(futures, untils, strict=True):
        expiries.add(future, until)
    return futures


async def ended_at(future):
    with pytest.raises(TimeoutError):
        await future
    return asyncio.get_running_loop().time()


async def test_each_ends_at_its_own_time():
    """In whatever order they came; one without a time never ends."""
    expiries = Expiries(time_out)
    *mortal, endless = waiters(expiries, 5.0, 2.0, 9.0, 2.0, math.inf)
    assert await asyncio.gather(*map(ended_at, mortal)) == pytest.approx([5, 2, 9, 2])
    assert not endless.done()
    assert len(list(expiries)) == len(expiries) == 5


async def test_one_that_has_ended_otherwise_is_left_alone():
    """Its result stands, also at its time."""
    expiries = Expiries(time_out)
    future, other = waiters(expiries, 1.0, 2.0)
    future.set_result(0.5)
    assert await ended_at(other) == pytest.approx(2)
    assert future.result() == 0.5


async def test_one_that_is_gone_is_not_ended():
    expiries = Expiries(time_out)
    gone, other = waiters(expiries, 1.0, 2.0)
    expiries.discard(gone)
    assert await ended_at(other) == pytest.approx(2)
    assert not gone.done()


async def test_many_that_end_together_end_in_portions():
    """The loop runs in between."""
    expiries = Expiries(time_out)
    futures = waiters(expiries, *[1.0] * 1200)
    await asyncio.sleep(1.0)
    counts = []
    while not all(future.done() for future in futures):
        counts.append(sum(future.done() for future in futures))
        await asyncio.sleep(0)
    assert counts
    assert all(count % 500 == 0 for count in counts)
    assert all(isinstance(future.exception(), TimeoutError) for future in futures)


async def test_what_is_kept_of_waiters_that_are_gone_is_bounded():
    """And nothing is kept without waiters, nor a timer."""
    expiries = Expiries(time_out)
    (stays,) = waiters(expiries, 7.0)
    for _ in range(5000):
        (future,) = waiters(expiries, 600.0)
        expiries.discard(future)
        assert len(expiries._heap) <= 1003
    assert await ended_at(stays) == pytest.approx(7)
    (last,) = waiters(expiries, 900.0)
    for future in (stays, last):
        expiries.discard(future)
    assert not expiries._heap
    assert expiries._timer is None
    (endless,) = waiters(expiries, math.inf)
    expiries.discard(endless)
    assert len(expiries) == 0
