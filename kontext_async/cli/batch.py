"""A batch into a folder: wait, save, record, report; and what such a folder holds."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeAlias

from rich.table import Table

from kontext_async.cli.input import distinct_ids
from kontext_async.cli.output import (
    Exit,
    error_console,
    fail,
    gravest,
    kind,
    outcome_line,
    say,
    write_line,
)
from kontext_async.cli.progress import Display
from kontext_async.cli.running import errors_told
from kontext_async.cli.tally import Tally
from kontext_async.client import KontextClient
from kontext_async.errors import KontextError
from kontext_async.polling import TaskOutcome
from kontext_async.results import ImageSaver, Ledger, SavedImage, write_report

# What became of an outcome's image: saved, not saved, or there was none.
_Saved: TypeAlias = SavedImage | KontextError | None

_LEDGER = "kontext.sqlite3"

# How a task in each state counts towards the exit code of `status`.
_EXITS = {
    "waiting": Exit.TIMEOUT,
    "done": Exit.DONE,
    "failed": Exit.FAILED,
    "unfinished": Exit.TIMEOUT,
    "error": Exit.ERROR,
}


class BatchTally(Tally):
    """Counts the images too."""

    def __init__(self, ids: Iterable[str]) -> None:
        super().__init__(ids)
        self.images: Counter[str] = Counter()

    @property
    def troubles(self) -> int:
        """Tasks that failed, and images that could not be saved."""
        return super().troubles + self.images["not saved"]

    def kept(self, saved: _Saved) -> None:
        """Count an image, or that it could not be saved."""
        if isinstance(saved, SavedImage):
            self.images["saved"] += 1
        elif saved is not None:
            self.images["not saved"] += 1
            self.exits.add(kind(saved)[1])

    def counts(self) -> str:
        """The outcomes and images so far, in words."""
        lost = f", {n} not saved" if (n := self.images["not saved"]) else ""
        return f"{super().counts()}, {self.images['saved']} saved{lost}"


def known_ledger(folder: Path) -> Path:
    """The ledger of a folder of results; ends the command where there is none."""
    if not (folder / _LEDGER).exists():
        fail(f"{folder} holds no results of `kontext batch`: there is no {_LEDGER} in it")
    return folder / _LEDGER


def batch_ids(source: str | None, folder: Path) -> list[str]:
    """The ids of a file; without one, those that a batch before put into the folder's ledger."""
    if source is not None:
        return distinct_ids([], source)
    with errors_told():
        return [entry.task_id for entry in Ledger.read(known_ledger(folder))]


def make_folder(folder: Path) -> None:
    """Make the folder where it is missing; ends the command where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot use the folder {folder}: {error.strerror}")


def can_report() -> bool:
    """Whether the extra that makes reports is installed."""
    return importlib.util.find_spec("jinja2") is not None


def require_report() -> None:
    """End the command where no report could be made, before anything is sent."""
    if not can_report():
        fail("a report needs its extra: pip install 'kontext-async[report]'")


async def keep_all(
    client: KontextClient,
    tally: BatchTally,
    folder: Path,
    take: Callable[[TaskOutcome, _Saved], None],
    *,
    timeout: float | None,
    batch_timeout: float | None = None,
    retry_failed: bool = False,
) -> Exit:
    """Wait for all that is unfinished by the folder's ledger, and save what is not saved yet."""
    display = Display(tally, client)
    async with (
        Ledger(folder / _LEDGER) as ledger,
        ImageSaver(client, folder, overwrite=True) as saver,
    ):
        await saver.sweep()
        await ledger.add(tally.unfinished)
        waiting = ledger.as_completed(
            client,
            tally.starting(),
            retry_failed=retry_failed,
            timeout=timeout,
            batch_timeout=batch_timeout,
            on_event=tally.looked,
        )
        with display.shown():
            async with (
                waiting as outcomes,
                aclosing(_counted(outcomes, tally, display)) as counted,
                ledger.save_outcomes(counted, saver) as kept,
            ):
                async for outcome, saved in kept:
                    tally.kept(saved)
                    with display.aside():
                        take(outcome, saved)
                    if isinstance(saved, KontextError):
                        display.trouble(saved)
    return gravest(tally.exits)


async def _counted(
    outcomes: AsyncIterable[TaskOutcome], tally: Tally, display: Display
) -> AsyncGenerator[TaskOutcome, None]:
    """The same, counted as they come and not as their images are saved."""
    async for outcome in outcomes:
        tally.ended(outcome)
        if outcome.error:
            display.trouble(outcome.error)
        yield outcome


def _kept_line(outcome: TaskOutcome, saved: _Saved) -> dict[str, Any]:
    fields = outcome_line(outcome)
    if isinstance(saved, SavedImage):
        fields["file"] = str(saved.path)
    elif saved is not None:
        fields |= {"error": type(saved).__name__, "message": str(saved)}
    return fields


def print_kept(outcome: TaskOutcome, saved: _Saved) -> None:
    """A line of JSON for a task of which all that can be done has been done."""
    write_line(_kept_line(outcome, saved))


def make_report(folder: Path) -> Exit:
    """Write a folder's report, and say where it is."""
    with errors_told():
        entries = list(Ledger.read(known_ledger(folder)))
    try:
        path = write_report(folder, entries)
    except OSError as error:
        say(f"kontext: cannot write the report into {folder}: {error.strerror}")
        return Exit.ERROR
    say(f"Report: {path}")
    return Exit.DONE


def say_how_to_go_on(tally: BatchTally, folder: Path) -> None:
    """After Ctrl-C: that nothing is lost, and the command that goes on."""
    say(f"Interrupted: {tally.counts()}, of {tally.total} tasks. All of that is kept.")
    if tally.unfinished:
        say("The others may still be generating, and are paid for.")
    say(f"To go on, with the same options: kontext batch --into {shlex.quote(str(folder))}")


def show_status(folder: Path) -> Exit:
    """How a folder's batch stands: a table for people, a line for programs."""
    states = Counter(dict.fromkeys(_EXITS, 0))
    images = Counter({"saved": 0, "notSaved": 0})
    with errors_told():
        for entry in Ledger.read(known_ledger(folder)):
            states[entry.state] += 1
            if entry.state == "done":
                images["saved" if entry.saved_path else "notSaved"] += 1
    table = Table("Tasks", "")
    for name, count in (*states.items(), ("images saved", images["saved"])):
        table.add_row(name, str(count))
    error_console().print(table)
    if not sys.stdout.isatty():
        write_line({**states, **images})
    met = {_EXITS[state] for state, count in states.items() if count}
    return gravest(met | ({Exit.ERROR} if images["notSaved"] else set()))
