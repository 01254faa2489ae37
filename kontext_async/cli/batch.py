"""A batch whose results go into a folder, and the contents of such a folder."""

from __future__ import annotations

import importlib.util
import shlex
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import aiohttp
from rich.table import Column, Table

from kontext_async.cli.input import distinct_ids
from kontext_async.cli.output import (
    Exit,
    Saved,
    exit_code,
    fail,
    say,
    say_where,
    write_summary,
)
from kontext_async.cli.progress import Display, thumbnails_shown
from kontext_async.cli.running import exit_on_error
from kontext_async.cli.tally import BatchTally
from kontext_async.cli.waiting import ids_to_wait_for, say_what_is_left
from kontext_async.client import KontextClient
from kontext_async.errors import KontextError
from kontext_async.outcomes import TaskOutcome
from kontext_async.results import ImageSaver, Ledger, LedgerEntry, write_report
from kontext_async.streams import Stream

LEDGER = "kontext.sqlite3"
_STATES = ("waiting", "done", "failed", "unfinished", "error")


def require_ledger(folder: Path) -> None:
    """Exit if a folder has no ledger."""
    if not (folder / LEDGER).exists():
        fail(f"{folder} holds no results: there is no {LEDGER} in it")


def read_ledger(folder: Path) -> Iterator[LedgerEntry]:
    """Iterate over a folder's ledger; exit if there is none, or if it cannot be read."""
    require_ledger(folder)
    with exit_on_error():
        yield from Ledger.read(folder / LEDGER)


def batch_ids(source: str | None, folder: Path) -> list[str]:
    """Return the ids in a file; without a file, those in the folder's ledger.

    Those on standard input come later.
    """
    if source == "-":
        return []
    if source is not None:
        return distinct_ids([], source)
    if not (folder / LEDGER).exists():
        fail(f"no task ids: give them in a file with --from; {folder} holds no batch to continue")
    return [entry.task_id for entry in read_ledger(folder)]


def make_folder(folder: Path) -> None:
    """Make the folder if it is missing; exit if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        fail(f"cannot use the folder {folder}: it is a file")
    except OSError as error:
        fail(f"cannot use the folder {folder}: {error.strerror}")


def can_report() -> bool:
    """Return True if the extra for reports is installed."""
    return importlib.util.find_spec("jinja2") is not None


def require_report() -> None:
    """Exit if the extra for reports is not installed."""
    if not can_report():
        fail("a report needs its extra: pip install 'kontext-async[report]'")


async def run_batch(
    client: KontextClient,
    tally: BatchTally,
    folder: Path,
    handle: Callable[[TaskOutcome, Saved], None],
    *,
    source: str | None = None,
    session: aiohttp.ClientSession | None = None,
    allow_private: bool = False,
    timeout: float | None,
    batch_timeout: float | None = None,
    retry_failed: bool = False,
) -> Exit:
    """Wait for tasks, save their images, and pass each outcome to ``handle``.

    Tasks that are finished by the folder's ledger are not polled, and images that are saved by it
    are not downloaded.
    """
    display = Display(tally, client)
    async with (
        Ledger(folder / LEDGER) as ledger,
        ImageSaver(
            client, folder, overwrite=True, allow_private=allow_private, session=session
        ) as saver,
    ):
        await saver.sweep()
        await ledger.add(tally.unfinished)
        waiting = ledger.as_completed(
            client,
            ids_to_wait_for(tally, source, display, ledger.add),
            retry_failed=retry_failed,
            timeout=timeout,
            batch_timeout=batch_timeout,
            on_event=tally.count_poll,
        )
        await save_all(ledger, saver, waiting, tally=tally, display=display, handle=handle)
    return tally.exit_code


async def save_all(
    ledger: Ledger,
    saver: ImageSaver,
    waiting: Stream[Any],
    *,
    tally: BatchTally,
    display: Display,
    handle: Callable[[TaskOutcome, Saved], None],
) -> None:
    """Save the images of a stream's outcomes while it goes on, and pass each to ``handle``."""
    with display.shown():
        async with (
            waiting as outcomes,
            aclosing(_counted(outcomes, tally, display)) as counted,
            ledger.save_outcomes(counted, saver) as saves,
        ):
            async for outcome, saved in saves:
                tally.count_image(saved)
                with display.bar_hidden():
                    handle(outcome, saved)
                if isinstance(saved, KontextError):
                    display.show_error(saved)


async def _counted(
    outcomes: AsyncIterable[TaskOutcome], tally: BatchTally, display: Display
) -> AsyncGenerator[TaskOutcome, None]:
    """Pass outcomes on, counted when a wait ends and not when its image is saved."""
    async for outcome in outcomes:
        tally.count_outcome(outcome)
        if outcome.error is not None:
            display.show_error(outcome.error)
        yield outcome


def make_report(folder: Path) -> Exit:
    """Write a folder's report, and print its path."""
    entries = list(read_ledger(folder))
    with exit_on_error():
        submissions = list(Ledger.read_submissions(folder / LEDGER))
    try:
        with thumbnails_shown() as on_progress:
            path = write_report(folder, entries, submissions, on_progress=on_progress)
    except OSError as error:
        say(f"kontext: cannot write the report into {folder}: {error.strerror}")
        return Exit.ERROR
    say_where("Report", path)
    return Exit.DONE


def say_how_to_continue(tally: BatchTally, folder: Path, options: str) -> None:
    """Print the counts after Ctrl-C, and the command that continues the batch."""
    say(f"Interrupted: {tally.counts()}, of {tally.total:,} tasks. These results are in {folder}.")
    say_what_is_left(tally)
    say(f"To continue: kontext batch {options}--into {shlex.quote(str(folder))}", is_copied=True)


def show_status(folder: Path) -> Exit:
    """Count a folder's tasks and images: a table for people, a JSON line for programs."""
    states = Counter(dict.fromkeys(_STATES, 0))
    images = Counter({"saved": 0, "notSaved": 0})
    for entry in read_ledger(folder):
        states[entry.state] += 1
        if entry.state == "done":
            images["saved" if entry.saved_path else "notSaved"] += 1
    table = Table("Tasks", Column("Count", justify="right"))
    for name, count in (*states.items(), ("images saved", images["saved"])):
        table.add_row(name, f"{count:,}")
    write_summary(table, {**states, **images})
    return exit_code(states + images)  # a sum of counters has no zeros
