"""What has become of the tasks of a batch, counted as it happens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

from rich.table import Table

from kontext_async.cli.output import Exit, code_of, kind
from kontext_async.errors import KontextError
from kontext_async.polling import PollEvent, TaskOutcome


class Tally:
    """Counts; ``unfinished`` holds the ids that have no outcome yet, in order.

    ``durations`` and ``lags`` are in seconds. A lag is how long a task had been over when a look
    saw it, by the task's own record and this machine's clock; as those two may disagree, it is
    taken as no longer than the time since the look before, and only where there was one.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        self.unfinished = dict.fromkeys(ids)
        self.total = len(self.unfinished)
        self.requests = 0
        self.outcomes: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.exits: set[Exit] = set()
        self.durations: list[float] = []
        self.lags: list[float] = []
        self._started = 0
        self._looks: dict[str, float] = {}

    @property
    def over(self) -> int:
        """Tasks that have an outcome."""
        return self.total - len(self.unfinished)

    @property
    def troubles(self) -> int:
        """Tasks whose outcome is an error."""
        return self.over - self.outcomes["success"]

    def starting(self) -> Iterator[str]:
        """The ids, counted as they are taken up."""
        for task_id in tuple(self.unfinished):
            self._started += 1
            yield task_id

    def looked(self, event: PollEvent) -> None:
        """Count a look; this is a wait's ``on_event``."""
        self.requests += 1
        before = self._looks.get(event.task_id)
        self._looks[event.task_id] = event.elapsed
        over = event.record and event.record.complete_time
        if over and before is not None:
            lag = (datetime.now(UTC) - over) / timedelta(seconds=1)
            self.lags.append(min(max(lag, 0.0), event.elapsed - before))

    def ended(self, outcome: TaskOutcome) -> None:
        """Count a task's end."""
        word, code = kind(outcome.error)
        self.outcomes[word] += 1
        self.exits.add(code)
        self._looks.pop(outcome.task_id, None)
        self.unfinished.pop(outcome.task_id, None)
        if outcome.error is not None:
            self.codes[_name(outcome.error)] += 1
        elif (duration := outcome.unwrap().duration) is not None:
            self.durations.append(duration.total_seconds())

    def counts(self) -> str:
        """The outcomes so far, in words."""
        late = self.outcomes["timeout"]
        failed = self.over - self.outcomes["success"] - late
        done = f"{self.outcomes['success']} done, {failed} failed"
        return f"{done}, {late} timed out" if late else done

    def state(self, elapsed: float) -> str:
        """How the batch stands after so many seconds, and how long the rest may take."""
        rate = self.over / max(elapsed, 1e-3)
        left = timedelta(seconds=math.ceil(len(self.unfinished) / rate)) if rate else "?"
        flying = self._started - self.over
        return f"{self.counts()}, {flying} in flight, {rate:.1f}/s, ETA {left}"

    def summary(self) -> Table:
        """Counts by outcome and by error, durations, requests per task, and lag."""
        table = Table("Summary", "", title_justify="left")
        for word, count in (*self.outcomes.most_common(), *self.codes.most_common()):
            table.add_row(word, str(count))
        table.add_row("duration p50, p95", _spread(self.durations))
        table.add_row("lag p50, p95", _spread(self.lags))
        table.add_row("requests per task", f"{self.requests / max(self.over, 1):.1f}")
        return table


def _name(error: KontextError) -> str:
    """What errors are counted by: the class, with the code where there is one."""
    code = code_of(error)
    return type(error).__name__ if code is None else f"{type(error).__name__} {code}"


def _spread(seconds: Sequence[float]) -> str:
    """The median and the 95th percentile, by nearest rank."""
    if not seconds:
        return "-"
    ranked = sorted(seconds)
    p50, p95 = (ranked[math.ceil(share * len(ranked)) - 1] for share in (0.5, 0.95))
    return f"{p50:.1f} s, {p95:.1f} s"
