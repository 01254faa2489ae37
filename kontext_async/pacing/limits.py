"""How fast requests may go: a limit that is known, or one found out from refusals.

Pure: every method is told the time, in seconds of one clock that never goes back.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

import attrs

from kontext_async.errors import ConfigurationError

__all__ = ["DiscoveredLimit", "Limit", "RateLimit", "SlidingWindow"]


def _check(name: str, value: object, kind: type[int | float]) -> None:
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        wanted = "whole number" if kind is int else "number of seconds"
        raise ConfigurationError(f"RateLimit: {name} must be a positive {wanted}, not {value!r}")


@attrs.frozen
class RateLimit:
    """At most ``max_requests`` in any ``period`` seconds, as the server sees them.

    Both must be positive, or `ConfigurationError` is raised.
    """

    max_requests: int
    period: float

    def __attrs_post_init__(self) -> None:
        _check("max_requests", self.max_requests, int)
        _check("period", self.period, float)


class Limit(Protocol):
    """What paces a client: asked before a request is sent, told how each one went."""

    def opens_at(self, now: float) -> float:
        """When the next request may go; infinity where only an answer can open the way."""
        ...

    def sent(self, now: float) -> None:
        """A request goes out."""

    def ended(self, now: float, *, sent: float, answered: bool, refused: bool) -> None:
        """A request sent at ``sent`` is over: answered, refused with 429, or neither."""

    def unsent(self) -> None:
        """What `sent` was told of did not go out after all."""

    def stall(self) -> float:
        """For how many seconds the way may be shut to everybody, as things are."""
        ...

    def rate(self) -> float | None:
        """Requests per second allowed just now; None while no limit is known."""


class SlidingWindow:
    """Holds an explicit `RateLimit` as the server counts.

    The server sees a request somewhere between its sending and its answer, so a place is given
    back a period after the answer: counted from the sending, windows overrun.
    """

    def __init__(self, limit: RateLimit) -> None:
        self._limit = limit
        self._in_flight = 0
        self._ended: deque[float] = deque()

    def opens_at(self, now: float) -> float:
        while self._ended and self._ended[0] + self._limit.period <= now:
            self._ended.popleft()
        if self._in_flight + len(self._ended) < self._limit.max_requests:
            return now
        return self._ended[0] + self._limit.period if self._ended else math.inf

    def sent(self, now: float) -> None:
        self._in_flight += 1

    def ended(self, now: float, *, sent: float, answered: bool, refused: bool) -> None:
        self._in_flight -= 1
        self._ended.append(now)

    def unsent(self) -> None:
        self._in_flight -= 1

    def stall(self) -> float:
        nearly_full = 2 * (self._in_flight + len(self._ended)) >= self._limit.max_requests
        return self._limit.period if nearly_full else 0.0

    def rate(self) -> float:
        return self._limit.max_requests / self._limit.period


class DiscoveredLimit:
    """Finds a limit that nobody publishes, from the refusals it meets.

    Until the first refusal only the number in flight is held down, and it rises with the
    answers, so that the first overshoot is small. From then on requests are spaced evenly. After
    a refusal the rate starts a little below what was being *answered* and follows a cubic curve
    (as TCP CUBIC does, RFC 9438): back near the rate of the refusal soon, flat around it, faster
    away from it. Refusals that agree make the curve longer, so that a steady limit is probed
    ever more rarely; one that disagrees makes it short again.
    """

    # Before the first refusal: so many in flight, and one more for each eight answers.
    _FIRST_IN_FLIGHT = 4
    _ANSWERS_FOR_MORE = 8

    # Of the answered rate, this share is given up at first; more where refusals disagree.
    _BACK_OFF = 0.07
    _BACK_OFF_UNSURE = 0.2

    # How long the curve takes to be back: seconds, and requests, at least; times a stretch that
    # begins small after a first guess made over a long pause, and grows where refusals agree.
    _SHORTEST = 8.0
    _FEWEST = 40.0
    _FIRST_STRETCH = 0.5
    _GROWS = 4.0
    _LONGEST_STRETCH = 12.0

    _AGREES = 0.15  # by what share two refusals may differ and still agree
    _FEW = 8  # answers in a cycle, below which it is judged together with what came before
    _RECENT = 16  # answers that tell the rate just before a refusal
    _PAUSE_FREE = 1.25  # a pause of a fifth of a cycle, or less, does not lower the estimate
    _SLOWEST = 0.2  # requests per second; below it a mistaken guess would take hours to mend
    _CATCH_UP = 0.05  # seconds' worth of turns kept for a loop that is late

    def __init__(self) -> None:
        self._in_flight = 0
        self._answered = 0
        self._answers: deque[float] = deque(maxlen=1024)
        self._before = 0.0  # answers in earlier cycles, and the seconds these took
        self._before_took = 0.0
        self._cycle_began: float | None = None  # cycle: from one way opened to the next
        self._refused_at: float | None = None
        self._probes = 0  # refused since then
        self._pace = 0.0  # answers per second just before the refusal
        self._peak: float | None = None  # requests per second around the last refusal
        self._stretch = 1.0
        self._back_off = self._BACK_OFF
        self._climbed = 0.0  # seconds on the curve, counted only while the rate was used up
        self._last_sent = -math.inf
        self._next = -math.inf

    def opens_at(self, now: float) -> float:
        if self._peak is None:
            room = self._FIRST_IN_FLIGHT + self._answered // self._ANSWERS_FOR_MORE
            return now if self._in_flight < room else math.inf
        return max(self._next, now)

    def sent(self, now: float) -> None:
        self._in_flight += 1
        if self._cycle_began is None:
            self._cycle_began = now
        if self._peak is not None:
            interval = 1 / self._curve(self._peak)
            if now - self._last_sent < 1.5 * interval:
                self._climbed += now - self._last_sent
            self._next = max(self._next, now - self._CATCH_UP) + interval
        self._last_sent = now

    def ended(self, now: float, *, sent: float, answered: bool, refused: bool) -> None:
        self._in_flight -= 1
        if refused:
            if self._refused_at is None:
                self._refused_at, self._pace = now, self._recent()
            elif sent >= self._refused_at:
                self._probes += 1
        elif answered:
            if self._refused_at is not None and sent >= self._refused_at:
                self._begin_again(now)
            self._answered += 1
            self._answers.append(now)

    def unsent(self) -> None:
        self._in_flight -= 1

    def stall(self) -> float:
        return 0.0 if self._peak is None else 1 / self._curve(self._peak)

    def rate(self) -> float | None:
        return None if self._peak is None else self._curve(self._peak)

    def _curve(self, peak: float) -> float:
        length = max(self._SHORTEST, self._FEWEST / peak) * self._stretch
        return peak * (1 + self._back_off * (self._climbed / length - 1) ** 3)

    def _begin_again(self, now: float) -> None:
        """The first answer after a refusal: a new cycle, from the rate that was answered."""
        assert self._cycle_began is not None, "an answer follows a request"
        took = max(now - self._cycle_began, 1e-3)
        if self._peak is None:  # a first guess, soon to be corrected
            peak = self._busiest(now, took)
            self._stretch = self._FIRST_STRETCH if self._probes else 1.0
        else:
            peak = self._judged(took)
            agrees = abs(peak / self._peak - 1) <= self._AGREES
            self._stretch = (
                min(self._GROWS * self._stretch, self._LONGEST_STRETCH) if agrees else 1.0
            )
            self._back_off = self._BACK_OFF if agrees else self._BACK_OFF_UNSURE
        self._note_cycle(took)
        self._peak = max(peak, self._SLOWEST)
        self._cycle_began, self._answered, self._refused_at, self._probes = now, 0, None, 0
        self._answers.clear()
        self._climbed = 0.0
        self._next = now + 1 / self._curve(self._peak)

    def _judged(self, took: float) -> float:
        """Requests per second that the cycle which took so long shows to be allowed."""
        assert self._cycle_began is not None, "an answer follows a request"
        assert self._refused_at is not None, "only a refusal ends a cycle"
        if self._answered < self._FEW:  # it says little by itself
            return (self._before + self._answered) / (self._before_took + took)
        # The pause counts: what was refused in it was too much as well.
        sending = (self._refused_at - self._cycle_began) / took
        return max(self._pace * min(1.0, self._PAUSE_FREE * sending), self._answered / took)

    def _note_cycle(self, took: float) -> None:
        """Keep what came before for cycles with few answers, but no more than so many answers."""
        if self._answered < self._FEW:
            self._before += self._answered
            self._before_took += took
        else:
            self._before, self._before_took = self._answered, took
        kept = min(1.0, self._FEWEST / max(self._before, 1))
        self._before *= kept
        self._before_took *= kept

    def _recent(self) -> float:
        """Answers per second, of late."""
        count = min(len(self._answers), max(self._RECENT, self._answered // 8))
        if count < 2:
            return 0.0
        return (count - 1) / max(self._answers[-1] - self._answers[-count], 1e-3)

    def _busiest(self, now: float, took: float) -> float:
        """Answers per second in the busiest stretch up to now.

        An idle client's average says nothing of the limit, so ever shorter stretches are tried.
        """
        best = max(self._answered, 1) / took
        count = len(self._answers)
        while count >= 8:
            best = max(best, count / max(now - self._answers[-count], 1e-3))
            count //= 2
        return best
