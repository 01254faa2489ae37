"""A known rate limit that several processes share exactly."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_async import ConfigurationError, KontextClient, RateLimit
from kontext_async.fleet import Fleet, FleetError, shared_limit
from kontext_async.fleet.shared_limit import Lease, next_share
from kontext_async.pacing import SlidingWindow
from kontext_async.simulator import Simulator
from kontext_async.simulator import SlidingWindow as ServersWindow

LIMIT = RateLimit(40, 1.0)


@pytest.fixture
async def fleet(dsn):
    async with Fleet(dsn) as opened:
        await opened.init()
        yield opened


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=30))
def test_processes_never_hold_more_than_the_limit(rounds):
    """Whoever comes and goes, the permits held are at most the limit's."""
    leases = {name: Lease(name, 0, is_wanted=False) for name in "abcd"}
    for wants in rounds:
        for name, is_wanted in zip("abcd", wants, strict=True):
            own = leases[name]._replace(is_wanted=is_wanted)
            others = [other for other in leases.values() if other.worker != name]
            share = next_share(10, own, others)
            assert share.max_requests <= share.held
            # It may use the old share until it hears of the new one, and only that one after it.
            leases[name] = own._replace(held=share.held)
            assert sum(lease.held for lease in leases.values()) <= 10
            leases[name] = own._replace(held=share.max_requests)


def test_those_that_want_permits_have_equal_shares():
    others = [Lease("b", 0, is_wanted=True), Lease("c", 0, is_wanted=False)]
    assert next_share(7, Lease("a", 0, is_wanted=True), others) == (4, 4)
    assert next_share(7, Lease("z", 0, is_wanted=True), others) == (3, 3)
    assert next_share(7, Lease("z", 5, is_wanted=False), others) == (0, 5)
    assert next_share(7, Lease("z", 0, is_wanted=True), [Lease("b", 9, is_wanted=True)]) == (0, 0)


def test_a_window_may_shrink_and_grow():
    """Permits beyond a smaller share leave the window before others are issued."""
    window = SlidingWindow(RateLimit(3, 10.0))
    for sent in (0.0, 1.0, 2.0):
        window.acquire(sent)
        window.release(sent + 0.5, sent=sent, reply="answered")
    window.max_requests = 1
    assert (window.used(3.0), window.opens_at(3.0)) == (3, 12.5)
    window.max_requests = 4
    assert window.opens_at(3.0) == 3.0


async def poll(client, seconds, count):
    """Poll as often as the client permits."""
    end = asyncio.get_running_loop().time() + seconds

    async def again(n):
        while asyncio.get_running_loop().time() < end:
            with contextlib.suppress(Exception):
                await client.record_info(f"t{n}")

    await asyncio.gather(*(again(n) for n in range(count)))


async def test_four_processes_keep_a_limit_exactly(dsn):
    """No window of the service has one request too many, and little of the limit is left unused."""
    async with contextlib.AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(
            Simulator(
                auto_create=True,
                durations=600.0,
                rate_limit=ServersWindow(LIMIT.max_requests, LIMIT.period),
                log_limit=None,
            )
        )
        clients = []
        for _ in range(4):
            fleet = await stack.enter_async_context(Fleet(dsn))
            await fleet.init()
            limit = await stack.enter_async_context(fleet.shared_limit(LIMIT))
            clients.append(
                await stack.enter_async_context(
                    KontextClient("key", base_url=simulator.base_url, rate_limit=limit)
                )
            )
        early = asyncio.gather(*(poll(client, 9, 12) for client in clients[:3]))
        await asyncio.sleep(2)
        late = asyncio.create_task(poll(clients[3], 7, 12))
        await asyncio.sleep(2)
        before = [client.stats.requests for client in clients]
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(4)
        took = asyncio.get_running_loop().time() - began
        counts = [c.stats.requests - b for c, b in zip(clients, before, strict=True)]
        await asyncio.gather(early, late)
        assert sum(client.stats.rate_limited for client in clients) == 0
        assert sum(counts) >= 0.95 * 40 * took
        assert min(counts) > 0.8 * max(counts)


async def test_a_lone_process_has_the_whole_limit_and_its_part_is_held_after_it(fleet):
    """Its share stays held until the service has forgotten it; then others have it all."""
    now = asyncio.get_running_loop().time
    async with fleet.shared_limit(RateLimit(5, 0.5), name="a") as limit:
        limit.opens_at(now())
        await until(lambda: limit.max_requests == 5)
        limit.acquire(now())
    async with fleet.shared_limit(RateLimit(5, 0.5), name="a") as limit:
        limit.opens_at(now())
        await until(lambda: limit.max_requests == 4)
        assert limit.rate() == 8


async def test_different_limits_under_one_name_are_refused(fleet):
    async with fleet.shared_limit(RateLimit(5, 1.0)):
        with pytest.raises(ConfigurationError, match="5 requests in 1 s"):
            async with fleet.shared_limit(RateLimit(6, 1.0)):
                pass
        async with fleet.shared_limit(RateLimit(6, 1.0), name="another"):
            pass
    with pytest.raises(ConfigurationError, match="RateLimit"):
        async with fleet.shared_limit(5):
            pass


async def test_errors_of_the_block_reach_its_caller_unchanged(fleet):
    """The user's own database is not the fleet's."""
    own = psycopg.OperationalError("of another database")
    with pytest.raises(psycopg.OperationalError) as caught:
        async with fleet.shared_limit(LIMIT):
            raise own
    assert caught.value is own


async def test_a_database_without_the_tables_is_named(dsn):
    """The message says which command makes them."""
    async with Fleet(dsn) as fleet:
        with pytest.raises(FleetError, match="kontext fleet init"):
            async with fleet.shared_limit(LIMIT):
                pass


async def test_without_the_database_a_process_keeps_its_part_and_says_so(
    fleet, monkeypatch, caplog
):
    """One warning for each time; a part that was never asked for stays nothing."""
    monkeypatch.setattr(shared_limit, "_RENEW_AFTER", 0.05)
    now = asyncio.get_running_loop().time
    async with fleet.shared_limit(RateLimit(5, 1.0)) as limit:
        limit.opens_at(now())
        await until(lambda: limit.max_requests == 5)

        async def away(*arguments):
            raise psycopg.OperationalError

        address = fleet._database.address
        with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "kontext_async"):
            patch.setattr(shared_limit._Leasing, "_exchange", away)
            await asyncio.sleep(0.5)
            assert limit.max_requests == 5
            assert limit.opens_at(now()) <= now()
        assert [r.getMessage() for r in caplog.records] == [
            f"the database at {address} is away, trying again: OperationalError",
            "this process keeps 5 of 5 requests of the shared limit",
        ]
        await asyncio.sleep(0.2)
        limit.heard_at -= 60  # as in a process that was stopped for a minute
        at = now()
        assert limit.opens_at(at) > at


async def test_the_part_of_a_dead_process_is_free_when_its_lease_is_over(fleet, monkeypatch):
    """Until then nobody gets it; the time in which the database was down does not count."""
    await fleet._database.fetch(
        "INSERT INTO kontext_leases VALUES ('default', 'dead', 5, 1.0, 5, true, '2000-01-01')"
    )
    now = asyncio.get_running_loop().time
    monkeypatch.setattr(shared_limit, "_LEASE", 3600.0)  # longer than this database is up
    async with fleet.shared_limit(RateLimit(5, 1.0)) as limit:
        limit.opens_at(now())
        await asyncio.sleep(0.3)
        assert limit.max_requests == 0
        assert now() < limit.opens_at(now()) < now() + 1
        monkeypatch.setattr(shared_limit, "_LEASE", -3600.0)
        await until(lambda: limit.opens_at(now()) <= now())
        assert limit.max_requests == 5


async def test_an_outage_of_the_service_leaves_the_share(fleet):
    """The limit forgets refusals, not its permits."""
    async with fleet.shared_limit(RateLimit(5, 1.0)) as limit:
        assert limit.forgotten() is limit


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError
