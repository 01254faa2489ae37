"""The limits a simulator enforces."""

from __future__ import annotations

import asyncio
import copy

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_async.simulator import FixedWindow, Simulator, SlidingWindow, TokenBucket


def admitted(limit, times):
    return [now for now in times if not limit.admit(now)]


def test_a_fixed_window_admits_its_number_until_the_next_begins():
    limit = FixedWindow(2, 10.0)
    assert admitted(limit, [8.0, 9.0, 9.5, 10.0, 10.1, 10.2, 19.9, 20.0]) == [8, 9, 10, 10.1, 20]


def test_a_fixed_window_returns_the_seconds_until_the_next():
    limit = FixedWindow(1, 10.0)
    limit.admit(12.0)
    assert limit.admit(14.0) == 6.0


@pytest.mark.parametrize("period", [0.1, 0.3, 1 / 3, 0.7])
def test_a_refusal_is_never_a_wait_of_0(period):
    limit = FixedWindow(1, period)
    for n in range(1, 2000):
        limit.admit(n * period)
        assert limit.admit(n * period) > 0


def test_a_sliding_window_admits_its_number_in_any_period():
    limit = SlidingWindow(2, 10.0)
    assert admitted(limit, [8.0, 9.0, 10.0, 17.9, 18.0, 18.5, 19.0]) == [8, 9, 18, 19]


def test_a_sliding_window_returns_the_seconds_until_the_oldest_leaves_it():
    limit = SlidingWindow(1, 10.0)
    limit.admit(12.0)
    assert limit.admit(14.0) == 8.0


def test_a_bucket_admits_its_capacity_and_its_rate():
    limit = TokenBucket(3, 0.5)
    assert admitted(limit, [0, 0, 0, 0, 1, 2, 2.5, 4, 4.1, 100, 100, 100, 100]) == [
        *[0, 0, 0, 2, 4],
        *[100, 100, 100],
    ]


def test_a_bucket_returns_the_seconds_until_its_next_token():
    limit = TokenBucket(1, 0.5)
    limit.admit(0.0)
    assert limit.admit(0.5) == 1.5


TIMES = st.lists(st.floats(0, 100), max_size=200).map(sorted)


@given(TIMES, st.integers(1, 5), st.floats(0.5, 20))
def test_no_sliding_window_exceeds_its_limit(times, most, period):
    seen = admitted(SlidingWindow(most, period), times)
    for start in seen:
        assert sum(start <= now and now - start < period - 1e-9 for now in seen) <= most


@given(TIMES, st.integers(1, 5), st.floats(0.5, 20))
def test_no_fixed_window_exceeds_its_limit(times, most, period):
    seen = [now // period for now in admitted(FixedWindow(most, period), times)]
    assert all(seen.count(window) <= most for window in seen)


@given(TIMES, st.sampled_from([FixedWindow(1, 3.0), SlidingWindow(2, 3.0), TokenBucket(2, 0.7)]))
def test_a_client_that_waits_as_long_as_asked_is_admitted(times, template):
    limit = copy.deepcopy(template)
    now = 0.0
    for step in times:
        now += step
        if wait := limit.admit(now):
            now += wait + 1e-6
            assert limit.admit(now) == 0


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [(FixedWindow, 0, 1), (FixedWindow, 1, 0), (SlidingWindow, 1, -1), (TokenBucket, 0, 1)],
)
def test_a_limit_must_admit_something(kind, first, second):
    with pytest.raises(ValueError, match="must be"):
        kind(first, second)


@pytest.mark.virtual_time
@pytest.mark.parametrize("limit", [FixedWindow(5, 1.0), SlidingWindow(5, 1.0), TokenBucket(5, 5.0)])
async def test_clients_that_poll_too_fast_get_the_limit_and_no_more(limit):
    async with Simulator(rate_limit=limit, log_limit=None) as simulator:
        await asyncio.gather(*(poll_until(simulator, 20.0) for _ in range(3)))
        passed = sum(logged.status == 200 for logged in simulator.requests)
    assert 95 <= passed <= 110
    assert passed == simulator.answered
    assert simulator.refused == len(simulator.requests) - passed


async def poll_until(simulator, seconds):
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer k"}) as session:
        while simulator.now < seconds:
            async with session.get(f"{simulator.base_url}/api/v1/flux/kontext/record-info"):
                await asyncio.sleep(0.1)


@pytest.mark.virtual_time
@pytest.mark.parametrize(("retry_after", "asked"), [(True, "10"), (False, None)])
async def test_a_limit_may_refuse_as_a_gateway_does(retry_after, asked):
    """With a page, which is not an envelope."""
    simulator = Simulator(
        rate_limit=FixedWindow(1, 10.0), refusal_status=503, retry_after=retry_after
    )
    async with simulator, aiohttp.ClientSession() as session:
        url = f"{simulator.base_url}/api/v1/flux/kontext/record-info?taskId=task"
        for status in (200, 503):
            async with session.get(url, headers={"Authorization": "Bearer key"}) as response:
                assert response.status == status
                body = await response.text()
    assert response.headers.get("Retry-After") == asked
    assert body.startswith("<h1>503")
