"""Limits are pure: these tests keep the time themselves."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_async import ConfigurationError, RateLimit
from kontext_async.pacing.limits import DiscoveredLimit, SlidingWindow


@pytest.mark.parametrize("max_requests", [0, -1, 1.5, True, "10", None])
def test_a_rate_limit_wants_a_positive_whole_number(max_requests):
    with pytest.raises(ConfigurationError, match="max_requests must be a positive whole number"):
        RateLimit(max_requests, 1.0)


@pytest.mark.parametrize("period", [0, -1.0, math.nan, math.inf, True, "1", None])
def test_a_rate_limit_wants_a_positive_period(period):
    with pytest.raises(ConfigurationError, match="period must be a positive number of seconds"):
        RateLimit(10, period)


def test_a_window_gives_a_place_back_a_period_after_the_answer():
    limit = SlidingWindow(RateLimit(2, 10.0))
    limit.acquire(0.0)
    limit.acquire(0.0)
    assert limit.opens_at(0.0) == math.inf
    limit.release(3.0, sent=0.0, reply="answered")
    assert limit.opens_at(3.0) == 13.0
    assert limit.opens_at(12.9) == 13.0
    assert limit.opens_at(13.0) == 13.0


def test_a_turn_not_used_gives_its_place_back_at_once():
    limit = SlidingWindow(RateLimit(1, 10.0))
    limit.acquire(0.0)
    limit.cancel()
    assert limit.opens_at(0.0) == 0.0


def test_a_window_tells_its_rate():
    assert SlidingWindow(RateLimit(20, 10.0)).rate() == 2.0


def test_a_window_nearly_full_may_be_shut_for_a_period():
    limit = SlidingWindow(RateLimit(4, 10.0))
    limit.acquire(0.0)
    assert limit.max_delay() == 0.0
    limit.release(1.0, sent=0.0, reply="answered")
    limit.acquire(1.0)
    assert limit.max_delay() == 10.0


def test_a_found_rate_may_be_shut_for_the_time_between_two_requests():
    limit = DiscoveredLimit()
    assert limit.max_delay() == 0.0
    saturate(limit, ServiceWindow(10, 1.0), until=60.0)
    assert limit.max_delay() == pytest.approx(1 / limit.rate())


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.floats(0, 2), st.floats(0, 3), st.floats(0, 1)), max_size=40),
)
def test_no_window_as_the_server_sees_it_ever_has_more_than_the_limit(most, steps):
    """Whatever the times between requests, the time to the answer and where in it the server is."""
    limit = SlidingWindow(RateLimit(most, 1.0))
    now, seen, answers = 0.0, [], []
    for gap, round_trip, where in steps:
        now += gap
        while True:
            while answers and answers[0] <= now:
                limit.release(heapq.heappop(answers), sent=0.0, reply="answered")
            opens_at = limit.opens_at(now)
            if opens_at <= now:
                break
            now = min(opens_at, answers[0] if answers else math.inf)
        limit.acquire(now)
        heapq.heappush(answers, now + round_trip)
        seen.append(now + round_trip * where)
    seen.sort()
    for first, last in zip(seen, seen[most:], strict=False):
        assert last - first >= 1.0 - 1e-9


class FixedWindow:
    def __init__(self, most, period, phase=0.0):
        self.most, self.period, self.phase = most, period, phase
        self.window, self.count = None, 0

    def admits(self, now):
        window = (now + self.phase) // self.period
        if window != self.window:
            self.window, self.count = window, 0
        self.count += 1
        return self.count <= self.most


class ServiceWindow:
    def __init__(self, most, period):
        self.most, self.period, self.times = most, period, deque()

    def admits(self, now):
        while self.times and self.times[0] <= now - self.period:
            self.times.popleft()
        if len(self.times) >= self.most:
            return False
        self.times.append(now)
        return True


class Bucket:
    def __init__(self, most, period):
        self.most, self.rate, self.tokens, self.then = most, most / period, most, 0.0

    def admits(self, now):
        self.tokens = min(self.most, self.tokens + (now - self.then) * self.rate)
        self.then = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


def saturate(limit, server, *, until, round_trip=0.005, began=0.0):
    """Send all that the limit lets through, pausing as a client does: (time, admitted) of each."""
    log, answers, order = [], [], itertools.count()
    now, paused_until, pause, probing = began, -math.inf, 1.0, False
    while now < until:
        opens_at = max(limit.opens_at(now), paused_until)
        if opens_at <= now and not (probing and answers) and len(answers) < 64:
            limit.acquire(now)
            admitted = server.admits(now + round_trip / 2)
            heapq.heappush(answers, (now + round_trip, next(order), now, admitted))
            continue
        opens_at = math.inf if opens_at <= now else opens_at
        now = min(opens_at, answers[0][0] if answers else math.inf)
        while answers and answers[0][0] <= now:
            at, _, sent, admitted = heapq.heappop(answers)
            log.append((at, admitted))
            limit.release(at, sent=sent, reply="answered" if admitted else "refused")
            if sent >= paused_until:
                probing, pause = not admitted, 1.0 if admitted else min(2 * pause, 60.0)
                if not admitted:
                    paused_until = at + pause / 2
    return log


def shares(log, rate):
    """Of the limit, how much was answered, and of the requests, how many were refused."""
    first = next(at for at, admitted in log if not admitted)
    after = [(at, admitted) for at, admitted in log if at >= first]
    answered = sum(admitted for _, admitted in after)
    return answered / (after[-1][0] - first) / rate, 1 - answered / len(after)


@pytest.mark.parametrize("kind", [FixedWindow, ServiceWindow, Bucket])
@pytest.mark.parametrize(
    ("most", "period", "windows", "least", "refused"),
    [
        (10, 1.0, 100, 0.90, 0.03),
        (40, 1.0, 100, 0.90, 0.03),
        (200, 1.0, 100, 0.90, 0.03),
        (20, 10.0, 40, 0.85, 0.05),
        (100, 60.0, 40, 0.70, 0.10),
    ],
)
def test_an_unknown_limit_is_found_and_used(kind, most, period, windows, least, refused):
    """Nearly all that it allows gets answered, and few requests are refused."""
    log = saturate(DiscoveredLimit(), kind(most, period), until=windows * period)
    share, refusals = shares(log, most / period)
    assert share >= least
    assert refusals <= refused


def test_nothing_but_the_number_in_flight_holds_before_the_first_refusal():
    limit = DiscoveredLimit()
    assert limit.rate() is None
    for _ in range(4):
        assert limit.opens_at(0.0) == 0.0
        limit.acquire(0.0)
    assert limit.opens_at(0.0) == math.inf
    limit.cancel()
    assert limit.opens_at(0.0) == 0.0


def test_the_number_in_flight_grows_with_the_answers():
    limit = DiscoveredLimit()
    for _ in range(80):
        limit.acquire(0.0)
        limit.release(0.1, sent=0.0, reply="answered")
    for _ in range(14):
        assert limit.opens_at(0.2) == 0.2
        limit.acquire(0.2)
    assert limit.opens_at(0.2) == math.inf


def test_a_lost_request_is_neither_answer_nor_refusal():
    limit = DiscoveredLimit()
    for _ in range(100):
        limit.acquire(0.0)
        limit.release(0.1, sent=0.0, reply="lost")
    for _ in range(4):
        limit.acquire(0.2)
    assert limit.opens_at(0.2) == math.inf
    assert limit.rate() is None


def test_a_client_refused_before_any_answer_does_not_starve():
    """A hundred refusals over hours, then one answer: the rate to begin with is still usable."""
    limit = DiscoveredLimit()
    for now in range(0, 30_000, 300):
        limit.acquire(now)
        limit.release(now + 0.1, sent=now, reply="refused")
    limit.acquire(30_000.0)
    limit.release(30_000.1, sent=30_000.0, reply="answered")
    assert limit.rate() >= 0.15
    assert limit.opens_at(30_000.1) <= 30_000.1 + 7.0


def test_refusals_of_requests_already_under_way_are_one_refusal():
    limit = DiscoveredLimit()
    log = saturate(limit, ServiceWindow(50, 1.0), until=3.0)
    before = limit.rate()
    limit.acquire(3.0)
    limit.acquire(3.0)
    limit.release(3.1, sent=3.0, reply="refused")
    limit.release(3.2, sent=3.0, reply="refused")
    assert limit.rate() == pytest.approx(before, rel=0.01)
    assert log


def test_an_idle_client_keeps_its_rate():
    """An hour without requests neither raises the rate nor saves up a burst."""
    limit = DiscoveredLimit()
    saturate(limit, ServiceWindow(10, 1.0), until=60.0)
    before = limit.rate()
    limit.acquire(3660.0)
    assert limit.rate() == pytest.approx(before, rel=0.01)
    assert limit.opens_at(3660.0) >= 3660.0 + 0.9 / before - 0.05


def test_a_limit_that_is_raised_is_found_again():
    limit = DiscoveredLimit()
    saturate(limit, ServiceWindow(10, 1.0), until=120.0)
    log = saturate(limit, ServiceWindow(40, 1.0), until=600.0, began=120.0)
    late = sum(admitted for at, admitted in log if at >= 500.0)
    assert late >= 0.85 * 40 * 100


def test_a_limit_that_is_lowered_is_found_again():
    limit = DiscoveredLimit()
    saturate(limit, ServiceWindow(40, 1.0), until=120.0)
    log = saturate(limit, ServiceWindow(10, 1.0), until=300.0, began=120.0)
    share, refusals = shares(log, 10.0)
    assert share >= 0.85
    assert refusals <= 0.05


def test_the_busiest_stretch_counts_after_an_idle_time():
    """Slow polling for ten minutes says nothing of the limit that a burst then meets."""
    limit, server = DiscoveredLimit(), ServiceWindow(40, 1.0)
    for now in range(0, 600, 2):
        limit.acquire(now)
        limit.release(now + 0.005, sent=now, reply="answered" if server.admits(now) else "lost")
    saturate(limit, server, until=603.0, began=600.0)
    assert limit.rate() >= 15.0
