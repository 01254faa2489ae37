"""One client's request budget: who may send a request, and when.

Everybody queues here, also to sleep: a turn is asked for with the earliest time it is wanted at,
so that a hundred thousand waits need one timer of the event loop, not a hundred thousand.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Mapping
from types import MappingProxyType

import attrs

from kontext_async.errors import (
    ApiError,
    Handling,
    KontextError,
    MaintenanceError,
    RateLimitedError,
    ResponseFormatError,
    ServerError,
    TransportError,
)
from kontext_async.pacing.limits import DiscoveredLimit, Limit, RateLimit, SlidingWindow

__all__ = ["ClientStats", "RequestBudget"]

_Turn = asyncio.Future[float]
_Entry = tuple[float, int, float, _Turn]  # what a heap goes by, its order, the other time, whose

# Pauses, in seconds.
_BELIEVED = 300.0  # the longest Retry-After that is taken at its word
_FIRST_PAUSE = 1.0
_FIRST_MAINTENANCE_PAUSE = 5.0
_LONGEST_PAUSE = 60.0

# A wait without a deadline is served as if it had one so many seconds after it wants a turn.
_PATIENCE = 600.0

# While no rate limit is known and only slots or the processor are short, first looks may make a
# look at a known task late by this share of what it has left to its deadline beyond a minute: by
# 13.5 s of 600. Else second looks take most turns before a large batch was looked at once.
_LENIENCE = 1 / 40
_IN_A_HURRY = 60.0  # s

# How many entries are moved in one go, so that the event loop gets air in between.
_PIECE = 1000

# What a turn's delay still counts for, one turn later.
_DELAY_FORGOTTEN = 0.99

# So many tasks failing in a row, and nobody succeeding, is an outage of the service.
_OUTAGE = 5


@attrs.frozen(kw_only=True)
class ClientStats:
    """What a client has done so far, and how it stands.

    ``errors`` counts the looks that failed, by the class name of the error; ``rate_limited``
    are those answered 429. ``rate`` is the present limit in requests per second, None while
    none is known; ``pause`` the seconds for which the whole client still holds back. ``waits`` are
    under way, and ``in_flight`` of the requests they sent are unanswered.
    """

    requests: int
    errors: Mapping[str, int]
    rate_limited: int
    rate: float | None
    pause: float
    waits: int
    in_flight: int


class _Pause:
    """The client-wide pause, and the single requests that probe for its end."""

    def __init__(self) -> None:
        self.error: KontextError | None = None  # why; None: the way is open
        self._began = self._until = -math.inf
        self._past = 0.0  # seconds of pauses that are over
        self._streak = 0  # pauses since the last good answer
        self._probing = False

    def opens_at(self, now: float) -> float:
        if self.error is None:
            return now
        return math.inf if self._probing else max(now, self._until)

    def remaining(self, now: float) -> float:
        return max(0.0, self._until - now)

    def spent(self, now: float) -> float:
        """Seconds spent in pauses, all told."""
        return self._past + max(0.0, min(now, self._until) - self._began)

    def sent(self) -> None:
        self._probing = self.error is not None

    def is_probe(self, sent: float) -> bool:
        return self.error is not None and sent >= self._until

    def probes_outage(self, sent: float) -> bool:
        """Whether a request was to see if an outage is over, and not a pause that was asked for."""
        asked_for = self.error is not None and self.error.handling is Handling.BACK_OFF
        return self.is_probe(sent) and not asked_for

    def hold(self, error: KontextError, *, now: float, sent: float) -> None:
        """Pause because of what came back for a request sent at ``sent``."""
        asked = error.retry_after if isinstance(error, ApiError) else None
        if sent >= self._until:
            self._past = self.spent(now)
            self._began, self._probing, self.error = now, False, error
            self._streak += 1
            self._until = now + (min(asked, _BELIEVED) if asked else self._growing(error))
        elif asked and now < self._until:  # one more answer to what led to this pause
            self._until = max(self._until, now + min(asked, _BELIEVED))

    def _growing(self, error: KontextError) -> float:
        maintenance = isinstance(error, MaintenanceError)
        first = _FIRST_MAINTENANCE_PAUSE if maintenance else _FIRST_PAUSE
        return min(first * float(1 << min(self._streak - 1, 10)), _LONGEST_PAUSE)

    def lost(self, *, sent: float) -> None:
        """A request sent at ``sent`` was cancelled: if it was the probe, the next may go."""
        self._probing = self._probing and not self.is_probe(sent)

    def lift(self, *, sent: float) -> None:
        """A request sent at ``sent`` was answered well."""
        if sent >= self._until:
            self.error, self._probing, self._streak = None, False, 0


class RequestBudget:
    """Slots, rate limit and pauses of one client, and the queue of those who want a turn.

    Looks at tasks already seen go before first looks, and among them those with the earlier
    deadline: a batch larger than the quota then admits tasks as fast as it can look after them.
    Without a quota they may be a little late instead. First looks are first come, first served.
    """

    def __init__(self, *, max_concurrency: int, rate_limit: RateLimit | None) -> None:
        self._slots = max_concurrency
        self._limit: Limit = DiscoveredLimit() if rate_limit is None else SlidingWindow(rate_limit)
        self._pause = _Pause()
        self._seen: list[_Entry] = []  # a heap, by the time wanted
        self._due: list[_Entry] = []  # those whose time has come: a heap, by deadline
        self._first: deque[_Turn] = deque()
        self._waiting = 0  # in the three, those that are not cancelled
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._failing: set[str | None] = set()  # tasks that failed since the last good answer
        self._in_flight = 0
        self._requests = 0
        self._errors: Counter[str] = Counter()
        self.round_trip = 0.0  # seconds, smoothed as TCP does (RFC 6298); 0 before the first
        self._lateness = 0.0  # seconds by which turns for known tasks came late, at worst, of late

    def try_acquire(self, now: float, *, seen: bool) -> bool:
        """Take a turn at once, if one is to be had."""
        if self._is_queued(now, seen=seen) or self._opens_at(now) > now:
            return False
        self._take(now)
        return True

    @property
    def acquire_delay(self) -> float:
        """Seconds by which a turn for a known task may well come later than it is wanted."""
        return self._lateness + self._limit.stall()

    async def acquire(self, at: float, *, seen: bool, until: float = math.inf) -> float:
        """Wait until ``at`` and then for a turn; return when it came, for `release`.

        ``until`` is the deadline of the one who asks: it decides who goes first.
        """
        loop = asyncio.get_running_loop()
        turn: _Turn = loop.create_future()
        if seen:
            latest = min(until, at + _PATIENCE)
            heapq.heappush(self._seen, (at, next(self._order), latest, turn))
        else:
            self._first.append(turn)
        self._waiting += 1
        self._dispatch(loop, loop.time())
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._leave()
            else:
                self.cancel(turn.result())
            raise

    def release(
        self, sent: float, error: KontextError | None = None, *, cancelled: bool = False
    ) -> None:
        """Give back the turn that came at ``sent``, with what the look at the task led to."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._in_flight -= 1
        refused = error is not None and isinstance(error, RateLimitedError)
        lost = cancelled or (error is not None and isinstance(error, TransportError))
        self._limit.ended(now, sent=sent, answered=not (lost or refused), refused=refused)
        if not lost:
            self._smooth(now - sent)
        if cancelled:
            self._pause.lost(sent=sent)
        elif error is None:
            self._note_good(sent)
        else:
            self._errors[type(error).__name__] += 1
            self._note_bad(error, now=now, sent=sent)
        if self._waiting:
            self._dispatch(loop, now)

    def cancel(self, sent: float) -> None:
        """Give back the turn that came at ``sent``, as no request was made in it."""
        loop = asyncio.get_running_loop()
        self._in_flight -= 1
        self._requests -= 1
        self._limit.unsent()
        self._pause.lost(sent=sent)
        self._dispatch(loop, loop.time())

    def blocked_by(self, task_id: str, now: float) -> KontextError | None:
        """Why no request may go now: the pause's error, or `RateLimitedError` for a full quota."""
        error = self._pause.error
        if isinstance(error, ApiError):
            remaining = self._pause.remaining(now)
            return error.for_task(task_id, retry_after=remaining, http_status=None)
        if error is not None:
            return error.for_task(task_id)
        opens_at = self._limit.opens_at(now)
        if opens_at <= now:
            return None
        return RateLimitedError(
            "this client's rate limit is used up",
            code=429,
            retry_after=opens_at - now if opens_at < math.inf else None,
            task_id=task_id,
        )

    def opens_in(self, now: float) -> float:
        """Seconds until the pause or the rate limit lets a request go; 0 where that is unknown."""
        opens_at = max(self._pause.opens_at(now), self._limit.opens_at(now))
        return opens_at - now if opens_at < math.inf else 0.0

    def pause_remaining(self, now: float) -> float:
        return self._pause.remaining(now)

    def pause_spent(self, now: float) -> float:
        """Seconds this client has spent in pauses, all told."""
        return self._pause.spent(now)

    def stats(self, *, waits: int, now: float) -> ClientStats:
        return ClientStats(
            requests=self._requests,
            errors=MappingProxyType(dict(self._errors)),
            rate_limited=self._errors[RateLimitedError.__name__],
            rate=self._limit.rate(),
            pause=self._pause.remaining(now),
            waits=waits,
            in_flight=self._in_flight,
        )

    def _note_good(self, sent: float) -> None:
        self._failing.clear()
        self._pause.lift(sent=sent)

    def _note_bad(self, error: KontextError, *, now: float, sent: float) -> None:
        if error.handling is Handling.BACK_OFF:
            self._pause.hold(error, now=now, sent=sent)
        elif isinstance(error, (ServerError, TransportError, ResponseFormatError)):
            if not isinstance(error, ResponseFormatError):  # neither an outage nor a good answer
                self._failing.add(error.task_id)
            if len(self._failing) >= _OUTAGE or self._pause.probes_outage(sent):
                self._pause.hold(error, now=now, sent=sent)
            else:  # that task's own trouble, and nobody asks for time any more
                self._pause.lift(sent=sent)
        else:
            self._note_good(sent)

    def _smooth(self, round_trip: float) -> None:
        if self.round_trip:
            self.round_trip += (round_trip - self.round_trip) / 8
        else:
            self.round_trip = round_trip

    def _opens_at(self, now: float) -> float:
        if self._in_flight >= self._slots:
            return math.inf
        if self._pause.error is None:
            return self._limit.opens_at(now)
        return max(self._pause.opens_at(now), self._limit.opens_at(now))

    def _take(self, now: float) -> None:
        self._lateness *= _DELAY_FORGOTTEN
        self._in_flight += 1
        self._requests += 1
        self._pause.sent()
        self._limit.sent(now)

    def _is_queued(self, now: float, *, seen: bool) -> bool:
        """Whether somebody else's turn comes before that of one who asks now."""
        self._drop_cancelled()
        if self._due or (self._seen and self._seen[0][0] <= now):
            return True
        return bool(self._first) and not seen

    def _drop_cancelled(self) -> None:
        for heap in (self._seen, self._due):
            while heap and heap[0][3].done():
                heapq.heappop(heap)
        while self._first and self._first[0].done():
            self._first.popleft()

    def _dispatch(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        """Hand out the turns that are due, and wake again when the next one may be."""
        self._note_due(now)
        while True:
            self._drop_cancelled()
            if not (self._due or self._first):
                wake_at = self._seen[0][0] if self._seen else math.inf
                break
            wake_at = self._opens_at(now)
            if wake_at > now:
                break
            self._take(now)
            self._waiting -= 1
            self._next(now).set_result(now)
        self._wake_at(loop, wake_at)

    def _next(self, now: float) -> _Turn:
        """Whose turn it is; another task's each time a pause is probed.

        One that fails whenever it is looked at would else hold up all others.
        """
        is_probe = self._pause.error is not None
        if self._first and (is_probe or not self._due or self._can_wait(now)):
            return self._first.popleft()
        if is_probe:
            entries = enumerate(self._due)
            _, longest = min((wanted, i) for i, (_, _, wanted, t) in entries if not t.done())
            _, _, wanted_at, turn = self._due.pop(longest)
            heapq.heapify(self._due)
        else:
            _, _, wanted_at, turn = heapq.heappop(self._due)
        self._lateness = max(self._lateness, now - wanted_at)
        return turn

    def _can_wait(self, now: float) -> bool:
        """Whether the first of those whose time has come may be later still."""
        latest, _, wanted_at, _ = self._due[0]
        spare = latest - wanted_at - _IN_A_HURRY
        return now - wanted_at < _LENIENCE * spare and self._limit.rate() is None

    def _note_due(self, now: float) -> None:
        for _ in range(_PIECE):
            if not self._seen or self._seen[0][0] > now:
                return
            wanted_at, order, latest, turn = heapq.heappop(self._seen)
            heapq.heappush(self._due, (latest, order, wanted_at, turn))

    def _wake_at(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        if when == math.inf or (self._timer is not None and self._timer.when() <= when):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(when, self._wake, loop, when)

    def _wake(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        self._timer = None
        # The loop may call a clock tick early.
        self._dispatch(loop, max(when, loop.time()))

    def _leave(self) -> None:
        """One that waited was cancelled. Its entry is dropped later, together with others."""
        self._waiting -= 1
        kept = len(self._seen) + len(self._due) + len(self._first)
        if not self._waiting:
            self._clear()
        elif kept > 2 * self._waiting + 1000:
            for heap in (self._seen, self._due):
                heap[:] = [entry for entry in heap if not entry[3].done()]
                heapq.heapify(heap)
            self._first = deque(turn for turn in self._first if not turn.done())

    def _clear(self) -> None:
        self._seen.clear()
        self._due.clear()
        self._first.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
