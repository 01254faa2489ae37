"""A wait for many tasks, without saving anything."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from kontext_async.cli.output import Exit, say
from kontext_async.cli.progress import Display
from kontext_async.cli.tally import Tally
from kontext_async.client import KontextClient
from kontext_async.polling import TaskOutcome

_MAX_IDS_SHOWN = 20


async def wait_for_all(
    client: KontextClient,
    tally: Tally,
    handle: Callable[[TaskOutcome], None],
    *,
    timeout: float | None,
    batch_timeout: float | None = None,
) -> Exit:
    """Wait for all unfinished tasks, and pass each outcome to ``handle``."""
    display = Display(tally, client)
    waiting = client.as_completed(
        tally.start(), timeout=timeout, batch_timeout=batch_timeout, on_event=tally.count_poll
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


def say_how_to_resume(tally: Tally, source: str | None) -> None:
    """Name the unfinished tasks after Ctrl-C, and the command that waits for them again."""
    ids = list(tally.unfinished)
    if not ids:
        return
    shown, more = ids[:_MAX_IDS_SHOWN], len(ids) - _MAX_IDS_SHOWN
    say(f"Still generating: {', '.join(shown)}{f' and {more} more' if more > 0 else ''}")
    if more > 0:
        arguments = f"--from {shlex.quote(source) if source and source != '-' else 'FILE'}"
    else:
        is_like_option = any(task_id.startswith("-") for task_id in ids)
        arguments = ("-- " if is_like_option else "") + shlex.join(ids)
    say("They are still paid for. To wait for them again, with the same ids and options:")
    say(f"  kontext wait {arguments}")
