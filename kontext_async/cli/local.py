"""Commands that need no key and no network: the simulator and the demo."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.table import Column, Table

from kontext_async.cli.batch import can_report, make_report, run_batch
from kontext_async.cli.output import (
    Exit,
    Saved,
    error_console,
    fail,
    outcome_line,
    plain,
    say,
    write_line,
)
from kontext_async.cli.running import run
from kontext_async.cli.tally import BatchTally
from kontext_async.client import KontextClient
from kontext_async.polling import TaskOutcome
from kontext_async.simulator import (
    Failure,
    FixedWindow,
    Limit,
    Simulator,
    SlidingWindow,
    TokenBucket,
    lognormal,
)

_FLAGGED = Failure(400, "The prompt was flagged as violating the content policies.")

# Prompt, duration in seconds, failure.
_TASKS: tuple[tuple[str, float, Failure | None], ...] = (
    ("a lighthouse at dawn", 2.0, None),
    ("a paper boat on a calm lake", 3.0, None),
    ("a portrait of somebody famous", 3.5, _FLAGGED),
    ("a fox in the snow", 5.0, None),
    ("a kitchen in the style of Vermeer", 5.0, None),
    ("a street in the rain at night", 5.2, None),
    ("a map of an island that does not exist", 5.4, None),
    ("a teapot on a windowsill", 5.6, None),
    ("a cat that is also a clock", 5.8, Failure(501, "The image could not be generated.")),
    ("a mountain hut under the stars", 6.0, None),
    ("a city made of glass", 6.5, None),
    ("a field of sunflowers", 7.0, None),
)


_LIMITS: Mapping[str, Callable[[int, float], Limit]] = {
    "sliding": SlidingWindow,
    "fixed": FixedWindow,
    "bucket": lambda requests, seconds: TokenBucket(requests, requests / seconds),
}
_PORT_PROBLEMS = {errno.EADDRINUSE: "it is in use", errno.EACCES: "permission denied"}


def read_limit(text: str) -> Limit:
    """Read ``20/10``, 20 requests in any 10 seconds, or the same with a kind: ``fixed:20/10``."""
    kind, _, rate = text.rpartition(":")
    requests, _, seconds = rate.partition("/")
    try:
        return _LIMITS[kind or "sliding"](int(requests), float(seconds or 1))
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise typer.BadParameter(
            "give REQUESTS/SECONDS, such as 20/10, fixed:20/10 or bucket:20/10"
        ) from error


def run_simulator(*, port: int, duration: float, spread: float, **options: Any) -> NoReturn:
    """Serve a simulator, and exit; a port that cannot be used is wrong usage."""
    simulator = Simulator(
        port=port,
        durations=lognormal(duration, spread),
        log_limit=0,  # nothing outside this process could read the log
        **options,
    )
    try:
        run(serve(simulator))
    except OSError as error:
        problem = _PORT_PROBLEMS.get(error.errno or 0)
        if problem is None:
            raise
        fail(
            f"cannot serve on port {port}: {problem}. "
            "Choose another --port, or leave it out to get a free one."
        )


async def serve(simulator: Simulator) -> Exit:
    """Serve until SIGTERM, or until cancelled. Standard output gets the base URL, for scripts."""
    terminated = asyncio.Event()
    with contextlib.suppress(NotImplementedError):  # on Windows only Ctrl-C ends it
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    async with simulator:
        write_line({"baseUrl": simulator.base_url})
        say(f"The API is simulated at {simulator.base_url}, for any key. Ctrl-C ends it. Try:")
        say(f"  APIKLEY_API_KEY=any kontext wait --base-url {simulator.base_url} task1 task2")
        await terminated.wait()
    return Exit.DONE


async def demonstrate(folder: Path) -> Exit:
    """Wait for a dozen simulated tasks, save their images, and print a table of the outcomes."""
    outcomes: list[TaskOutcome] = []

    def handle(outcome: TaskOutcome, saved: Saved) -> None:
        outcomes.append(outcome)
        if not sys.stdout.isatty():
            write_line(outcome_line(outcome, saved))

    async with Simulator() as simulator:
        say(f"The API is simulated at {simulator.base_url}")
        ids = [
            simulator.add_task(
                f"demo-{number:02}",
                duration=duration,
                outcome=failure or "success",
                params={"prompt": prompt, "model": "flux-kontext-pro"},
            )
            for number, (prompt, duration, failure) in enumerate(_TASKS, 1)
        ]
        async with KontextClient("demo", base_url=simulator.base_url) as client:
            await run_batch(client, BatchTally(ids), folder, handle, timeout=60.0)
    error_console().print(_table(outcomes))
    if can_report():
        return make_report(folder)
    say(f"Images: {folder}")
    say("For a page about them: pip install 'kontext-async[images,report]'")
    return Exit.DONE


def _table(outcomes: list[TaskOutcome]) -> Table:
    table = Table("Task", "Outcome", "Took", Column("Image or error", overflow="fold"))
    for outcome in sorted(outcomes, key=lambda outcome: outcome.task_id):
        line = outcome_line(outcome)
        took = "" if line["duration"] is None else f"{line['duration'].total_seconds():.0f} s"
        result = line["resultImageUrl"] or f"{line['errorCode']}: {line['message']}"
        table.add_row(line["taskId"], line["outcome"], took, plain(result))
    return table
