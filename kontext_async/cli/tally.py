"""Counts of a batch's tasks while it runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

from rich.table import Table

from kontext_async.cli.output import Exit, Saved, classify, code_of, exit_code
from kontext_async.polling import PollEvent, TaskOutcome
from kontext_async.results import SavedImage


class Tally:
    """Counts of outcomes, errors and polls, with the ids that have no outcome yet.

    ``durations`` and ``lags`` are in seconds. A lag is the time from a task's end to the poll that
    saw it, by the task's record and this machine's clock. Those two may disagree, so it is at most
    the time since the poll before; a task that had ended at its first poll has no lag.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        self.unfinished = dict.fromkeys(ids)
        self.total = len(self.unfinished)
        self.polls = 0
        self.outcomes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.durations: list[float] = []
        self.lags: list[float] = []
        self._started = 0
        self._last_polls: dict[str, float] = {}

    @property
    def finished(self) -> int:
        """Number of tasks that have an outcome."""
        return self.total - len(self.unfinished)

    @property
    def unsuccessful(self) -> int:
        return self.finished - self.outcomes["success"]

    @property
    def exit_code(self) -> Exit:
        return exit_code(self.outcomes)

    def start(self) -> Iterator[str]:
        """Yield the unfinished ids, and count each as started."""
        for task_id in tuple(self.unfinished):
            self._started += 1
            yield task_id

    def count_poll(self, event: PollEvent) -> None:
        """Count a poll; this is a wait's ``on_event``."""
        self.polls += 1
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
        self.unfinished.pop(outcome.task_id, None)
        if (error := outcome.error) is not None:
            code = code_of(error)
            self.errors[type(error).__name__ + ("" if code is None else f" {code}")] += 1
        elif (duration := outcome.unwrap().duration) is not None:
            self.durations.append(duration.total_seconds())

    def counts(self) -> str:
        """Return the number of each outcome, in words."""
        failed = self.outcomes["failed"] + self.outcomes["error"]
        done = f"{self.outcomes['success']} done, {failed} failed"
        return f"{done}, {late} timed out" if (late := self.outcomes["timeout"]) else done

    def progress(self, elapsed: float) -> str:
        """Return the counts after ``elapsed`` seconds, with the rate and the time left."""
        rate = self.finished / max(elapsed, 1e-3)
        left = timedelta(seconds=math.ceil(len(self.unfinished) / rate)) if rate else "?"
        in_flight = self._started - self.finished
        return f"{self.counts()}, {in_flight} in flight, {rate:.1f}/s, ETA {left}"

    def summary(self) -> Table:
        """Return a table of outcomes, errors, durations, lags, and polls per task."""
        table = Table("Summary", "", title_justify="left")
        for name, count in (*self.outcomes.most_common(), *self.errors.most_common()):
            table.add_row(name, str(count))
        table.add_row("duration p50, p95", _percentiles(self.durations))
        table.add_row("lag p50, p95", _percentiles(self.lags))
        table.add_row("polls per task", f"{self.polls / max(self.finished, 1):.1f}")
        return table


class BatchTally(Tally):
    """A tally that counts images too."""

    def __init__(self, ids: Iterable[str]) -> None:
        super().__init__(ids)
        self.images: Counter[str] = Counter()

    @property
    def unsuccessful(self) -> int:
        return super().unsuccessful + self.images["notSaved"]

    @property
    def exit_code(self) -> Exit:
        return exit_code(self.outcomes + self.images)

    def count_image(self, saved: Saved) -> None:
        """Count an image that was saved, or could not be saved."""
        if saved is not None:
            self.images["saved" if isinstance(saved, SavedImage) else "notSaved"] += 1

    def counts(self) -> str:
        not_saved = f", {n} not saved" if (n := self.images["notSaved"]) else ""
        return f"{super().counts()}, {self.images['saved']} saved{not_saved}"


def _percentiles(seconds: Sequence[float]) -> str:
    """Return the median and the 95th percentile, by nearest rank."""
    if not seconds:
        return "-"
    ranked = sorted(seconds)
    p50, p95 = (ranked[math.ceil(share * len(ranked)) - 1] for share in (0.5, 0.95))
    return f"{p50:.1f} s, {p95:.1f} s"
