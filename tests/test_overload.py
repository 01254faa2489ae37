"""Overload as gateways tell it: evenly spaced requests, small bursts, requests at a time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import pytest

from kontext_async import KontextClient, RateLimit
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


async def used(shape, refusal, *, known=None, seconds=40.0, tasks=500):
    """Return the share of a limit that is used from the tenth second on, and that is refused."""
    rate, latency, limit = SHAPES[shape]
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
            async with asyncio.timeout(seconds):
                async with KontextClient(
                    "key", base_url=simulator.base_url, rate_limit=known
                ) as client:
                    await client.wait_for_results(
                        [f"t{n}" for n in range(tasks)], timeout=None, wait=lambda _: 1.0
                    )
        assert asyncio.get_running_loop().time() - began >= seconds
        late = [request for request in simulator.requests if request.time >= 10.0]
    refused = sum(request.status in (429, 503) for request in late)
    return (len(late) - refused) / (seconds - 10) / rate, refused / len(late)


@pytest.mark.parametrize(("shape", "refusal"), [*itertools.product(SHAPES, REFUSALS)])
async def test_a_limit_of_any_shape_is_used_whatever_the_number_of_its_refusal(shape, refusal):
    """Four fifths of it from the tenth second on, with six refused in a hundred at most."""
    share, refused = await used(shape, refusal)
    assert share >= 0.80
    assert refused <= 0.06


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize(
    ("shape", "known"),
    [("evenly spaced", RateLimit(20, 1.0)), ("burst of five", RateLimit(20, 1.0))],
)
async def test_a_known_limit_that_is_refused_is_spaced(shape, refusal, known):
    """A limit in the words of its operator may hold fewer at once than in its period."""
    share, refused = await used(shape, refusal, known=known)
    assert share >= 0.80
    assert refused <= 0.06
