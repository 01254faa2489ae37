"""The command's main job: wait for a batch, handing on each outcome as it comes."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from kontext_async.cli.output import Exit, gravest, say
from kontext_async.cli.progress import Display
from kontext_async.cli.tally import Tally
from kontext_async.client import KontextClient
from kontext_async.polling import TaskOutcome

# Of a long list, so many ids are named.
_NAMED = 20


async def wait_for_all(
    client: KontextClient,
    tally: Tally,
    take: Callable[[TaskOutcome], None],
    *,
    timeout: float | None,
    batch_timeout: float | None = None,
) -> Exit:
    """Wait for all that is unfinished, handing on each outcome; the exit code for them all."""
    display = Display(tally, client)
    with display.shown():
        waiting = client.as_completed(
            tally.starting(), timeout=timeout, batch_timeout=batch_timeout, on_event=tally.looked
        )
        async with waiting as outcomes:
            async for outcome in outcomes:
                tally.ended(outcome)
                with display.aside():
                    take(outcome)
                if outcome.error:
                    display.trouble(outcome.error)
    return gravest(tally.exits)


def say_how_to_resume(tally: Tally, source: str | None) -> None:
    """After Ctrl-C: what may still be generating, and how to wait for it again."""
    left = list(tally.unfinished)
    if not left:
        return
    named = shlex.join(left[:_NAMED])
    if any(task_id.startswith("-") for task_id in left[:_NAMED]):
        named = f"-- {named}"
    if len(left) <= _NAMED:
        say(f"Still generating: {', '.join(left)}")
        say("They are still paid for. To wait for them again, with the same options:")
        say(f"  kontext wait {named}")
        return
    say(f"Still generating: {', '.join(left[:_NAMED])} and {len(left) - _NAMED} more")
    file = "FILE" if source is None or source == "-" else shlex.quote(source)
    say(
        "They are still paid for. To wait for them again, give the same ids: kontext wait --from "
        f"{file} (those that have ended answer at the first look)"
    )
