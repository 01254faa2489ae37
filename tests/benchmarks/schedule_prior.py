"""The prior of the learned schedule, by minimax regret over log-normal durations.

The plan that is best for a mixture of distributions is that of a dynamic programme. The mixture
whose best plan costs most, each distribution against an exponential backoff, is found by
multiplicative weights; its plan has the smallest worst ratio. `python schedule_prior.py` prints
the hazard of this mixture by age, which is what `schedule.py` holds, and the worst ratio.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence

from benchmarks.schedule_efficiency import Exponential, lognormal, mean_cost, simulate

CASES = tuple(
    itertools.product((2, 3, 4.5, 7, 10, 15, 22, 33, 50, 75, 110, 150, 180), (0.2, 0.4, 0.8))
)
AGES = [k * 0.25 for k in range(80)] + [20.0 + k for k in range(280)]  # s


def below(median: float, sigma: float) -> list[float]:
    """The share of log-normal durations below each age."""
    scale = sigma * math.sqrt(2)
    return [0.5 * (1 + math.erf(math.log(age / median) / scale)) if age else 0.0 for age in AGES]


def plan(ended: Sequence[float], tail: float = 15.0) -> list[float]:
    """The ages to poll at if this share of the tasks has ended by each age; then every 15 s."""
    lag = list(
        itertools.accumulate(
            (e * (b - a) for e, (a, b) in zip(ended, itertools.pairwise(AGES), strict=False)),
            initial=0.0,
        )
    )
    last = len(AGES) - 1
    cost, following = [0.0] * last + [(1 - ended[last]) * 8 * tail], [last] * (last + 1)
    for i in range(last - 1, -1, -1):
        best = math.inf
        for j in range(i + 1, following[i + 1] + 1):
            late = lag[j] - lag[i] - ended[i] * (AGES[j] - AGES[i])
            if late >= best:
                break
            if late + cost[j] < best:
                best, following[i] = late + cost[j], j
        cost[i] = best + 1 - ended[i]
    ages, i = [], 0
    while i < last:
        i = following[i]
        ages.append(AGES[i])
    return ages


def price(ages: Sequence[float], durations: Sequence[float], tail: float = 15.0) -> float:
    """J of polls at these ages, then at a steady rate."""
    costs = []
    for duration in durations:
        ahead = itertools.chain(ages, itertools.count(ages[-1] + tail, tail))
        requests, seen = next((n, age) for n, age in enumerate(ahead, 1) if age >= duration)
        costs.append(requests + seen - duration)
    return statistics.fmean(costs)


def run(
    cases: Sequence[tuple[float, float]] = CASES, *, rounds: int = 300, sample: int = 400
) -> tuple[float, list[float]]:
    """The worst ratio to the backoff, and the share of tasks ended by each age in the prior."""
    shares = [below(*case) for case in cases]
    durations = [[lognormal(*case)(random.Random(k)) for k in range(sample)] for case in cases]
    backoff = [
        mean_cost(simulate(Exponential(7), d, [0.0] * sample)[0], range(sample)) for d in durations
    ]
    weights, worst, prior = [1.0] * len(cases), math.inf, shares[0]
    for turn in range(rounds):
        parts = [w / b for w, b in zip(weights, backoff, strict=True)]
        mixture = [
            sum(p * share[i] for p, share in zip(parts, shares, strict=True)) / sum(parts)
            for i in range(len(AGES))
        ]
        ages = plan(mixture)
        ratios = [price(ages, d) / b for d, b in zip(durations, backoff, strict=True)]
        if max(ratios) < worst:
            worst, prior = max(ratios), mixture
        rate, mean = 0.5 / (1 + turn / 40), statistics.fmean(ratios)
        weights = [w * math.exp(rate * (r - mean)) for w, r in zip(weights, ratios, strict=True)]
    return worst, prior


def hazards(
    prior: Sequence[float], ages: Sequence[float] = (1.5, 3, 5, 10, 20, 40, 100, 200)
) -> dict[float, float]:
    """The rate per second at which tasks of an age end."""
    at = {age: next(i for i, edge in enumerate(AGES) if edge >= age) for age in ages}
    return {
        age: math.log((1 - prior[i - 1]) / (1 - prior[i + 1])) / (AGES[i + 1] - AGES[i - 1])
        for age, i in at.items()
    }


if __name__ == "__main__":
    ratio, found = run()
    print(f"worst ratio to the backoff: {ratio:.3f}")
    for age, hazard in hazards(found).items():
        print(f"{age:6.1f} s  {hazard:.4f} a second")
