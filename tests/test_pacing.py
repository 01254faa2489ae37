"""The request budget by itself: permits, pauses and the queue, on virtual time."""

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


def make_budget(max_concurrency=64, rate_limit=None):
    return RequestBudget(max_concurrency=max_concurrency, rate_limit=rate_limit)


def now():
    return asyncio.get_running_loop().time()


def refused(retry_after=None):
    return RateLimitedError("slow down", code=429, http_status=200, retry_after=retry_after)


def broken(task_id):
    return ServerError("boom", code=500, http_status=500, task_id=task_id)


async def request(budget, error=None):
    """Send one request that ends at once."""
    sent = now() if budget.try_acquire(now(), seen=True) else await budget.acquire(now(), seen=True)
    budget.release(sent, error)
    return sent


def waiter(budget, at=0.0, *, seen=True, deadline=math.inf):
    """Return a task that waits for a permit."""
    return asyncio.create_task(budget.acquire(at, seen=seen, deadline=deadline))


def timers():
    return [handle for handle in asyncio.get_running_loop()._scheduled if not handle.cancelled()]


async def cancel(*waiters):
    for task in waiters:
        task.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)


# --- the queue ----------------------------------------------------------------------------------


async def test_a_free_permit_is_acquired_at_once():
    budget = make_budget()
    assert budget.try_acquire(now(), seen=False)
    assert budget.stats(waits=0, now=now()).in_flight == 1


async def test_the_concurrency_bounds_the_requests_in_flight():
    budget = make_budget(max_concurrency=2)
    assert budget.try_acquire(now(), seen=True)
    assert budget.try_acquire(now(), seen=True)
    assert not budget.try_acquire(now(), seen=True)
    third = waiter(budget)
    await asyncio.sleep(5)
    assert not third.done()
    budget.release(0.0)
    assert await third == 5.0


async def test_a_permit_comes_no_earlier_than_it_is_wanted():
    assert await make_budget().acquire(7.5, seen=True) == 7.5


async def test_a_cancelled_permit_goes_to_the_next_waiter_and_is_not_counted():
    budget = make_budget(max_concurrency=1)
    budget.try_acquire(now(), seen=True)
    second = waiter(budget)
    await asyncio.sleep(1)
    budget.cancel(0.0)
    assert await second == 1.0
    stats = budget.stats(waits=0, now=now())
    assert (stats.requests, stats.in_flight) == (1, 1)


async def order_of_permits(budget, *wanted, ended):
    """Return the names in the order in which they get permits, after a request that ends then.

    ``wanted`` has a name, when the permit is wanted, whether the task is known, and the deadline.
    """
    began = now()
    assert budget.try_acquire(began, seen=True)
    order = []

    async def want(name, at, seen, deadline):
        sent = await budget.acquire(began + at, seen=seen, deadline=began + deadline)
        order.append(name)
        await asyncio.sleep(0)
        budget.release(sent)

    async with asyncio.TaskGroup() as group:
        for one in wanted:
            group.create_task(want(*one))
        await asyncio.sleep(ended)
        budget.release(began)
    return order


async def test_permits_come_in_the_order_they_are_wanted_at():
    wanted = [(str(at), at, True, math.inf) for at in (3.0, 1.0, 2.0, 1.5)]
    order = await order_of_permits(make_budget(max_concurrency=1), *wanted, ended=10)
    assert order == ["1.0", "1.5", "2.0", "3.0"]


async def test_among_known_tasks_the_earlier_deadline_goes_first():
    wanted = [("none", 0, True, math.inf), ("late", 0, True, 100), ("soon", 0, True, 20)]
    order = await order_of_permits(make_budget(max_concurrency=1), *wanted, ended=1)
    assert order == ["soon", "late", "none"]


def first_and_known(deadline):
    """Two first polls from the start, and two polls of known tasks a second later."""
    first = [("first 1", 0, False, deadline), ("first 2", 0, False, deadline)]
    return [*first, ("known 1", 1, True, deadline), ("known 2", 1, True, deadline)]


@pytest.mark.parametrize(
    ("deadline", "late", "order"),
    [
        (61.0, 0.0, "known known first first"),
        (601.0, 13.49, "first first known known"),
        (601.0, 13.5, "known known first first"),
        (math.inf, 13.49, "first first known known"),
        (math.inf, 13.5, "known known first first"),
    ],
)
async def test_polls_of_known_tasks_go_first_unless_they_have_time(deadline, late, order):
    """They have a fortieth of the time until a minute before the deadline."""
    budget = make_budget(max_concurrency=1)
    names = await order_of_permits(budget, *first_and_known(deadline), ended=1 + late)
    assert [name.split()[0] for name in names] == order.split()
    assert sorted(names) == ["first 1", "first 2", "known 1", "known 2"]


async def test_the_known_task_with_the_earliest_deadline_decides_if_there_is_time():
    wanted = [("first", 0, False, 601), ("later", 1, True, 601), ("soon", 1, True, 61)]
    order = await order_of_permits(make_budget(max_concurrency=1), *wanted, ended=6)
    assert order == ["soon", "first", "later"]


async def test_under_a_rate_limit_polls_of_known_tasks_go_first():
    budget = make_budget(max_concurrency=1, rate_limit=RateLimit(1000, 1.0))
    order = await order_of_permits(budget, *first_and_known(math.inf), ended=2)
    assert order == ["known 1", "known 2", "first 1", "first 2"]


async def test_a_discovered_rate_limit_counts_as_one():
    budget = make_budget(max_concurrency=1)
    await request(budget, refused())
    await asyncio.sleep(2)
    await request(budget)  # the probe that ends the pause
    await asyncio.sleep(10)
    order = await order_of_permits(budget, *first_and_known(math.inf), ended=2)
    assert order == ["known 1", "known 2", "first 1", "first 2"]


async def test_thousands_of_waiters_for_the_same_instant_are_all_served():
    budget = make_budget(rate_limit=RateLimit(100_000, 1.0))

    async def want():
        budget.release(await budget.acquire(5.0, seen=True))

    async with asyncio.TaskGroup() as group:
        for _ in range(5000):
            group.create_task(want())
    assert budget.stats(waits=0, now=now()).requests == 5000
    assert now() == 5.0


async def test_one_dispatch_sorts_a_thousand_entries_at_most():
    budget = make_budget(max_concurrency=1)
    waiters = [waiter(budget, 5.0) for _ in range(1500)]
    await asyncio.sleep(4)
    budget.try_acquire(now(), seen=True)
    await asyncio.sleep(1)
    assert (budget._due.entries, len(budget._waiting)) == (1000, 500)
    await cancel(*waiters)


async def test_permits_that_came_late_make_later_ones_be_expected_late():
    budget = make_budget(max_concurrency=1, rate_limit=RateLimit(100_000, 1.0))
    assert budget.acquire_delay == 0.0
    budget.try_acquire(now(), seen=True)
    waiters = [waiter(budget, 1.0), waiter(budget, 2.5)]
    await asyncio.sleep(3)
    budget.release(0.0)
    for task in waiters:
        budget.release(await task)
    assert budget.acquire_delay == pytest.approx(2.0 * 0.99)
    for _ in range(100):
        await request(budget)
    assert budget.acquire_delay == pytest.approx(2.0 * 0.99**101)


async def test_a_limit_that_may_close_adds_to_the_delay_to_expect():
    budget = make_budget(rate_limit=RateLimit(2, 10.0))
    budget.try_acquire(now(), seen=True)
    assert budget.acquire_delay == 10.0


@pytest.mark.parametrize(
    ("wanted_at", "queued", "asking", "overtakes"),
    [
        (0.0, True, True, False),
        (0.0, True, False, False),
        (10.0, True, True, False),
        (10.1, True, True, True),
        (10.1, True, False, True),
        (0.0, False, True, True),
        (0.0, False, False, False),
    ],
)
async def test_one_who_asks_now_overtakes_only_waiters_with_less_priority(
    wanted_at, queued, asking, overtakes
):
    """At 10 s the rate limit has a free permit, and the queue has not been served yet."""
    budget = make_budget(rate_limit=RateLimit(1, 10.0))
    await request(budget)
    queue = waiter(budget, wanted_at, seen=queued)
    await asyncio.sleep(0)
    assert budget.try_acquire(10.0, seen=asking) is overtakes
    await cancel(queue)


async def test_a_cancelled_waiter_takes_no_permit():
    budget = make_budget(rate_limit=RateLimit(1, 10.0))
    await request(budget)
    waiters = [waiter(budget, seen=seen) for seen in (True, True, False, True)]
    later = [waiter(budget, 30.0), waiter(budget, 40.0)]
    await asyncio.sleep(1)
    await cancel(waiters[0], waiters[2], later[0])
    assert await waiters[1] == 10.0
    await cancel(waiters[3])
    assert budget.try_acquire(35.0, seen=True) is False
    budget.release(10.0)
    assert budget.try_acquire(35.0, seen=False)
    await cancel(*later)


async def test_a_permit_issued_as_its_waiter_was_cancelled_goes_to_the_next():
    budget = make_budget(rate_limit=RateLimit(1, 10.0))
    await request(budget)
    first, second = waiter(budget), waiter(budget)
    loop = asyncio.get_running_loop()
    loop.call_at(10.0, lambda: loop.call_soon(first.cancel))
    assert await second == 10.0
    with pytest.raises(asyncio.CancelledError):
        await first
    stats = budget.stats(waits=0, now=now())
    assert (stats.requests, stats.in_flight) == (2, 1)


async def test_neither_timer_nor_entry_is_left_without_waiters():
    budget = make_budget(max_concurrency=1)
    await budget.acquire(now(), seen=True)
    waiters = [waiter(budget, 1000.0), waiter(budget, seen=False), waiter(budget)]
    await asyncio.sleep(1)
    await cancel(*waiters)
    assert (len(budget._first), budget._due.entries, len(budget._waiting)) == (0, 0, 0)
    assert not timers()
    budget.release(0.0)
    assert await budget.acquire(2000.0, seen=True) == 2000.0


async def test_one_timer_serves_all_waiters():
    budget = make_budget()
    waiters = [waiter(budget, at) for at in (7.0, 5.0)]
    await asyncio.sleep(1)
    [timer] = timers()
    waiters += [waiter(budget, at) for at in (9.0, 6.0)]
    await asyncio.sleep(1)
    assert timers() == [timer]
    assert timer.when() == 5.0
    assert await asyncio.gather(*waiters) == [7.0, 5.0, 9.0, 6.0]
    assert not timers()


async def test_a_timer_that_fires_a_clock_tick_early_is_good_enough():
    budget = make_budget()
    task = waiter(budget, 5.0)
    await asyncio.sleep(4.999)
    budget._wake(asyncio.get_running_loop(), 5.0)
    assert await task == 5.0
    assert now() == 4.999


async def test_entries_of_cancelled_waiters_are_dropped_in_bulk():
    """The queue stays in order."""
    budget = make_budget(max_concurrency=1)
    budget.try_acquire(now(), seen=True)
    waiters = [
        waiter(budget, n * 37 % 101 * (n % 3 == 0), seen=n % 3 != 1, deadline=200 - n * 37 % 101)
        for n in range(3003)
    ]
    await asyncio.sleep(0)

    def kept():
        return len(budget._waiting) + budget._due.entries + len(budget._first)

    await cancel(*waiters[:2001])
    assert kept() == 3003
    await cancel(waiters[2001])
    assert kept() == 1001
    for heap in (budget._waiting, *budget._due._heaps):
        assert all(heap[(n - 1) // 2] < heap[n] for n in range(1, len(heap)))
    await cancel(*waiters[2002:-1])
    assert kept() <= 2 * 1 + 1000
    budget.release(0.0)
    assert await waiters[-1] == 0.0


@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(st.floats(0, 5), st.floats(0, 2), st.booleans(), st.booleans()), max_size=30
    ),
)
def test_a_budget_keeps_its_limits_and_ends_empty(most, wants):
    """In any order of waiters that come, are cancelled or are served."""

    async def main():
        budget = make_budget(max_concurrency=3, rate_limit=RateLimit(most, 1.0))
        sent_at, most_in_flight = [], 0

        async def want(at, takes, seen, gives_up):
            nonlocal most_in_flight
            try:
                async with asyncio.timeout(takes if gives_up else None):
                    sent = await budget.acquire(at, seen=seen)
            except TimeoutError:
                return
            sent_at.append(sent)
            most_in_flight = max(most_in_flight, budget.stats(waits=0, now=now()).in_flight)
            await asyncio.sleep(takes)
            budget.release(sent)

        async with asyncio.TaskGroup() as group:
            for at, takes, seen, gives_up in wants:
                group.create_task(want(at, takes, seen, gives_up))
        assert most_in_flight <= 3
        assert budget.stats(waits=0, now=now()).in_flight == 0
        sent_at.sort()
        for first, last in zip(sent_at, sent_at[most:], strict=False):
            assert last - first >= 1.0 - 1e-9

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())


# --- pauses -------------------------------------------------------------------------------------


async def test_a_refusal_pauses_the_whole_client_and_one_request_probes():
    budget = make_budget()
    budget.try_acquire(now(), seen=True)
    budget.release(0.0, refused())
    assert budget.pause_remaining(now()) == 0.25
    probe, other = (waiter(budget) for _ in range(2))
    assert await probe == 0.25
    await asyncio.sleep(0.99)
    assert not other.done()
    budget.release(0.25)
    budget.release(await other)


async def test_a_probe_that_hangs_keeps_the_others_back_for_a_second():
    """And the probes after it for twice as long each; the first result ends the pause."""
    budget = make_budget()
    budget.try_acquire(now(), seen=True)
    budget.release(0.0, refused())
    probes = [waiter(budget) for _ in range(5)]
    assert [await probe for probe in probes[:3]] == [0.25, 1.25, 3.25]
    await asyncio.sleep(3.99)
    assert not probes[3].done()
    budget.release(3.25)
    assert [7.24 < await probe < 8.0 for probe in probes[3:]] == [True, True]


async def test_a_pause_is_logged_when_it_begins_and_when_it_ends(caplog):
    """Once each however long it is, and without what the service wrote."""
    caplog.set_level("INFO", "kontext_async")
    budget = make_budget()
    await request(budget, refused(2.0))
    await request(budget, refused(3.0))
    await request(budget)
    await request(budget)
    budget.pause_for(refused(1.0))
    budget.pause_for(refused(1.0))
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "pause: all polls wait, at first for 2 s: RateLimitedError"),
        ("INFO", "the pause ended after 5 s"),
        ("WARNING", "pause: all polls wait, at first for 1 s: RateLimitedError"),
    ]


async def test_the_short_pauses_of_a_limit_that_is_tried_are_not_logged(caplog):
    caplog.set_level("INFO", "kontext_async")
    budget = make_budget()
    await request(budget, refused())
    await request(budget, refused())
    await request(budget)
    assert not caplog.records


async def test_polls_that_fail_in_a_row_are_logged_once_and_when_they_end(caplog):
    """For a single wait too, and from the third one on, if a second has passed."""
    caplog.set_level("INFO", "kontext_async")
    budget = make_budget()
    for _ in range(5):
        await request(budget, broken("task"))
        await asyncio.sleep(1)
    await request(budget)
    await request(budget)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "failures: 3 polls in a row had no good answer: ServerError"),
        ("INFO", "the failures ended after 5 s"),
    ]


@pytest.mark.parametrize(("bad", "seconds"), [(2, 1.0), (4, 0.2)])
async def test_a_few_bad_polls_or_a_short_time_of_them_are_not_logged(bad, seconds, caplog):
    """An API with some bad answers among good ones would fill the log."""
    caplog.set_level("INFO", "kontext_async")
    budget = make_budget()
    for _ in range(3):
        for _ in range(bad):
            await request(budget, broken("task"))
            await asyncio.sleep(seconds)
        await request(budget)
    assert not caplog.records


async def test_an_outage_is_logged_too_and_what_becomes_of_it(caplog):
    caplog.set_level("INFO", "kontext_async")
    budget = make_budget()
    for task_id in "abcde":
        await request(budget, broken(task_id))
    await request(budget, refused(2.0))
    await request(budget)
    assert [r.getMessage() for r in caplog.records] == [
        "outage: all polls wait, at first for 1 s: ServerError",
        "pause: all polls wait, at first for 2 s: RateLimitedError",
        "the pause ended after 3 s",
    ]


@pytest.mark.parametrize(
    ("error", "pauses"),
    [
        (refused(), [0.25, 0.75, 2.25, 6.75, 20.25, 60.0, 60.0]),
        (refused(2.0), [2.0, 2.0]),
        (refused(1e6), [300.0]),
        (refused(0.0), [0.25, 0.75]),
        (MaintenanceError("", code=455), [5.0, 10.0, 20.0, 40.0, 60.0]),
        (ServerError("", code=503, retry_after=7.0), [7.0]),
        (ServerError("", code=503, retry_after=0.0), [0.25, 0.75]),
    ],
)
async def test_pauses_are_as_long_as_asked_or_grow_while_they_last(error, pauses):
    budget = make_budget()
    for pause in pauses:
        await request(budget, error)
        assert budget.pause_remaining(now()) == pytest.approx(pause)


async def test_a_good_answer_to_the_probe_ends_the_growth():
    budget = make_budget()
    for _ in range(3):
        await request(budget, refused())
    await request(budget)
    await request(budget, refused())
    assert budget.pause_remaining(now()) == pytest.approx(0.25)


async def test_refusals_of_requests_in_flight_lengthen_the_pause_only_if_they_ask_for_more():
    budget = make_budget()
    for _ in range(4):
        budget.try_acquire(now(), seen=True)
    budget.release(0.0, refused())
    await asyncio.sleep(0.125)
    budget.release(0.0, refused())
    assert budget.pause_remaining(now()) == 0.125
    budget.release(0.0, refused(10.0))
    assert budget.pause_remaining(now()) == 9.875  # 10 s from its sending
    await asyncio.sleep(10)
    budget.release(0.0, refused(10.0))
    assert budget.pause_remaining(now()) == 0.0


async def test_a_good_answer_to_an_earlier_request_does_not_end_the_pause():
    budget = make_budget()
    budget.try_acquire(now(), seen=True)
    budget.try_acquire(now(), seen=True)
    budget.release(0.0, refused())
    budget.release(0.0)
    assert budget.pause_remaining(now()) == 0.25
    assert isinstance(budget.blocked_by("t", now()), RateLimitedError)


async def test_a_cancelled_probe_lets_the_next_request_probe():
    budget = make_budget()
    await request(budget, refused())
    sent = await budget.acquire(now(), seen=True)
    following = waiter(budget)
    await asyncio.sleep(1)
    budget.release(sent, cancelled=True)
    assert await following == 1.25


async def test_a_probe_that_was_never_sent_lets_the_next_request_probe():
    budget = make_budget()
    await request(budget, refused())
    sent = await budget.acquire(now(), seen=True)
    following = waiter(budget)
    await asyncio.sleep(1)
    budget.cancel(sent)
    assert await following == 1.25


async def test_the_end_of_an_earlier_request_does_not_end_the_probe():
    budget = make_budget()
    for _ in range(4):
        budget.try_acquire(now(), seen=True)
    budget.release(0.0, refused())
    probe, following = waiter(budget), waiter(budget)
    assert await probe == 0.25
    await asyncio.sleep(0.5)
    budget.release(0.0, cancelled=True)
    budget.release(0.0)
    budget.release(0.0, refused(60.0))
    await asyncio.sleep(0.25)
    assert budget.pause_remaining(now()) == 0.0
    assert not following.done()
    budget.release(0.25)
    budget.release(await following)


async def test_a_longer_pause_asked_for_later_is_kept_by_a_shorter_one():
    budget = make_budget()
    for _ in range(3):
        budget.try_acquire(now(), seen=True)
    budget.release(0.0, refused(20.0))
    budget.release(0.0, refused(10.0))
    assert budget.pause_remaining(now()) == 20.0
    budget.release(0.0, refused(1e6))
    assert budget.pause_remaining(now()) == 300.0


FAILURES = [
    broken("a"),
    TransportError("reset", task_id="a"),
    ResponseFormatError("not JSON", task_id="a"),
]


@pytest.mark.parametrize("error", FAILURES)
async def test_a_failure_after_a_pause_that_was_asked_for_is_that_tasks_own(error):
    budget = make_budget()
    await request(budget, refused())
    await request(budget, error)
    assert budget.pause_remaining(now()) == 0.0
    await request(budget, refused())
    assert budget.pause_remaining(now()) == 0.25


async def test_a_probe_that_is_refused_extends_the_pause():
    budget = make_budget()
    await request(budget, refused())
    await request(budget, refused())
    assert budget.pause_remaining(now()) == pytest.approx(0.75)


@pytest.mark.parametrize("error", FAILURES)
async def test_a_probe_that_fails_in_any_way_extends_an_outage(error):
    budget = make_budget()
    for task_id in "abcde":
        await request(budget, broken(task_id))
    await request(budget, error)
    assert budget.pause_remaining(now()) == pytest.approx(2.0)


async def test_a_failed_probe_extends_an_outage_though_an_earlier_request_is_answered():
    budget = make_budget()
    for _ in range(2):
        budget.try_acquire(now(), seen=True)
    await asyncio.sleep(1)
    for task_id in "abcde":
        await request(budget, broken(task_id))
    budget.release(0.0)
    probe = await budget.acquire(now(), seen=True)
    budget.release(0.0, broken("f"))
    budget.release(probe, broken("a"))
    assert budget.pause_remaining(now()) == pytest.approx(2.0)
    await request(budget)
    assert budget.blocked_by("mine", now()) is None


async def test_a_refused_probe_turns_an_outage_into_a_pause_that_was_asked_for():
    budget = make_budget()
    budget.try_acquire(now(), seen=True)
    for task_id in "abcde":
        await request(budget, broken(task_id))
    await request(budget, refused())
    budget.release(0.0)
    await request(budget, broken("a"))
    assert budget.pause_remaining(now()) == 0.0


@pytest.mark.parametrize("error", FAILURES[1:])
async def test_an_outage_blocks_each_task_with_an_error_that_names_the_cause(error):
    budget = make_budget()
    for task_id in "bcdef":
        await request(budget, broken(task_id))
    await request(budget, error)
    blocked = budget.blocked_by("mine", now())
    assert (type(blocked), blocked.task_id) == (TransportError, "mine")
    assert str(blocked).startswith("task mine: the polls of several tasks failed: ")
    assert "task b" not in str(blocked)


async def probed_by(budget, *wanted):
    """Return the names of those that probe a pause of a second.

    ``wanted`` has a name, when the permit is wanted, the deadline, and whether the task is known.
    """
    await request(budget, refused(1.0))
    waits = {
        name: asyncio.create_task(budget.acquire(now() + late, seen=seen, deadline=now() + left))
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


async def test_a_pause_is_probed_by_the_waiter_that_wanted_a_permit_first():
    """The one with the earliest deadline may be a task that always fails."""
    wanted = [("hurried", 0.5, 20, True), ("cancelled", 0.1, 90, True), ("patient", 0.2, 90, True)]
    assert await probed_by(make_budget(), *wanted) == ["patient"]


async def test_a_pause_is_probed_by_a_first_poll_where_there_is_one():
    """Each is of another task, while the known one may be what fails."""
    wanted = [("known", 0.0, 20, True), ("new", 0.0, 90, False)]
    assert await probed_by(make_budget(), *wanted) == ["new"]


async def test_several_tasks_failing_in_a_row_are_an_outage():
    budget = make_budget()
    for task_id in "abcd":
        await request(budget, broken(task_id))
    assert budget.pause_remaining(now()) == 0.0
    await request(budget, TransportError("reset", task_id="e"))
    assert budget.pause_remaining(now()) == 1.0
    for pause in (2.0, 4.0):
        await request(budget, broken("a"))
        assert budget.pause_remaining(now()) == pytest.approx(pause)
    await request(budget)
    await request(budget, broken("a"))
    assert budget.pause_remaining(now()) == 0.0


async def test_one_task_failing_again_and_again_is_not_an_outage():
    budget = make_budget()
    for _ in range(50):
        await request(budget, broken("a"))
    assert budget.pause_remaining(now()) == 0.0


@pytest.mark.parametrize("good", [None, ApiError("credits", code=402)])
async def test_failures_with_good_answers_between_are_not_an_outage(good):
    budget = make_budget()
    for task_id in "abcdefgh":
        await request(budget, broken(task_id))
        await request(budget, good)
    assert budget.pause_remaining(now()) == 0.0


async def test_an_unreadable_answer_is_neither_outage_nor_success():
    budget = make_budget()
    for task_id in "abcd":
        await request(budget, broken(task_id))
    await request(budget, ResponseFormatError("not JSON", task_id="x"))
    await request(budget, broken("e"))
    assert budget.pause_remaining(now()) == 1.0


async def test_time_spent_in_pauses_is_counted_once():
    budget = make_budget()
    await request(budget, refused())
    assert budget.pause_spent(now()) == 0.0
    await asyncio.sleep(0.125)
    assert budget.pause_spent(now()) == 0.125
    await asyncio.sleep(10)
    assert budget.pause_spent(now()) == 0.25
    await request(budget, refused())
    await asyncio.sleep(10)
    assert budget.pause_spent(now()) == 1.0


async def test_a_pause_blocks_a_task_with_the_error_that_caused_it():
    budget = make_budget()
    assert budget.blocked_by("mine", now()) is None
    await request(budget, MaintenanceError("back soon", code=455, task_id="another"))
    blocked = budget.blocked_by("mine", now())
    assert isinstance(blocked, MaintenanceError)
    assert (blocked.task_id, blocked.msg, blocked.retry_after) == ("mine", "back soon", 5.0)


async def test_an_outage_blocks_a_task_with_its_error():
    budget = make_budget()
    for task_id in "abcde":
        await request(budget, TransportError("reset", task_id=task_id))
    assert isinstance(budget.blocked_by("mine", now()), TransportError)


async def test_a_pause_with_a_full_rate_limit_blocks_a_task_with_the_error_of_the_pause():
    budget = make_budget(rate_limit=RateLimit(1, 10.0))
    await request(budget, MaintenanceError("back soon", code=455))
    assert isinstance(budget.blocked_by("mine", now()), MaintenanceError)
    assert budget.opens_in(now()) == 10.0


async def test_a_full_rate_limit_blocks_a_task():
    budget = make_budget(rate_limit=RateLimit(1, 10.0))
    budget.try_acquire(now(), seen=True)
    blocked = budget.blocked_by("mine", now())
    assert isinstance(blocked, RateLimitedError)
    assert (blocked.code, blocked.retry_after) == (429, None)
    assert budget.opens_in(now()) == 0.0
    await asyncio.sleep(1)
    budget.release(0.0)
    await asyncio.sleep(4)
    assert budget.blocked_by("mine", now()).retry_after == 6.0
    assert budget.opens_in(now()) == 6.0


async def test_the_round_trip_is_smoothed():
    budget = make_budget()
    assert budget.round_trip == 0.0
    for seconds in (1.0, 2.0):
        sent = await budget.acquire(now(), seen=True)
        await asyncio.sleep(seconds)
        budget.release(sent)
    assert budget.round_trip == 1.125
    sent = await budget.acquire(now(), seen=True)
    await asyncio.sleep(30)
    budget.release(sent, TransportError("reset", task_id="a"))
    assert budget.round_trip == 1.125
    sent = await budget.acquire(now(), seen=True)
    await asyncio.sleep(30)
    budget.release(sent, cancelled=True)
    assert budget.round_trip == 1.125


async def test_stats_count_requests_and_errors_by_class():
    budget = make_budget(rate_limit=RateLimit(20, 10.0))
    await request(budget)
    await request(budget, broken("a"))
    await request(budget, refused(2.0))
    stats = budget.stats(waits=7, now=now())
    assert stats.requests == 3
    assert dict(stats.errors) == {"ServerError": 1, "RateLimitedError": 1}
    assert (stats.rate_limited, stats.rate, stats.pause, stats.waits) == (1, 2.0, 2.0, 7)


async def test_a_failing_task_leaves_the_probe_of_an_outage_to_others():
    budget = make_budget()
    for task_id in "abcde":
        await request(budget, broken(task_id))
    await asyncio.sleep(1)
    healthy = waiter(budget, 31.0)
    await asyncio.sleep(0)
    failing = asyncio.create_task(budget.acquire(now(), seen=True, failing=True))
    assert not budget.try_acquire(now(), seen=True, failing=True)
    await asyncio.sleep(29)
    assert not failing.done()
    assert await healthy == 31.0
    budget.release(31.0)
    assert await failing == 31.0


async def test_a_failing_task_probes_an_outage_if_no_other_polls_within_a_minute():
    budget = make_budget()
    for task_id in "abcde":
        await request(budget, broken(task_id))
    healthy = waiter(budget, 100.0)
    assert await budget.acquire(now(), seen=True, failing=True) == 1.0
    await cancel(healthy)


async def test_new_tasks_count_a_tenth_towards_an_outage():
    """A probe of a new task that fails does not lengthen the pause."""
    budget = make_budget()
    for number in range(49):
        budget.try_acquire(now(), seen=False)
        budget.release(now(), broken(str(number)), first=True)
    assert budget.pause_remaining(now()) == 0.0
    budget.try_acquire(now(), seen=False)
    budget.release(now(), broken("49"), first=True)
    assert budget.pause_remaining(now()) == 1.0
    for number in range(3):
        sent = await budget.acquire(now(), seen=False)
        budget.release(sent, broken(f"probe {number}"), first=True)
        assert budget.pause_remaining(now()) == 1.0


async def test_a_task_that_fails_again_is_not_evidence_of_an_outage():
    budget = make_budget()
    for task_id in "abcdefgh":
        budget.try_acquire(now(), seen=True, failing=True)
        budget.release(now(), broken(task_id), failing=True)
    assert budget.pause_remaining(now()) == 0.0


async def test_probes_of_an_outage_are_spread_over_the_queue_of_first_polls():
    """Those at its front may all be broken."""
    budget = make_budget()
    for task_id in "abcde":
        await request(budget, broken(task_id))
    waiters = [waiter(budget, seen=False) for _ in range(100)]
    probed = []
    for _ in range(4):
        await asyncio.wait(waiters, return_when="FIRST_COMPLETED")
        (done,) = [n for n, task in enumerate(waiters) if task.done() and n not in probed]
        probed.append(done)
        budget.release(now(), broken(f"new {done}"), first=True)
        await asyncio.sleep(1)
    await cancel(*waiters)
    assert max(probed) - min(probed) > 60


# --- polls that are planned again ---------------------------------------------------------------


class Plan:
    """A plan that the test moves."""

    def __init__(self, at):
        self.at = at

    def planned_at(self):
        return self.at


def planned(budget, plan):
    async def send():
        sent = await budget.acquire(plan.at, seen=True, plan=plan)
        budget.release(sent)
        return sent

    return asyncio.create_task(send())


async def test_a_new_revision_moves_polls_forward():
    """Sleepers use what others have shown; the same revision moves nothing."""
    budget, plan = make_budget(), Plan(30.0)
    waiting = planned(budget, plan)
    fixed = waiter(budget, 20.0)
    await asyncio.sleep(1.0)
    plan.at = 5.0
    budget.replan(0)
    await asyncio.sleep(0.1)
    assert not waiting.done()
    budget.replan(1)
    assert (await waiting, await fixed) == (5.0, 20.0)


async def test_a_poll_that_is_due_is_postponed_if_it_is_planned_for_later_now():
    """No request is spent at a time at which the task cannot have ended."""
    budget, plan = make_budget(), Plan(3.0)
    waiting = planned(budget, plan)
    await asyncio.sleep(1.0)
    plan.at = 8.0
    assert await waiting == 8.0


async def test_thousands_of_polls_are_planned_again_a_few_at_a_time():
    """No dispatch takes long, polls due meanwhile are sent, and no timer or entry is left."""
    budget, count = make_budget(max_concurrency=10_000), 1000
    plans = [Plan(30.0) for _ in range(count)]
    waiting = [planned(budget, plan) for plan in plans]
    soon = waiter(budget, 1.0)
    await asyncio.sleep(1.0)
    for plan in plans:
        plan.at = 5.0
    budget.replan(1)
    assert 0 < len(budget._to_replan) < count
    budget.replan(2)  # one at a time
    assert await soon == 1.0
    assert set(await asyncio.gather(*waiting)) == {5.0}
    assert not budget._to_replan


async def test_nothing_is_planned_again_if_none_of_a_sample_moves():
    """Ten plans are asked, not a thousand; the next revision asks others."""
    budget, asked = make_budget(max_concurrency=10_000), []

    class Asked(Plan):
        def planned_at(self):
            asked.append(self)
            return self.at

    waiting = [planned(budget, Asked(30.0)) for _ in range(1000)]
    await asyncio.sleep(1.0)
    budget.replan(1)
    budget.replan(2)
    assert len(set(asked)) == 20
    assert set(await asyncio.gather(*waiting)) == {30.0}


async def test_plans_are_not_made_again_and_again():
    """A thousand of them are planned again at most ten times a second."""
    budget, plan = make_budget(max_concurrency=10_000), Plan(30.0)
    waiting = [planned(budget, plan) for _ in range(1000)]
    await asyncio.sleep(1.0)
    plan.at = 20.0
    budget.replan(1)
    await asyncio.sleep(0.09)
    plan.at = 5.0
    budget.replan(2)
    assert not budget._to_replan
    await asyncio.sleep(0.02)
    budget.replan(2)
    assert budget._to_replan
    assert set(await asyncio.gather(*waiting)) == {5.0}


async def test_cancelled_waiters_are_not_planned_again():
    """Their entries are dropped."""
    budget, plan = make_budget(), Plan(30.0)
    stays, leaves = planned(budget, plan), planned(budget, Plan(40.0))
    await asyncio.sleep(1.0)
    leaves.cancel()
    await asyncio.sleep(0)
    plan.at = 5.0
    budget.replan(1)
    assert len(budget._waiting) == 1
    assert await stays == 5.0
