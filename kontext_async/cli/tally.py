"""Counts of a batch's tasks while it runs."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from rich.table import Column, Table

from kontext_async.cli.output import Exit, Saved, classify, code_of, exit_code
from kontext_async.errors import KontextError
from kontext_async.outcomes import TaskOutcome
from kontext_async.polling import PollEvent

_MIN_WINDOW = 10.0  # s; the rate is of this time, or of the last half if that is longer
_OVERDUE = 1.5  # of the longest duration; less may be the time until the next poll

# Ranks of the parts of a progress line: a narrow terminal shows the lowest.
_FAILED, _LEFT, _OTHERS, _DONE, _PACE, _IN_FLIGHT = range(1, 7)


class Part(NamedTuple):
    """A part of a progress line. ``rank``: 0 for what is never left out."""

    text: str
    rank: int = 0


class Tally:
    """Counts of outcomes, errors and polls, with the ids that have no outcome yet.

    ``durations``, sorted, and ``lags`` are in seconds. A lag is the time from a task's end to the
    poll that saw it, by the task's record and this machine's clock. Those two may disagree, so it
    is at most the time since the poll before; a task that had ended at its first poll has no lag.
    """

    def __init__(self, ids: Iterable[str] = ()) -> None:
        self.unfinished = dict.fromkeys(ids)
        self.total = len(self.unfinished)
        self.is_complete = True  # False while more ids may come
        self.unreadable = 0  # places of the input that hold no id
        self.trouble: KontextError | None = None  # the last poll's; None after a good answer
        self.polls = 0
        self.outcomes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.durations: list[float] = []
        self.lags: list[float] = []
        self._known = set(self.unfinished)
        self._started = 0
        self._last_polls: dict[str, float] = {}
        self._generating: set[str] = set()
        self._now = 0.0
        self._created: dict[str, float] = {}  # by the same clock, of tasks seen that still run
        self._progress: deque[tuple[float, int]] = deque()  # seconds, and tasks finished by then

    @property
    def finished(self) -> int:
        """Number of tasks that have an outcome."""
        return self.total - len(self.unfinished)

    @property
    def to_save(self) -> int:
        """Number of images that are not yet saved, of tasks that have ended."""
        return 0

    @property
    def generating(self) -> list[str]:
        """Unfinished tasks that the API has said it is working on."""
        return [task_id for task_id in self.unfinished if task_id in self._generating]

    @property
    def exit_code(self) -> Exit:
        return max(exit_code(self._results), Exit.USAGE if self.unreadable else Exit.DONE)

    @property
    def _results(self) -> Counter[str]:
        return self.outcomes

    def add(self, ids: Iterable[str]) -> list[str]:
        """Add tasks, and return those that are new."""
        new = [task_id for task_id in dict.fromkeys(ids) if task_id not in self._known]
        self._known.update(new)
        self.unfinished.update(dict.fromkeys(new))
        self.total += len(new)
        return new

    def start(self, ids: Iterable[str]) -> Iterator[str]:
        """Yield the ids, and count each as started."""
        for task_id in ids:
            self._started += 1
            yield task_id

    def count_poll(self, event: PollEvent) -> None:
        """Count a poll; this is a wait's ``on_event``."""
        self.polls += 1
        self.trouble = event.error
        if event.record is not None:
            self._generating.add(event.task_id)
            self._created.setdefault(event.task_id, self._now - _age(event))
        before = self._last_polls.get(event.task_id)
        self._last_polls[event.task_id] = event.elapsed
        ended_at = event.record and event.record.complete_time
        if ended_at and before is not None:
            lag = (datetime.now(UTC) - ended_at).total_seconds()
            self.lags.append(min(max(lag, 0.0), event.elapsed - before))

    def count_outcome(self, outcome: TaskOutcome) -> None:
        """Count a task that has ended."""
        self.outcomes[classify(outcome.error)] += 1
        self._last_polls.pop(outcome.task_id, None)
        self._generating.discard(outcome.task_id)
        self._created.pop(outcome.task_id, None)
        self.unfinished.pop(outcome.task_id, None)
        if (error := outcome.error) is not None:
            code = code_of(error)
            self.errors[type(error).__name__ + ("" if code is None else f" {code}")] += 1
        elif (duration := outcome.unwrap().duration) is not None:
            insort(self.durations, duration.total_seconds())

    def counts(self) -> str:
        """Return the number of each outcome, in words."""
        return ", ".join(part.text for part in self._counts())

    def _counts(self) -> list[Part]:
        failed = self.outcomes["failed"] + self.outcomes["error"]
        parts = [
            Part(f"{self.outcomes['success']:,} done", _DONE),
            Part(f"{failed:,} failed", _FAILED if failed else _DONE),
        ]
        if late := self.outcomes["timeout"]:
            parts.append(Part(f"{late:,} timed out", _OTHERS))
        return parts

    def progress(self, elapsed: float) -> list[Part]:
        """Return the counts and the pace after ``elapsed`` seconds, in the order of reading."""
        self._now = elapsed
        if self.is_complete and not self.unfinished:
            return self._counts()
        in_flight = Part(f"{self._started - self.finished:,} in flight", _IN_FLIGHT)
        return [*self._counts(), *self._pace(elapsed), in_flight]

    def _pace(self, elapsed: float) -> list[Part]:
        """Return the time left and the recent rate, once a tenth of the tasks has ended.

        Before that, the time left would be far too long: the first task has yet to end.
        """
        samples = self._progress
        samples.append((elapsed, self.finished))
        while len(samples) > 2 and samples[1][0] <= elapsed - max(elapsed / 2, _MIN_WINDOW):
            samples.popleft()
        seconds, finished = elapsed - samples[0][0], self.finished - samples[0][1]
        if not (seconds and finished) or self.finished < self.total / 10:
            return []
        rate = finished / seconds
        left = self._time_left(rate) if self.is_complete else None
        pace = Part(f"{rate:,.1f}/s", _PACE)
        if left is None:
            return [pace]
        return [Part(f"{timedelta(seconds=math.ceil(left))} left", _LEFT), pace]

    def _time_left(self, rate: float) -> float | None:
        """Return the seconds until the last task ends, None if too few like it have ended.

        A task that runs may take as long as the longest of as many tasks as run.
        """
        ages, known = [self._now - created for created in self._created.values()], self.durations
        queued = len(self.unfinished) - len(ages)
        if not ages:
            return queued / rate
        youngest = 0.0 if queued else min(ages)
        older = len(known) - bisect_right(known, youngest)  # tasks that ended at a greater age
        if older < len(ages) or sum(age > known[-1] * _OVERDUE for age in ages) > len(ages) / 10:
            return None
        slowest = known[-math.ceil(older / 2 / len(ages))] - youngest
        return max(len(self.unfinished) / rate, queued / rate + slowest)

    def summary(self) -> Table:
        """Return a table of outcomes, errors, durations, lags, and polls per task."""
        table = Table("Summary", Column("Value", justify="right"))
        for name, count in (*self.outcomes.most_common(), *self.errors.most_common()):
            table.add_row(name, f"{count:,}")
        for name, seconds in (("duration", self.durations), ("lag", self.lags)):
            if seconds:
                table.add_row(f"{name} p50, p95", _percentiles(seconds))
        table.add_row("polls per task", f"{self.polls / max(self.finished, 1):.1f}")
        return table


class BatchTally(Tally):
    """A tally that counts images too."""

    def __init__(self, ids: Iterable[str] = ()) -> None:
        super().__init__(ids)
        self.images: Counter[str] = Counter()

    @property
    def _results(self) -> Counter[str]:
        return self.outcomes + self.images

    @property
    def to_save(self) -> int:
        return self.outcomes["success"] - self.images.total()

    def count_image(self, saved: Saved) -> None:
        """Count an image that was saved, or could not be saved."""
        if saved is not None:
            self.images["notSaved" if isinstance(saved, KontextError) else "saved"] += 1

    def _counts(self) -> list[Part]:
        parts = [*super()._counts(), Part(f"{self.images['saved']:,} saved", _DONE)]
        if not_saved := self.images["notSaved"]:
            parts.append(Part(f"{not_saved:,} not saved", _OTHERS))
        if self.to_save and not self.unfinished:
            parts.append(Part(f"{self.to_save:,} to save", _LEFT))
        return parts


def _age(event: PollEvent) -> float:
    """Return a task's age in seconds by its record, which may be older than the wait."""
    created = event.record and event.record.create_time
    by_record = (datetime.now(UTC) - created).total_seconds() if created else 0.0
    return max(by_record, event.elapsed)


def _percentiles(seconds: Sequence[float]) -> str:
    """Return the median and the 95th percentile, by nearest rank."""
    ranked = sorted(seconds)
    p50, p95 = (ranked[math.ceil(share * len(ranked)) - 1] for share in (0.5, 0.95))
    return f"{p50:.1f} s, {p95:.1f} s"
