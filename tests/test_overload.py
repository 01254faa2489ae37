"""Overload as gateways tell it: evenly spaced requests, small bursts, requests at a time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import pytest

from kontext_async import (
    ApiError,
    KontextClient,
    MaintenanceError,
    RateLimit,
    RateLimitedError,
    ServerError,
    TaskNotFoundError,
    TransportError,
)
from kontext_async.pacing import RequestBudget
from kontext_async.pacing.overload import Overload
from kontext_async.simulator import Simulator, SlidingWindow, TokenBucket

pytestmark = pytest.mark.virtual_time

# nginx `limit_req` of 20 a second without and with a burst, `limit_conn` 8 on requests of 0.1 s,
# and two at a time: requests a second, latency in seconds, the limit.
SHAPES = {
    "evenly spaced": (20, 0.02, TokenBucket(1, 20)),
    "burst of five": (20, 0.02, TokenBucket(6, 20)),
    "eight at a time": (80, 0.1, SlidingWindow(8, 0.1)),
    "two at a time": (20, 0.1, SlidingWindow(2, 0.1)),
}
REFUSALS = {
    "429": {"refusal_status": 429},
    "503": {"refusal_status": 503},
    "503 and Retry-After": {"refusal_status": 503, "retry_after": True},
}


async def used(shape, refusal, *, known=None):
    """Return the share of a limit that is used from the tenth second on, and that is refused.

    It would allow 600 requests in that time, and the tasks want three times as many.
    """
    rate, latency, limit = SHAPES[shape]
    counted = 600 / rate
    simulator = Simulator(
        rate_limit=limit,
        latency=latency,
        durations=1e9,
        auto_create=True,
        log_limit=None,
        **REFUSALS[refusal],
    )
    async with simulator:
        began = asyncio.get_running_loop().time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10.0 + counted):
                async with KontextClient(
                    "key", base_url=simulator.base_url, rate_limit=known
                ) as client:
                    await client.wait_for_results(
                        [f"t{n}" for n in range(3 * rate)], timeout=None, wait=lambda _: 1.0
                    )
        assert asyncio.get_running_loop().time() - began >= 10.0 + counted
        late = [request for request in simulator.requests if request.time >= 10.0]
    refused = sum(request.status in (429, 503) for request in late)
    return (len(late) - refused) / 600, refused / len(late)


@pytest.mark.parametrize(("shape", "refusal"), [*itertools.product(SHAPES, REFUSALS)])
async def test_a_limit_of_any_shape_is_used_whatever_the_number_of_its_refusal(shape, refusal):
    """Four fifths of it from the tenth second on, with six refused in a hundred at most."""
    share, refused = await used(shape, refusal)
    assert share >= 0.80
    assert refused <= 0.06


@pytest.mark.parametrize(
    ("shape", "refusal"),
    [*itertools.product(["evenly spaced"], REFUSALS), ("burst of five", "503")],
)
async def test_a_known_limit_that_is_refused_is_spaced(shape, refusal):
    """A limit in the words of its operator may hold fewer at once than in its period."""
    share, refused = await used(shape, refusal, known=RateLimit(20, 1.0))
    assert share >= 0.80
    assert refused <= 0.06


# The evidence


def unavailable(retry_after=None):
    return ServerError("busy", code=503, http_status=503, retry_after=retry_after)


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (None, False),
        (RateLimitedError("slow down", code=429), True),
        (unavailable(2.0), True),
        (unavailable(0.0), True),
        (unavailable(), False),
        (ServerError("boom", code=500, retry_after=2.0), False),
        (MaintenanceError("later", code=455), False),
        (TransportError("reset"), False),
    ],
)
async def test_a_refusal_by_its_number_is_429_or_503_with_the_time_to_wait(error, refusal):
    assert Overload().observe(error, now=0.0, failing=False) is refusal


def refused_before():
    """Return the evidence after an answer and two bare 503s, of which the second is a refusal."""
    overload = Overload()
    overload.observe(None, now=0.0, failing=False)
    assert not overload.observe(unavailable(), now=0.0, failing=False)
    assert overload.observe(unavailable(), now=0.0, failing=False)
    return overload


async def test_a_single_503_is_an_accident_and_two_of_thirty_are_refusals():
    """Accidents say nothing about the rate."""
    overload = Overload()
    for _ in range(20):
        for _ in range(60):
            overload.observe(None, now=0.0, failing=False)
        assert not overload.observe(unavailable(), now=0.0, failing=False)
    for _ in range(13):
        overload.observe(None, now=0.0, failing=False)
    assert overload.observe(unavailable(), now=0.0, failing=False)


def observe_all(overload, *errors):
    return [overload.observe(error, now=0.0, failing=False) for error in errors]


BOOM = ServerError("boom", code=500)


@pytest.mark.parametrize("other", [BOOM, TransportError("reset"), ServerError("", code=502)])
async def test_503s_among_as_many_other_failures_are_accidents(other):
    overload = Overload()
    observe_all(overload, None, *[other] * 3)
    assert not any(observe_all(overload, *[unavailable()] * 2))
    assert overload.observe(unavailable(), now=0.0, failing=False)


@pytest.mark.parametrize(
    "reply", [None, TaskNotFoundError("unknown", code=422), RateLimitedError("", code=429)]
)
async def test_answers_and_refusals_are_no_other_failures(reply):
    overload = Overload()
    observe_all(overload, None, *[reply] * 3, unavailable(2.0))
    assert observe_all(overload, *[unavailable()] * 2) == [False, True]


async def test_a_task_that_fails_again_weighs_neither_for_an_overload_nor_against_it():
    overload = Overload()
    for _ in range(20):
        overload.observe(unavailable(), now=0.0, failing=True)
        overload.observe(None, now=0.0, failing=False)
    assert not overload.observe(unavailable(), now=0.0, failing=False)
    for _ in range(50):
        overload.observe(BOOM, now=0.0, failing=True)
    assert overload.observe(unavailable(), now=0.0, failing=False)


@pytest.mark.parametrize("answer", [None, TaskNotFoundError("unknown", code=422)])
async def test_without_an_answer_for_a_second_the_service_is_down(answer):
    """Any answer of the API shows that it is up, also one that refuses a task."""
    overload = refused_before()
    assert overload.observe(unavailable(), now=0.9, failing=False)
    assert not overload.observe(unavailable(), now=1.0, failing=False)
    assert not overload.is_believed
    overload.observe(answer, now=2.0, failing=False)
    assert overload.is_believed
    assert overload.observe(unavailable(), now=2.9, failing=False)


async def test_the_second_503_of_a_task_in_a_row_is_no_refusal():
    overload = refused_before()
    assert not overload.observe(unavailable(), now=0.5, failing=True)


@pytest.mark.parametrize(
    "error",
    [ServerError("boom", code=500), TransportError("reset"), ApiError("odd", code=504)],
)
async def test_another_error_is_no_refusal_by_overload_and_no_evidence(error):
    overload = Overload()
    overload.observe(None, now=0.0, failing=False)
    for _ in range(50):
        assert not overload.observe(error, now=1.0, failing=True)
    assert overload.is_believed
    assert not overload.observe(error, now=1.0, failing=False)


async def test_overload_is_not_believed_after_six_polls_refused_again_until_one_is_answered():
    """Of a broken task the next poll is refused as well, of an overloaded service it rarely is."""
    overload = refused_before()
    for _ in range(5):
        overload.observe(unavailable(), now=1.0, failing=True)
        overload.observe(None, now=1.0, failing=False)
        assert overload.is_believed
    overload.observe(unavailable(), now=1.0, failing=True)
    overload.observe(None, now=1.0, failing=False)
    assert not overload.is_believed
    assert not overload.observe(unavailable(), now=1.0, failing=False)
    overload.observe(None, now=1.0, failing=True)
    assert overload.is_believed
    assert overload.observe(unavailable(), now=1.0, failing=False)


async def test_what_happens_long_after_a_refusal_is_no_evidence():
    """The rate has risen since, so an overloaded service may refuse a task twice."""
    overload = refused_before()
    for _ in range(20):
        overload.observe(unavailable(), now=30.0, failing=True)
        overload.observe(None, now=30.0, failing=False)
    assert overload.is_believed


async def test_a_limit_that_was_found_from_broken_tasks_is_forgotten():
    budget = RequestBudget(max_concurrency=64, rate_limit=None)

    async def request(error=None, *, failing=False):
        sent = await budget.acquire(asyncio.get_running_loop().time(), seen=True)
        budget.release(sent, error, failing=failing)

    def rate():
        return budget.stats(waits=0, now=asyncio.get_running_loop().time()).rate

    await request()
    await request(unavailable())
    await request(unavailable())
    await request()
    for _ in range(5):
        await request(unavailable(), failing=True)
    assert rate() is not None
    await request(unavailable(), failing=True)
    assert rate() is None
