"""The limits a simulator enforces."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_async.simulator import BucketLimit, Simulator, SlidingLimit, WindowLimit


def admitted(limit, times):
    return [now for now in times if not limit.admit(now)]


def test_a_window_admits_so_many_until_the_next_begins():
    limit = WindowLimit(2, 10.0)
    assert admitted(limit, [8.0, 9.0, 9.5, 10.0, 10.1, 10.2, 19.9, 20.0]) == [8, 9, 10, 10.1, 20]


def test_a_window_tells_when_the_next_begins():
    limit = WindowLimit(1, 10.0)
    limit.admit(12.0)
    assert limit.admit(14.0) == 6.0


@pytest.mark.parametrize("period", [0.1, 0.3, 1 / 3, 0.7])
def test_a_refusal_is_never_a_wait_of_nothing(period):
    limit = WindowLimit(1, period)
    for n in range(1, 2000):
        limit.admit(n * period)
        assert limit.admit(n * period) > 0


def test_a_sliding_window_admits_so_many_in_any_period():
    limit = SlidingLimit(2, 10.0)
    assert admitted(limit, [8.0, 9.0, 10.0, 17.9, 18.0, 18.5, 19.0]) == [8, 9, 18, 19]


def test_a_sliding_window_tells_when_the_oldest_leaves_it():
    limit = SlidingLimit(1, 10.0)
    limit.admit(12.0)
    assert limit.admit(14.0) == 8.0


def test_a_bucket_admits_what_it_holds_and_what_flows_in():
    limit = BucketLimit(3, 0.5)
    assert admitted(limit, [0, 0, 0, 0, 1, 2, 2.5, 4, 4.1, 100, 100, 100, 100]) == [
        *[0, 0, 0, 2, 4],
        *[100, 100, 100],
    ]


def test_a_bucket_tells_when_there_will_be_one_in_it():
    limit = BucketLimit(1, 0.5)
    limit.admit(0.0)
    assert limit.admit(0.5) == 1.5


TIMES = st.lists(st.floats(0, 100), max_size=200).map(sorted)


@given(TIMES, st.integers(1, 5), st.floats(0.5, 20))
def test_no_sliding_window_ever_holds_more_than_it_may(times, most, period):
    seen = admitted(SlidingLimit(most, period), times)
    for start in seen:
        assert sum(start <= now and now - start < period - 1e-9 for now in seen) <= most


@given(TIMES, st.integers(1, 5), st.floats(0.5, 20))
def test_no_window_ever_holds_more_than_it_may(times, most, period):
    seen = [now // period for now in admitted(WindowLimit(most, period), times)]
    assert all(seen.count(window) <= most for window in seen)


@given(TIMES, st.sampled_from([WindowLimit(1, 3.0), SlidingLimit(2, 3.0), BucketLimit(2, 0.7)]))
def test_who_waits_as_long_as_told_is_admitted(times, template):
    import copy

    limit = copy.deepcopy(template)
    now = 0.0
    for step in times:
        now += step
        if wait := limit.admit(now):
            now += wait + 1e-6
            assert limit.admit(now) == 0


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [(WindowLimit, 0, 1), (WindowLimit, 1, 0), (SlidingLimit, 1, -1), (BucketLimit, 0, 1)],
)
def test_a_limit_must_let_something_pass(kind, first, second):
    with pytest.raises(ValueError, match="must be"):
        kind(first, second)


@pytest.mark.virtual_time
@pytest.mark.parametrize("limit", [WindowLimit(5, 1.0), SlidingLimit(5, 1.0), BucketLimit(5, 5.0)])
async def test_clients_that_press_get_the_limit_and_no_more(limit):
    async with Simulator(rate_limit=limit, log_limit=None) as simulator:
        await asyncio.gather(*(press(simulator, 20.0) for _ in range(3)))
        passed = sum(logged.status == 200 for logged in simulator.requests)
    assert 95 <= passed <= 110
    assert passed == simulator.answered
    assert simulator.refused == len(simulator.requests) - passed


async def press(simulator, seconds):
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer k"}) as session:
        while simulator.now < seconds:
            async with session.get(f"{simulator.base_url}/api/v1/flux/kontext/record-info"):
                await asyncio.sleep(0.1)
