"""The durations of tasks, as the bars of a chart."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

import attrs

__all__ = ["Bar", "Histogram", "histogram"]

_MOST_BARS = 30
# One bar holds all durations above 1.5 times the 95th percentile, so that a rare tail does not
# flatten the others: most tasks take 10 to 30 s, a few 300.
_TAIL_FACTOR = 1.5


@attrs.frozen
class Bar:
    """``count`` durations from ``start`` to below ``end`` (s); ``end`` is None in the tail's bar.

    ``left`` and ``width`` are in percent of the chart's width, ``height`` of its height.
    """

    start: float
    end: float | None
    count: int
    left: float
    width: float
    height: float


@attrs.frozen
class Histogram:
    """Bars over the durations (s), and the figures for their caption."""

    bars: Sequence[Bar]
    ticks: Sequence[tuple[float, float]]  # (percent of the width, seconds)
    tail: float | None  # the start of the tail's bar (s)
    count: int
    median: float
    p95: float
    longest: float


def histogram(durations: Sequence[float]) -> Histogram | None:
    """Return the chart of some durations (s), or None if there are none."""
    if not durations:
        return None
    ordered = sorted(map(float, durations))
    longest = ordered[-1]
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    top = min(longest, _TAIL_FACTOR * p95)
    # Records have whole seconds: narrower bars would leave gaps.
    finest = max(top / _MOST_BARS, 1.0 if all(map(float.is_integer, ordered)) else 1 / _MOST_BARS)
    step = _nice(finest)
    body = math.floor(top / step) + 1  # bars before the tail's
    has_tail = longest >= body * step
    return Histogram(
        bars=_bars(ordered, step, body, body + has_tail),
        ticks=_ticks(step, body, body + has_tail),
        tail=body * step if has_tail else None,
        count=len(ordered),
        median=statistics.median(ordered),
        p95=p95,
        longest=longest,
    )


def _nice(finest: float) -> float:
    """Return the first step of 1, 2 or 5 times 10ⁿ s that is not finer."""
    power = 10.0 ** math.floor(math.log10(finest))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= finest)


def _bars(ordered: Sequence[float], step: float, body: int, total: int) -> list[Bar]:
    counts = Counter(min(math.floor(duration / step), body) for duration in ordered)
    highest = max(counts.values())
    return [
        Bar(
            start=index * step,
            end=(index + 1) * step if index < body else None,
            count=counts[index],
            left=100 * index / total,
            width=100 / total,
            height=100 * counts[index] / highest,
        )
        for index in sorted(counts)
    ]


def _ticks(step: float, body: int, total: int) -> list[tuple[float, float]]:
    every = math.ceil(body / 6)
    end = body + 1 if total == body else body - every // 2  # leaves room for the tail's own label
    return [(100 * index / total, index * step) for index in range(0, end, every)]
