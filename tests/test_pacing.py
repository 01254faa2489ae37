"""The request budget by itself: turns, pauses and the queue, on virtual time."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_time import VirtualTimeLoop

from kontext_async import (
    ApiError,
    MaintenanceError,
    RateLimit,
    RateLimitedError,
    ResponseFormatError,
    ServerError,
    TransportError,
)
from kontext_async.pacing import RequestBudget

pytestmark = pytest.mark.virtual_time


def budget(max_concurrency=64, rate_limit=None):
    return RequestBudget(max_concurrency=max_concurrency, rate_limit=rate_limit)


def now():
    return asyncio.get_running_loop().time()


def refused(retry_after=None):
    return RateLimitedError("slow down", code=429, http_status=200, retry_after=retry_after)


def broken(task_id):
    return ServerError("boom", code=500, http_status=500, task_id=task_id)


async def answered(pace, error=None):
    """One request that is answered at once."""
    sent = now() if pace.try_acquire(now(), seen=True) else await pace.acquire(now(), seen=True)
    pace.release(sent, error)
    return sent


async def test_a_free_turn_is_taken_at_once():
    pace = budget()
    assert pace.try_acquire(now(), seen=False)
    assert pace.stats(waits=0, now=now()).in_flight == 1


async def test_slots_bound_the_requests_in_flight():
    pace = budget(max_concurrency=2)
    assert pace.try_acquire(now(), seen=True)
    assert pace.try_acquire(now(), seen=True)
    assert not pace.try_acquire(now(), seen=True)
    waiter = asyncio.create_task(pace.acquire(now(), seen=True))
    await asyncio.sleep(5)
    assert not waiter.done()
    pace.release(0.0)
    assert await waiter == 5.0


async def test_a_turn_comes_no_earlier_than_it_is_wanted():
    assert await budget().acquire(7.5, seen=True) == 7.5


async def test_turns_come_in_the_order_they_are_wanted_at():
    pace = budget(max_concurrency=1)
    pace.try_acquire(now(), seen=True)
    order = []

    async def want(at):
        sent = await pace.acquire(at, seen=True)
        order.append(at)
        pace.release(sent)

    async with asyncio.TaskGroup() as group:
        for at in (3.0, 1.0, 2.0, 1.5):
            group.create_task(want(at))
        await asyncio.sleep(10)
        pace.release(0.0)
    assert order == [1.0, 1.5, 2.0, 3.0]


async def order_of_turns(pace, *, until, late):
    """Two first looks, then two at known tasks, waiting for a slot until ``late``."""
    pace.try_acquire(now(), seen=True)
    order = []

    async def want(name, *, seen):
        sent = await pace.acquire(now(), seen=seen, until=until)
        order.append(name)
        pace.release(sent)

    async with asyncio.TaskGroup() as group:
        for name in ("first 1", "first 2"):
            group.create_task(want(name, seen=False))
        await asyncio.sleep(1)
        for name in ("seen 1", "seen 2"):
            group.create_task(want(name, seen=True))
        await asyncio.sleep(late)
        pace.release(0.0)
    return order


@pytest.mark.parametrize(
    ("until", "late", "first"),
    [
        (61.0, 0.1, "seen 1"),
        (601.0, 13.4, "first 1"),
        (601.0, 13.6, "seen 1"),
        (math.inf, 13.4, "first 1"),
        (math.inf, 13.6, "seen 1"),
    ],
)
async def test_looks_at_known_tasks_go_first_unless_they_have_time(until, late, first):
    order = await order_of_turns(budget(max_concurrency=1), until=until, late=late)
    assert order[0] == first
    assert sorted(order) == ["first 1", "first 2", "seen 1", "seen 2"]


async def test_under_a_quota_looks_at_known_tasks_go_first():
    pace = budget(max_concurrency=1, rate_limit=RateLimit(1000, 1.0))
    order = await order_of_turns(pace, until=math.inf, late=1.0)
    assert order == ["seen 1", "seen 2", "first 1", "first 2"]


async def test_a_quota_that_was_found_out_is_one_as_well():
    pace = budget(max_concurrency=1)
    pace.try_acquire(now(), seen=True)
    pace.release(now(), RateLimitedError("slow down", code=429))
    await asyncio.sleep(2)
    assert pace.try_acquire(now(), seen=True)  # the probe that ends the pause
    pace.release(now())
    await asyncio.sleep(10)
    order = await order_of_turns(pace, until=math.inf, late=1.0)
    assert order == ["seen 1", "seen 2", "first 1", "first 2"]


async def test_among_tasks_already_seen_the_earlier_deadline_goes_first():
    pace = budget(max_concurrency=1)
    pace.try_acquire(now(), seen=True)
    order = []

    async def want(name, until):
        sent = await pace.acquire(now(), seen=True, until=until)
        order.append(name)
        pace.release(sent)

    async with asyncio.TaskGroup() as group:
        for name, until in (("none", math.inf), ("late", 100.0), ("soon", 20.0)):
            group.create_task(want(name, until))
        await asyncio.sleep(1)
        pace.release(0.0)
    assert order == ["soon", "late", "none"]


async def test_more_turns_fall_due_than_are_sorted_in_one_go():
    """Five thousand that want the same instant are all served, the slots never exceeded."""
    pace = budget(rate_limit=RateLimit(100_000, 1.0))

    async def want():
        pace.release(await pace.acquire(5.0, seen=True))

    async with asyncio.TaskGroup() as group:
        for _ in range(5000):
            group.create_task(want())
    assert pace.stats(waits=0, now=now()).requests == 5000


async def test_turns_that_came_late_make_later_ones_be_expected_late():
    pace = budget(max_concurrency=1, rate_limit=RateLimit(100_000, 1.0))
    assert pace.acquire_delay == 0.0
    pace.try_acquire(now(), seen=True)
    waiter = asyncio.create_task(pace.acquire(1.0, seen=True))
    await asyncio.sleep(3)
    pace.release(0.0)
    pace.release(await waiter)
    assert pace.acquire_delay == 2.0
    for _ in range(500):
        await answered(pace)
    assert pace.acquire_delay < 0.1


@pytest.mark.parametrize("seen", [True, False])
async def test_one_who_asks_now_does_not_overtake_one_who_waits(seen):
    pace = budget(max_concurrency=2, rate_limit=RateLimit(1, 10.0))
    pace.try_acquire(now(), seen=True)
    waiter = asyncio.create_task(pace.acquire(now(), seen=seen))
    await asyncio.sleep(0)
    assert not pace.try_acquire(now(), seen=seen)
    pace.release(0.0)
    assert await waiter == 10.0


async def test_a_cancelled_waiter_costs_nobody_a_turn():
    pace = budget(rate_limit=RateLimit(1, 10.0))
    await answered(pace)
    waiters = [asyncio.create_task(pace.acquire(now(), seen=True)) for _ in range(3)]
    await asyncio.sleep(1)
    waiters[0].cancel()
    assert await waiters[1] == 10.0
    waiters[2].cancel()
    await asyncio.gather(*waiters, return_exceptions=True)


async def test_a_turn_that_came_as_its_waiter_was_cancelled_goes_to_the_next():
    pace = budget(rate_limit=RateLimit(1, 10.0))
    await answered(pace)
    first, second = (asyncio.create_task(pace.acquire(now(), seen=True)) for _ in range(2))
    asyncio.get_running_loop().call_at(
        10.0, lambda: asyncio.get_running_loop().call_soon(first.cancel)
    )
    assert await second == 10.0
    assert (await asyncio.gather(first, return_exceptions=True))[
        0
    ].__class__ is asyncio.CancelledError
    stats = pace.stats(waits=0, now=now())
    assert (stats.requests, stats.in_flight) == (2, 1)


async def test_no_timer_is_left_when_nobody_waits():
    pace = budget()
    waiters = [asyncio.create_task(pace.acquire(1000.0 + n, seen=True)) for n in range(5)]
    await asyncio.sleep(1)
    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    scheduled = [
        handle for handle in asyncio.get_running_loop()._scheduled if not handle.cancelled()
    ]
    assert not scheduled


async def test_ten_thousand_cancelled_waiters_are_not_kept():
    pace = budget(max_concurrency=1)
    pace.try_acquire(now(), seen=True)
    waiters = [asyncio.create_task(pace.acquire(now(), seen=n % 2 == 0)) for n in range(10_000)]
    await asyncio.sleep(1)
    for waiter in waiters[10:]:
        waiter.cancel()
    await asyncio.gather(*waiters[10:], return_exceptions=True)
    assert len(pace._waiting) + len(pace._due) + len(pace._first) < 2000
    pace.release(0.0)
    for waiter in asyncio.as_completed(waiters[:10]):
        pace.release(await waiter)


@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(st.floats(0, 5), st.floats(0, 2), st.booleans(), st.booleans()), max_size=30
    ),
)
def test_whatever_comes_a_budget_ends_empty_and_keeps_its_limits(most, wants):
    """Waiters that come, are cancelled or are served: no slot is lost, no limit broken."""

    async def main():
        pace = budget(max_concurrency=3, rate_limit=RateLimit(most, 1.0))
        sent_at, most_in_flight = [], 0

        async def want(at, takes, seen, gives_up):
            nonlocal most_in_flight
            try:
                async with asyncio.timeout(takes if gives_up else None):
                    sent = await pace.acquire(at, seen=seen)
            except TimeoutError:
                return
            sent_at.append(sent)
            most_in_flight = max(most_in_flight, pace.stats(waits=0, now=now()).in_flight)
            await asyncio.sleep(takes)
            pace.release(sent)

        async with asyncio.TaskGroup() as group:
            for at, takes, seen, gives_up in wants:
                group.create_task(want(at, takes, seen, gives_up))
        assert most_in_flight <= 3
        assert pace.stats(waits=0, now=now()).in_flight == 0
        sent_at.sort()
        for first, last in zip(sent_at, sent_at[most:], strict=False):
            assert last - first >= 1.0 - 1e-9

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())


async def test_a_refusal_pauses_the_whole_client_and_one_request_probes():
    pace = budget()
    pace.try_acquire(now(), seen=True)
    pace.release(0.0, refused())
    assert pace.pause_remaining(now()) == 1.0
    probe, other = (asyncio.create_task(pace.acquire(now(), seen=True)) for _ in range(2))
    assert await probe == 1.0
    await asyncio.sleep(5)
    assert not other.done()
    pace.release(1.0)
    pace.release(await other)


@pytest.mark.parametrize(
    ("error", "pauses"),
    [
        (refused(), [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]),
        (refused(2.0), [2.0, 2.0]),
        (refused(1e6), [300.0]),
        (refused(0.0), [1.0, 2.0]),
        (MaintenanceError("", code=455), [5.0, 10.0, 20.0, 40.0, 60.0]),
        (ServerError("", code=503, retry_after=7.0), [7.0]),
    ],
)
async def test_pauses_double_while_they_last_or_are_as_long_as_asked(error, pauses):
    pace = budget()
    for pause in pauses:
        await answered(pace, error)
        assert pace.pause_remaining(now()) == pytest.approx(pause)


async def test_a_good_answer_to_the_probe_ends_the_doubling():
    pace = budget()
    for _ in range(3):
        await answered(pace, refused())
    await answered(pace)
    await answered(pace, refused())
    assert pace.pause_remaining(now()) == pytest.approx(1.0)


async def test_refusals_of_requests_under_way_do_not_lengthen_the_pause():
    pace = budget()
    for _ in range(4):
        pace.try_acquire(now(), seen=True)
    pace.release(0.0, refused())
    await asyncio.sleep(0.5)
    pace.release(0.0, refused())
    assert pace.pause_remaining(now()) == 0.5
    pace.release(0.0, refused(10.0))
    assert pace.pause_remaining(now()) == 10.0
    await asyncio.sleep(11)
    pace.release(0.0, refused(10.0))
    assert pace.pause_remaining(now()) == 0.0


async def test_a_good_answer_to_a_request_from_before_does_not_end_the_pause():
    pace = budget()
    pace.try_acquire(now(), seen=True)
    pace.try_acquire(now(), seen=True)
    pace.release(0.0, refused())
    pace.release(0.0)
    assert pace.pause_remaining(now()) == 1.0
    assert isinstance(pace.blocked_by("t", now()), RateLimitedError)


async def test_a_cancelled_probe_lets_the_next_one_go():
    pace = budget()
    await answered(pace, refused())
    sent = await pace.acquire(now(), seen=True)
    waiter = asyncio.create_task(pace.acquire(now(), seen=True))
    await asyncio.sleep(1)
    pace.release(sent, cancelled=True)
    assert await waiter == 2.0


TROUBLE = [
    broken("a"),
    TransportError("reset", task_id="a"),
    ResponseFormatError("not JSON", task_id="a"),
]


@pytest.mark.parametrize("error", TROUBLE)
async def test_trouble_after_a_pause_that_was_asked_for_is_that_tasks_own(error):
    pace = budget()
    await answered(pace, refused())
    await answered(pace, error)
    assert pace.pause_remaining(now()) == 0.0
    await answered(pace, refused())
    assert pace.pause_remaining(now()) == 1.0


async def test_a_probe_that_is_refused_prolongs_the_pause():
    pace = budget()
    await answered(pace, refused())
    await answered(pace, refused())
    assert pace.pause_remaining(now()) == pytest.approx(2.0)


@pytest.mark.parametrize("error", TROUBLE)
async def test_a_probe_that_fails_in_any_way_prolongs_an_outage(error):
    pace = budget()
    for task_id in "abcde":
        await answered(pace, broken(task_id))
    await answered(pace, error)
    assert pace.pause_remaining(now()) == pytest.approx(2.0)


@pytest.mark.parametrize("error", TROUBLE[1:])
async def test_who_is_blocked_by_an_outage_is_told_of_it_by_its_own_name(error):
    pace = budget()
    for task_id in "bcdef":
        await answered(pace, broken(task_id))
    await answered(pace, error)
    held = pace.blocked_by("mine", now())
    assert (type(held), held.task_id, error.task_id) == (type(error), "mine", "a")


async def probed_by(pace, *wanted):
    """Who probes a pause of a second, of waits that want a turn so late and have such deadlines."""
    await answered(pace, refused())
    waits = {
        name: asyncio.create_task(pace.acquire(now() + late, seen=seen, until=now() + left))
        for name, late, left, seen in wanted
    }
    await asyncio.sleep(0.9)
    for name, wait in waits.items():
        if name == "cancelled":
            wait.cancel()
    await asyncio.sleep(0.2)
    done = [name for name, wait in waits.items() if wait.done() and not wait.cancelled()]
    for wait in waits.values():
        wait.cancel()
    await asyncio.gather(*waits.values(), return_exceptions=True)
    return done


async def test_a_pause_is_probed_by_whoever_has_waited_longest():
    """Not by the earliest deadline: that task may be what fails, and would probe every time."""
    wanted = [("hurried", 0.5, 20, True), ("cancelled", 0.1, 90, True), ("patient", 0.2, 90, True)]
    assert await probed_by(budget(), *wanted) == ["patient"]


async def test_a_pause_is_probed_by_a_first_look_where_there_is_one():
    """Each is another task, while the known one may be what fails."""
    wanted = [("known", 0.0, 20, True), ("new", 0.0, 90, False)]
    assert await probed_by(budget(), *wanted) == ["new"]


async def test_several_tasks_failing_in_a_row_are_an_outage():
    pace = budget()
    for task_id in "abcd":
        await answered(pace, broken(task_id))
    assert pace.pause_remaining(now()) == 0.0
    await answered(pace, TransportError("reset", task_id="e"))
    assert pace.pause_remaining(now()) == 1.0
    for pause in (2.0, 4.0):
        await answered(pace, broken("a"))
        assert pace.pause_remaining(now()) == pytest.approx(pause)
    await answered(pace)
    await answered(pace, broken("a"))
    assert pace.pause_remaining(now()) == 0.0


async def test_one_task_failing_again_and_again_is_no_outage():
    pace = budget()
    for _ in range(50):
        await answered(pace, broken("a"))
    assert pace.pause_remaining(now()) == 0.0


@pytest.mark.parametrize("good", [None, ApiError("credits", code=402)])
async def test_a_service_that_answers_anybody_is_no_outage(good):
    pace = budget()
    for task_id in "abcdefgh":
        await answered(pace, broken(task_id))
        await answered(pace, good)
    assert pace.pause_remaining(now()) == 0.0


async def test_an_unreadable_answer_is_neither_outage_nor_success():
    pace = budget()
    for task_id in "abcd":
        await answered(pace, broken(task_id))
    await answered(pace, ResponseFormatError("not JSON", task_id="x"))
    await answered(pace, broken("e"))
    assert pace.pause_remaining(now()) == 1.0


async def test_time_spent_in_pauses_is_counted_once():
    pace = budget()
    await answered(pace, refused())
    assert pace.pause_spent(now()) == 0.0
    await asyncio.sleep(0.25)
    assert pace.pause_spent(now()) == 0.25
    await asyncio.sleep(10)
    assert pace.pause_spent(now()) == 1.0
    await answered(pace, refused())
    await asyncio.sleep(10)
    assert pace.pause_spent(now()) == 3.0


async def test_what_holds_the_client_is_told_for_the_task_that_asks():
    pace = budget()
    assert pace.blocked_by("mine", now()) is None
    await answered(pace, MaintenanceError("back soon", code=455, task_id="another"))
    held = pace.blocked_by("mine", now())
    assert isinstance(held, MaintenanceError)
    assert (held.task_id, held.msg, held.retry_after) == ("mine", "back soon", 5.0)


async def test_an_outage_that_holds_the_client_is_told():
    pace = budget()
    for task_id in "abcde":
        await answered(pace, TransportError("reset", task_id=task_id))
    assert isinstance(pace.blocked_by("mine", now()), TransportError)


async def test_a_full_quota_that_holds_the_client_is_told():
    pace = budget(rate_limit=RateLimit(1, 10.0))
    pace.try_acquire(now(), seen=True)
    held = pace.blocked_by("mine", now())
    assert isinstance(held, RateLimitedError)
    assert held.retry_after is None
    assert pace.opens_in(now()) == 0.0
    pace.release(0.0)
    assert pace.blocked_by("mine", now()).retry_after == 10.0
    assert pace.opens_in(now()) == 10.0


async def test_the_round_trip_is_smoothed():
    pace = budget()
    for seconds in (1.0, 2.0):
        sent = await pace.acquire(now(), seen=True)
        await asyncio.sleep(seconds)
        pace.release(sent)
    assert pace.round_trip == 1.125
    sent = await pace.acquire(now(), seen=True)
    await asyncio.sleep(30)
    pace.release(sent, TransportError("reset", task_id="a"))
    assert pace.round_trip == 1.125


async def test_stats_count_requests_and_errors_by_class():
    pace = budget(rate_limit=RateLimit(20, 10.0))
    await answered(pace)
    await answered(pace, broken("a"))
    await answered(pace, refused(2.0))
    stats = pace.stats(waits=7, now=now())
    assert stats.requests == 3
    assert dict(stats.errors) == {"ServerError": 1, "RateLimitedError": 1}
    assert (stats.rate_limited, stats.rate, stats.pause, stats.waits) == (1, 2.0, 2.0, 7)
