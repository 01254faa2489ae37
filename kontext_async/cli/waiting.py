"""A wait for many tasks, without saving anything."""

from __future__ import annotations

import shlex
from collections.abc import AsyncGenerator, Awaitable, Callable

from kontext_async.cli.input import Problem, ids_from_stdin
from kontext_async.cli.output import Exit, say
from kontext_async.cli.progress import Display
from kontext_async.cli.tally import Tally
from kontext_async.client import KontextClient
from kontext_async.outcomes import TaskOutcome

_MAX_IDS_SHOWN = 20


async def wait_for_all(
    client: KontextClient,
    tally: Tally,
    handle: Callable[[TaskOutcome], None],
    *,
    source: str | None = None,
    timeout: float | None,
    batch_timeout: float | None = None,
) -> Exit:
    """Wait for all unfinished tasks, and pass each outcome to ``handle``."""
    display = Display(tally, client)
    waiting = client.as_completed(
        ids_to_wait_for(tally, source, display),
        timeout=timeout,
        batch_timeout=batch_timeout,
        on_event=tally.count_poll,
    )
    with display.shown():
        async with waiting as outcomes:
            async for outcome in outcomes:
                tally.count_outcome(outcome)
                with display.bar_hidden():
                    handle(outcome)
                if outcome.error is not None:
                    display.show_error(outcome.error)
    return tally.exit_code


async def ids_to_wait_for(
    tally: Tally,
    source: str | None,
    display: Display,
    remember: Callable[[list[str]], Awaitable[None]] | None = None,
) -> AsyncGenerator[str]:
    """Yield the tally's ids, then those of standard input while it is still being written.

    ``remember`` is given the ids of standard input before they are yielded.
    """
    for task_id in tally.start(list(tally.unfinished)):
        yield task_id
    if source != "-":
        return
    async for items in ids_from_stdin():
        for problem in items:
            if isinstance(problem, Problem):
                tally.unreadable += 1
                display.show_problem(str(problem))
        new = tally.add(item for item in items if isinstance(item, str))
        if new and remember is not None:
            await remember(new)
        for task_id in tally.start(new):
            yield task_id
    tally.is_complete = True
    if not (tally.total or tally.unreadable):
        display.fail("no task ids on standard input")


def say_what_is_left(tally: Tally) -> None:
    """Name the tasks that are known to be generating, and count the others that are left."""
    generating = tally.generating
    if generating:
        shown, more = generating[:_MAX_IDS_SHOWN], len(generating) - _MAX_IDS_SHOWN
        say(f"Still generating: {', '.join(shown)}{f' and {more:,} more' if more > 0 else ''}")
        say("They are paid for.")
    if others := len(tally.unfinished) - len(generating):
        say(f"{others:,} {'task has' if others == 1 else 'tasks have'} not been seen yet.")


def say_how_to_resume(tally: Tally, source: str | None, options: str) -> None:
    """Say what is left after Ctrl-C, and the command that waits for it again."""
    ids = list(tally.unfinished)
    if not ids:
        return
    say_what_is_left(tally)
    if len(ids) > _MAX_IDS_SHOWN:
        arguments = f"--from {shlex.quote(source) if source and source != '-' else 'FILE'}"
    else:
        is_like_option = any(task_id.startswith("-") for task_id in ids)
        arguments = ("-- " if is_like_option else "") + shlex.join(ids)
    say(f"To wait again: kontext wait {options}{arguments}", is_copied=True)
