"""How long tasks took, as the bars of a chart."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

import attrs

__all__ = ["Bar", "Histogram", "histogram"]

_MOST_BARS = 30
# Beyond so many times the 95th percentile one bar holds all, so that a rare tail does not flatten
# the rest: most tasks take 10 to 30 s, a few 300.
_REACH = 1.5


@attrs.frozen
class Bar:
    """``count`` durations from ``start`` to below ``end`` (s); ``end`` is None in the last of all.

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
    """Bars over the durations (s), and what to say of them in words."""

    bars: Sequence[Bar]
    ticks: Sequence[tuple[float, float]]  # (percent of the width, seconds)
    tail: float | None  # where the last bar begins that holds all above it
    count: int
    median: float
    p95: float
    longest: float


def histogram(durations: Sequence[float]) -> Histogram | None:
    """The chart of some durations (s); None where there are none."""
    if not durations:
        return None
    ordered = sorted(durations)
    step = _nice(_top(ordered))
    return Histogram(
        bars=_bars(ordered, step),
        ticks=_ticks(ordered, step),
        tail=_tail(ordered, step),
        count=len(ordered),
        median=statistics.median(ordered),
        p95=_p95(ordered),
        longest=ordered[-1],
    )


def _p95(ordered: Sequence[float]) -> float:
    return ordered[math.ceil(0.95 * len(ordered)) - 1]


def _top(ordered: Sequence[float]) -> float:
    return min(ordered[-1], _REACH * _p95(ordered))


def _nice(top: float) -> float:
    """The finest round step that reaches ``top`` in few enough bars: 1, 2 or 5 times 10ⁿ s."""
    finest = max(top, 1.0) / _MOST_BARS
    power = 10.0 ** math.floor(math.log10(finest))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= finest)


def _places(ordered: Sequence[float], step: float) -> tuple[int, int]:
    """How many bars the body takes, and how many places there are with the tail's."""
    body = math.floor(_top(ordered) / step) + 1
    return body, body + (ordered[-1] >= body * step)


def _bars(ordered: Sequence[float], step: float) -> list[Bar]:
    body, places = _places(ordered, step)
    counts = Counter(min(math.floor(duration / step), body) for duration in ordered)
    highest = max(counts.values())
    return [
        Bar(
            start=place * step,
            end=(place + 1) * step if place < body else None,
            count=counts[place],
            left=100 * place / places,
            width=100 / places,
            height=100 * counts[place] / highest,
        )
        for place in sorted(counts)
    ]


def _ticks(ordered: Sequence[float], step: float) -> list[tuple[float, float]]:
    body, places = _places(ordered, step)
    every = math.ceil(body / 6)
    room = body + 1 if places == body else body - every // 2  # beside the tail's own
    return [(100 * place / places, place * step) for place in range(0, room, every)]


def _tail(ordered: Sequence[float], step: float) -> float | None:
    body, places = _places(ordered, step)
    return None if places == body else body * step
