"""Commands that create tasks, and that decide what is uncertain about them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from kontext_async.cli.connection import connection
from kontext_async.cli.options import (
    AllowHttp,
    AllowPrivate,
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
    fail,
    is_for_people,
    log_polls,
    write_for_people,
    write_line,
)
from kontext_async.cli.running import exit_on_error, exit_on_output_error, run
from kontext_async.client import DEFAULT_BASE_URL
from kontext_async.pacing import RateLimit
from kontext_async.polling import DEFAULT_TIMEOUT
from kontext_async.wire import ImageRequest

__all__ = ["credits_left", "edit", "generate", "resolve", "unknown"]


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
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Model of all requests: flux-kontext-pro or flux-kontext-max."
    ),
]
AspectRatio = Annotated[
    str | None, typer.Option(metavar="W:H", help="Aspect ratio of all requests, such as 16:9.")
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
    allow_private: AllowPrivate = False,
    proxy: Proxy = None,
    api_key_file: KeyFile = None,
) -> None:
    """Create a task for each prompt, and save the images.

    The folder holds the images and a ledger of what was paid for. The same command continues a
    run that was stopped, and pays for no prompt twice. All prompts are checked before the first
    task is paid for.
    """
    # `--help` should not wait for the import of what keeps results.
    from kontext_async.cli.listening import read_callbacks  # noqa: PLC0415
    from kontext_async.cli.prompts import read_requests  # noqa: PLC0415
    from kontext_async.cli.requests import create_tasks  # noqa: PLC0415

    log_polls(verbose)
    fields = {"model": model, "aspectRatio": aspect_ratio, "outputFormat": output_format}
    create_tasks(
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
        allow_private=allow_private,
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
    allow_private: AllowPrivate = False,
    proxy: Proxy = None,
    api_key_file: KeyFile = None,
) -> None:
    """Create a task that edits an image, and save the result.

    Without an aspect ratio the image keeps its own. The folder is one of `kontext generate`.
    """
    from kontext_async.cli.requests import create_tasks  # noqa: PLC0415  # see `generate`

    log_polls(verbose)
    fields = {"model": model, "aspectRatio": aspect_ratio, "outputFormat": output_format}
    with exit_on_error():
        request = ImageRequest.from_json({**fields, "prompt": prompt, "inputImage": url})
    create_tasks(
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
        allow_private=allow_private,
        timeout=timeout,
    )


def unknown(folder: Folder) -> None:
    """List the requests that may have been paid for."""
    from kontext_async.cli.requests import list_unknown  # noqa: PLC0415  # see `generate`

    with exit_on_output_error():
        raise typer.Exit(list_unknown(folder))


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
    from kontext_async.cli.requests import resolve_request  # noqa: PLC0415  # see `generate`

    if (task_id is None) is not abandon:
        fail("give either --task-id or --abandon")
    run(resolve_request(folder, key, task_id))


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
            balance = await client.credits()
        if is_for_people():
            write_for_people(f"{balance:,.10g} credits")
        else:
            write_line({"credits": balance})
        return Exit.DONE

    run(ask())
