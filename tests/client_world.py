"""Helpers that the tests of a client have in common."""

from __future__ import annotations

import asyncio

import pytest
from tenacity import wait_fixed
from virtual_time import VirtualTimeLoop

from kontext_async import KontextClient, KontextError, RateLimit

KEY = "marker-key"

# A limit that never holds a request back, so that the waits alone decide when to poll.
UNBOUND = RateLimit(1_000_000, 1.0)
EVERY_SECOND = wait_fixed(1)


def seconds(value):
    return pytest.approx(value, abs=1e-6)


def make_client(simulator, **options):
    options = {"rate_limit": UNBOUND, "base_url": simulator.base_url, **options}
    return KontextClient(KEY, **options)


async def error_of(awaitable, kind=KontextError):
    with pytest.raises(kind) as caught:
        await awaitable
    return caught.value


async def turns(count=20):
    """Let the loop go round: work that is ending needs a few turns to end."""
    for _ in range(count):
        await asyncio.sleep(0)


def run_on_virtual_time(main):
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main())
