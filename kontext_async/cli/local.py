"""Commands that need no key and no network: the simulator and the demo."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.table import Column, Table
from rich.text import Text

from kontext_async.cli.batch import can_report, make_report
from kontext_async.cli.listening import free_callbacks
from kontext_async.cli.output import (
    STYLES,
    Exit,
    Saved,
    error_console,
    fail,
    file_link,
    outcome_line,
    plain,
    say,
    say_where,
    write_line,
)
from kontext_async.cli.requests import RequestTally, request_line, run_requests
from kontext_async.cli.running import run
from kontext_async.client import KontextClient
from kontext_async.outcomes import TaskOutcome
from kontext_async.results import Ledger, RequestOutcome
from kontext_async.simulator import (
    CREATION_STEPS,
    Failure,
    FixedWindow,
    Limit,
    Reply,
    Simulator,
    SlidingWindow,
    StepRequest,
    TokenBucket,
    lognormal,
)
from kontext_async.wire import ImageRequest

_FLAGGED = Failure(400, "The prompt was flagged as violating the content policies.")

# The prompt whose answer is lost.
_LOST = "a paper boat on a calm lake"

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
        try_it = f"APIKLEY_API_KEY=any kontext wait --base-url {simulator.base_url} task1 task2"
        say(f"  {try_it}", is_copied=True)
        await terminated.wait()
    return Exit.DONE


async def demonstrate(folder: Path) -> Exit:
    """Create a dozen simulated tasks, save their images, and print a table of the outcomes.

    The answer to one request is lost, and its task is found again by its callback.
    """
    outcomes: list[tuple[TaskOutcome, Saved]] = []

    def handle(outcome: TaskOutcome, saved: Saved) -> None:
        outcomes.append((outcome, saved))
        if not sys.stdout.isatty():
            write_line(request_line(outcome, saved))

    requests = [ImageRequest(prompt=prompt, model="flux-kontext-pro") for prompt, *_ in _TASKS]
    keyed = dict(Ledger.keys_of(requests))
    callbacks = free_callbacks()
    async with Simulator(generate_script=itertools.repeat(_create)) as simulator:
        say(f"The API is simulated at {simulator.base_url}")
        async with KontextClient(
            "demo", base_url=simulator.base_url, callback_url=callbacks.url
        ) as client:
            await run_requests(
                client,
                keyed,
                folder,
                tally=RequestTally(keyed),
                handle=handle,
                on_submitted=lambda _: None,
                callbacks=callbacks,
                timeout=60.0,
            )
        paid = len(simulator.created)
    error_console().print(_table(outcomes))
    say(
        f"The answer to the request for “{_LOST}” was lost, as a network may lose it. It was not "
        f"sent again: its callback named the task. {len(_TASKS)} prompts, {paid} tasks paid for."
    )
    if can_report():
        return make_report(folder)
    say_where("Images", folder)
    say("For a page about them: pip install 'kontext-async[images,report]'")
    return Exit.DONE


def _create(request: StepRequest) -> Reply:
    """Create a task of the demo; the answer to one of the requests is lost."""
    prompt = json.loads(request.task.param_json)["prompt"]
    _, request.task.duration, request.task.failure = next(t for t in _TASKS if t[0] == prompt)
    return CREATION_STEPS["made_closed"](request) if prompt == _LOST else request.default_reply()


def _table(outcomes: list[tuple[TaskOutcome, Saved]]) -> Table:
    """Return a table that links the files: the simulator's addresses end with it."""
    prompts = [prompt for prompt, *_ in _TASKS]
    prompt, result = (Column(name, overflow="fold") for name in ("Prompt", "Image or error"))
    table = Table(prompt, "Outcome", "Took", result)
    rows = [(o, saved) for o, saved in outcomes if isinstance(o, RequestOutcome)]
    for outcome, saved in sorted(rows, key=lambda row: prompts.index(row[0].request.prompt)):
        line = outcome_line(outcome, saved)
        took = "" if line["duration"] is None else f"{line['duration'].total_seconds():.0f} s"
        if line["file"]:
            path = Path(line["file"])
            cell = file_link(path, path.name)
            cell.no_wrap, cell.overflow = True, "ellipsis"
        else:
            cell = Text(plain(f"{line['errorCode']}: {line['message']}"))
        how = Text(line["outcome"], style=STYLES[line["outcome"]])
        table.add_row(plain(outcome.request.prompt), how, took, cell)
    return table
