"""When to look at a task again: what a wait strategy is told, and the schedule that learns."""

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

# What a strategy finds as `retry_object`: no controller drives a wait, one inert object serves all.
_NO_CONTROLLER: Final = Retrying()


class PollState(RetryCallState):
    """What a wait strategy is handed after a look that did not end the wait.

    Beside all that tenacity's own state has, ``age`` is how long the task has existed in seconds,
    ``record`` the answer of the last look and ``error`` its error (one of them is None), and
    ``failures`` how many looks in a row, up to this one, have failed. Times are those of the
    event loop's clock.
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
        """Take down the look that just ended, at loop time ``now``, the wait's ``attempt``-th."""
        self.outcome_timestamp = now
        self.attempt_number = attempt
        self.age = age
        self.record = record
        self.error = error
        self.failures = failures
        self._outcome = None

    @property
    def outcome(self) -> Future | None:
        """The last look as a future, made when asked for: it is dear, and few strategies ask."""
        if self._outcome is None and self.outcome_timestamp is not None:
            value = self.record if self.error is None else self.error
            self._outcome = Future.construct(self.attempt_number, value, self.error is not None)
        return self._outcome

    # In tenacity an attribute, which is read and written just so.
    @outcome.setter
    def outcome(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, value: Future | None
    ) -> None:
        self._outcome = value


# Edges of the bins of age in seconds: 0.25 s apart at first, growing by 5 % a bin, to an hour.
_EDGES: Final = tuple(5.0 * (1.05**k - 1.0) for k in range(136))
_WIDTHS: Final = tuple(b - a for a, b in itertools.pairwise(_EDGES))
_BINS: Final = len(_WIDTHS)

# What is believed before anything was seen: the rate at which tasks of an age in seconds end,
# per second; linear in between. Most take 8 to 30 s, some much longer.
_PRIOR_AGES: Final = (0.0, 2.5, 5.0, 8.0, 12.0, 20.0, 40.0, 100.0, math.inf)
_PRIOR_RATES: Final = (0.0, 0.0, 0.025, 0.045, 0.12, 0.065, 0.045, 0.03, 0.03)
_PRIOR_WEIGHT: Final = 3.5  # tasks that the prior counts for, in a bin that no task passed yet
_PRIOR_GONE: Final = 20.0  # tasks having passed through a bin that put an end to the prior there

_MEMORY: Final = 100.0  # tasks that a bin remembers having passed through it
_LIFE: Final = 300.0  # tasks ended anywhere after which what a bin holds has faded to 1/e
_REBUILD: Final = 40.0  # tasks ended between two renewals of the curve
_MOST_HEARD: Final = 500  # looks that may wait to be taken into account
_LOOK: Final = 0.1  # a look that finds a task running, counted in tasks ended

_SHORTEST: Final = 0.25  # s between two looks, at least
_LONGEST: Final = 60.0  # s between two looks, at most
_UNKNOWN: Final = 15.0  # s between two looks at an age of which nothing is known, at most
_FOREVER: Final = 1e6  # looks by which the curve goes on beyond what is known
_FADED: Final = 0.05  # ended tasks in a bin, or fewer, are as good as forgotten
_VERSION: Final = 1
_MAX_SAVED: Final = 65_536  # characters, some ten times what is saved


def _prior_rate(age: float) -> float:
    i = bisect_right(_PRIOR_AGES, age) - 1
    a, b = _PRIOR_AGES[i : i + 2]
    share = (age - a) / (b - a)
    return _PRIOR_RATES[i] * (1.0 - share) + _PRIOR_RATES[i + 1] * share


_PRIOR: Final = tuple(_prior_rate((a + b) / 2) for a, b in itertools.pairwise(_EDGES))
_PRIOR_REACH: Final = bisect_right(_EDGES, 120.0)  # bins that the curve has at least: to 120 s
_DOUBT: Final = 2.0  # ended tasks that it takes to halve or double the prior
_LEAST_SCALE: Final = 0.85  # of the prior, where fewer tasks ended than it foretold
_NEARBY: Final = 0.8  # what a bin counts for in the next one, in scaling the prior


class DurationModel:
    """How long tasks take, learned from every look, and when it is worth looking again.

    ``cost_per_request`` is what one request is worth in seconds of lag: 2.0 looks more rarely
    than the default, 0.5 more often.

    Age is divided into bins. Each holds how many tasks ended in it and the time that tasks spent
    in it, those still running too; one over the other is the rate at which tasks of that age end
    (Nelson-Aalen). Scaling both down together, as tasks pass, forgets without shifting the rate.
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
        self._heard: list[tuple[float, float, bool]] = []  # ran from, to, and then ended
        self._crossed = [0] * (_BINS + 1)  # +1 where a task's crossings begin, -1 past their end
        self._just_ended = [0] * _BINS
        self._news = 0.0
        self._rebuild()

    def __repr__(self) -> str:
        return (
            f"<DurationModel cost_per_request={self.cost_per_request:g}"
            f" finished={self._finished} running={len(self._ages)}>"
        )

    def observe(self, task_id: str, age: float, duration: float | None = None) -> None:
        """Learn from a look at a task: at ``age`` seconds it still ran, or it took ``duration``.

        Numbers that are no times are passed over.
        """
        if duration is None:
            since = self._ages.get(task_id, 0.0)
            if since < age < math.inf:
                self._ages[task_id] = age
                self._heard.append((since, age, False))
                self._news += _LOOK
        else:
            since = self._ages.pop(task_id, 0.0)
            if 0.0 <= duration < math.inf:
                self._heard.append((since, duration, True))
                self._finished += 1
                self._news += 1.0
        if len(self._heard) >= _MOST_HEARD:
            self._settle()

    def forget(self, task_id: str) -> None:
        """Drop a task that is not waited for any more; that it ran so long stays known."""
        self._ages.pop(task_id, None)

    def next_age(self, age: float, step: float = 1.0) -> float:
        """The age in seconds at which to look again at a task that runs at ``age``.

        ``step`` is how many looks on to go: 1.0 but for jitter. The result is 0.25 s to 60 s
        after ``age``, and at most 15 s after it where nothing is known of tasks so old.
        """
        if self._news >= min(_REBUILD, 1.0 + self._finished / 10.0):
            self._rebuild()
        ages, counts = self._ages_at, self._counts_at
        age = max(0.0, age)
        found = _interpolate(counts, ages, _interpolate(ages, counts, age) + step)
        latest = min(age + _LONGEST, max(age + _UNKNOWN, self._known_until))
        return max(age + _SHORTEST, min(found, latest))

    def to_json(self) -> str:
        """What was learned, for :meth:`from_json` in a later process."""
        self._settle()
        state = {
            "version": _VERSION,
            "finished": self._finished,
            "ended": [_brief(tasks) for tasks in self._ended],
            "at_risk": [_brief(seconds) for seconds in self._at_risk],
        }
        return json.dumps(state, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, *, cost_per_request: float = 1.0) -> DurationModel:
        """A model that goes on from what :meth:`to_json` gave.

        Raises :class:`ConfigurationError` where ``text`` is anything else.
        """
        model = cls(cost_per_request=cost_per_request)
        state = _saved_state(text)
        model._finished = int(_saved_number("finished", state.get("finished"), 1e15))
        model._ended = _saved_numbers(state, "ended", [2.0 * _LIFE] * _BINS)
        model._at_risk = _saved_numbers(state, "at_risk", [2.0 * _MEMORY * w for w in _WIDTHS])
        model._rebuild()
        return model

    def _run(self, since: float, until: float) -> None:
        """Add a task's running from one age to another to the bins it lay in, or went through."""
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
        keep = 1.0 - seconds / (_WIDTHS[i] * _MEMORY)
        self._ended[i] *= keep
        self._at_risk[i] = self._at_risk[i] * keep + seconds

    def _settle(self) -> None:
        """Bring the bins up to date: what ended, and what went through, since last time.

        Bins that tasks no longer reach fade too, a little for each task that ended.
        """
        for since, until, has_ended in self._heard:
            self._run(since, until)
            if has_ended and until < _EDGES[-1]:
                self._just_ended[bisect_right(_EDGES, until) - 1] += 1
        self._heard.clear()
        fade = (1.0 - 1.0 / _LIFE) ** sum(self._just_ended)
        crossings = 0
        for i, width in enumerate(_WIDTHS):
            crossings += self._crossed[i]
            if crossings:
                keep = (1.0 - 1.0 / _MEMORY) ** crossings
                self._ended[i] *= keep
                self._at_risk[i] = self._at_risk[i] * keep + width * _MEMORY * (1.0 - keep)
            if self._just_ended[i]:
                # On average, an end lies half-way between those crossings.
                self._ended[i] += self._just_ended[i] * (1.0 - 1.0 / _MEMORY) ** (crossings / 2)
        self._ended = [tasks * fade for tasks in self._ended]
        self._at_risk = [seconds * fade for seconds in self._at_risk]
        self._crossed = [0] * (_BINS + 1)
        self._just_ended = [0] * _BINS

    def _rebuild(self) -> None:
        """Draw the curve N(age) anew, straight between the edges of groups of bins."""
        self._news = 0.0
        self._settle()
        ages, counts = [0.0], [0.0]
        for edge, ended, at_risk in self._groups():
            density = math.sqrt(ended / at_risk / (2.0 * self.cost_per_request))
            density = min(density, 1.0 / _SHORTEST)
            counts.append(counts[-1] + density * (edge - ages[-1]))
            ages.append(edge)
        self._known_until = ages[-1]
        ages.append(ages[-1] + _FOREVER * _UNKNOWN)
        counts.append(counts[-1] + _FOREVER)
        self._ages_at, self._counts_at = ages, counts

    def _groups(self) -> Iterator[tuple[float, float, float]]:
        """Bins taken together until a whole task ended in them, as `_believed` gives them.

        One in which half a task ended begins a new group: what came before would blur its rate.
        """
        upto = ended = at_risk = 0.0
        for edge, more_ended, more_at_risk in self._believed():
            if at_risk and (ended >= 1.0 or more_ended >= 0.5):
                yield upto, ended, at_risk
                ended = at_risk = 0.0
            upto, ended, at_risk = edge, ended + more_ended, at_risk + more_at_risk
        if ended >= 1.0:
            yield upto, ended, at_risk

    def _believed(self) -> Iterator[tuple[float, float, float]]:
        """Each bin's upper edge, tasks ended, and time at risk, with the prior where they are few.

        The prior is scaled by the ends seen in the bins just before over those it foretold there.
        It is not scaled far down: where tasks began together, none may have ended a moment before
        most do.
        """
        seen = foretold = 0.0
        for i in range(self._reach()):
            width, rate = _WIDTHS[i], _PRIOR[i]
            ended, at_risk = self._ended[i], self._at_risk[i]
            scale = max(_LEAST_SCALE, (seen + _DOUBT) / (foretold + _DOUBT))
            weight = _PRIOR_WEIGHT * max(0.0, width - at_risk / _PRIOR_GONE)
            yield _EDGES[i + 1], ended + weight * scale * rate, at_risk + weight
            seen = seen * _NEARBY + ended
            foretold = foretold * _NEARBY + at_risk * rate

    def _reach(self) -> int:
        """How many bins there is anything to say of."""
        past = range(_BINS - 1, _PRIOR_REACH - 1, -1)
        return next((i + 1 for i in past if self._ended[i] > _FADED), _PRIOR_REACH)


def _interpolate(xs: list[float], ys: list[float], x: float) -> float:
    i = min(bisect_right(xs, x), len(xs) - 1)
    share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + share * (ys[i] - ys[i - 1])


def _brief(number: float) -> float:
    return float(f"{number:.6g}")


def _saved_state(text: str) -> dict[str, Any]:
    try:
        state = json.loads(text) if len(text) <= _MAX_SAVED else None
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise ConfigurationError("not a saved duration model: no JSON object of its size")
    saved = cast("dict[str, Any]", state)
    if saved.get("version") != _VERSION:
        raise ConfigurationError(f"not a saved duration model of version {_VERSION}")
    return saved


def _saved_numbers(state: dict[str, Any], name: str, limits: Sequence[float]) -> list[float]:
    numbers: list[Any] = state.get(name, [])
    if type(numbers) is not list or len(numbers) != len(limits):
        raise ConfigurationError(f"not a saved duration model: {name!r} has a wrong length")
    pairs = zip(numbers, limits, strict=True)
    return [_saved_number(name, number, limit) for number, limit in pairs]


def _saved_number(name: str, number: Any, limit: float) -> float:
    if type(number) not in (int, float) or not 0.0 <= number <= limit:
        raise ConfigurationError(f"not a saved duration model: {name!r} is out of range")
    return float(number)


class wait_learned(wait_base):  # noqa: N801  # tenacity's way of naming strategies
    """Wait until the age at which ``model`` finds the next look worth its request.

    ``jitter`` is a strategy whose value multiplies the step along the curve, so that tasks do not
    march in step. After a look that failed the wait is at most an exponential backoff, 1 s growing
    by 1.4 to 8 s and spread by ``spread``: the look that was missed may have been the one.
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
