"""A single wait: poll, classify the answer, sleep, repeat.

A short driver over tenacity's wait strategies. `AsyncRetrying` would do the same at 1.8 times
the cost of the request itself: it builds closures and a future for every attempt.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import attrs
from tenacity.wait import wait_base

from kontext_async.errors import (
    ClientStateError,
    ConfigurationError,
    GenerationFailedError,
    Handling,
    KontextError,
    ResponseFormatError,
    WaitTimeoutError,
)
from kontext_async.models import CompletedTask, TaskRecord
from kontext_async.notices import Noticeboard
from kontext_async.outcomes import ErrorOutcome, ResultOutcome, TaskOutcome
from kontext_async.schedule import DurationModel, PollState, wait_learned

__all__ = [
    "DEFAULT_ERROR_GRACE",
    "DEFAULT_NOT_FOUND_GRACE",
    "DEFAULT_TIMEOUT",
    "PollEvent",
    "Poller",
    "RequestPacing",
    "TaskWait",
    "WaitPolicy",
    "check_count",
    "check_plain_function",
    "check_seconds",
]

# The service gives up on a task after 10 minutes.
DEFAULT_TIMEOUT: Final = 600.0
DEFAULT_ERROR_GRACE: Final = 300.0
DEFAULT_NOT_FOUND_GRACE: Final = 10.0

# The last poll precedes the deadline by two round trips, and by this many seconds at least.
_MIN_LEAD = 0.05
# Seconds from one poll to the next after a notice, if the task still generates.
_FOLLOW_UPS = (1.0, 3.0)
_ROUNDING = 1e-6  # s; rounding may leave this much of a grace that is over


@attrs.frozen(kw_only=True)
class PollEvent:
    """One poll of a wait, as passed to ``on_event``.

    ``attempt`` counts from 1; ``elapsed`` is in seconds since the wait began. One of ``record``
    and ``error`` is None. ``next_delay`` is the planned delay until the next poll in seconds,
    None if this was the last.
    """

    task_id: str
    attempt: int
    elapsed: float
    record: TaskRecord | None
    error: KontextError | None
    next_delay: float | None


def check_seconds(name: str, value: object) -> None:
    """Raise `ConfigurationError` unless the value is None or a number of seconds, 0 or more."""
    if value is None or (type(value) is float and 0 <= value < math.inf):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigurationError(f"{name} must be a number of seconds or None, not {value!r}")
    if not 0 <= value < math.inf:
        raise ConfigurationError(
            f"{name} must be 0 or more seconds, or None for no limit, not {value!r}"
        )


def check_count(name: str, value: object, *, at_least: int = 1) -> None:
    """Raise `ConfigurationError` unless the value is an int that is not too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigurationError(f"{name} must be an int of {at_least} or more, not {value!r}")


def _seconds(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    check_seconds(attribute.name, value)


def check_plain_function(name: str, value: object) -> None:
    """Raise `ConfigurationError` unless the value is None or can be called without `await`."""
    if value is None:
        return
    if not callable(value):
        raise ConfigurationError(f"{name} must be callable, not {value!r}")
    if _is_async(value):
        raise ConfigurationError(
            f"{name} must be a plain function: an `async def` would never be awaited"
        )


def _plain_callable(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, wait_base):
        check_plain_function(attribute.name, value)


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    call = type(function).__call__
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


@attrs.frozen(kw_only=True)
class WaitPolicy:
    """The checked keywords of a wait; `KontextClient.wait_for_result` explains each."""

    timeout: float | None = attrs.field(validator=_seconds)
    wait: Callable[[PollState], float] = attrs.field(validator=_plain_callable)
    error_grace: float | None = attrs.field(validator=_seconds)
    not_found_grace: float | None = attrs.field(validator=_seconds)
    on_event: Callable[[PollEvent], object] | None = attrs.field(validator=_plain_callable)

    def delay(self, state: PollState) -> float:
        """Return the strategy's delay in seconds; raise `ConfigurationError` if it is not one."""
        delay: object = self.wait(state)
        if isinstance(delay, (int, float)) and 0 <= delay < math.inf:
            return delay
        raise ConfigurationError(
            f"the wait strategy returned {delay!r}, not a delay of 0 or more seconds"
        )


class RequestPacing(Protocol):
    """The view that a wait has of its client's request budget. Times are in seconds."""

    @property
    def round_trip(self) -> float: ...
    @property
    def acquire_delay(self) -> float: ...
    @property
    def has_outage(self) -> bool: ...
    @property
    def has_planned_polls(self) -> bool: ...
    def blocked_by(self, task_id: str, now: float) -> KontextError | None: ...
    def pause_remaining(self, now: float) -> float: ...
    def pause_spent(self, now: float) -> float: ...
    def replan(self, revision: int) -> None: ...


class Poller(Protocol):
    """Acquires permits and polls. Both methods return None when ``until`` comes first."""

    @property
    def budget(self) -> RequestPacing: ...
    @property
    def durations(self) -> DurationModel: ...
    @property
    def notices(self) -> Noticeboard: ...
    @property
    def request_timeout(self) -> float: ...
    async def acquire(
        self,
        at: float,
        *,
        until: float,
        seen: bool,
        failing: int,
        deadline: float,
        plan: TaskWait | None,
    ) -> float | None: ...
    async def poll(
        self, task_id: str, sent: float, *, until: float, first: bool, failing: bool
    ) -> tuple[TaskRecord, float | None] | None: ...


class TaskWait:
    """One wait for one task, to be run once.

    The policy's timeout counts from the creation of this object, or from the first poll if
    ``timeout_from_first_poll``. The wait ends at ``latest``, on the loop's clock, in any case.
    """

    __slots__ = (
        "_began",
        "_born",
        "_cancelling",
        "_deadline",
        "_expected_age",
        "_failing_since",
        "_failures",
        "_follow_ups",
        "_had_early_poll",
        "_idle_for",
        "_is_asleep",
        "_is_woken",
        "_last_delay",
        "_last_error",
        "_last_record",
        "_latest",
        "_loop",
        "_missing_since",
        "_next_poll_at",
        "_policy",
        "_polled_at",
        "_poller",
        "_polls",
        "_task",
        "_task_id",
        "_timeout_from_first_poll",
    )

    def __init__(
        self,
        task_id: str,
        policy: WaitPolicy,
        poller: Poller,
        *,
        timeout_from_first_poll: bool = False,
        latest: float = math.inf,
    ) -> None:
        self._task_id = task_id
        self._policy = policy
        self._poller = poller
        self._timeout_from_first_poll = timeout_from_first_poll
        self._latest = latest
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._deadline = latest if timeout_from_first_poll else self._own_deadline()
        self._next_poll_at = self._began  # infinity where no poll is planned
        self._polls = 0
        self._failures = 0  # polls in a row
        self._had_early_poll = False  # the first of the two last polls, see `_plan_next`
        self._missing_since: float | None = None  # these two on a clock that stops in pauses
        self._failing_since: float | None = None
        self._born: float | None = None  # the task's creation on the loop's clock
        self._last_record: TaskRecord | None = None
        self._last_error: KontextError | None = None
        self._polled_at = self._began  # the time of the last answer, for the strategy
        self._last_delay = 0.0
        self._idle_for = 0.0
        self._expected_age: float | None = None  # of the next poll by the model, if it may move
        self._follow_ups: Iterator[float] | None = None  # s, delays after a notice
        self._is_asleep = False
        self._is_woken = False  # by a notice

    async def run(self) -> TaskOutcome:
        """Wait, and return the completed task or the error that ended it.

        Raises what the caller's callbacks raise, `ConfigurationError` for a strategy that returns
        something other than a delay, and `ClientStateError`.
        """
        task = asyncio.current_task()
        assert task is not None, "coroutines run in tasks"
        self._task, self._cancelling = task, task.cancelling()
        self._poller.notices.watch(self._task_id, self.notice, self._began)
        try:
            outcome = None
            while outcome is None:
                self._is_asleep = True
                try:
                    sent = await self._poller.acquire(
                        self._next_poll_at,
                        until=self._give_up_at(),
                        seen=self._polls > 0,
                        failing=self._failing,
                        deadline=self._deadline,
                        plan=None if self._expected_age is None else self,
                    )
                except asyncio.CancelledError:
                    if not self._was_woken():
                        raise
                    continue
                finally:
                    self._is_asleep = False
                outcome = self._blocked() if sent is None else await self._poll(sent)
            return outcome
        finally:
            self._poller.notices.unwatch(self._task_id, self.notice)
            self._poller.durations.forget(self._task_id)

    @property
    def _failing(self) -> int:
        """0 if the last poll was answered, 1 if it failed, 2 if none was ever answered."""
        if not self._failures:
            return 0
        return 2 if self._last_record is None else 1

    async def _poll(self, sent: float) -> TaskOutcome | None:
        """Poll once, with the permit acquired at ``sent``; return the outcome if that ends it."""
        if self._timeout_from_first_poll and not self._polls:
            if not self._poller.budget.has_outage:  # time queued for the quota does not count
                self._began = sent
            self._deadline = self._own_deadline()
        self._polls += 1
        self._next_poll_at = math.inf
        try:
            answer = await self._poller.poll(
                self._task_id,
                sent,
                until=self._deadline,
                first=self._polls == 1,
                failing=self._failures > 0,
            )
        except ClientStateError:
            raise
        except KontextError as error:
            outcome = self._on_error(error)
        else:
            outcome = self._timed_out() if answer is None else self._on_record(*answer)
        if outcome is None and self._policy.timeout == 0:
            return self._timed_out()
        return outcome

    def notice(self) -> None:
        """Poll now, because the task is said to have ended; only the first notice counts.

        If it has not, two more polls follow soon, and then the schedule goes on.
        """
        if self._follow_ups is not None:
            return
        now = self._loop.time()
        if self._is_asleep and self._polls and self._next_poll_at > now:
            self._follow_ups = iter(_FOLLOW_UPS)
            self._next_poll_at = now
            self._is_woken = True
            self._task.cancel()
        else:  # a poll is wanted already, or one is under way that may have been too early
            is_polling = self._polls > 0 and not self._is_asleep
            self._follow_ups = iter((0.0, *_FOLLOW_UPS) if is_polling else _FOLLOW_UPS)

    def _was_woken(self) -> bool:
        """Return True if the sleep was cut short by a notice, and by nothing else."""
        was_woken, self._is_woken = self._is_woken, False
        return was_woken and self._task.uncancel() <= self._cancelling

    def _give_up_at(self) -> float:
        """Return when to stop waiting for a permit, and see whether the wait is over."""
        now = self._loop.time()
        if self._polls:  # the last poll may be planned for the end of the grace
            return min(self._deadline, now + self._unpolled_grace_left(now) + _MIN_LEAD)
        if not self._timeout_from_first_poll or self._policy.timeout is None:
            return self._deadline
        timeout = self._policy.timeout or self._poller.request_timeout
        return min(self._deadline, max(self._began, now) + timeout)

    def _blocked(self) -> TaskOutcome | None:
        """Return the outcome if the wait is over before a permit was acquired.

        An outage does not extend the grace of a task that fails, nor the timeout of one that was
        never polled. The queue for the rate limit extends the latter.
        """
        now = self._loop.time()
        if now >= self._deadline or (not self._polls and self._poller.budget.has_outage):
            return self._timed_out()
        if self._last_error is not None and self._unpolled_grace_left(now) < _ROUNDING:
            return self._ended_by(self._last_error)
        return None

    def _unpolled_grace_left(self, now: float) -> float:
        """Return the seconds until a grace ends the wait without another poll; infinity if none.

        An outage or a queue that holds back the next poll does not show that a task is missing.
        """
        last = self._last_error
        if not self._failures or last is None or last.handling is Handling.RETRY_NOT_FOUND:
            return math.inf
        return self._grace_left(last.handling, now)

    def _own_deadline(self) -> float:
        timeout = self._policy.timeout
        if timeout is None:
            return self._latest
        return min(self._began + (timeout or self._poller.request_timeout), self._latest)

    def _on_record(self, record: TaskRecord, age: float | None) -> TaskOutcome | None:
        now = self._loop.time()
        self._last_record = record
        if self._born is None and age is not None:
            self._born = now - age
        if record.status.phase == "ready" and record.result_image_url is None:
            return self._on_error(
                ResponseFormatError(
                    "data.response.resultImageUrl: missing in a record of success",
                    task_id=self._task_id,
                )
            )
        self._failures = 0
        self._missing_since = self._failing_since = None
        if record.status.phase == "generating":
            self._poller.durations.observe(self._task_id, self._age(now))
            self._plan_next(now, record=record)
            return None
        if record.duration is not None:
            duration = record.duration.total_seconds()
            durations, budget = self._poller.durations, self._poller.budget
            durations.observe(self._task_id, self._age(now), duration)
            if budget.has_planned_polls:  # the model plans again when it is asked, at 0.3 ms
                budget.replan(durations.revision)
        self._emit(now, record=record)
        if record.status.phase == "ready":
            return ResultOutcome(task_id=self._task_id, result=CompletedTask.of(record))
        return self._ended_by(
            GenerationFailedError(
                task_id=self._task_id,
                status=record.status,
                error_code=record.error_code,
                error_message=record.error_message,
                record=record,
            )
        )

    def _on_error(self, error: KontextError) -> TaskOutcome | None:
        now = self._loop.time()
        self._last_error = error
        self._failures += 1
        grace_left = self._grace_left(error.handling, now)
        if grace_left < _ROUNDING:
            self._emit(now, error=error)
            return self._ended_by(error)
        self._plan_next(now, error=error, within=grace_left)
        return None

    def _grace_left(self, handling: Handling, now: float) -> float:
        """Return the seconds for which polls may go on failing so; pauses do not count."""
        unpaused = now - self._poller.budget.pause_spent(now)
        if handling is Handling.BACK_OFF:
            return math.inf
        if handling is Handling.RETRY:
            if self._failing_since is None:
                self._failing_since = unpaused
            grace, since = self._policy.error_grace, self._failing_since
        elif handling is Handling.RETRY_NOT_FOUND:
            if self._missing_since is None:
                self._missing_since = unpaused
            grace, since = self._policy.not_found_grace, self._missing_since
        else:
            return 0.0
        return math.inf if grace is None else since + grace - unpaused

    def _plan_next(
        self,
        now: float,
        *,
        record: TaskRecord | None = None,
        error: KontextError | None = None,
        within: float = math.inf,
    ) -> None:
        """Plan the next poll, and report this one.

        Where permits take time to come, the last poll is brought forward once by that time, so
        that it is sent before the deadline; a second last poll follows if there is time.
        """
        budget = self._poller.budget
        last = self._last_poll_at()
        next_delay = self._expected_age = None
        if now < last and self._policy.timeout != 0:
            delay = min(self._delay(now, record, error), within)
            if self._follow_ups is not None:
                delay = min(delay, next(self._follow_ups, delay))
            early = last if self._had_early_poll else last - budget.acquire_delay
            final = early if now < early else last
            self._had_early_poll = self._had_early_poll or final <= now + delay
            self._next_poll_at = min(now + delay, final)
            if now + delay < final and error is None and self._follow_ups is None:
                self._expect(self._age(now), delay)
            expected = max(self._next_poll_at, now + budget.pause_remaining(now))
            next_delay = expected - now if expected < self._deadline else None
        self._emit(now, record=record, error=error, next_delay=next_delay)

    def _last_poll_at(self) -> float:
        return self._deadline - max(_MIN_LEAD, 2 * self._poller.budget.round_trip)

    def _expect(self, age: float, delay: float) -> None:
        """Remember when the model expects the next poll, unless that of a scout comes before."""
        wait = self._policy.wait
        # A subclass may decide otherwise.
        if isinstance(wait, wait_learned) and type(wait) is wait_learned:
            expected = wait.model.next_age(age)
            self._expected_age = expected if age + delay > expected - _ROUNDING else None

    def planned_at(self) -> float:
        """Return when to poll next; plan it again if what was learned meanwhile has moved it.

        The last poll before the deadline and the polls of scouts are left as they are.
        """
        wait = self._policy.wait
        assert isinstance(wait, wait_learned), "only its polls move"
        age = self._age(self._polled_at)
        if self._expected_age is not None and wait.has_moved(age, self._expected_age):
            now = self._loop.time()
            delay = wait.delay_again(self._state(record=self._last_record), self._expected_age)
            planned = self._polled_at + delay
            if planned < now:
                planned = now + wait.overdue_age(self._age(now)) - self._age(now)
            latest = self._last_poll_at() - self._poller.budget.acquire_delay
            self._next_poll_at = max(now, min(planned, latest))
            self._expect(age, delay)
        return self._next_poll_at

    def _delay(self, now: float, record: TaskRecord | None, error: KontextError | None) -> float:
        self._polled_at = now
        self._last_delay = self._policy.delay(self._state(record=record, error=error))
        self._idle_for += self._last_delay
        return self._last_delay

    def _state(
        self, *, record: TaskRecord | None = None, error: KontextError | None = None
    ) -> PollState:
        """Return the state after the last poll; made on demand, because it is large."""
        state = PollState(self._began)
        state.update(
            now=self._polled_at,
            attempt=self._polls,
            age=self._age(self._polled_at),
            record=record,
            error=error,
            failures=self._failures,
        )
        state.upcoming_sleep = self._last_delay
        state.idle_for = self._idle_for
        return state

    def _age(self, now: float) -> float:
        return now - (self._began if self._born is None else self._born)

    def _emit(
        self,
        now: float,
        *,
        record: TaskRecord | None = None,
        error: KontextError | None = None,
        next_delay: float | None = None,
    ) -> None:
        if self._policy.on_event is not None:
            self._policy.on_event(
                PollEvent(
                    task_id=self._task_id,
                    attempt=self._polls,
                    elapsed=now - self._began,
                    record=record,
                    error=error,
                    next_delay=next_delay,
                )
            )

    def _ended_by(self, error: KontextError) -> ErrorOutcome:
        return ErrorOutcome(task_id=self._task_id, error=error)

    def _timed_out(self) -> TaskOutcome:
        now = self._loop.time()
        was_blocked = self._next_poll_at < now
        blocked_by = was_blocked and self._poller.budget.blocked_by(self._task_id, now)
        return self._ended_by(
            WaitTimeoutError(
                task_id=self._task_id,
                elapsed=now - self._began,
                polls=self._polls,
                last_record=self._last_record,
                last_error=blocked_by or self._last_error,
            )
        )
