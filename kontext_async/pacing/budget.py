"""The request budget of one client: who may send a request, and when.

Waits also sleep in its queue: they ask for a permit with the earliest time they want it. So a
hundred thousand waits need one timer of the event loop, not a hundred thousand.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import attrs

from kontext_async.errors import KontextError, RateLimitedError, TransportError
from kontext_async.pacing.due import Due, DueQueue
from kontext_async.pacing.limits import DiscoveredLimit, Limit, RateLimit, Reply, SlidingWindow
from kontext_async.pacing.overload import Overload
from kontext_async.pacing.pauses import Pause
from kontext_async.pacing.trouble import TroubleLog

__all__ = ["ClientStats", "PlannedPoll", "RequestBudget"]

_Permit = asyncio.Future[float]  # done when the permit is acquired; its result is that time

# Seconds after the time a permit is wanted; a later deadline, or none, counts as this.
_DEADLINE_HORIZON = 600.0

# The share of a known task's time until its deadline, beyond the last minute, by which first polls
# may delay its poll: 13.5 s of 600. tests/benchmarks/scale.py: with it each of 100,000 tasks was
# polled once within 19 s, without it within 41 s.
_DELAY_SHARE = 1 / 40
_URGENT_WITHIN = 60.0  # s

# In an outage, tasks whose last poll failed leave the probe to others that poll within this time:
# they may be broken, and would then keep the outage alive.
_PROBE_WAIT = 60.0  # s
_PROBE_STRIDE = 0.382  # of the queue of first polls, between two probes: spreads them evenly

_MAX_MOVED = 1000  # entries that one dispatch sorts by deadline, so that it ends soon
_MAX_REPLANNED = 300  # entries that one dispatch plans again
_REPLAN_SAMPLE = 10  # entries, of which one must have moved before all are planned again
_REPLAN_PAUSE = 1e-4  # s for each entry, from one planning of all of them to the next
_MIN_POSTPONED = 0.2  # s by which a poll that is due must have been planned later, to be put back
_MAX_STALE = 1000  # entries of cancelled waiters that are kept, beyond one for each waiter
_DELAY_DECAY = 0.99  # for each permit acquired, of the longest delay of a permit


class PlannedPoll(Protocol):
    """A poll that may be planned again while its wait sleeps in the queue."""

    def planned_at(self) -> float:
        """Return the time at which to poll, as it is planned now."""
        ...


class _Waiting(NamedTuple):
    """A waiter for a poll of a known task, ordered by the time it wants the permit."""

    wanted_at: float
    order: int
    deadline: float
    permit: _Permit
    failing: int
    plan: PlannedPoll | None


def _has_moved(waiting: _Waiting) -> bool:
    plan = None if waiting.permit.done() else waiting.plan
    return plan is not None and plan.planned_at() != waiting.wanted_at


@attrs.frozen(kw_only=True)
class ClientStats:
    """Counts of a client's requests so far, and its present state.

    ``errors`` counts the polls that failed, by the class name of the error; ``rate_limited`` of
    them were answered 429. ``rate`` is the present rate limit in requests per second, None while
    none is known. ``pause`` is the seconds left of the pause of the whole client. ``waits`` are
    under way, and ``in_flight`` of the requests they sent are unanswered.
    """

    requests: int
    errors: Mapping[str, int]
    rate_limited: int
    rate: float | None
    pause: float
    waits: int
    in_flight: int


class RequestBudget:
    """Concurrency, rate limit and pause of one client, and the queue for its permits.

    A permit is acquired to send one request. It is released when the request has ended, or
    cancelled if the request was never sent.

    Polls of known tasks go before first polls, and among them those with the earlier deadline. So
    a batch larger than the rate limit admits tasks as fast as it can poll them. Where no rate
    limit is known, first polls may delay them a little. First polls are first come, first served.
    """

    def __init__(
        self, *, max_concurrency: int, rate_limit: RateLimit | SlidingWindow | None
    ) -> None:
        self._max_concurrency = max_concurrency
        if isinstance(rate_limit, RateLimit):
            rate_limit = SlidingWindow(rate_limit)
        self._limit: Limit = DiscoveredLimit() if rate_limit is None else rate_limit
        self._pause = Pause()
        self._overload = Overload()
        self._trouble = TroubleLog(self._pause)
        # The queue; entries whose permit is done are dropped when they come to the front.
        self._waiting: list[_Waiting] = []  # a heap
        self._to_replan: list[_Waiting] = []  # a heap of those to be planned again
        self._revision = 0
        self._replan_from = 0.0  # the earliest time at which to plan all of them again
        self._failing: list[_Waiting] = []  # a heap of those whose last poll failed
        self._due = DueQueue()
        self._first: deque[_Permit] = deque()  # of first polls
        self._waiters = 0
        self._order = itertools.count()
        self._timer: asyncio.Handle | None = None
        self._wakes_at = math.inf  # not all loops have timers that know it
        self._in_flight = 0
        self._requests = 0
        self._errors: Counter[str] = Counter()
        self.round_trip = 0.0  # seconds, smoothed as TCP does (RFC 6298); 0 before the first
        self._longest_delay = 0.0  # seconds, decaying

    def try_acquire(self, now: float, *, seen: bool, failing: int = 0) -> bool:
        """Acquire a permit and return True if one is free now."""
        if failing and self.has_outage:
            return False
        if self._must_queue(now, seen=seen) or self._opens_at(now) > now:
            return False
        self._issue(now)
        return True

    @property
    def acquire_delay(self) -> float:
        """Seconds by which a permit for a known task may come later than it is wanted."""
        return self._longest_delay + self._limit.max_delay()

    async def acquire(
        self,
        at: float,
        *,
        seen: bool,
        deadline: float = math.inf,
        failing: int = 0,
        plan: PlannedPoll | None = None,
    ) -> float:
        """Wait until ``at`` and then for a permit; return when it was acquired, for `release`.

        ``deadline`` of the wait that asks decides its priority. ``failing``: 0 if the task's last
        poll was answered, 1 if it failed, 2 if none ever was; they probe an outage in this order.
        ``plan`` may move ``at`` meanwhile.
        """
        permit = self.enqueue(at, seen=seen, deadline=deadline, failing=failing, plan=plan)
        try:
            return await permit
        except asyncio.CancelledError:
            self.leave(permit)
            raise

    def enqueue(
        self,
        at: float,
        *,
        seen: bool,
        deadline: float = math.inf,
        failing: int = 0,
        plan: PlannedPoll | None = None,
    ) -> asyncio.Future[float]:
        """Return the permit to await, as in `acquire`; whoever no longer wants it calls `leave`."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        permit: _Permit = loop.create_future()
        self._waiters += 1
        order, deadline = next(self._order), min(deadline, at + _DEADLINE_HORIZON)
        if seen and at > now:
            heap = self._failing if failing else self._waiting
            heapq.heappush(heap, _Waiting(at, order, deadline, permit, failing, plan))
            self._wake_at(loop, at)
            return permit
        if seen:
            self._due.push(Due(deadline, order, at, permit, failing))
        else:
            self._first.append(permit)
        self._dispatch(loop, now)
        return permit

    @property
    def has_planned_polls(self) -> bool:
        """True if polls sleep in the queue that `replan` may move."""
        return bool(self._waiting)

    def replan(self, revision: int) -> None:
        """Plan the polls of the queue again, a few at a time, if the revision is a new one.

        A sample of them is planned first; if none of it moves, the others stay as they are.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        if revision == self._revision or self._to_replan or now < self._replan_from:
            return
        self._revision = revision
        count = len(self._waiting)
        stride = max(1, count // _REPLAN_SAMPLE)
        if any(map(_has_moved, self._waiting[revision % stride :: stride])):
            self._replan_from = now + _REPLAN_PAUSE * count
            self._to_replan, self._waiting = self._waiting, []
            self._dispatch(loop, now)

    def leave(self, permit: asyncio.Future[float]) -> None:
        """Leave the queue, or give the permit back if it was acquired meanwhile."""
        if permit.cancelled() or permit.exception() is not None:
            self._abandon()
        else:
            self.cancel(permit.result())

    def release(
        self,
        sent: float,
        error: KontextError | None = None,
        *,
        first: bool = False,
        failing: bool = False,
        cancelled: bool = False,
    ) -> None:
        """Release the permit acquired at ``sent``, as its request has ended.

        ``error`` is the error it ended with, None for a good answer. ``first``: it was the task's
        first poll; ``failing``: the one before it failed too. ``cancelled`` means that nobody
        waited for the answer.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._in_flight -= 1
        is_refused = False
        if not cancelled:
            was_believed = self._overload.is_believed
            is_refused = self._overload.observe(error, now=now, failing=failing)
            if was_believed and not self._overload.is_believed:
                self._limit = self._limit.forgotten()  # it was found from broken tasks
        reply: Reply = "lost" if cancelled else "answered"
        if error is not None:
            self._errors[type(error).__name__] += 1
            is_lost = isinstance(error, TransportError)
            reply = "lost" if is_lost else "refused" if is_refused else "failed"
        self._limit.release(now, sent=sent, reply=reply)
        if reply != "lost":
            self._smooth(now - sent)
        if cancelled:
            self._pause.probe_lost(sent=sent)
        else:
            self._pause.observe(
                error, now=now, sent=sent, first=first, failing=failing, refused=is_refused
            )
            self._trouble.observe(error, now)
        if self._waiters:
            self._dispatch(loop, now)

    def cancel(self, sent: float) -> None:
        """Give back the permit acquired at ``sent``, as its request was never sent."""
        loop = asyncio.get_running_loop()
        self._in_flight -= 1
        self._requests -= 1
        self._limit.cancel()
        self._pause.probe_lost(sent=sent)
        self._dispatch(loop, loop.time())

    def pause_for(self, error: KontextError) -> None:
        """Pause as for this error of a request that had no permit of this budget."""
        now = asyncio.get_running_loop().time()
        self._pause.observe(error, now=now, sent=now)
        self._trouble.observe(error, now)

    def blocked_by(self, task_id: str, now: float) -> KontextError | None:
        """Return the error that keeps a request of this task back, None if nothing does.

        That is the pause's error, or `RateLimitedError` where the rate limit is used up.
        """
        error = self._pause.blocked_by(task_id, now)
        opens_at = self._limit.opens_at(now)
        if error is not None or opens_at <= now:
            return error
        return RateLimitedError(
            "this client's rate limit is used up",
            code=429,
            retry_after=opens_at - now if opens_at < math.inf else None,
            task_id=task_id,
        )

    def opens_in(self, now: float) -> float:
        """Return the seconds until the pause and the rate limit allow a request; 0 if unknown."""
        opens_at = max(self._pause.opens_at(now), self._limit.opens_at(now))
        return opens_at - now if opens_at < math.inf else 0.0

    def pause_remaining(self, now: float) -> float:
        return self._pause.remaining(now)

    def pause_spent(self, now: float) -> float:
        """Return the seconds spent up to now in pauses that the service asked for."""
        return self._pause.spent(now)

    @property
    def has_outage(self) -> bool:
        """True while the client pauses because the polls of several tasks failed."""
        return self._pause.state.is_outage

    def stats(self, *, waits: int, now: float) -> ClientStats:
        return ClientStats(
            requests=self._requests,
            errors=dict(self._errors),
            rate_limited=self._errors[RateLimitedError.__name__],
            rate=self._limit.rate(),
            pause=self._pause.remaining(now),
            waits=waits,
            in_flight=self._in_flight,
        )

    def _smooth(self, round_trip: float) -> None:
        if self.round_trip:
            self.round_trip += (round_trip - self.round_trip) / 8
        else:
            self.round_trip = round_trip

    def _opens_at(self, now: float) -> float:
        if self._in_flight >= self._max_concurrency:
            return math.inf
        if self._pause.state.is_open:
            return self._limit.opens_at(now)
        return max(self._pause.opens_at(now), self._limit.opens_at(now))

    def _issue(self, now: float) -> None:
        """Account for a permit that is acquired now."""
        self._longest_delay *= _DELAY_DECAY
        self._in_flight += 1
        self._requests += 1
        self._pause.acquire(now)
        self._limit.acquire(now)

    def _must_queue(self, now: float, *, seen: bool) -> bool:
        """Return True if a waiter in the queue goes before one that asks now."""
        if not self._waiters:
            return False
        return bool(self._due) or self._wanted_at() <= now or (not seen and self._has_first())

    def _has_first(self) -> bool:
        """Return True if a first poll waits; drop entries that are done from the front."""
        while self._first and self._first[0].done():
            self._first.popleft()
        return bool(self._first)

    def _wanted_at(self) -> float:
        """Return when the next waiter will want a permit; infinity if there is none."""
        return min(self._healthy_wanted_at(), self._first_wanted(self._failing))

    def _healthy_wanted_at(self) -> float:
        return min(self._first_wanted(self._waiting), self._first_wanted(self._to_replan))

    def _first_wanted(self, heap: list[_Waiting]) -> float:
        while heap and heap[0].permit.done():
            heapq.heappop(heap)
        return heap[0].wanted_at if heap else math.inf

    def _dispatch(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        """Issue the permits that are free, and set the timer for the next one."""
        self._replan_some()
        self._move_due(now)
        while (due := self._due.first()) is not None or self._has_first():
            wake_at = self._opens_at(now)
            if wake_at <= now:
                wake_at = self._probes_at(now)
            if wake_at > now:
                break
            self._issue(now)
            self._waiters -= 1
            self._next(due, now).set_result(now)
        else:
            wake_at = self._wanted_at()
        self._wake_at(loop, now if self._to_replan else wake_at)

    def _probes_at(self, now: float) -> float:
        """Return when one of the waiters that are due may probe an outage."""
        if not self.has_outage or self._has_first():
            return now
        if self._due.has_healthy():
            return now
        healthy = self._healthy_wanted_at()
        return healthy if healthy <= now + _PROBE_WAIT else now

    def _next(self, due: Due | None, now: float) -> _Permit:
        """Choose who gets the permit that was just issued; ``due`` is the first that is due.

        Each probe of a pause goes to another task. Otherwise one task that always fails could
        probe every time, and keep all others waiting.
        """
        is_probe = not self._pause.state.is_open
        if self._has_first() and (is_probe or due is None or self._may_delay(due, now)):
            if self.has_outage:  # the next in line may all be broken
                self._first.rotate(-int(_PROBE_STRIDE * len(self._first)))
                self._has_first()  # drops entries that are done, now at the front
            return self._first.popleft()
        assert due is not None, "a permit is issued to a waiter"
        if is_probe:
            due = self._due.prober()
        else:
            self._due.remove_first(due)
        self._longest_delay = max(self._longest_delay, now - due.wanted_at)
        return due.permit

    def _may_delay(self, due: Due, now: float) -> bool:
        """Return True if a first poll may go before the known task that is next."""
        spare = due.deadline - due.wanted_at - _URGENT_WITHIN
        return now - due.wanted_at < _DELAY_SHARE * spare and self._limit.rate() is None

    def _replan_some(self) -> None:
        for _ in range(min(_MAX_REPLANNED, len(self._to_replan))):
            waiting = self._to_replan.pop()  # the last, which leaves a heap
            if not waiting.permit.done():
                at = waiting.wanted_at if waiting.plan is None else waiting.plan.planned_at()
                heapq.heappush(self._waiting, waiting._replace(wanted_at=at))

    def _move_due(self, now: float) -> None:
        for heap in (self._waiting, self._to_replan, self._failing):
            for _ in range(_MAX_MOVED):
                if not heap or heap[0].wanted_at > now:
                    break
                self._move(heapq.heappop(heap), now)

    def _move(self, waiting: _Waiting, now: float) -> None:
        """Put a waiter among the due ones, unless its poll is planned for later now."""
        if waiting.plan is not None and not waiting.permit.done():
            at = waiting.plan.planned_at()
            if at > now + _MIN_POSTPONED:
                heapq.heappush(self._waiting, waiting._replace(wanted_at=at))
                return
        wanted_at, order, deadline, permit, failing, _ = waiting
        self._due.push(Due(deadline, order, wanted_at, permit, failing))

    def _wake_at(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        if when == math.inf or self._wakes_at <= when:
            return
        self._cancel_timer()
        self._wakes_at = when
        self._timer = loop.call_at(when, self._wake, loop, when)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._wakes_at = math.inf

    def _wake(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        self._cancel_timer()
        # The loop may call a clock tick early.
        self._dispatch(loop, max(when, loop.time()))

    def _abandon(self) -> None:
        """Count a waiter out that was cancelled; its entry is dropped later, with others."""
        self._waiters -= 1
        planned = len(self._waiting) + len(self._to_replan) + len(self._failing)
        kept = planned + self._due.entries + len(self._first)
        if not self._waiters:
            self._clear()
        elif kept > 2 * self._waiters + _MAX_STALE:
            self._waiting = [waiting for waiting in self._waiting if not waiting.permit.done()]
            self._to_replan = [entry for entry in self._to_replan if not entry.permit.done()]
            self._failing = [waiting for waiting in self._failing if not waiting.permit.done()]
            self._due.drop_done()
            self._first = deque(permit for permit in self._first if not permit.done())
            heapq.heapify(self._waiting)
            heapq.heapify(self._to_replan)
            heapq.heapify(self._failing)

    def _clear(self) -> None:
        self._waiting.clear()
        self._to_replan.clear()
        self._failing.clear()
        self._due.clear()
        self._first.clear()
        self._cancel_timer()
