"""Rate limits: one that the caller knows, and one that is discovered from refusals.

Pure: every method takes the time, in seconds of one monotonic clock.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from typing import Literal, Protocol

import attrs

from kontext_async.errors import ConfigurationError

__all__ = ["DiscoveredLimit", "DiscoveryState", "Limit", "RateLimit", "Reply", "SlidingWindow"]

# Of a request: the service answered it, failed to, or refused it with 429, or no answer arrived.
# What failed counts towards the rate as what was answered does. How long it took says nothing.
Reply = Literal["answered", "failed", "refused", "lost"]


def _check(name: str, value: object, kind: type[int | float]) -> None:
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        wanted = "whole number" if kind is int else "number of seconds"
        raise ConfigurationError(f"RateLimit: {name} must be a positive {wanted}, not {value!r}")


@attrs.frozen
class RateLimit:
    """At most ``max_requests`` in any window of ``period`` seconds, as the server counts them.

    Both must be positive, or `ConfigurationError` is raised.
    """

    max_requests: int
    period: float

    def __attrs_post_init__(self) -> None:
        _check("max_requests", self.max_requests, int)
        _check("period", self.period, float)


class Limit(Protocol):
    """The questions and reports of a request budget to its rate limit."""

    def opens_at(self, now: float) -> float:
        """Return when the next permit is free; infinity if a request must end first."""
        ...

    def acquire(self, now: float) -> None:
        """Note that a permit was acquired, and that its request goes out now."""

    def release(self, now: float, *, sent: float, reply: Reply) -> None:
        """Note that the request sent at ``sent`` ended."""

    def cancel(self) -> None:
        """Note that the last permit was never used."""

    def forgotten(self) -> Limit:
        """Return the same limit without what it has learned from refusals."""
        ...

    def max_delay(self) -> float:
        """Return for how many seconds this limit may now delay a permit."""
        ...

    def rate(self) -> float | None:
        """Return the requests per second allowed now; None while no limit is known."""


class SlidingWindow:
    """Keeps a known `RateLimit`, as the server counts.

    The server counts a request at some time between its sending and its answer. So a permit
    stays in the window until a period after the answer. Counted from the sending, windows of the
    server have too many.

    If requests are refused all the same, the service counts otherwise, such as one at a time: then
    they are spaced as those of a `DiscoveredLimit` are, from the known rate on.

    ``max_requests`` may be changed at any time.
    """

    def __init__(self, limit: RateLimit) -> None:
        self.max_requests = limit.max_requests
        self._limit = limit
        self._in_flight = 0
        self._released: deque[float] = deque()  # at most a period ago
        self._spacing: DiscoveredLimit | None = None

    def opens_at(self, now: float) -> float:
        opens_at = self._window_opens_at(now)
        return opens_at if self._spacing is None else max(opens_at, self._spacing.opens_at(now))

    def used(self, now: float) -> int:
        """Return the number of permits in the window."""
        while self._released and self._released[0] + self._limit.period <= now:
            self._released.popleft()
        return self._in_flight + len(self._released)

    def _window_opens_at(self, now: float) -> float:
        excess = self.used(now) - self.max_requests
        if excess < 0:
            return now
        is_enough = excess < len(self._released)  # that some leave the window
        return self._released[excess] + self._limit.period if is_enough else math.inf

    def acquire(self, now: float) -> None:
        self._in_flight += 1
        if self._spacing is not None:
            self._spacing.acquire(now)

    def release(self, now: float, *, sent: float, reply: Reply) -> None:
        self._in_flight -= 1
        self._released.append(now)
        if self._spacing is not None:
            self._spacing.release(now, sent=sent, reply=reply)
        elif reply == "refused":
            self._spacing = DiscoveredLimit.after_refusal(now, self.rate())

    def cancel(self) -> None:
        self._in_flight -= 1
        if self._spacing is not None:
            self._spacing.cancel()

    def forgotten(self) -> SlidingWindow:
        limit = SlidingWindow(self._limit)
        limit._in_flight, limit._released = self._in_flight, self._released
        return limit

    def max_delay(self) -> float:
        # A window that is half full now may be full when the permit is wanted.
        half_full = 2 * (self._in_flight + len(self._released)) >= self.max_requests
        return self._limit.period if half_full else 0.0

    def rate(self) -> float:
        return self.max_requests / self._limit.period


class DiscoveryState(enum.Enum):
    """The states of a `DiscoveredLimit`; its docstring has the transitions."""

    UNUSED = "unused"
    SEARCHING = "searching"
    FIRST_REFUSED = "first refused"
    RISING = "rising"
    CRUISING = "cruising"
    REFUSED = "refused"

    def __init__(self, label: str) -> None:
        # Attributes, because the hot path reads them and Python 3.11 is slow to look up members.
        self.has_rate = label in {"rising", "cruising", "refused"}
        self.is_refused = label in {"first refused", "refused"}


_UNUSED = DiscoveryState.UNUSED
_RISING = DiscoveryState.RISING
_CRUISING = DiscoveryState.CRUISING


class DiscoveredLimit:
    """Discovers an unpublished limit from the refusals.

    =============  ============  ======================  ===============  =====================
    state          the limit     a request is sent       it is refused    one sent after the
                                                                          refusal is answered
    =============  ============  ======================  ===============  =====================
    UNUSED         concurrency   SEARCHING
    SEARCHING      concurrency                           FIRST_REFUSED
    FIRST_REFUSED  concurrency                                            RISING / CRUISING
    RISING         rate                                  REFUSED
    CRUISING       rate          RISING above the top    REFUSED
    REFUSED        rate                                                   RISING / CRUISING
    =============  ============  ======================  ===============  =====================

    An empty cell leaves the state as it is. A lost reply never changes it.

    Without a refusal there is no rate to go by. The concurrency starts low and rises with the
    answers, so that the first overshoot is small.

    The answer after a refusal starts a new cycle: CRUISING once the rate is settled, RISING
    before. Each starts a little below the rate that was *answered* before, and its requests are
    evenly spaced.

    RISING doubles the rate every two seconds and eight answers until it is refused. The rate is
    settled by a cycle with enough answers, by four that say little, or by a first refusal that
    lasted two seconds: such a window has shown how many it holds.

    CRUISING follows a cubic curve (as TCP CUBIC does, RFC 9438). It returns to nearly the refused
    rate soon, stays flat around it, and rises faster beyond it. Where two refusals agree, the next
    curve is longer: a steady limit is probed more rarely. Where they disagree, it is short
    again. A rate not refused by the curve's top, a quarter beyond its length, is RISING.
    """

    # tests/test_limits.py chose these constants by the shares that it asks for, and
    # tests/test_overload.py those of a rising rate, with tests/benchmarks/discovery.py.

    _INITIAL_CONCURRENCY = 4
    _ANSWERS_PER_STEP = 8  # answers that raise the concurrency by 1

    # The share of the answered rate that a cycle starts below it.
    _DECREASE = 0.12
    _DECREASE_UNSURE = 0.15  # after a refusal that disagreed with the one before

    # The curve is back at the answered rate after the longer of these two, times the stretch.
    _MIN_CYCLE_SECONDS = 8.0
    _MIN_CYCLE_REQUESTS = 60.0
    _STRETCH = 1.5  # after a refusal that agrees
    _STRETCH_SLOW = 3.0  # where the refusal costs more
    _LONG_PAUSE = 0.5  # s; a refusal costs more if its pause was longer, or a probe was refused
    _FULL_WINDOW = 2.0  # s; a first refusal that lasts longer is of a window that is full
    _UNSETTLED_CYCLES = 4  # that say little: then the rate is settled all the same

    _AGREEMENT = 0.15  # the share by which two refusals may differ and still agree
    _MIN_ANSWERS = 8  # fewer answers say little: they are judged together with earlier cycles
    _REMEMBERED_ANSWERS = 40.0  # of earlier cycles
    _KNOWN_SECONDS = 1000.0  # at a known rate: beside them the pause after a refusal hardly counts
    _RECENT_ANSWERS = 16  # that give the rate just before a refusal, or an eighth if that is more
    _PAUSE_ALLOWANCE = 1.25  # a pause of a fifth of its cycle does not lower the estimate
    _ROUNDING = 1.0  # s
    # An answer that takes longer than this is slow; so many in a row count as a refusal.
    _SLOW_FACTOR = 3.0
    _SLOW_SECONDS = 0.05
    _SLOW_ANSWERS = 8
    _FASTEST_GROWTH = 1.001  # for each answer
    _BUSY_INTERVALS = 1.5  # requests at most this many intervals apart use up the rate

    _MIN_FIRST_RATE = 4.0  # requests per second, where few answers came before the first refusal
    _MIN_RATE = 0.2  # requests per second; correcting a lower estimate would take hours
    _TOP = 1.25  # of the curve's length: not refused by then, the limit is thought to have risen
    _DOUBLING_SECONDS = 2.0
    _DOUBLING_ANSWERS = 8.0
    _MAX_DOUBLINGS = 30.0
    _MIN_SECONDS = 1e-3  # keeps a rate finite

    def __init__(self) -> None:
        self._state = DiscoveryState.UNUSED
        self._in_flight = 0
        # This cycle, and the answers in it.
        self._cycle_began = 0.0
        self._answered = 0
        self._answers: deque[float] = deque(maxlen=1024)
        # The refusal that ends it.
        self._refused_at = 0.0
        self._rate_before = 0.0  # answers per second just before
        self._probe_refused = False  # true if a request sent after the first was refused too
        self._probed_at = math.inf  # when the first one was sent since the last that was refused
        # Earlier cycles.
        self._earlier_answers = 0.0
        self._earlier_seconds = 0.0
        # The curve.
        self._peak = 0.0  # requests per second around the last refusal
        self._decrease = self._DECREASE
        self._stretch = 1.0
        self._climbed = 0.0  # seconds on the curve, counted only while the rate is used up
        self._answered_before = 0  # in this cycle, when it began to rise
        self._refused_rate = 0.0
        self._cycles = 0
        self._steps = 0  # answers that were not slow
        self._slow = 0  # slow answers in a row
        self._fastest = math.inf  # seconds of the fastest answer, slowly forgotten
        self._is_settled = False  # true once a cycle has had enough answers to judge it by
        self._last_sent = 0.0
        self._next_at = 0.0

    @classmethod
    def after_refusal(cls, now: float, rate: float) -> DiscoveredLimit:
        """Return a limit near a rate that has just been refused."""
        limit = cls()
        limit._state = DiscoveryState.REFUSED
        limit._refused_at = limit._cycle_began = now
        limit._is_settled = True
        limit._rate_before = limit._peak = limit._refused_rate = rate
        limit._earlier_answers = rate * cls._KNOWN_SECONDS
        limit._earlier_seconds = cls._KNOWN_SECONDS
        return limit

    def forgotten(self) -> DiscoveredLimit:
        limit = DiscoveredLimit()
        limit._in_flight = self._in_flight
        return limit

    def opens_at(self, now: float) -> float:
        if self._state.has_rate:
            return max(self._next_at, now)
        concurrency = self._INITIAL_CONCURRENCY + self._steps // self._ANSWERS_PER_STEP
        return now if self._in_flight < concurrency else math.inf

    def acquire(self, now: float) -> None:
        self._in_flight += 1
        if self._state.has_rate:
            interval = 1 / self._curve_rate()
            if now - self._last_sent < self._BUSY_INTERVALS * interval:
                self._climbed += now - self._last_sent
            # Evenly spaced: a late event loop does not catch up, as that would be a burst.
            self._next_at = now + interval
            if self._state is _CRUISING and self._climbed > self._TOP * self._length():
                self._rise(1 / interval)
        elif self._state is _UNUSED:
            self._state = DiscoveryState.SEARCHING
            self._cycle_began = now
        if self._state.is_refused:
            self._probed_at = min(self._probed_at, now)
        self._last_sent = now

    def release(self, now: float, *, sent: float, reply: Reply) -> None:
        self._in_flight -= 1
        is_probe = self._state.is_refused and sent >= self._refused_at
        if reply == "refused":
            if is_probe:
                self._probe_refused = True
                self._probed_at = math.inf
            if sent >= self._cycle_began:  # one sent before is refused for the rate before
                self._refuse(now)
        elif reply != "lost":
            if is_probe:
                self._start_cycle(now)
            self._answered += 1
            self._answers.append(now)
            if reply == "answered":
                self._observe_time(now, now - sent)

    def _observe_time(self, now: float, taken: float) -> None:
        """Note how long an answer took: many slow ones in a row are a queue that is filling."""
        self._fastest = min(taken, self._fastest * self._FASTEST_GROWTH)
        if taken <= self._slow_after():
            self._steps += 1
            self._slow = 0
            return
        self._slow += 1
        if self._slow >= self._SLOW_ANSWERS and self._state.has_rate:
            self._slow = 0
            self._refuse(now)

    def _slow_after(self) -> float:
        return self._SLOW_FACTOR * self._fastest + self._SLOW_SECONDS

    def cancel(self) -> None:
        self._in_flight -= 1

    def max_delay(self) -> float:
        return 1 / self._curve_rate() if self._state.has_rate else 0.0

    def rate(self) -> float | None:
        return self._curve_rate() if self._state.has_rate else None

    def _curve_rate(self) -> float:
        if self._state is _CRUISING:
            return self._peak * (1 + self._decrease * (self._climbed / self._length() - 1) ** 3)
        if self._state is _RISING:
            doublings = min(
                self._climbed / self._DOUBLING_SECONDS,
                (self._answered - self._answered_before) / self._DOUBLING_ANSWERS,
            )
            return float(self._peak * 2.0 ** min(doublings, self._MAX_DOUBLINGS))
        return self._refused_rate

    def _length(self) -> float:
        """Return the seconds after which the curve is back at its peak."""
        length = max(self._MIN_CYCLE_SECONDS, self._MIN_CYCLE_REQUESTS / self._peak)
        return length * self._stretch

    def _rise(self, rate: float) -> None:
        """Double the rate again and again until it is refused: the limit seems far away."""
        self._state = _RISING
        self._peak = rate
        self._climbed = 0.0
        self._answered_before = self._answered

    def _refuse(self, now: float) -> None:
        # More refusals before an answer say the same again. One in UNUSED is of a request sent
        # before the limit was forgotten.
        if not self._state.is_refused and self._state is not _UNUSED:
            is_first = self._state is DiscoveryState.SEARCHING
            if not is_first:
                self._refused_rate = self._curve_rate()
            self._state = DiscoveryState.FIRST_REFUSED if is_first else DiscoveryState.REFUSED
            self._refused_at = now
            self._probed_at = math.inf
            self._rate_before = self._recent_rate()

    def _start_cycle(self, now: float) -> None:
        # A probe that is slow, or lost, says nothing: the pause would have ended with it.
        ended = min(now, self._probed_at + self._slow_after())
        took = max(ended - self._cycle_began, self._MIN_SECONDS)
        paused, sending = ended - self._refused_at, self._refused_at - self._cycle_began
        remembered = self._REMEMBERED_ANSWERS
        if self._state is DiscoveryState.FIRST_REFUSED:
            remembered = self._MIN_ANSWERS  # it may have been the burst that a bucket holds
            peak = self._busiest_rate(ended, took)
            if self._answered < self._MIN_ANSWERS:
                peak = max(peak, self._MIN_FIRST_RATE)
            # A window that stayed full for long has shown how many it holds.
            self._is_settled = paused >= self._FULL_WINDOW
        else:
            peak = self._allowed_rate(took)
            self._shape_curve(peak, was_long=self._probe_refused or paused >= self._LONG_PAUSE)
            # A cycle that was mostly pause, or had few answers, says little: but four of them do.
            self._cycles += 1
            has_enough = self._answered >= self._MIN_ANSWERS and sending >= paused
            self._is_settled |= has_enough or self._cycles >= self._UNSETTLED_CYCLES
        self._remember_cycle(took, remembered)
        self._probe_refused = False
        self._cycle_began = now
        self._answered = 0
        self._answers.clear()
        self._peak = max(peak, self._MIN_RATE)
        self._climbed = 0.0
        if not self._is_settled:
            self._rise(self._peak * (1 - self._decrease))
        else:
            self._state = _CRUISING
        self._next_at = now + 1 / self._curve_rate()

    def _shape_curve(self, peak: float, *, was_long: bool) -> None:
        agrees = self._is_settled and abs(peak / self._peak - 1) <= self._AGREEMENT
        longer = self._STRETCH_SLOW if was_long else self._STRETCH
        self._stretch = longer if agrees else 1.0
        self._decrease = self._DECREASE if agrees else self._DECREASE_UNSURE

    def _allowed_rate(self, took: float) -> float:
        """Return the requests per second that a cycle of ``took`` seconds shows to be allowed."""
        if self._answered < self._MIN_ANSWERS:
            return (self._earlier_answers + self._answered) / (self._earlier_seconds + took)
        # The pause counts, because requests refused in it were too many as well.
        # A second of it may be the rounding of the service's own Retry-After.
        sending = (self._refused_at - self._cycle_began) / max(
            took - self._ROUNDING, self._refused_at - self._cycle_began, self._MIN_SECONDS
        )
        return max(
            self._rate_before * min(1.0, self._PAUSE_ALLOWANCE * sending), self._answered / took
        )

    def _remember_cycle(self, took: float, most: float) -> None:
        if self._answered < self._MIN_ANSWERS:
            self._earlier_answers += self._answered
            self._earlier_seconds += took
        else:
            self._earlier_answers, self._earlier_seconds = self._answered, took
        share = min(1.0, most / max(self._earlier_answers, 1))
        self._earlier_answers *= share
        self._earlier_seconds *= share

    def _recent_rate(self) -> float:
        count = min(len(self._answers), max(self._RECENT_ANSWERS, self._answered // 8))
        if count < 2:
            return 0.0
        return (count - 1) / max(self._answers[-1] - self._answers[-count], self._MIN_SECONDS)

    def _busiest_rate(self, now: float, took: float) -> float:
        """Return the answers per second in the busiest time up to now.

        The average of a client that was mostly idle says nothing about the limit. So ever shorter
        times are tried.
        """
        best = max(self._answered, 1) / took
        count = len(self._answers)
        while count >= self._MIN_ANSWERS:
            best = max(best, count / max(now - self._answers[-count], self._MIN_SECONDS))
            count //= 2
        return best
