"""Requests for tasks whose images go into a folder, and what is uncertain about them."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
from rich.table import Column, Table

from kontext_async.cli.batch import (
    LEDGER,
    make_folder,
    make_report,
    require_ledger,
    require_report,
    save_all,
)
from kontext_async.cli.connection import Connection
from kontext_async.cli.listening import Callbacks, receiving
from kontext_async.cli.output import (
    Exit,
    Saved,
    fail,
    is_for_people,
    one_line,
    outcome_line,
    say,
    submitted_line,
    write_for_people,
    write_line,
    write_result,
    write_summary,
)
from kontext_async.cli.progress import Display
from kontext_async.cli.running import exit_on_error, run
from kontext_async.cli.tally import BatchTally
from kontext_async.client import DEFAULT_CREATION_LIMIT, KontextClient
from kontext_async.creation import SubmittedTask
from kontext_async.outcomes import TaskOutcome
from kontext_async.pacing import RateLimit
from kontext_async.results import (
    ImageSaver,
    KeyedRequest,
    Ledger,
    RequestOutcome,
    SubmissionEntry,
)
from kontext_async.wire import ImageRequest

__all__ = [
    "RequestTally",
    "create_tasks",
    "list_unknown",
    "request_line",
    "resolve_request",
    "run_requests",
]


class RequestTally(BatchTally):
    """A tally of requests for tasks: ``unfinished`` are their keys."""

    def count_outcome(self, outcome: TaskOutcome) -> None:
        super().count_outcome(outcome)
        if isinstance(outcome, RequestOutcome):
            self.unfinished.pop(outcome.key, None)


def request_line(outcome: TaskOutcome, saved: Saved) -> dict[str, Any]:
    """Return the fields of an outcome, with the request's key."""
    line = outcome_line(outcome, saved)
    return {**line, "key": outcome.key} if isinstance(outcome, RequestOutcome) else line


def _prompt_of(outcome: TaskOutcome) -> str | None:
    return outcome.request.prompt if isinstance(outcome, RequestOutcome) else None


def create_tasks(
    items: Sequence[KeyedRequest],
    into: Path,
    options: Connection,
    *,
    as_json: bool,
    report: bool = False,
    dry_run: bool = False,
    creation_limit: RateLimit = DEFAULT_CREATION_LIMIT,
    callbacks: Callbacks | None = None,
    **keywords: Any,
) -> NoReturn:
    """Create tasks for requests, save their images into a folder, and exit."""
    if report:
        require_report()
    with exit_on_error():
        keyed = dict(Ledger.keys_of(items))
        _check_known(keyed, into)
    if dry_run:
        run(_show_plan(keyed, into, options))
    tally = RequestTally(keyed)
    make_folder(into)

    async def create() -> Exit:
        async with options.open(
            creation_limit=creation_limit,
            callback_url=None if callbacks is None else callbacks.url,
        ) as (client, session):
            await run_requests(
                client,
                keyed,
                into,
                tally=tally,
                handle=lambda outcome, saved: write_result(
                    request_line(outcome, saved), as_json=as_json, prompt=_prompt_of(outcome)
                ),
                on_submitted=lambda task: write_result(
                    submitted_line(task), as_json=as_json, prompt=task.request.prompt
                ),
                callbacks=callbacks,
                session=session,
                **keywords,
            )
        _say_what_is_uncertain(into)
        return max(tally.exit_code, make_report(into)) if report else tally.exit_code

    run(create(), on_interrupt=lambda: _say_how_to_continue(tally, into))


async def run_requests(
    client: KontextClient,
    keyed: dict[str, ImageRequest],
    folder: Path,
    *,
    tally: RequestTally,
    handle: Callable[[TaskOutcome, Saved], None],
    on_submitted: Callable[[SubmittedTask], None],
    callbacks: Callbacks | None,
    session: aiohttp.ClientSession | None = None,
    allow_private: bool = False,
    **keywords: Any,
) -> None:
    """Create tasks for requests by key, save their images, and pass each to a callback."""
    display = Display(tally, client)

    def submitted(task: SubmittedTask) -> None:
        with display.bar_hidden():
            on_submitted(task)

    async with (
        Ledger(folder / LEDGER) as ledger,
        ImageSaver(
            client, folder, overwrite=True, allow_private=allow_private, session=session
        ) as saver,
        receiving(callbacks, client, ledger),
    ):
        await saver.sweep()
        waiting = ledger.generate(
            client,
            ((key, keyed[key]) for key in tally.start(keyed)),
            on_submitted=submitted,
            on_event=tally.count_poll,
            **keywords,
        )
        await save_all(ledger, saver, waiting, tally=tally, display=display, handle=handle)


def _submissions(folder: Path) -> list[SubmissionEntry]:
    if not (folder / LEDGER).exists():
        return []
    with exit_on_error():
        return list(Ledger.read_submissions(folder / LEDGER))


def _check_known(keyed: dict[str, ImageRequest], folder: Path) -> None:
    """Exit if a key of the folder's ledger has another request."""
    for entry in _submissions(folder):
        if entry.key in keyed and keyed[entry.key].to_json() != entry.request.to_json():
            fail(
                f"key {entry.key!r} has another request already: "
                "give the changed request a key of its own"
            )


async def _show_plan(keyed: dict[str, ImageRequest], folder: Path, options: Connection) -> Exit:
    states = {entry.key: entry.state for entry in _submissions(folder)}
    counts = Counter(_PLAN[states.get(name, "planned")] for name in keyed)
    async with options.open() as (client, _):
        balance = await client.credits()
    line = {**{name: counts[name] for name in dict.fromkeys(_PLAN.values())}, "credits": balance}
    table = Table("Requests", Column("Count", justify="right"))
    for name, count in line.items():
        table.add_row(name, f"{count:,.10g}")
    write_summary(table, line)
    return Exit.DONE


_PLAN = {
    "planned": "new",
    "submitted": "known",
    "sending": "unknown",
    "unknown": "unknown",
    "refused": "refused",
    "abandoned": "abandoned",
}


def _say_what_is_uncertain(folder: Path) -> None:
    count = sum(entry.state == "unknown" for entry in _submissions(folder))
    if count:
        tasks = "1 task" if count == 1 else f"{count:,} tasks"
        say(f"{tasks} may have been created without an answer, and be paid for. To see which:")
        say(f"  kontext unknown {shlex.quote(str(folder))}", is_copied=True)


def _say_how_to_continue(tally: RequestTally, folder: Path) -> None:
    say(f"Interrupted: {tally.counts()}, of {tally.total:,} requests. The results are in {folder}.")
    say(
        "What was created is paid for. To continue, run the same command again: it pays for no "
        "request twice."
    )
    _say_what_is_uncertain(folder)


def _table(found: Iterable[SubmissionEntry]) -> Table:
    table = Table(Column("Key", overflow="fold"), "Prompt", "Sent, UTC", "Error")
    for entry in found:
        sent = f"{entry.updated_at:%Y-%m-%d %H:%M:%S}"
        texts = (entry.key, entry.request.prompt, sent, entry.error_message)
        table.add_row(*map(one_line, texts))
    return table


def list_unknown(folder: Path) -> Exit:
    """Write the requests that may have been paid for, and say how to decide them."""
    require_ledger(folder)
    found = [entry for entry in _submissions(folder) if entry.state in {"unknown", "sending"}]
    if found and is_for_people():
        write_for_people(_table(found))
    else:
        for entry in found:
            write_line(
                {
                    "key": entry.key,
                    "prompt": entry.request.prompt,
                    "sentAt": entry.updated_at,
                    "message": entry.error_message,
                }
            )
    if not found:
        say("No request is uncertain.")
    else:
        say("Look for each in the provider's web log of tasks, by its prompt and time. Then:")
        say(f"  kontext resolve {shlex.quote(str(folder))} KEY --task-id ID", is_copied=True)
        say(f"  kontext resolve {shlex.quote(str(folder))} KEY --abandon", is_copied=True)
    return Exit.ERROR if found else Exit.DONE


async def resolve_request(folder: Path, key: str, task_id: str | None) -> Exit:
    """Bind an uncertain request to a task, or give it up."""
    require_ledger(folder)
    async with Ledger(folder / LEDGER) as ledger:
        entry = await ledger.resolve(key, task_id)
    write_line({"key": entry.key, "state": entry.state, "taskId": entry.task_id})
    return Exit.DONE
