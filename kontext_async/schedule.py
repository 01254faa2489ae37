"""When to poll a task again: the state that wait strategies read, and the schedule that learns."""

from __future__ import annotations

import itertools
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
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

    - ``age``: seconds since the task was created.
    - ``record``: the last poll's record, None if that poll failed.
    - ``error``: its error, None if it did not.
    - ``failures``: polls in a row that have failed, up to and including the last one.
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


def _edges() -> Iterator[float]:
    """Yield edges of age in seconds, on whole seconds too: the API's times are whole seconds."""
    edge = 0.0
    for step, until in _STEPS:
        while edge < until:
            yield edge
            edge += step
    yield edge


# Widths of the bins of age up to an age, in seconds. The first is the shortest delay; later ones
# are at most a twentieth of the age.
_STEPS: Final = (
    (0.25, 10.0),
    (0.5, 20.0),
    (1.0, 60.0),
    (2.0, 120.0),
    (5.0, 300.0),
    (10.0, 600.0),
    (30.0, 1200.0),
    (60.0, 3600.0),
)
_EDGES: Final = tuple(_edges())
_WIDTHS: Final = tuple(b - a for a, b in itertools.pairwise(_EDGES))
_SPANS: Final = tuple(2.0 * (b - a) / (a + b) for a, b in itertools.pairwise(_EDGES))  # of the age
_BINS: Final = len(_WIDTHS)

# The prior: the rate per second at which tasks of an age in seconds end, before any is known;
# linear in between. It is that of the least favourable mixture of log-normal durations with medians
# of 2 to 180 s: tests/benchmarks/schedule_prior.py finds it, and compares it with a backoff.
_PRIOR_AGES: Final = (0.0, 0.75, 1.5, 3.0, 4.5, 7.5, 11.0, 20.0, 40.0, 200.0, math.inf)
_PRIOR_RATES: Final = (0.0, 0.17, 0.21, 0.14, 0.115, 0.054, 0.029, 0.0165, 0.014, 0.014, 0.014)
_PRIOR_REACH: Final = 300.0  # s of age that the plan covers at least

# These were chosen with tests/benchmarks/schedule_efficiency.py.
_PRIOR_TASKS: Final = 0.5  # tasks that a forecast counts as in each bin
_TREND_SPAN: Final = 0.1  # of the age, over which the trend of a bin's forecast forgets to 1/e
_BIN_MEMORY: Final = 100.0  # tasks passing through a bin after which its counts have faded to 1/e
_MEMORY: Final = 300.0  # tasks ended anywhere after which all counts have faded to 1/e
_REBUILD_AFTER: Final = 20.0  # tasks ended in well-known bins, after which to plan again
_RUNNING_NEWS: Final = 0.1  # news in an observation of a running task, to that of an ended one

_SCOUTS: Final = 50.0  # tasks polled early for all others, times the growth of the root of the age
_SCOUT_SHARE: Final = 0.125  # of the running tasks, at most
_SCOUT_TASKS: Final = 16  # tasks running at least, where a few are polled early for all
_KNOWN_TASKS: Final = 20.0  # tasks that have reached an age at which no scouts are needed any more

_MIN_ENDED: Final = 0.05  # tasks ended in a bin, faded; fewer do not extend the plan to it
_JUST_AFTER: Final = 0.01  # s, by which timers may be late
_MIN_DELAY: Final = 0.25  # s
_MAX_DELAY: Final = 120.0  # s
_BLIND_DELAY: Final = 15.0  # s, at ages beyond the plan
_VERSION: Final = 2
_MAX_SAVED: Final = 65_536  # characters, some ten times what is saved


def _prior_rate(age: float) -> float:
    i = bisect_right(_PRIOR_AGES, age) - 1
    a, b = _PRIOR_AGES[i : i + 2]
    share = (age - a) / (b - a)
    return _PRIOR_RATES[i] * (1.0 - share) + _PRIOR_RATES[i + 1] * share


# The share of the tasks that reach a bin which end in it, by the prior.
_PRIOR: Final = tuple(
    1.0 - math.exp(-_prior_rate((a + b) / 2) * (b - a)) for a, b in itertools.pairwise(_EDGES)
)
_PRIOR_BINS: Final = bisect_left(_EDGES, _PRIOR_REACH)
_KEPT: Final = tuple(math.exp(-span / _TREND_SPAN) for span in _SPANS)
_BLIND_SURVIVAL: Final = math.exp(-_PRIOR_RATES[-1] * _BLIND_DELAY)


class DurationModel:
    """The durations of tasks, learned from every poll, and the age at which to poll next.

    ``cost_per_request`` is the seconds of lag that one request is worth, above 0. With 2.0 polls
    are rarer than by default, with 0.5 more frequent. Raises `ConfigurationError` for any other
    value.

    Age is divided into bins. Each bin counts the tasks that ended in it, and those that reached
    its end or ended in it. Their ratio is the probability of ending there (the Kaplan-Meier
    estimator). Old tasks are forgotten by scaling both counts down together, which leaves the
    ratio as it is.
    """

    def __init__(self, *, cost_per_request: float = 1.0) -> None:
        if not 0.0 < cost_per_request < math.inf:
            raise ConfigurationError(
                f"cost_per_request must be a positive number of seconds, not {cost_per_request!r}"
            )
        self.cost_per_request: Final = cost_per_request
        self._ended = [0.0] * _BINS
        self._reached = [0.0] * _BINS
        self._finished = 0
        self._ages: dict[str, float] = {}
        # Not yet counted: the bins that tasks crossed, +1 at the first and -1 after the last, and
        # the tasks that ended in each.
        self._crossed = [0] * (_BINS + 1)
        self._just_ended = [0] * _BINS
        self._news = 0.0  # since the plan was made; 1.0 is enough for a new one
        self._revision = 0
        self._plan()

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
            if since <= age < math.inf:
                self._ages[task_id] = age
            if since < age < math.inf:
                self._run(since, age)
                self._news += self._news_at(age) * _RUNNING_NEWS
        else:
            since = self._ages.pop(task_id, 0.0)
            if 0.0 <= duration < math.inf:
                self._end(since, age, duration)
                self._finished += 1
                self._news += self._news_at(duration)

    def forget(self, task_id: str) -> None:
        """Free what is kept for a task that nobody waits for; what it taught stays."""
        self._ages.pop(task_id, None)

    def next_age(self, age: float, step: float = 1.0) -> float:
        """Return the age in seconds at which to poll a task again that runs at ``age``.

        ``step`` multiplies the delay: 1.0, or near it for jitter. The result is 0.25 s to 120 s
        after ``age``, and 15 s after it beyond 300 s and all known durations.
        """
        self._refresh()
        age = max(0.0, age)
        found = age + (self._planned(age) - age) * step
        return max(age + _MIN_DELAY, min(found, age + _MAX_DELAY))

    @property
    def revision(self) -> int:
        """A number that changes with the plan: polls already planned may be due earlier now."""
        self._refresh()
        return self._revision

    def scout_share(self, start: float, until: float) -> float:
        """Return the share of tasks to be polled early, between two ages, on behalf of all others.

        It grows with the root of the age, as the cost of polls does. It is 0 unless many tasks run,
        and few are known to have reached the age ``until``.
        """
        i = min(bisect_right(_EDGES, until), _BINS) - 1
        if start >= until or self._reached[i] >= _KNOWN_TASKS or len(self._ages) < _SCOUT_TASKS:
            return 0.0
        return min(_SCOUT_SHARE, _SCOUTS * (math.sqrt(until) - math.sqrt(start)) / len(self._ages))

    def merge(self, other: DurationModel) -> None:
        """Learn what another model has learned, such as that of another process.

        Each bin has the ratio of both models together, and the evidence of the better informed
        one. So models that have learned from the same tasks may be merged any number of times.
        """
        other._settle()
        self._settle()
        for i, reached in enumerate(other._reached):
            total = self._reached[i] + reached
            if total:
                known = max(self._reached[i], reached)
                self._ended[i] = (self._ended[i] + other._ended[i]) * known / total
                self._reached[i] = known
        self._finished = max(self._finished, other._finished)
        self._plan()

    def to_json(self) -> str:
        """Return what was learned as JSON, for :meth:`from_json` in a later process."""
        self._settle()
        known = max((i + 1 for i, tasks in enumerate(self._reached) if tasks), default=0)
        state = {
            "version": _VERSION,
            "finished": self._finished,
            "ended": [_rounded(tasks) for tasks in self._ended[:known]],
            "reached": [_rounded(tasks) for tasks in self._reached[:known]],
        }
        return json.dumps(state, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, *, cost_per_request: float = 1.0) -> DurationModel:
        """Return a model with what :meth:`to_json` has saved.

        Raises :class:`ConfigurationError` if ``text`` is anything else, or if another version of
        this package has saved it in another form.
        """
        model = cls(cost_per_request=cost_per_request)
        state = _saved_state(text)
        model._finished = int(_saved_number("finished", state.get("finished"), 1e15))
        model._ended = _saved_numbers(state, "ended", 2.0 * _MEMORY)
        model._reached = _saved_numbers(state, "reached", 2.0 * _BIN_MEMORY)
        model._plan()
        return model

    def _news_at(self, age: float) -> float:
        """Return the news in the end of a task at an age: the fewer were seen there, the more."""
        i = min(max(1, bisect_left(_EDGES, age)), _BINS) - 1
        return 1.0 / min(1.0 + self._reached[i], _REBUILD_AFTER)

    def _refresh(self) -> None:
        if self._news >= 1.0:
            self._plan()

    def _end(self, since: float, age: float, duration: float) -> None:
        """Count a task that ended after ``duration``, but not before it was seen to run.

        A poll within the bin does not count there: it would see ended tasks, and none that
        reached the end of the bin.
        """
        i = max(bisect_left(_EDGES, duration), bisect_right(_EDGES, since)) - 1
        if i >= _BINS:
            self._run(since, _EDGES[-1])
        elif since < _EDGES[i] and age < _EDGES[i + 1]:
            self._run(since, _EDGES[i])
        else:
            self._just_ended[i] += 1
            self._run(since, _EDGES[i + 1])

    def _run(self, since: float, until: float) -> None:
        """Count a task that ran from one age to another in the bins whose ends it has reached."""
        self._crossed[bisect_right(_EDGES, since) - 1] += 1
        self._crossed[bisect_right(_EDGES, until) - 1] -= 1

    def _settle(self) -> None:
        """Count what was observed since the last time.

        Bins that tasks no longer reach fade too, a little for each task that ended.
        """
        fade = (1.0 - 1.0 / _MEMORY) ** sum(self._just_ended)
        crossings = 0
        for i, ended in enumerate(self._just_ended):
            crossings += self._crossed[i]
            if crossings:
                keep = (1.0 - 1.0 / _BIN_MEMORY) ** crossings
                counted = _BIN_MEMORY * (1.0 - keep)
                self._reached[i] = self._reached[i] * keep + counted
                self._ended[i] = self._ended[i] * keep + counted * ended / crossings
        self._ended = [tasks * fade for tasks in self._ended]
        self._reached = [tasks * fade for tasks in self._reached]
        self._crossed = [0] * (_BINS + 1)
        self._just_ended = [0] * _BINS

    def _plan(self) -> None:
        """Find the next age from each edge that costs least, by dynamic programming.

        ``lag[j] - lag[i] - (1 - survival[i]) * (edge[j] - edge[i])`` is the lag of the tasks that
        end between edges i and j if they are next polled at j. It grows with j, so the search for
        the best j ends where the lag alone costs more than the best so far. The best j never
        falls as i grows, which bounds the search too.
        """
        self._news = 0.0
        self._revision += 1
        self._settle()
        survival = self._survival()
        lag = list(itertools.accumulate(map(_missed, survival, _WIDTHS), initial=0.0))
        end = len(survival) - 1
        polls = 1.0 / (1.0 - _BLIND_SURVIVAL)
        blind = (self.cost_per_request + _BLIND_DELAY) * polls - 1.0 / _PRIOR_RATES[-1]
        # The cost still to come at each edge, shared by all tasks, the ended ones included.
        cost = [0.0] * end + [survival[end] * blind]
        best = [end] * (end + 1)
        for i in range(end - 1, -1, -1):
            least, ended, edge, base = math.inf, 1.0 - survival[i], _EDGES[i], lag[i]
            for j in range(i + 1, best[i + 1] + 1):
                late = lag[j] - base - ended * (_EDGES[j] - edge)
                if late >= least:
                    break
                if late + cost[j] < least:
                    least = late + cost[j]
                    best[i] = j
            cost[i] = least + self.cost_per_request * survival[i]
        self._next = [_EDGES[j] for j in best]
        self._next[end] += _BLIND_DELAY

    def _survival(self) -> list[float]:
        """Return the probability that a task lives to each edge that the plan covers.

        The forecast for a bin that few have reached is the trend of the bins before it, or the
        prior where these are as little known. It counts as `_PRIOR_TASKS` tasks.
        """
        known = next((i + 1 for i in range(_BINS - 1, -1, -1) if self._ended[i] > _MIN_ENDED), 0)
        alive, survival = 1.0, [1.0]
        trend_ended = trend_reached = 0.0
        counts = zip(self._ended, self._reached, _PRIOR, _SPANS, _KEPT, strict=True)
        for ended, reached, prior, span, kept in itertools.islice(counts, max(known, _PRIOR_BINS)):
            trend_weight = trend_reached + _PRIOR_TASKS
            forecast = (trend_ended * span + _PRIOR_TASKS * prior) / trend_weight
            share = (ended + _PRIOR_TASKS * forecast) / (reached + _PRIOR_TASKS)
            alive *= max(0.0, 1.0 - share)
            survival.append(alive)
            trend_ended = (trend_ended + ended) * kept
            trend_reached = (trend_reached + reached * span) * kept
        return survival

    def _planned(self, age: float) -> float:
        """Return the planned age, between the plans of the edges around ``age``.

        Where these are far apart, many tasks end at the second edge and none for long after it. A
        task that is polled between the edges may be one of them.
        """
        i = bisect_right(_EDGES, age) - 1
        if i >= len(self._next) - 1:
            return age + _BLIND_DELAY
        a, b = self._next[i], self._next[i + 1]
        if b - a > 4.0 * _WIDTHS[i]:
            return a
        return a + (age - _EDGES[i]) / _WIDTHS[i] * (b - a)


def _missed(survival: float, width: float) -> float:
    """Return the lag that tasks ended before a bin add up in it."""
    return (1.0 - survival) * width


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


def _saved_numbers(state: dict[str, Any], name: str, limit: float) -> list[float]:
    numbers: list[Any] = state.get(name, [None])
    if type(numbers) is not list or len(numbers) > _BINS:
        raise ConfigurationError(f"not a saved duration model: {name!r} has the wrong length")
    saved = [_saved_number(name, number, limit) for number in numbers]
    return saved + [0.0] * (_BINS - len(saved))


def _saved_number(name: str, number: Any, limit: float) -> float:
    if type(number) not in (int, float) or not 0.0 <= number <= limit:
        raise ConfigurationError(f"not a saved duration model: {name!r} is out of range")
    return float(number)


class wait_learned(wait_base):  # noqa: N801  # tenacity's way of naming strategies
    """Wait until the age at which ``model`` expects a poll to be worth its request.

    ``jitter`` is a strategy whose value multiplies the delay, so that tasks begun together are not
    polled together. A failed poll may have missed the task's end, so after it the delay is at most
    an exponential backoff: 1 s, growing by 1.4 up to 8 s, multiplied by the value of ``spread``.
    At ages about which the model knows little, a few of many tasks are scouts, and polled earlier.
    They are those for which the value of ``scout``, from 0 to 1, is smallest.
    """

    def __init__(
        self,
        model: DurationModel,
        *,
        jitter: wait_base = wait_random(1.0, 1.02),  # noqa: B008  # a strategy holds no state
        spread: wait_base = wait_random(0.8, 1.2),  # noqa: B008
        scout: wait_base = wait_random(0, 1),  # noqa: B008
    ) -> None:
        self.model = model
        self.jitter = jitter
        self.spread = spread
        self.scout = scout

    def __call__(self, retry_state: RetryCallState) -> float:
        if not isinstance(retry_state, PollState):
            return self._learned(retry_state, retry_state.seconds_since_start or 0.0)
        delay = self._learned(retry_state, retry_state.age)
        if retry_state.failures:
            delay = min(delay, _backoff(retry_state.failures) * self.spread(retry_state))
        return delay

    def has_moved(self, age: float, expected: float) -> bool:
        """Return True if a poll is to be planned again.

        It follows a poll at ``age``, and the model expected it at ``expected`` when it was planned.
        """
        change = abs(self.model.next_age(age) - expected)
        return change > _MIN_DELAY + (expected - age) / 20.0

    @staticmethod
    def overdue_age(age: float) -> float:
        """Return the age in seconds at which to poll a task whose poll has moved to before ``age``.

        It is the next whole second, as the durations of the API are: just before one, a poll would
        miss all tasks that end at it. Just after one it is ``age`` itself.
        """
        return max(age, math.ceil(age - _JUST_AFTER))

    def delay_again(self, state: PollState, expected: float) -> float:
        """Return the delay of a poll that has moved; scouts are out up to the age ``expected``."""
        return self._learned(state, state.age, expected)

    def _learned(self, state: RetryCallState, age: float, scouted: float = 0.0) -> float:
        planned = self.model.next_age(age, self.jitter(state))
        start = max(age + _MIN_DELAY, scouted)
        share = self.model.scout_share(start, planned)
        if share > 0.0 and (place := self.scout(state)) < share:
            root = math.sqrt(start)
            return (root + place / share * (math.sqrt(planned) - root)) ** 2 - age
        return planned - age


def _backoff(failures: int) -> float:
    return float(min(8.0, 1.4 ** min(failures - 1, 10)))
