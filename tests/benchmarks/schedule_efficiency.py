"""The cost of polling schedules, for simulated tasks: nothing sleeps.

A schedule costs J = mean lag + COST x mean requests for each task, in seconds; lower is better.
The poll at age 0, which every wait makes, costs all schedules the same and is not counted. Every
schedule is a tenacity wait strategy that is handed a `PollState`, as in a real wait; the learned
one is what ships. The optimum knows the true distribution, by dynamic programming.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tenacity import RetryCallState, wait_fixed
from tenacity.wait import wait_base

from kontext_async.schedule import DurationModel, PollState, wait_learned

Draw = Callable[[random.Random], float]
Spent = Sequence[tuple[int, float]]  # each task's requests, and its lag in seconds

COST = 1.0  # seconds of lag that one request is worth
FIXED = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20)  # s; the best of them is chosen in hindsight
SEEDS = tuple(range(101, 113))  # none of them chose a constant of the schedule
SETTLED = 200  # tasks ended after a shift, from which on "settled" counts
ARRIVALS = ("one a second", "all at once")
REPLAN_SAMPLE, REPLAN_PAUSE = 10, 1e-4  # tasks, and s for each task, as in a client
PAUSE = 600.0  # s between two batches where all tasks of a batch begin at once


def lognormal(median: float, sigma: float) -> Draw:
    """Durations with this median in seconds."""
    return lambda rng: rng.lognormvariate(math.log(median), sigma)


def modes(*humps: tuple[float, float, float]) -> Draw:
    """Durations around several means: each hump is its share, mean and standard deviation."""

    def draw(rng: random.Random) -> float:
        u = rng.random()
        for share, mean, deviation in humps:
            u -= share
            if u < 0:
                return max(0.1, rng.gauss(mean, deviation))
        return max(0.1, rng.gauss(*humps[-1][1:]))

    return draw


def whole(draw: Draw) -> Draw:
    """The same durations in whole seconds, as the API gives them."""
    return lambda rng: float(max(1, round(draw(rng))))


def stragglers(rng: random.Random) -> float:
    """12 s, and 5 % of 30 to 320 s."""
    return rng.uniform(30, 320) if rng.random() < 0.05 else lognormal(12, 0.2)(rng)


def mixed(rng: random.Random) -> float:
    """Two models and a few stragglers."""
    if rng.random() < 0.03:
        return rng.uniform(60, 180)
    return rng.lognormvariate(math.log(9), 0.35) if rng.random() < 0.7 else lognormal(22, 0.4)(rng)


TWO_MODES = modes((0.5, 5, 0.5), (0.5, 45, 3))
THREE_MODES = modes((0.3, 4, 0.4), (0.4, 15, 1.5), (0.3, 60, 5))

# Each shape is what the first half of the tasks take, and what the second half take.
SHAPES: dict[str, tuple[Draw, Draw]] = {
    "tight": (lognormal(12, 0.2),) * 2,
    "mixed": (mixed,) * 2,
    "wide": (lognormal(20, 0.8),) * 2,
    "two modes": (TWO_MODES,) * 2,
    "two modes, whole seconds": (whole(TWO_MODES),) * 2,
    "three modes": (THREE_MODES,) * 2,
    "three modes, whole seconds": (whole(THREE_MODES),) * 2,
    "tight, whole seconds": (whole(lognormal(12, 0.2)),) * 2,
    "uniform": (lambda rng: rng.uniform(10, 20),) * 2,
    "Pareto": (lambda rng: 8 * rng.paretovariate(1.5),) * 2,
    "stragglers": (stragglers,) * 2,
    "150 s": (lognormal(150, 0.3),) * 2,
    "2 s": (lognormal(2, 0.3),) * 2,
    "shift up": (lognormal(12, 0.2), lognormal(48, 0.2)),
    "shift down": (lognormal(48, 0.2), lognormal(12, 0.2)),
}

# What the table calls them.
LABELS = {
    "tight": "tight: lognormal 12 s, sigma 0.2",
    "mixed": "mixed: 70 % near 9 s, 27 % near 22 s, 3 % of 60 to 180 s",
    "wide": "wide: lognormal 20 s, sigma 0.8",
    "two modes": "two modes: 5 s and 45 s",
    "three modes": "three modes: 4, 15 and 60 s",
    "uniform": "uniform, 10 to 20 s",
    "Pareto": "Pareto, 8 s and 1.5",
    "stragglers": "stragglers: 12 s, and 5 % of 30 to 320 s",
    "150 s": "lognormal 150 s, sigma 0.3",
    "2 s": "lognormal 2 s, sigma 0.3",
    "shift up": "from 12 s to 48 s half-way",
    "shift down": "from 48 s to 12 s half-way",
}


class Jitter(wait_base):
    """A number from a range, by a generator of its own."""

    def __init__(self, low: float, high: float, seed: int) -> None:
        self.low, self.high, self.rng = low, high, random.Random(seed)

    def __call__(self, retry_state: RetryCallState) -> float:
        return self.rng.uniform(self.low, self.high)


class Exponential(wait_base):
    """1 s, growing by 1.5 to 10 s, +-20 %."""

    def __init__(self, seed: int) -> None:
        self.jitter = Jitter(0.8, 1.2, seed)

    def __call__(self, retry_state: RetryCallState) -> float:
        growth = 1.5 ** min(retry_state.attempt_number - 1, 20)
        return min(10.0, growth) * self.jitter(retry_state)


class Planned(wait_base):
    """Polls at given ages, then every 15 s."""

    def __init__(self, ages: Sequence[float]) -> None:
        self.ages = ages

    def __call__(self, retry_state: PollState) -> float:
        i = bisect_right(self.ages, retry_state.age + 1e-6)  # reached, apart from rounding
        return self.ages[i] - retry_state.age if i < len(self.ages) else 15.0


def optimum(draw: Draw, *, cost: float = COST, sample: int = 20_000) -> list[float]:
    """The ages to poll at if the distribution is known."""
    rng = random.Random(8)
    xs = sorted(draw(rng) for _ in range(sample))
    ages = _grid(xs)
    done = [bisect_right(xs, age) for age in ages]
    sums = [0.0]
    for x in xs:
        sums.append(sums[-1] + x)
    took = [sums[k] for k in done]
    # value[i]: what is still to pay at a poll at ages[i], times the sample, if all goes best.
    value, following = [0.0] * len(ages), [0] * len(ages)
    for i in range(len(ages) - 2, -1, -1):
        best = math.inf
        for j in range(i + 1, len(ages)):
            lag = ages[j] * (done[j] - done[i]) - (took[j] - took[i])
            if lag >= best:  # it grows with j
                break
            if lag + value[j] < best:
                best, following[i] = lag + value[j], j
        value[i] = best + cost * (sample - done[i])
    plan, i = [], 0
    while i < len(ages) - 1:
        i = following[i]
        plan.append(ages[i])
    return plan


def _grid(xs: Sequence[float]) -> list[float]:
    """Ages worth considering: quantiles, and even steps that reach to the longest duration."""
    quantiles = {xs[i * len(xs) // 800] for i in range(1, 800)}
    steps = {k * 0.25 for k in range(1, 480)} | {120.0 + k for k in range(4_000)}
    return [0.0, *sorted(x for x in quantiles | steps if x < xs[-1]), xs[-1]]


@dataclasses.dataclass
class _Task:
    """A simulated task; the model expected its next poll, planned for ``due``, at ``expected``."""

    start: float
    duration: float
    state: PollState
    due: float
    polls: int = 0  # the first, at age 0, included
    expected: float = 0.0
    is_scout: bool = False
    version: int = 0  # of its entry in the queue


def simulate(
    wait: Callable[[PollState], float],
    durations: Sequence[float],
    starts: Sequence[float],
    model: DurationModel | None = None,
) -> tuple[Spent, list[int]]:
    """Each task's requests and lag, and the tasks in the order in which they were seen to end.

    Polls of a model's strategy move while they are planned, as a client moves them: when they are
    due, and all of them when the model has a new revision that moves one of a sample.
    """
    run = _Run(wait, durations, starts, model)
    while run.queue:
        run.step()
    return run.spent, run.order


class _Run:
    def __init__(
        self,
        wait: Callable[[PollState], float],
        durations: Sequence[float],
        starts: Sequence[float],
        model: DurationModel | None,
    ) -> None:
        self.wait, self.model = wait, model
        self.tasks = [
            _Task(start, duration, PollState(start), due=start)
            for start, duration in zip(starts, durations, strict=True)
        ]
        self.running: dict[int, None] = {}
        self.spent: list[tuple[int, float]] = [(0, 0.0)] * len(self.tasks)
        self.order: list[int] = []
        self.revision = 0
        self.replan_from = 0.0
        self.queue = [(task.due, k, 0) for k, task in enumerate(self.tasks)]
        heapq.heapify(self.queue)

    def plan(self, k: int, now: float) -> None:
        task = self.tasks[k]
        if isinstance(self.wait, wait_learned):
            delay = self.wait.delay_again(task.state, task.expected)
            task.expected = self.wait.model.next_age(task.state.age)
            task.is_scout = task.state.age + delay < task.expected - 1e-6
        else:
            delay = self.wait(task.state)
        task.due = task.start + task.state.age + delay
        if task.due < now:
            task.due = task.start + wait_learned.overdue_age(now - task.start)
        task.version += 1
        heapq.heappush(self.queue, (task.due, k, task.version))

    def has_moved(self, k: int) -> bool:
        task, wait = self.tasks[k], self.wait
        if not isinstance(wait, wait_learned) or not task.polls or task.is_scout:
            return False
        return wait.has_moved(task.state.age, task.expected)

    def step(self) -> None:
        now, k, version = heapq.heappop(self.queue)
        task = self.tasks[k]
        if version != task.version:
            return
        if self.has_moved(k):
            self.plan(k, now)
            if task.due > now + 0.2:
                return
            task.version += 1
        age = now - task.start
        task.polls += 1
        if task.polls > 1 and age >= task.duration - 1e-9:
            self.end(k, now)
            return
        self.running[k] = None
        if self.model:
            self.model.observe(str(k), age)
        task.state.update(now=now, attempt=task.polls, age=age)
        task.expected = 0.0
        self.plan(k, now)

    def end(self, k: int, now: float) -> None:
        task = self.tasks[k]
        age = now - task.start
        self.spent[k] = task.polls - 1, age - task.duration
        self.order.append(k)
        self.running.pop(k)
        if self.model is None:
            return
        self.model.observe(str(k), age, task.duration)
        if self.model.revision != self.revision and now >= self.replan_from:
            self.revision = self.model.revision
            self.replan(now)

    def replan(self, now: float) -> None:
        running = list(self.running)
        stride = max(1, len(running) // REPLAN_SAMPLE)
        if any(map(self.has_moved, running[self.revision % stride :: stride])):
            self.replan_from = now + REPLAN_PAUSE * len(running)
            for k in running:
                if self.has_moved(k):
                    self.plan(k, now)


def strategy(model: DurationModel, seed: int) -> wait_learned:
    """The schedule that ships, with chance of its own."""
    return wait_learned(model, jitter=Jitter(1.0, 1.02, seed), scout=Jitter(0, 1, seed + 1))


def learned(
    durations: Sequence[float], starts: Sequence[float], *, seed: int = 9, cost: float = COST
) -> tuple[Spent, list[int]]:
    """`simulate` with the schedule that ships, from a fresh model on."""
    model = DurationModel(cost_per_request=cost)
    wait = strategy(model, seed)
    return simulate(wait, durations, starts, model)


def mean_cost(spent: Spent, tasks: Iterable[int], cost: float = COST) -> float:
    """J over some of the tasks."""
    return statistics.fmean(cost * spent[k][0] + spent[k][1] for k in tasks)


def case(shape: str, arrivals: str, tasks: int, seed: int) -> tuple[list[float], list[float]]:
    """Durations, and the times at which tasks begin."""
    before, after = SHAPES[shape]
    rng, half = random.Random(seed), tasks // 2
    durations = [(before if k < half else after)(rng) for k in range(tasks)]
    if arrivals == "one a second":
        return durations, [float(k) for k in range(tasks)]
    second = PAUSE if before is not after else 0.0
    return durations, [0.0 if k < half else second for k in range(tasks)]


def compare(shape: str, arrivals: str, *, tasks: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each schedule: its J, lag and requests, and J over that of the optimum."""
    plans = [Planned(optimum(draw)) for draw in SHAPES[shape]]
    runs: dict[str, list[Any]] = {}
    for seed in seeds:
        durations, starts = case(shape, arrivals, tasks, seed)
        half = tasks // 2
        best = [simulate(plan, durations, starts)[0] for plan in plans]
        outcomes = {
            "exponential": simulate(Exponential(seed), durations, starts),
            **{f"every {s} s": simulate(wait_fixed(s), durations, starts) for s in FIXED},
            "learned": learned(durations, starts, seed=seed),
            "optimum": (best[0][:half] + best[1][half:], range(tasks)),
        }
        for name, (spent, order) in outcomes.items():
            late = [k for k in order if k >= half][SETTLED:]
            runs.setdefault(name, []).append((spent, late))
    rows = {name: _row(shape, arrivals, name, run, runs["optimum"]) for name, run in runs.items()}
    fixed = min((rows[f"every {s} s"] for s in FIXED), key=lambda row: row["J"])
    return [rows["exponential"], fixed, rows["learned"], rows["optimum"]]


def _row(shape: str, arrivals: str, name: str, runs: list[Any], best: list[Any]) -> dict[str, Any]:
    cost = statistics.fmean(mean_cost(spent, range(len(spent))) for spent, _ in runs)
    least = statistics.fmean(mean_cost(spent, range(len(spent))) for spent, _ in best)
    row = {
        "shape": shape,
        "arrivals": arrivals,
        "schedule": name,
        "J": cost,
        "lag": statistics.fmean(lag for spent, _ in runs for _, lag in spent),
        "requests": statistics.fmean(requests for spent, _ in runs for requests, _ in spent),
        "ratio": cost / least,
        "settled_ratio": None,
    }
    if shape.startswith("shift") and arrivals == "one a second":
        settled = [
            mean_cost(spent, late) / mean_cost(ideal, late)
            for (spent, late), (ideal, _) in zip(runs, best, strict=True)
        ]
        row["settled_ratio"] = statistics.fmean(settled)
    return row


def run(*, tasks: int = 2000, seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """All shapes and arrivals; plain data."""
    return [
        row
        for shape in SHAPES
        for arrivals in ARRIVALS
        for row in compare(shape, arrivals, tasks=tasks, seeds=seeds)
    ]


def run_lognormals(
    *,
    medians: Sequence[float] = (6, 12, 25, 60),
    sigmas: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    tasks: int = 2000,
    seeds: Sequence[int] = SEEDS[:5],
) -> list[dict[str, Any]]:
    """The learned schedule's J over that of the optimum, one row for each median and sigma."""
    rows = []
    for median, sigma in itertools.product(medians, sigmas):
        draw = lognormal(median, sigma)
        plan = Planned(optimum(draw))
        row: dict[str, Any] = {"median_s": median, "sigma": sigma}
        for arrivals in ARRIVALS:
            costs, best = [], []
            for seed in seeds:
                rng = random.Random(seed)
                durations = [draw(rng) for _ in range(tasks)]
                starts = [float(k) if arrivals == "one a second" else 0.0 for k in range(tasks)]
                costs.append(mean_cost(learned(durations, starts, seed=seed)[0], range(tasks)))
                best.append(mean_cost(simulate(plan, durations, starts)[0], range(tasks)))
            row[arrivals] = statistics.fmean(costs) / statistics.fmean(best)
        rows.append(row)
    return rows


FRESH = tuple(itertools.product((2, 4, 8, 15, 30, 60, 120, 180), (0.2, 0.5, 0.8)))


def run_fresh(
    *,
    cases: Iterable[tuple[float, float]] = FRESH,
    together: Sequence[int] = (1, 12),
    waits: int = 600,
    seed: int = 7,
) -> list[dict[str, Any]]:
    """J of fresh models over that of the backoff, for one task and for twelve at once."""
    rows = []
    for median, sigma in cases:
        draw, row = lognormal(median, sigma), {"median_s": median, "sigma": sigma}
        for count in together:
            rng, cost, backoff = random.Random(seed), 0.0, 0.0
            for batch in range(waits // count):
                durations, starts = [draw(rng) for _ in range(count)], [0.0] * count
                cost += mean_cost(learned(durations, starts, seed=batch)[0], range(count))
                spent, _ = simulate(Exponential(batch), durations, starts)
                backoff += mean_cost(spent, range(count))
            row[str(count)] = cost / backoff
        rows.append(row)
    return rows


def lognormals_table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as a Markdown table: both arrivals by median and sigma."""
    by_median: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        by_median.setdefault(row["median_s"], []).append(row)
    sigmas = [row["sigma"] for row in next(iter(by_median.values()))]
    lines = [
        "| median | " + " | ".join(f"sigma {sigma}" for sigma in sigmas) + " |",
        "|--:" * (len(sigmas) + 1) + "|",
    ]
    for median, same in by_median.items():
        cells = [" · ".join(f"{row[arrivals]:.2f}" for arrivals in ARRIVALS) for row in same]
        lines.append(f"| {median} s | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return a Markdown table of J over that of the optimum, by shape of the durations."""
    steady, at_once = ARRIVALS
    ratios: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        schedule = "fixed" if row["schedule"].startswith("every") else row["schedule"]
        ratios.setdefault(row["shape"], {})[schedule, row["arrivals"]] = row["ratio"]
    columns = {
        "backoff": ("exponential", steady),
        "best fixed interval": ("fixed", steady),
        "learned, one a second": ("learned", steady),
        "learned, all at once": ("learned", at_once),
    }
    lines = ["| durations | " + " | ".join(columns) + " |", "|---" + "|--:" * len(columns) + "|"]
    for shape, found in ratios.items():
        cells = " | ".join(f"{found[column]:.2f}" for column in columns.values())
        lines.append(f"| {LABELS.get(shape, shape)} | {cells} |")
    return "\n".join(lines)


def ages_polled(wait: Callable[[PollState], float], until: float) -> list[float]:
    """Return the ages, up to one, at which a strategy would poll a task."""
    state, ages = PollState(0.0), [0.0]
    while ages[-1] <= until:
        state.update(now=ages[-1], attempt=len(ages), age=ages[-1])
        ages.append(ages[-1] + wait(state))
    return ages[1:-1]


def by_age(*, tasks: int = 2000, until: float = 60.0, bins: int = 120) -> list[dict[str, Any]]:
    """Return when tasks end, counted in bins, and when each schedule polls, for three shapes."""
    rows = []
    for shape in ("tight", "mixed", "wide"):
        durations, starts = case(shape, "one a second", tasks, 7)
        model = DurationModel()
        simulate(strategy(model, 9), durations, starts, model)
        ended = Counter(int(duration / until * bins) for duration in durations)
        schedules: dict[str, Callable[[PollState], float]] = {
            "exponential": lambda s: min(10.0, 1.5 ** (s.attempt_number - 1)),
            "optimum": Planned(optimum(SHAPES[shape][0])),
            "learned": wait_learned(model, jitter=wait_fixed(1.0)),
        }
        polls = {name: ages_polled(wait, until) for name, wait in schedules.items()}
        rows.append(
            {
                "shape": shape,
                "tasks": tasks,
                "until": until,
                "ended": [ended[k] for k in range(bins)],
                "polls": polls,
            }
        )
    return rows
