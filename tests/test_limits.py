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
from kontext_async.pacing.limits import DiscoveredLimit, DiscoveryState, SlidingWindow


@pytest.mark.parametrize("max_requests", [0, -1, 1.5, True, "10", None])
def test_a_rate_limit_wants_a_positive_whole_number(max_requests):
    with pytest.raises(ConfigurationError, match="max_requests must be a positive whole number"):
        RateLimit(max_requests, 1.0)


@pytest.mark.parametrize("period", [0, -1.0, math.nan, math.inf, True, "1", None])
def test_a_rate_limit_wants_a_positive_period(period):
    with pytest.raises(ConfigurationError, match="period must be a positive number of seconds"):
        RateLimit(10, period)


def exchange(limit, at, reply="answered"):
    """Send a request that ends at once."""
    limit.acquire(at)
    limit.release(at, sent=at, reply=reply)


# --- a known limit ------------------------------------------------------------------------------


def test_a_permit_leaves_the_window_a_period_after_the_answer():
    limit = SlidingWindow(RateLimit(2, 10.0))
    limit.acquire(0.0)
    limit.acquire(0.0)
    assert limit.opens_at(0.0) == math.inf
    limit.release(3.0, sent=0.0, reply="answered")
    assert limit.opens_at(3.0) == 13.0
    assert limit.opens_at(12.9) == 13.0
    assert limit.opens_at(13.0) == 13.0


def test_permits_leave_the_window_in_the_order_of_their_answers():
    limit = SlidingWindow(RateLimit(2, 10.0))
    exchange(limit, 3.0)
    exchange(limit, 7.0)
    assert limit.opens_at(8.0) == 13.0
    assert limit.opens_at(14.0) == 14.0
    limit.acquire(14.0)
    assert limit.opens_at(14.0) == 17.0


def test_a_cancelled_permit_leaves_the_window_at_once():
    limit = SlidingWindow(RateLimit(1, 10.0))
    limit.acquire(0.0)
    limit.cancel()
    assert limit.opens_at(0.0) == 0.0
    limit.acquire(0.0)
    assert limit.opens_at(0.0) == math.inf


def test_a_window_has_its_rate():
    assert SlidingWindow(RateLimit(20, 10.0)).rate() == 2.0


def test_a_half_full_window_may_delay_by_a_period():
    for size in (5, 6):
        limit = SlidingWindow(RateLimit(size, 10.0))
        exchange(limit, 0.0)
        limit.acquire(0.0)
        assert limit.max_delay() == 0.0
        limit.acquire(1.0)
        assert limit.max_delay() == 10.0


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.floats(0, 2), st.floats(0, 3), st.floats(0, 1)), max_size=40),
)
def test_no_window_of_the_server_has_more_than_the_limit(most, steps):
    """The server may count a request at any time between its sending and its answer."""
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


@pytest.mark.parametrize("pause", [0.1, 30.0])
def test_a_known_limit_that_is_refused_is_spaced_from_its_rate_on(pause):
    limit = SlidingWindow(RateLimit(20, 10.0))
    exchange(limit, 0.0)
    assert limit.opens_at(0.0) == 0.0
    exchange(limit, 0.1, "refused")
    now = 0.1 + pause
    assert limit.opens_at(now) == now
    exchange(limit, now)
    interval = limit.opens_at(now) - now
    assert interval == pytest.approx((1 + pause / 1000) / 2.0 / 0.88)  # a pause hardly counts
    now = limit.opens_at(now)
    limit.acquire(now)
    assert limit.opens_at(now) == pytest.approx(now + interval, rel=0.05)
    assert limit.rate() == 2.0


def test_a_spaced_window_is_a_window_all_the_same():
    limit = SlidingWindow(RateLimit(2, 10.0))
    exchange(limit, 0.0, "refused")
    exchange(limit, 1.0)
    assert limit.opens_at(9.0) == 10.0


def test_a_cancelled_permit_of_a_spaced_window_leaves_it():
    limit = SlidingWindow(RateLimit(2, 10.0))
    exchange(limit, 0.0, "refused")
    limit.acquire(1.0)
    assert limit.opens_at(6.0) == 10.0
    limit.cancel()
    assert limit.opens_at(6.0) == 6.0


def test_a_known_limit_forgets_its_spacing_and_nothing_else():
    limit = SlidingWindow(RateLimit(3, 10.0))
    exchange(limit, 0.0, "refused")
    exchange(limit, 1.0)
    limit.acquire(6.0)
    limit = limit.forgotten()
    assert limit.opens_at(6.0) == 10.0
    limit.release(7.0, sent=6.0, reply="answered")
    exchange(limit, 10.0)
    assert limit.opens_at(10.0) == 11.0


# --- a limit to discover ------------------------------------------------------------------------


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
    now, paused_until, pause, probing = began, -math.inf, 0.25, False
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
                if not admitted:
                    paused_until = at + pause
                probing, pause = not admitted, 0.25 if admitted else min(3 * pause, 60.0)
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


def test_before_the_first_refusal_only_the_concurrency_is_limited():
    limit = DiscoveredLimit()
    assert limit.rate() is None
    assert limit.max_delay() == 0.0
    for _ in range(4):
        assert limit.opens_at(0.0) == 0.0
        limit.acquire(0.0)
    assert limit.opens_at(0.0) == math.inf
    limit.cancel()
    assert limit.opens_at(0.0) == 0.0
    limit.acquire(0.0)
    assert limit.opens_at(0.0) == math.inf


def test_eight_answers_raise_the_concurrency_by_one():
    limit = DiscoveredLimit()
    for _ in range(79):
        exchange(limit, 0.1)
    for _ in range(13):
        assert limit.opens_at(0.2) == 0.2
        limit.acquire(0.2)
    assert limit.opens_at(0.2) == math.inf
    limit.release(0.2, sent=0.2, reply="answered")
    limit.acquire(0.2)
    assert limit.opens_at(0.2) == 0.2


def test_a_lost_reply_is_neither_answer_nor_refusal():
    limit = DiscoveredLimit()
    for _ in range(100):
        exchange(limit, 0.0, "lost")
    for _ in range(4):
        limit.acquire(0.2)
    assert limit.opens_at(0.2) == math.inf
    assert limit.rate() is None
    exchange(limit, 0.3, "refused")
    exchange(limit, 1.0, "lost")
    assert limit.rate() is None


def cycle(limit, began, *, gaps, pause=1.0):
    """Have answers at these gaps, a refusal, and the answer that ends the pause."""
    now = began
    for gap in gaps[:-1]:
        now += gap
        exchange(limit, now)
    exchange(limit, now + gaps[-1], "refused")
    ended = now + gaps[-1] + pause
    exchange(limit, ended)
    return ended


def unsettled(gaps=(0.1,) * 41, pause=1.0):
    """Have 40 answers in 5 s by default, and a short pause; return the limit and the time."""
    limit = DiscoveredLimit()
    return limit, cycle(limit, 0.0, gaps=gaps, pause=pause)


def settled(gaps=(1 / 12,) * 49):
    """Have 48 answers in 6 s by default, of which 2 are a pause; return the limit and the time."""
    return unsettled(gaps, pause=2.0)


def curve(seconds, *, peak=8.0, decrease=0.12, length=8.0):
    return pytest.approx(peak * (1 + decrease * (seconds / length - 1) ** 3))


def climb(limit, began, seconds):
    """Use the rate up for this many seconds; return the time."""
    now = began
    while now < began + seconds:
        now = limit.opens_at(now)
        exchange(limit, now)
    return now


def state(limit):
    return limit._state


# The states


def test_the_first_request_begins_the_search():
    limit = DiscoveredLimit()
    assert state(limit) is DiscoveryState.UNUSED
    limit.acquire(0.0)
    assert state(limit) is DiscoveryState.SEARCHING


def test_a_refusal_ends_the_search():
    limit = DiscoveredLimit()
    exchange(limit, 0.0, "refused")
    assert state(limit) is DiscoveryState.FIRST_REFUSED


@pytest.mark.parametrize(
    ("pause", "then"),
    [(1.9, DiscoveryState.RISING), (2.0, DiscoveryState.CRUISING)],
)
def test_the_first_rate_is_doubled_unless_a_full_window_has_shown_the_limit(pause, then):
    """A window that stays full for two seconds has shown how many it holds."""
    limit, _ = unsettled(pause=pause)
    assert state(limit) is then


@pytest.mark.parametrize("first", [unsettled, settled])
def test_a_rate_that_is_refused_stays_until_the_next_answer(first):
    limit, now = first()
    now = climb(limit, now, 1.0)
    rate = limit.rate()
    exchange(limit, now + 0.01, "refused")
    assert state(limit) is DiscoveryState.REFUSED
    assert limit.rate() == pytest.approx(rate, rel=0.01)
    assert limit.opens_at(now + 0.01) < math.inf


def test_a_cycle_with_enough_answers_settles_the_rate():
    limit, now = unsettled()
    cycle(limit, now, gaps=[0.1] * 9, pause=0.5)
    assert state(limit) is DiscoveryState.CRUISING


@pytest.mark.parametrize(
    ("gaps", "pause"),
    [([0.1] * 8, 0.5), ([0.1] * 9, 1.0)],  # seven answers in it; more pause than sending
)
def test_a_cycle_that_says_little_leaves_the_rate_rising_but_four_of_them_settle_it(gaps, pause):
    limit, now = unsettled()
    for _ in range(3):
        now = cycle(limit, now, gaps=gaps[1:], pause=pause)
        assert state(limit) is DiscoveryState.RISING
    cycle(limit, now, gaps=gaps[1:], pause=pause)
    assert state(limit) is DiscoveryState.CRUISING


def test_a_settled_rate_stays_settled():
    limit, now = settled()
    cycle(limit, now, gaps=[0.1], pause=30.0)
    assert state(limit) is DiscoveryState.CRUISING


def test_a_curve_that_is_not_refused_a_quarter_beyond_its_length_rises():
    limit, began = settled()
    now = began
    while state(limit) is DiscoveryState.CRUISING and now < began + 20.0:
        now = limit.opens_at(now)
        exchange(limit, now)
    assert began + 10.0 < now < began + 10.25
    assert limit.rate() == pytest.approx(8.0 * (1 + 0.12 / 64), rel=0.01)
    rate, rose = limit.rate(), now
    now = climb(limit, now, 2.0)
    assert limit.rate() == pytest.approx(rate * 2 ** ((now - rose) / 2), rel=1e-3)


def test_an_answer_to_a_request_sent_before_the_refusal_starts_no_cycle():
    limit = DiscoveredLimit()
    limit.acquire(0.5)
    exchange(limit, 1.0, "refused")
    limit.release(2.0, sent=0.5, reply="answered")
    assert limit.rate() is None
    exchange(limit, 2.0)
    assert limit.rate() is not None


def test_more_refusals_before_an_answer_are_the_same_refusal():
    rates = []
    for more in (0, 3):
        limit, began = settled()
        for n in range(1, 81):
            exchange(limit, began + n / 8)
        for n in range(1 + more):
            exchange(limit, began + 10.5 + n, "refused")
        exchange(limit, began + 15.0)
        rates.append(limit.rate())
    assert rates[0] == rates[1] == curve(0.0, peak=8.0 * 1.25 * 10.5 / 14.0, decrease=0.12)


def test_what_was_found_is_forgotten_except_the_requests_in_flight():
    limit, _ = settled()
    for now in (7.0, 7.0, 7.0):
        limit.acquire(now)
    limit = limit.forgotten()
    assert (state(limit), limit.rate()) == (DiscoveryState.UNUSED, None)
    limit.acquire(7.1)
    assert limit.opens_at(7.1) == math.inf
    limit.release(7.2, sent=7.0, reply="answered")
    assert limit.opens_at(7.2) == 7.2


def test_a_refusal_of_a_request_sent_before_the_limit_was_forgotten_says_nothing():
    limit, _ = settled()
    limit.acquire(7.0)
    limit = limit.forgotten()
    limit.release(7.1, sent=7.0, reply="refused")
    assert (state(limit), limit.rate()) == (DiscoveryState.UNUSED, None)


# A rising rate


def test_a_rising_rate_doubles_in_two_seconds():
    limit, began = unsettled()
    rate = limit.rate()
    assert rate == pytest.approx(8.0 * 0.88)
    assert limit.max_delay() == pytest.approx(1 / rate)
    assert limit.opens_at(began) == pytest.approx(began + 1 / rate)
    now = climb(limit, began, 2.0)
    assert limit.rate() == pytest.approx(rate * 2 ** ((now - began) / 2))
    now = climb(limit, now, 2.0)
    assert limit.rate() == pytest.approx(rate * 2 ** ((now - began) / 2))


def test_a_rising_rate_doubles_after_eight_answers_at_least():
    """Requests without an answer yet, or with a lost one, raise nothing."""
    limit, began = unsettled()
    rate, now = limit.rate(), began
    for _ in range(40):
        now = limit.opens_at(now)
        exchange(limit, now, "lost")
    assert now > began + 4.0
    assert limit.rate() == pytest.approx(rate * 2 ** (1 / 8))  # of the answer that ended the pause
    for _ in range(7):
        limit.release(now, sent=now, reply="answered")
    assert limit.rate() == pytest.approx(2 * rate)


def test_a_rate_that_begins_to_rise_counts_its_answers_afresh():
    limit, began = settled()
    now = climb(limit, began, 10.0)
    assert state(limit) is DiscoveryState.RISING
    for _ in range(40):
        now = limit.opens_at(now)
        exchange(limit, now, "lost")
    # Only the request that made it rise has been answered.
    assert limit.rate() == pytest.approx(8.0 * (1 + 0.12 / 64) * 2 ** (1 / 8), rel=1e-3)


def test_a_rising_rate_that_is_not_used_up_does_not_rise():
    limit, began = unsettled()
    rate = limit.rate()
    for n in range(1, 31):
        exchange(limit, began + 1.6 * n / rate)
    assert limit.rate() == pytest.approx(rate)


def test_a_rate_that_is_never_refused_stays_finite():
    limit, now = unsettled()
    for n in range(1, 30_001):
        exchange(limit, now + n / 10)
    assert limit.rate() < math.inf


# The curve


def test_the_first_rate_starts_below_that_of_the_busiest_time():
    limit, now = settled()
    assert limit.rate() == curve(0.0)
    assert limit.rate() == pytest.approx(8.0 * 0.88)
    assert limit.max_delay() == pytest.approx(1 / limit.rate())
    assert limit.opens_at(now) == pytest.approx(now + 1 / limit.rate())
    assert limit.opens_at(now + 9.0) == now + 9.0


@pytest.mark.parametrize("seconds", [2.0, 4.0, 8.0, 9.5])
def test_the_rate_follows_a_cubic_curve_while_it_is_used_up(seconds):
    """It is back after 8 s, and rises beyond."""
    limit, began = settled()
    now = climb(limit, began, seconds)
    assert limit.rate() == curve(now - began)
    interval, now = 1 / limit.rate(), limit.opens_at(now)
    limit.acquire(now)
    assert limit.opens_at(now) == pytest.approx(now + interval, rel=1e-3)


def test_a_curve_takes_sixty_requests_at_least():
    limit = DiscoveredLimit()
    began = cycle(limit, 0.0, gaps=[1.25] * 32, pause=2.0)
    peak = 31 / 40.75
    now = climb(limit, began, 20.0)
    assert limit.rate() == curve(now - began, peak=peak, length=60 / peak)


def test_a_rate_that_is_not_used_up_does_not_rise():
    limit, began = settled()
    interval = 1 / limit.rate()
    exchange(limit, began + 1.6 * interval)
    assert limit.rate() == curve(0.0)
    exchange(limit, began + 3.0 * interval)
    assert limit.rate() == curve(1.4 * interval)


@pytest.mark.parametrize("late", [0.01, 3600.0])
def test_a_late_client_catches_up_on_nothing(late):
    """Requests are evenly spaced, because a limit without a burst refuses the second of two."""
    limit, now = settled()
    now = limit.opens_at(now) + late
    interval = 1 / limit.rate()
    limit.acquire(now)
    assert limit.opens_at(now) == pytest.approx(now + interval, rel=1e-3)


@pytest.mark.parametrize(
    ("factor", "decrease", "length"),
    [(0.84, 0.15, 60 / 6.72), (0.86, 0.12, 180 / 6.88), (1.14, 0.12, 24.0), (1.16, 0.15, 8.0)],
)
def test_refusals_that_agree_make_the_curve_longer_and_others_deeper(factor, decrease, length):
    """They agree if their rates differ by 15 % at most."""
    limit, now = settled()
    now = cycle(limit, now, gaps=[0.125 / factor] * 81)
    exchange(limit, now + 0.1)
    assert limit.rate() == curve(0.1, peak=8.0 * factor, decrease=decrease, length=length)


def test_refusals_agree_only_once_a_rate_is_settled():
    """The first rate was one of few answers."""
    limit, now = unsettled()
    now = cycle(limit, now, gaps=[0.125] * 81)
    exchange(limit, now + 0.1)
    assert limit.rate() == curve(0.1, decrease=0.15)
    now = cycle(limit, now + 0.1, gaps=[0.125] * 81)
    exchange(limit, now + 0.1)
    assert limit.rate() == curve(0.1, length=24.0)


@pytest.mark.parametrize(("pause", "length"), [(0.4, 12.0), (0.6, 24.0)])
def test_a_curve_is_longest_where_a_refusal_costs_a_long_pause(pause, length):
    limit, now = settled()
    for _ in range(2):
        now = cycle(limit, now, gaps=[0.125] * 81, pause=pause) + 0.1
        exchange(limit, now)
        assert limit.rate() == curve(0.1, length=length)


def test_a_curve_is_longest_where_a_probe_was_refused():
    limit, now = settled()
    for n in range(1, 81):
        exchange(limit, now + n / 8)
    exchange(limit, now + 10.125, "refused")
    exchange(limit, now + 10.25, "refused")
    exchange(limit, now + 10.5)
    exchange(limit, now + 10.6)
    assert limit.rate() == curve(0.1, length=24.0)


def test_a_refusal_that_disagrees_makes_a_long_curve_short_again():
    limit, now = settled()
    for length in (24.0, 24.0):
        now = cycle(limit, now, gaps=[0.125] * 81) + 0.1
        exchange(limit, now)
        assert limit.rate() == curve(0.1, length=length)
    now = cycle(limit, now, gaps=[0.05] * 201) + 0.02
    exchange(limit, now)
    assert limit.rate() == curve(0.02, peak=20.0, decrease=0.15)


# The estimate


@pytest.mark.parametrize(
    ("gaps", "pause", "peak"),
    [
        ([0.1] * 81, 0.9, 10.0),
        ([0.1] * 81, 3.0, 10.0),  # a second may be rounding, and the rest is a fifth
        ([0.1] * 81, 9.1, 10.0 * 1.25 / 2),
        ([0.05] * 100 + [0.5] * 21, 0.5, 121 / 16.0),  # slow before the refusal
        ([1.0] + [0.0] * 20, 0.0, 15 / 1e-3),  # finite
        ([0.0] * 20, 0.0, 20 / 1e-3),
        ([0.1] * 143 + [0.05] * 18, 0.1, 19 / 1.05),  # the last eighth
    ],
)
def test_a_cycle_shows_the_rate_just_before_its_refusal_unless_the_pause_was_long(
    gaps, pause, peak
):
    limit, now = settled()
    cycle(limit, now, gaps=gaps, pause=pause)
    agrees = abs(peak / 8.0 - 1) <= 0.15
    assert limit.rate() == pytest.approx(peak * (0.88 if agrees else 0.85))


@pytest.mark.parametrize(("pause", "counted"), [(1.0, 0.0), (1.5, 0.5), (2.0, 1.0)])
def test_a_second_of_a_pause_may_be_the_rounding_of_retry_after(pause, counted):
    limit, now = settled()
    cycle(limit, now, gaps=[0.1] * 11, pause=pause)
    peak = 10.0 * min(1.0, 1.25 * 1.1 / (1.1 + counted))
    agrees = abs(peak / 8.0 - 1) <= 0.15
    assert limit.rate() == pytest.approx(peak * (0.88 if agrees else 0.85))


def test_answers_of_an_earlier_cycle_do_not_count():
    limit, now = settled(gaps=[1.25] * 32)
    cycle(limit, now, gaps=[0.1] * 11, pause=2.0)
    assert limit.rate() == pytest.approx(0.85 * 10.0 * 1.25 * 1.1 / 2.1)


def settled_again():
    """Have a second cycle of 48 answers in 6 s as well."""
    limit, now = settled()
    return limit, cycle(limit, now, gaps=[1 / 12] * 48, pause=2.0)


def test_a_cycle_with_few_answers_is_judged_together_with_earlier_ones():
    """With the last 40 answers of them."""
    limit, now = settled_again()
    now = cycle(limit, now, gaps=[0.1] * 4)
    assert limit.rate() == pytest.approx(0.85 * 44 / 6.4)
    now = cycle(limit, now, gaps=[0.1] * 4)
    assert limit.rate() == pytest.approx(0.88 * 44 / (6.4 * 40 / 44 + 1.4))
    now = cycle(limit, now, gaps=[0.1] * 81)
    cycle(limit, now, gaps=[0.1] * 4)
    assert limit.rate() == pytest.approx(0.85 * 44 / (9.1 * 40 / 81 + 1.4))


@pytest.mark.parametrize(
    ("first", "peak"),
    [([0.1] * 20, (20 + 4) / (4.0 + 1.4)), ([0.1] * 9, (9 + 4) / (2.9 + 1.4))],
)
def test_earlier_cycles_count_in_full_up_to_forty_answers(first, peak):
    limit, now = settled()
    now = cycle(limit, now, gaps=first, pause=2.0)
    cycle(limit, now, gaps=[0.1] * 4)
    assert limit.rate() == pytest.approx(0.85 * peak)


def test_eight_answers_of_the_first_cycle_count_later():
    """More of them would keep the rate high for long, if they were the burst of a bucket."""
    limit, now = settled()
    cycle(limit, now, gaps=[0.1] * 4)
    assert limit.rate() == pytest.approx(0.85 * (8 + 4) / (6.0 * 8 / 48 + 1.4))


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [([0.1] * 7, 0.85 * (40 + 7) / (5.0 + 2.7)), ([0.1] * 8, 0.85 * 10.0 * 1.25 * 0.8 / 1.8)],
)
def test_eight_answers_are_enough_to_judge_a_cycle_by(gaps, expected):
    limit, now = settled_again()
    cycle(limit, now, gaps=gaps, pause=2.0)
    assert limit.rate() == pytest.approx(expected)


def test_a_cycle_with_eight_answers_replaces_the_earlier_ones():
    limit, now = settled()
    now = cycle(limit, now, gaps=[0.1] * 8, pause=2.0)
    cycle(limit, now, gaps=[0.1] * 4)
    assert limit.rate() == pytest.approx(0.85 * (8 + 4) / (2.8 + 1.4))


@pytest.mark.parametrize(("more", "peak"), [([], 9 / 20.2), ([0.9], 1 / 0.9)])
def test_few_answers_before_a_refusal_give_no_rate_or_that_between_two(more, peak):
    """Enough answers to earlier requests come after the refusal."""
    limit, now = settled()
    for seconds in more:
        exchange(limit, now + seconds)
    for _ in range(8):
        limit.acquire(now + 1.0)
    exchange(limit, now + 20.0, "refused")
    for _ in range(8):
        limit.release(now + 20.1, sent=now + 1.0, reply="answered")
    exchange(limit, now + 20.2)
    assert limit.rate() == pytest.approx(0.85 * peak)


@pytest.mark.parametrize(("idle", "burst"), [(20, 16), (24, 8)])
def test_the_first_estimate_is_of_the_busiest_time(idle, burst):
    """Slow polling says nothing of the limit that a burst then meets."""
    limit, _ = unsettled([10.0] * idle + [0.0625] * (burst + 1), pause=0.0)
    assert limit.rate() == pytest.approx(0.88 * 16.0)


@pytest.mark.parametrize(("answers", "peak"), [(1, 4.0), (7, 4.0), (8, 8 / 11.25)])
def test_few_answers_before_the_first_refusal_give_four_requests_a_second(answers, peak):
    limit, _ = unsettled([1.25] * (answers + 1), pause=1.25)
    assert limit.rate() == pytest.approx(0.88 * peak)


def test_few_answers_before_the_first_refusal_may_give_more():
    limit, _ = unsettled([0.1] * 8, pause=0.1)
    assert limit.rate() == pytest.approx(0.88 * 7 / 0.8)


def test_a_client_refused_before_any_answer_does_not_starve():
    """A hundred refusals over hours, then one answer: four requests a second are tried."""
    limit = DiscoveredLimit()
    for now in range(0, 30_000, 300):
        exchange(limit, float(now), "refused")
    exchange(limit, 30_000.0)
    assert limit.rate() == curve(0.0, peak=4.0, length=15.0)
    assert limit.opens_at(30_000.0) == pytest.approx(30_000.0 + 1 / limit.rate())


def test_a_rate_falls_no_lower_than_one_request_in_five_seconds():
    limit, now = settled([10.0] * 10)
    assert limit.rate() == curve(0.0, peak=0.2, length=300.0)
    assert limit.opens_at(now) == pytest.approx(now + 1 / limit.rate())


def test_a_refusal_of_a_request_from_before_the_cycle_leaves_the_rate():
    """It was refused for the rate before."""
    limit, now = settled()
    limit.acquire(now - 0.1)
    limit.release(now + 0.1, sent=now - 0.1, reply="refused")
    assert not limit._state.is_refused
    exchange(limit, now + 0.2, "refused")
    assert limit._state.is_refused


def rate_after(*probes):
    """Return the rate after 3 s of answers, a refusal, and these probes: sent, ended, reply."""
    limit, now = settled()
    for _ in range(30):
        now += 0.1
        exchange(limit, now)
    exchange(limit, now, "refused")
    for sent, _, _ in probes:
        limit.acquire(now + sent)
    for sent, ended, reply in probes:
        limit.release(now + ended, sent=now + sent, reply=reply)
    return limit.rate()


def test_a_slow_or_lost_probe_does_not_lower_the_rate():
    """The pause would have ended with it."""
    at_once = rate_after((1.0, 1.05, "answered"))
    assert rate_after((1.0, 5.0, "answered")) == pytest.approx(at_once)
    assert rate_after((1.0, 9.0, "lost"), (5.0, 5.05, "answered")) == pytest.approx(at_once)
    refused_first = rate_after((1.0, 1.05, "refused"), (5.0, 5.05, "answered"))
    assert refused_first < 0.8 * at_once
    assert rate_after((5.0, 5.05, "answered")) == pytest.approx(refused_first)


@pytest.mark.parametrize("kind", [FixedWindow, ServiceWindow, Bucket])
@pytest.mark.parametrize("raised_at", [100.0, 105.3, 110.6, 115.9])
def test_a_limit_that_is_raised_is_used_within_half_a_minute(kind, raised_at):
    limit = DiscoveredLimit()
    saturate(limit, kind(10, 1.0), until=raised_at)
    until = raised_at + 90.0
    log = saturate(limit, kind(50, 1.0), until=until, began=raised_at)
    used = sum(admitted for at, admitted in log if at >= raised_at + 30.0)
    assert used >= 0.90 * 50 * 60


def test_a_limit_that_is_lowered_is_found_again():
    limit = DiscoveredLimit()
    saturate(limit, ServiceWindow(40, 1.0), until=120.0)
    log = saturate(limit, ServiceWindow(10, 1.0), until=300.0, began=120.0)
    share, refusals = shares(log, 10.0)
    assert share >= 0.85
    assert refusals <= 0.05


# --- answers that grow slower -------------------------------------------------------------------


def answer_after(limit, at, taken):
    limit.acquire(at)
    limit.release(at + taken, sent=at, reply="answered")


def test_slow_answers_raise_the_concurrency_no_further():
    """A queue is filling, where answers take thrice as long as the fastest and 50 ms more."""
    limit = DiscoveredLimit()
    answer_after(limit, 0.0, 0.1)
    for _ in range(100):
        answer_after(limit, 1.0, 0.5)
    for _ in range(4):
        limit.acquire(2.0)
    assert limit.opens_at(2.0) == math.inf
    assert limit.rate() is None
    for _ in range(7):
        answer_after(limit, 3.0, 0.34)
    assert limit.opens_at(4.0) == 4.0


@pytest.mark.parametrize(("slow", "is_refused"), [(7, False), (8, True)])
def test_eight_slow_answers_in_a_row_are_a_refusal(slow, is_refused):
    """A fast one between begins the count again."""
    limit = DiscoveredLimit.after_refusal(0.0, 10.0)
    answer_after(limit, 0.5, 0.1)
    for wave in (7, slow):
        answer_after(limit, 1.0, 0.1)
        for _ in range(wave):
            answer_after(limit, 1.0, 0.5)
    assert limit._state.is_refused is is_refused


def test_failures_are_no_measure_of_how_fast_answers_are():
    """A gateway fails at once where the service behind it takes its time."""
    limit = DiscoveredLimit.after_refusal(0.0, 10.0)
    exchange(limit, 0.5, "failed")
    for at in range(1, 20):
        answer_after(limit, at, 0.1)
        exchange(limit, at + 0.2, "failed")
    assert not limit._state.is_refused
    assert limit._answered == 39


def test_a_queue_that_refuses_after_a_second_refuses_little():
    """Two at a time take 0.1 s each; who waits for a second is refused."""
    limit, free, answers, order = DiscoveredLimit(), [0.0, 0.0], [], itertools.count()
    now, log, paused_until = 0.0, [], 0.0
    while now < 60.0:
        opens_at = max(limit.opens_at(now), paused_until)
        if opens_at <= now and len(answers) < 64:
            limit.acquire(now)
            starts = max(now, free[0])
            admitted = starts - now <= 1.0
            if admitted:
                heapq.heapreplace(free, starts + 0.1)
            ends = starts + 0.1 if admitted else now + 1.0
            heapq.heappush(answers, (ends, next(order), now, admitted))
            continue
        ends = answers[0][0] if answers else math.inf
        now = min(opens_at if opens_at > now else math.inf, ends)
        while answers and answers[0][0] <= now:
            at, _, sent, admitted = heapq.heappop(answers)
            log.append((at, admitted))
            limit.release(at, sent=sent, reply="answered" if admitted else "refused")
            paused_until = paused_until if admitted else at + 0.25
    late = [admitted for at, admitted in log if at >= 10.0]
    assert sum(late) / 50.0 / 20.0 >= 0.95
    assert late.count(False) / len(late) <= 0.06
