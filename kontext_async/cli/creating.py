"""Commands that create tasks, and that decide what is uncertain about them."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.table import Table

from kontext_async.cli.batch import (
    LEDGER,
    make_folder,
    make_report,
    require_report,
    save_all,
)
from kontext_async.cli.connection import Connection, connection
from kontext_async.cli.listening import Callbacks, read_callbacks, receiving
from kontext_async.cli.options import (
    AllowHttp,
    AsJson,
    BaseUrl,
    BatchTimeout,
    Folder,
    Into,
    KeyFile,
    NoMemory,
    Proxy,
    Quiet,
    Report,
    Timeout,
    Verbose,
    read_rate,
)
from kontext_async.cli.output import (
    Exit,
    Saved,
    error_console,
    fail,
    log_polls,
    outcome_line,
    say,
    submitted_line,
    write_line,
    write_result,
)
from kontext_async.cli.progress import Display
from kontext_async.cli.prompts import read_requests
from kontext_async.cli.running import exit_on_error, run
from kontext_async.cli.tally import RequestTally
from kontext_async.client import DEFAULT_BASE_URL, DEFAULT_CREATION_LIMIT, KontextClient
from kontext_async.creation import SubmittedTask
from kontext_async.pacing import RateLimit
from kontext_async.polling import DEFAULT_TIMEOUT, TaskOutcome
from kontext_async.results import ImageSaver, KeyedRequest, Ledger, SubmissionEntry
from kontext_async.wire import ImageRequest

__all__ = ["credits_left", "edit", "generate", "resolve", "run_requests", "unknown"]


PromptSource = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FILE|-",
        help="File with prompts, or - for standard input. A line holds a prompt, or a JSON object "
        "with the API's field names and perhaps a key. Blank lines and lines that begin with # "
        "are skipped.",
    ),
]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="Model of all requests.")]
AspectRatio = Annotated[
    str | None, typer.Option(metavar="W:H", help="Aspect ratio of all requests.")
]
OutputFormat = Annotated[
    str | None, typer.Option(metavar="FORMAT", help="Format of all images: jpeg or png.")
]
Limit = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Create at most N tasks in this run.")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Count what is new, known and uncertain, print the balance, and stop."
    ),
]
CreationLimit = Annotated[
    RateLimit,
    typer.Option(
        parser=read_rate,
        metavar="REQUESTS/SECONDS",
        help="Create at most this many tasks in any such time: the account's limit.",
    ),
]
CallbackUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Address that the service calls when a task ends. {token} in its path is replaced by "
        "a text of its own for each task, by which a lost task is found again.",
    ),
]
Listen = Annotated[
    str | None,
    typer.Option(
        metavar="[HOST:]PORT",
        help="Receive the callbacks on this port while the command runs, at the path of "
        "--callback-url.",
    ),
]
CallbackKeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File with the key that signs the callbacks."),
]
CallbackGrace = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="SECONDS",
        help="Time for which a request whose answer was lost waits for its callback.",
    ),
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Send refused requests again, poll failed tasks.")
]


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Prompts of the images.", show_default=False),
    ] = None,
    *,
    into: Into,
    source: PromptSource = None,
    model: Model = None,
    aspect_ratio: AspectRatio = None,
    output_format: OutputFormat = None,
    report: Report = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    creation_limit: CreationLimit = "20/10",  # type: ignore[assignment]  # typer parses it
    retry_failed: RetryFailed = False,
    callback_url: CallbackUrl = None,
    listen: Listen = None,
    callback_key_file: CallbackKeyFile = None,
    callback_grace: CallbackGrace = 120.0,
    timeout: Timeout = DEFAULT_TIMEOUT,
    batch_timeout: BatchTimeout = math.inf,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_memory: NoMemory = False,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    allow_http: AllowHttp = False,
    proxy: Proxy = None,
    api_key_file: KeyFile = None,
) -> None:
    """Create a task for each prompt, and save the images.

    The folder holds the images and a ledger of what was paid for. The same command continues a
    run that was stopped, and pays for no prompt twice. All prompts are checked before the first
    task is paid for.
    """
    log_polls(verbose)
    fields = {"model": model, "aspectRatio": aspect_ratio, "outputFormat": output_format}
    _create(
        read_requests(prompts or [], source, fields),
        into,
        connection(
            base_url=base_url,
            api_key_file=api_key_file,
            allow_http=allow_http,
            proxy=proxy,
            no_memory=no_memory,
        ),
        as_json=as_json,
        report=report,
        dry_run=dry_run,
        creation_limit=creation_limit,
        max_new=limit,
        retry_failed=retry_failed,
        callbacks=read_callbacks(callback_url, listen, callback_key_file),
        callback_grace=callback_grace,
        timeout=timeout,
        batch_timeout=batch_timeout,
    )


def edit(
    url: Annotated[str, typer.Argument(metavar="URL", help="Public address of the input image.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The change to make.")],
    *,
    into: Into,
    model: Model = None,
    aspect_ratio: AspectRatio = None,
    output_format: OutputFormat = None,
    timeout: Timeout = DEFAULT_TIMEOUT,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_memory: NoMemory = False,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    allow_http: AllowHttp = False,
    proxy: Proxy = None,
    api_key_file: KeyFile = None,
) -> None:
    """Create a task that edits an image, and save the result.

    Without an aspect ratio the image keeps its own. The folder is one of `kontext generate`.
    """
    log_polls(verbose)
    fields = {"model": model, "aspectRatio": aspect_ratio, "outputFormat": output_format}
    with exit_on_error():
        request = ImageRequest.from_json({**fields, "prompt": prompt, "inputImage": url})
    _create(
        [request],
        into,
        connection(
            base_url=base_url,
            api_key_file=api_key_file,
            allow_http=allow_http,
            proxy=proxy,
            no_memory=no_memory,
        ),
        as_json=as_json,
        timeout=timeout,
    )


def _create(
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
) -> None:
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
            creates=True,
            creation_limit=creation_limit,
            callback_url=None if callbacks is None else callbacks.url,
        ) as (client, session):
            await run_requests(
                client,
                keyed,
                into,
                tally=tally,
                handle=lambda outcome, saved: write_result(
                    outcome_line(outcome, saved), as_json=as_json
                ),
                on_submitted=lambda task: write_result(submitted_line(task), as_json=as_json),
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
    **keywords: Any,
) -> None:
    """Create tasks for requests by key, save their images, and pass each to a callback."""
    display = Display(tally, client)

    def submitted(task: SubmittedTask) -> None:
        with display.bar_hidden():
            on_submitted(task)

    async with (
        Ledger(folder / LEDGER) as ledger,
        ImageSaver(client, folder, overwrite=True, session=session) as saver,
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
    table = Table("Requests", "")
    for name, count in line.items():
        table.add_row(name, f"{count:,.10g}")
    error_console().print(table)
    write_line(line)
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
        tasks = "1 task" if count == 1 else f"{count} tasks"
        say(f"{tasks} may have been created without an answer, and be paid for. To see which:")
        say(f"  kontext unknown {shlex.quote(str(folder))}", is_copied=True)


def _say_how_to_continue(tally: RequestTally, folder: Path) -> None:
    say(f"Interrupted: {tally.counts()}, of {tally.total} requests. The results are in {folder}.")
    say(
        "What was created is paid for. To continue, run the same command again: it pays for no "
        "request twice."
    )
    _say_what_is_uncertain(folder)


def unknown(folder: Folder) -> None:
    """List the requests that may have been paid for."""
    found = [entry for entry in _submissions(folder) if entry.state in {"unknown", "sending"}]
    for entry in found:
        write_line(
            {
                "key": entry.key,
                "prompt": entry.request.prompt,
                "sentAt": entry.updated_at,
                "message": entry.error_message,
            }
        )
    if found:
        say("Look for each in the provider's web log of tasks, by its prompt and time. Then:")
        say(f"  kontext resolve {shlex.quote(str(folder))} KEY --task-id ID", is_copied=True)
        say(f"  kontext resolve {shlex.quote(str(folder))} KEY --abandon", is_copied=True)
    raise typer.Exit(Exit.ERROR if found else Exit.DONE)


def resolve(
    folder: Folder,
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key of the request.")],
    *,
    task_id: Annotated[
        str | None, typer.Option(metavar="ID", help="The task that was found for it.")
    ] = None,
    abandon: Annotated[
        bool, typer.Option("--abandon", help="Give it up: it is not sent again.")
    ] = False,
) -> None:
    """Decide an uncertain request by hand.

    With a task, the next run of `kontext generate` waits for it and saves its image.
    """
    if (task_id is None) is not abandon:
        fail("give either --task-id or --abandon")
    if not (folder / LEDGER).exists():
        fail(f"{folder} holds no results: there is no {LEDGER} in it")

    async def decide() -> Exit:
        async with Ledger(folder / LEDGER) as ledger:
            entry = await ledger.resolve(key, task_id)
        write_line({"key": entry.key, "state": entry.state, "taskId": entry.task_id})
        return Exit.DONE

    run(decide())


def credits_left(
    *,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    allow_http: AllowHttp = False,
    proxy: Proxy = None,
    api_key_file: KeyFile = None,
) -> None:
    """Print the account's balance of credits."""
    options = connection(
        base_url=base_url, api_key_file=api_key_file, allow_http=allow_http, proxy=proxy
    )

    async def ask() -> Exit:
        async with options.open() as (client, _):
            write_line({"credits": await client.credits()})
        return Exit.DONE

    run(ask())
