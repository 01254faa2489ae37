"""When to poll a task again: the state that wait strategies read, and the schedule that learns."""

from __future__ import annotations

import itertools
import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

from tenacity import Future, RetryCallState, Retrying, wait_random
from tenacity.wait import wait_base

from kontext_async.errors import ConfigurationError
from kontext_async.models import TaskRecord

__all__ = ["DurationModel", "PollState", "wait_learned"]

# The `retry_object` of every state. No tenacity controller drives a wait, so one object serves all.
_NO_CONTROLLER: Final = Retrying()


class PollState(RetryCallState):
    """The state of a wait, passed to its wait strategy after each poll that did not end it.

    It has all attributes of tenacity's own state, with times by the event loop's clock, and:

    ``age``: seconds since the task was created. ``record``: the last poll's record, None if that
    poll failed. ``error``: its error, None if it did not. ``failures``: polls in a row that have
    failed, up to and including the last one.
    """

    def __init__(self, start_time: float) -> None:
        # Not RetryCallState.__init__, which reads a clock.
        self.start_time = start_time
        self.retry_object = _NO_CONTROLLER
        self.fn = None
        self.args: Any = ()
        self.kwargs: Any = {}
        self.attempt_number = 1
        self.outcome_timestamp: float | None = None
        self.idle_for = 0.0
        self.next_action = None
        self.upcoming_sleep = 0.0
        self.age = 0.0
        self.record: TaskRecord | None = None
        self.error: BaseException | None = None
        self.failures = 0
        self._outcome: Future | None = None

    def update(
        self,
        *,
        now: float,
        attempt: int,
        age: float,
        record: TaskRecord | None = None,
        error: BaseException | None = None,
        failures: int = 0,
    ) -> None:
        """Set the state to the wait's ``attempt``-th poll, which ended at loop time ``now``."""
        self.outcome_timestamp = now
        self.attempt_number = attempt
        self.age = age
        self.record = record
        self.error = error
        self.failures = failures
        self._outcome = None

    @property
    def outcome(self) -> Future | None:
        """The last poll as a future, made on demand: it is expensive and rarely needed."""
        if self._outcome is None and self.outcome_timestamp is not None:
            value = self.record if self.error is None else self.error
            self._outcome = Future.construct(self.attempt_number, value, self.error is not None)
        return self._outcome

    # tenacity has a plain attribute here, which it also writes.
    @outcome.setter
    def outcome(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, value: Future | None
    ) -> None:
        self._outcome = value


# Edges of the bins of age in seconds: 0.25 s apart at first, growing by 5 % a bin, to an hour.
_EDGES: Final = tuple(5.0 * (1.05**k - 1.0) for k in range(136))
_WIDTHS: Final = tuple(b - a for a, b in itertools.pairwise(_EDGES))
_BINS: Final = len(_WIDTHS)

# The constants below were chosen with tests/benchmarks/schedule_efficiency.py. Moving a single one
# by a fifth changes J by at most 2 % on average over the shapes there, and by at most 4 % in one
# of them; fewer _PRIOR_TASKS cost 13 % in one of them.

# The prior: the rate per second at which tasks of an age in seconds end, before any is known;
# linear in between. Most tasks take 8 to 30 s, some much longer.
_PRIOR_AGES: Final = (0.0, 2.5, 5.0, 8.0, 12.0, 20.0, 40.0, 100.0, math.inf)
_PRIOR_RATES: Final = (0.0, 0.0, 0.025, 0.045, 0.12, 0.065, 0.045, 0.03, 0.03)
_PRIOR_REACH: Final = 120.0  # s of age that the curve covers at least, by the prior
_PRIOR_TASKS: Final = 3.5  # tasks that the prior counts as, in a bin that no task has passed yet
_PRIOR_LAST_TASK: Final = 20.0  # tasks to pass through a bin until the prior counts for nothing
_PRIOR_SCALE_TASKS: Final = 2.0  # tasks to end beyond those expected until the prior is doubled
_MIN_PRIOR_SCALE: Final = 0.85  # where fewer tasks ended than expected
_PRIOR_SCALE_DECAY: Final = 0.8  # from one bin to the next, of the counts that scale the prior

_BIN_MEMORY: Final = 100.0  # tasks passing through a bin after which its counts have faded to 1/e
_MEMORY: Final = 300.0  # tasks ended anywhere after which all counts have faded to 1/e
_MIN_ENDED: Final = 0.05  # tasks ended in a bin, faded; fewer do not extend the curve to it
_MAX_PENDING: Final = 500  # observations until they are counted, if no rebuild comes first
_REBUILD_AFTER: Final = 40.0  # news, in tasks ended, after which the curve is rebuilt at the latest
_RUNNING_NEWS: Final = 0.1  # news in an observation of a running task

_MIN_DELAY: Final = 0.25  # s
_MAX_DELAY: Final = 60.0  # s
_MAX_BLIND_DELAY: Final = 15.0  # s, at ages that no known task has reached
_MAX_BLIND_POLLS: Final = 1e6  # polls for which the curve goes on after the last known age
_VERSION: Final = 1
_MAX_SAVED: Final = 65_536  # characters, some ten times what is saved


def _prior_rate(age: float) -> float:
    i = bisect_right(_PRIOR_AGES, age) - 1
    a, b = _PRIOR_AGES[i : i + 2]
    share = (age - a) / (b - a)
    return _PRIOR_RATES[i] * (1.0 - share) + _PRIOR_RATES[i + 1] * share


_PRIOR: Final = tuple(_prior_rate((a + b) / 2) for a, b in itertools.pairwise(_EDGES))
_PRIOR_BINS: Final = bisect_right(_EDGES, _PRIOR_REACH)


class DurationModel:
    """The durations of tasks, learned from every poll, and the age at which to poll next.

    ``cost_per_request`` is the seconds of lag that one request is worth, above 0. With 2.0 polls
    are rarer than by default, with 0.5 more frequent. Raises `ConfigurationError` for any other
    value.

    Age is divided into bins. Each bin counts the tasks that ended in it, and the seconds that
    tasks spent in it, also those still running. Their ratio is the rate at which tasks of that
    age end (the Nelson-Aalen estimator). Old tasks are forgotten by scaling both counts down
    together, which leaves the rate as it is.
    """

    def __init__(self, *, cost_per_request: float = 1.0) -> None:
        if not 0.0 < cost_per_request < math.inf:
            raise ConfigurationError(
                f"cost_per_request must be a positive number of seconds, not {cost_per_request!r}"
            )
        self.cost_per_request: Final = cost_per_request
        self._ended = [0.0] * _BINS
        self._at_risk = [0.0] * _BINS
        self._finished = 0
        self._ages: dict[str, float] = {}
        # Observations not counted yet: the ages from and to which a task ran, and if it ended.
        self._pending: list[tuple[float, float, bool]] = []
        # The bins that pending observations crossed: +1 at the first, -1 after the last.
        self._crossed = [0] * (_BINS + 1)
        self._just_ended = [0] * _BINS
        self._news = 0.0  # since the curve was built
        self._rebuild()

    def __repr__(self) -> str:
        return (
            f"<DurationModel cost_per_request={self.cost_per_request:g}"
            f" finished={self._finished} running={len(self._ages)}>"
        )

    def observe(self, task_id: str, age: float, duration: float | None = None) -> None:
        """Learn from a poll: the task still ran at ``age``, or it ended after ``duration``.

        Both are in seconds; ``duration`` is None for a task that still runs. Negative, infinite
        and NaN values are ignored.
        """
        if duration is None:
            since = self._ages.get(task_id, 0.0)
            if since < age < math.inf:
                self._ages[task_id] = age
                self._pending.append((since, age, False))
                self._news += _RUNNING_NEWS
        else:
            since = self._ages.pop(task_id, 0.0)
            if 0.0 <= duration < math.inf:
                self._pending.append((since, duration, True))
                self._finished += 1
                self._news += 1.0
        if len(self._pending) >= _MAX_PENDING:
            self._settle()

    def forget(self, task_id: str) -> None:
        """Free what is kept for a task that nobody waits for; what it taught stays."""
        self._ages.pop(task_id, None)

    def next_age(self, age: float, step: float = 1.0) -> float:
        """Return the age in seconds at which to poll a task again that runs at ``age``.

        ``step`` is the number of polls to go forward along the curve: 1.0, or near it for jitter.
        The result is 0.25 s to 60 s after ``age``, and at most 15 s after it if no known task has
        become so old.
        """
        if self._news >= min(_REBUILD_AFTER, 1.0 + self._finished / 10.0):
            self._rebuild()
        ages, counts = self._ages_at, self._counts_at
        age = max(0.0, age)
        found = _interpolate(counts, ages, _interpolate(ages, counts, age) + step)
        latest = min(age + _MAX_DELAY, max(age + _MAX_BLIND_DELAY, self._known_until))
        return max(age + _MIN_DELAY, min(found, latest))

    def to_json(self) -> str:
        """Return what was learned as JSON, for :meth:`from_json` in a later process."""
        self._settle()
        state = {
            "version": _VERSION,
            "finished": self._finished,
            "ended": [_rounded(tasks) for tasks in self._ended],
            "at_risk": [_rounded(seconds) for seconds in self._at_risk],
        }
        return json.dumps(state, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, *, cost_per_request: float = 1.0) -> DurationModel:
        """Return a model with what :meth:`to_json` has saved.

        Raises :class:`ConfigurationError` if ``text`` is anything else.
        """
        model = cls(cost_per_request=cost_per_request)
        state = _saved_state(text)
        model._finished = int(_saved_number("finished", state.get("finished"), 1e15))
        model._ended = _saved_numbers(state, "ended", [2.0 * _MEMORY] * _BINS)
        model._at_risk = _saved_numbers(state, "at_risk", [2.0 * _BIN_MEMORY * w for w in _WIDTHS])
        model._rebuild()
        return model

    def _run(self, since: float, until: float) -> None:
        """Count the time that a task ran from one age to another, in the bins of these ages."""
        until = min(until, _EDGES[-1])
        first = bisect_right(_EDGES, since) - 1
        last = bisect_right(_EDGES, until) - 1
        if first == last < _BINS:
            self._spend(first, until - since)
        elif first < last:
            self._spend(first, _EDGES[first + 1] - since)
            self._crossed[first + 1] += 1
            self._crossed[last] -= 1
            if last < _BINS:
                self._spend(last, until - _EDGES[last])

    def _spend(self, i: int, seconds: float) -> None:
        keep = 1.0 - seconds / (_WIDTHS[i] * _BIN_MEMORY)
        self._ended[i] *= keep
        self._at_risk[i] = self._at_risk[i] * keep + seconds

    def _settle(self) -> None:
        """Count the pending observations in the bins.

        Bins that tasks no longer reach fade too, a little for each task that ended.
        """
        for since, until, has_ended in self._pending:
            self._run(since, until)
            if has_ended and until < _EDGES[-1]:
                self._just_ended[bisect_right(_EDGES, until) - 1] += 1
        self._pending.clear()
        fade = (1.0 - 1.0 / _MEMORY) ** sum(self._just_ended)
        crossings = 0
        for i, width in enumerate(_WIDTHS):
            crossings += self._crossed[i]
            if crossings:
                keep = (1.0 - 1.0 / _BIN_MEMORY) ** crossings
                self._ended[i] *= keep
                self._at_risk[i] = self._at_risk[i] * keep + width * _BIN_MEMORY * (1.0 - keep)
            if self._just_ended[i]:
                # On average a task ended half-way between those crossings.
                self._ended[i] += self._just_ended[i] * (1.0 - 1.0 / _BIN_MEMORY) ** (crossings / 2)
        self._ended = [tasks * fade for tasks in self._ended]
        self._at_risk = [seconds * fade for seconds in self._at_risk]
        self._crossed = [0] * (_BINS + 1)
        self._just_ended = [0] * _BINS

    def _rebuild(self) -> None:
        """Build the curve N(age): polls due up to an age, linear within each group of bins."""
        self._news = 0.0
        self._settle()
        ages, counts = [0.0], [0.0]
        for edge, ended, at_risk in self._groups():
            density = math.sqrt(ended / at_risk / (2.0 * self.cost_per_request))
            density = min(density, 1.0 / _MIN_DELAY)
            counts.append(counts[-1] + density * (edge - ages[-1]))
            ages.append(edge)
        self._known_until = ages[-1]
        ages.append(ages[-1] + _MAX_BLIND_POLLS * _MAX_BLIND_DELAY)
        counts.append(counts[-1] + _MAX_BLIND_POLLS)
        self._ages_at, self._counts_at = ages, counts

    def _groups(self) -> Iterator[tuple[float, float, float]]:
        """Yield neighbouring bins as one until a whole task ended in them, against noise.

        A bin in which half a task ended begins a new group: the bins before would blur its rate.
        """
        upto = ended = at_risk = 0.0
        for edge, more_ended, more_at_risk in self._with_prior():
            if at_risk and (ended >= 1.0 or more_ended >= 0.5):
                yield upto, ended, at_risk
                ended = at_risk = 0.0
            upto, ended, at_risk = edge, ended + more_ended, at_risk + more_at_risk
        if ended >= 1.0:
            yield upto, ended, at_risk

    def _with_prior(self) -> Iterator[tuple[float, float, float]]:
        """Yield each bin's upper edge, tasks ended and seconds at risk, with the prior's share.

        The prior is scaled by the tasks that ended in the bins just before, over those it expected
        there. It is never scaled far down: of tasks that began together, none may have ended a
        moment before most do.
        """
        seen = expected = 0.0
        for i in range(self._reach()):
            width, rate = _WIDTHS[i], _PRIOR[i]
            ended, at_risk = self._ended[i], self._at_risk[i]
            odds = (seen + _PRIOR_SCALE_TASKS) / (expected + _PRIOR_SCALE_TASKS)
            scale = max(_MIN_PRIOR_SCALE, odds)
            weight = _PRIOR_TASKS * max(0.0, width - at_risk / _PRIOR_LAST_TASK)
            yield _EDGES[i + 1], ended + weight * scale * rate, at_risk + weight
            seen = seen * _PRIOR_SCALE_DECAY + ended
            expected = expected * _PRIOR_SCALE_DECAY + at_risk * rate

    def _reach(self) -> int:
        """Return the number of bins that the curve covers."""
        past = range(_BINS - 1, _PRIOR_BINS - 1, -1)
        return next((i + 1 for i in past if self._ended[i] > _MIN_ENDED), _PRIOR_BINS)


def _interpolate(xs: list[float], ys: list[float], x: float) -> float:
    i = min(bisect_right(xs, x), len(xs) - 1)
    share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + share * (ys[i] - ys[i - 1])


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")


def _saved_state(text: str) -> dict[str, Any]:
    try:
        state = json.loads(text) if len(text) <= _MAX_SAVED else None
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise ConfigurationError("not a saved duration model: not a JSON object, or too long")
    saved = cast("dict[str, Any]", state)
    if saved.get("version") != _VERSION:
        raise ConfigurationError(f"not a saved duration model of version {_VERSION}")
    return saved


def _saved_numbers(state: dict[str, Any], name: str, limits: Sequence[float]) -> list[float]:
    numbers: list[Any] = state.get(name, [])
    if type(numbers) is not list or len(numbers) != len(limits):
        raise ConfigurationError(f"not a saved duration model: {name!r} has the wrong length")
    pairs = zip(numbers, limits, strict=True)
    return [_saved_number(name, number, limit) for number, limit in pairs]


def _saved_number(name: str, number: Any, limit: float) -> float:
    if type(number) not in (int, float) or not 0.0 <= number <= limit:
        raise ConfigurationError(f"not a saved duration model: {name!r} is out of range")
    return float(number)


class wait_learned(wait_base):  # noqa: N801  # tenacity's way of naming strategies
    """Wait until the age at which ``model`` expects a poll to be worth its request.

    ``jitter`` is a strategy whose value multiplies the step along the model's curve, so that tasks
    begun together are not polled together. After a failed poll, which may have missed the task's
    end, the delay is at most an exponential backoff: 1 s, growing by 1.4 up to 8 s, multiplied by
    the value of ``spread``.
    """

    def __init__(
        self,
        model: DurationModel,
        *,
        jitter: wait_base = wait_random(0.9, 1.1),  # noqa: B008  # a strategy holds no state
        spread: wait_base = wait_random(0.8, 1.2),  # noqa: B008
    ) -> None:
        self.model = model
        self.jitter = jitter
        self.spread = spread

    def __call__(self, retry_state: RetryCallState) -> float:
        if not isinstance(retry_state, PollState):
            return self._learned(retry_state, retry_state.seconds_since_start or 0.0)
        delay = self._learned(retry_state, retry_state.age)
        if retry_state.failures:
            delay = min(delay, _backoff(retry_state.failures) * self.spread(retry_state))
        return delay

    def _learned(self, state: RetryCallState, age: float) -> float:
        return self.model.next_age(age, self.jitter(state)) - age


def _backoff(failures: int) -> float:
    return float(min(8.0, 1.4 ** min(failures - 1, 10)))
