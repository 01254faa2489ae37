"""One wait: look, judge the answer, sleep as the schedule says, until the task ends.

A short driver over tenacity's wait strategies. `AsyncRetrying` would do the same at 1.8 times
the cost of the request itself: it builds closures and a future for every attempt.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

import attrs
from tenacity import RetryCallState
from tenacity.wait import WaitBaseT, wait_base

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
from kontext_async.schedule import DurationModel, PollState

__all__ = ["Budget", "PollEvent", "TaskWait", "Transport", "WaitPolicy", "check_seconds"]

# The last look before a deadline is sent this early at least, in seconds.
_SHORTEST_LEAD = 0.05


@attrs.frozen(kw_only=True)
class PollEvent:
    """One look of a wait, as ``on_event`` is told of it.

    ``attempt`` counts from 1; ``elapsed`` is in seconds since the wait began. Of ``record`` and
    ``error`` one is None. ``next_delay`` is how many seconds from now the next look is wanted,
    None where there will be none.
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


def _seconds(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    check_seconds(attribute.name, value)


def _plain_callable(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is None or isinstance(value, wait_base):
        return
    if not callable(value):
        raise ConfigurationError(f"{attribute.name} must be callable, not {value!r}")
    if _is_async(value):
        raise ConfigurationError(
            f"{attribute.name} must be a plain function: an `async def` would never be awaited"
        )


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    call = type(function).__call__
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


@attrs.frozen(kw_only=True)
class WaitPolicy:
    """The keywords of a wait, checked. What each means is written at `wait_for_result`."""

    timeout: float | None = attrs.field(validator=_seconds)
    wait: WaitBaseT = attrs.field(validator=_plain_callable)
    error_grace: float | None = attrs.field(validator=_seconds)
    not_found_grace: float | None = attrs.field(validator=_seconds)
    on_event: Callable[[PollEvent], object] | None = attrs.field(validator=_plain_callable)

    def delay(self, state: RetryCallState) -> float:
        """What the strategy says, in seconds; `ConfigurationError` where that is no delay."""
        delay: object = self.wait(state)
        if isinstance(delay, (int, float)) and 0 <= delay < math.inf:
            return delay
        raise ConfigurationError(
            f"the wait strategy returned {delay!r}, not a delay of 0 or more seconds"
        )


class Budget(Protocol):
    """What a wait asks of its client's request budget."""

    @property
    def round_trip(self) -> float: ...
    @property
    def acquire_delay(self) -> float: ...
    def blocked_by(self, task_id: str, now: float) -> KontextError | None: ...
    def pause_remaining(self, now: float) -> float: ...
    def pause_spent(self, now: float) -> float: ...


class Transport(Protocol):
    """How a wait looks: it takes its turn, and then asks. None says that ``until`` has come."""

    @property
    def budget(self) -> Budget: ...
    @property
    def durations(self) -> DurationModel: ...
    @property
    def request_timeout(self) -> float: ...
    async def acquire(self, at: float, *, seen: bool, until: float) -> float | None: ...
    async def poll(
        self, task_id: str, sent: float, *, until: float
    ) -> tuple[TaskRecord, float | None] | None: ...


class TaskWait:
    """One wait for one task, to be run once.

    The policy's timeout counts from the making of this object, or ``from_first_look``; ``latest``
    is an instant of the loop's clock that ends the wait in any case.
    """

    __slots__ = (
        "_began",
        "_born",
        "_deadline",
        "_failing_since",
        "_failures",
        "_from_first_look",
        "_had_early",
        "_last_error",
        "_last_record",
        "_latest",
        "_loop",
        "_missing_since",
        "_policy",
        "_polls",
        "_state",
        "_task_id",
        "_transport",
        "_wanted_at",
    )

    def __init__(
        self,
        task_id: str,
        policy: WaitPolicy,
        transport: Transport,
        *,
        from_first_look: bool = False,
        latest: float = math.inf,
    ) -> None:
        self._task_id = task_id
        self._policy = policy
        self._transport = transport
        self._from_first_look = from_first_look
        self._latest = latest
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._deadline = latest if from_first_look else self._own_deadline()
        self._wanted_at = self._began  # when to look next; infinity where no look is wanted
        self._polls = 0
        self._failures = 0  # looks in a row
        self._had_early = False  # the early one of the two last looks
        self._missing_since: float | None = None  # these two by the clock that pauses stop
        self._failing_since: float | None = None
        self._born: float | None = None  # when the task was made
        self._last_record: TaskRecord | None = None
        self._last_error: KontextError | None = None
        self._state: PollState | None = None

    async def outcome(self) -> CompletedTask | KontextError:
        """Wait, and return the task or why there is none; raises only what is no outcome.

        That is what the caller's callbacks raise, `ConfigurationError` for a strategy that
        returns no delay, and `ClientStateError`.
        """
        try:
            outcome = await self._look()
            while outcome is None:
                outcome = await self._look()
            return outcome
        finally:
            self._transport.durations.forget(self._task_id)

    async def _look(self) -> CompletedTask | KontextError | None:
        """Look once, when it is time to; how the wait ends, if that ends it."""
        sent = await self._transport.acquire(
            self._wanted_at, seen=self._polls > 0, until=self._deadline
        )
        if sent is None:
            return self._timed_out()
        if self._from_first_look and not self._polls:
            self._began = sent
            self._deadline = self._own_deadline()
        self._polls += 1
        self._wanted_at = math.inf
        try:
            answer = await self._transport.poll(self._task_id, sent, until=self._deadline)
        except ClientStateError:
            raise
        except KontextError as error:
            outcome: CompletedTask | KontextError | None = self._failed_look(error)
        else:
            outcome = self._timed_out() if answer is None else self._good_look(*answer)
        if outcome is None and self._policy.timeout == 0:
            return self._timed_out()
        return outcome

    def _own_deadline(self) -> float:
        timeout = self._policy.timeout
        if timeout is None:
            return self._latest
        return min(self._began + (timeout or self._transport.request_timeout), self._latest)

    def _good_look(
        self, record: TaskRecord, age: float | None
    ) -> CompletedTask | KontextError | None:
        """How the wait ends, if this look ends it."""
        now = self._loop.time()
        self._last_record = record
        if self._born is None and age is not None:
            self._born = now - age
        if record.status.phase == "ready" and record.result_image_url is None:
            return self._failed_look(
                ResponseFormatError(
                    "data.response.resultImageUrl: missing in a record of success",
                    task_id=self._task_id,
                )
            )
        self._failures = 0
        self._missing_since = self._failing_since = None
        if record.status.phase == "generating":
            self._transport.durations.observe(self._task_id, self._age(now))
            self._go_on(now, record=record)
            return None
        if record.duration is not None:
            taken = record.duration.total_seconds()
            self._transport.durations.observe(self._task_id, self._age(now), taken)
        self._emit(now, record=record)
        if record.status.phase == "failed":
            return GenerationFailedError(
                task_id=self._task_id,
                status=record.status,
                error_code=record.error_code,
                error_message=record.error_message,
                record=record,
            )
        return CompletedTask.of(record)

    def _failed_look(self, error: KontextError) -> KontextError | None:
        now = self._loop.time()
        self._last_error = error
        self._failures += 1
        grace_left = self._grace_left(error.handling, now)
        if grace_left < 1e-6:  # what rounding may leave of nothing
            self._emit(now, error=error)
            return error
        self._go_on(now, error=error, within=grace_left)
        return None

    def _grace_left(self, handling: Handling, now: float) -> float:
        """Seconds for which looks may go on failing like this; pauses do not count."""
        unpaused = now - self._transport.budget.pause_spent(now)
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

    def _go_on(
        self,
        now: float,
        *,
        record: TaskRecord | None = None,
        error: KontextError | None = None,
        within: float = math.inf,
    ) -> None:
        """Plan the next look, and tell of this one."""
        budget = self._transport.budget
        last = self._deadline - max(_SHORTEST_LEAD, 2 * budget.round_trip)
        next_delay = None
        if now < last and self._policy.timeout != 0:
            delay = min(self._delay(now, record, error), within)
            # Where turns take time to come, the last look is to be had earlier, and once again.
            early = last if self._had_early else last - budget.acquire_delay
            final = early if now < early else last
            self._had_early = self._had_early or final <= now + delay
            self._wanted_at = min(now + delay, final)
            expected = max(self._wanted_at, now + budget.pause_remaining(now))
            next_delay = expected - now if expected < self._deadline else None
        self._emit(now, record=record, error=error, next_delay=next_delay)

    def _delay(self, now: float, record: TaskRecord | None, error: KontextError | None) -> float:
        if self._state is None:
            self._state = PollState(self._began)
        self._state.update(
            now=now,
            attempt=self._polls,
            age=self._age(now),
            record=record,
            error=error,
            failures=self._failures,
        )
        delay = self._policy.delay(self._state)
        self._state.upcoming_sleep = delay
        self._state.idle_for += delay
        return delay

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

    def _timed_out(self) -> WaitTimeoutError:
        now = self._loop.time()
        held = self._wanted_at < now  # wanting a look, and kept from it
        return WaitTimeoutError(
            task_id=self._task_id,
            elapsed=now - self._began,
            polls=self._polls,
            last_record=self._last_record,
            last_error=(held and self._transport.budget.blocked_by(self._task_id, now))
            or self._last_error,
        )
