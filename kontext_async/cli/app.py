"""Commands and options of ``kontext``."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from kontext_async._version import __version__
from kontext_async.cli.connection import connection
from kontext_async.cli.creating import credits_left, edit, generate, resolve, unknown
from kontext_async.cli.fleet import fleet_app, submit, worker
from kontext_async.cli.help import Group, add_commands
from kontext_async.cli.input import distinct_ids
from kontext_async.cli.options import (
    AllowHttp,
    AllowPrivate,
    AsJson,
    BaseUrl,
    BatchTimeout,
    Folder,
    Into,
    KeyFile,
    KnownLimit,
    NoMemory,
    Proxy,
    Quiet,
    Report,
    Source,
    Timeout,
    Verbose,
)
from kontext_async.cli.output import (
    Exit,
    be_quiet,
    error_console,
    exit_code,
    is_one_terminal,
    log_polls,
    outcome_line,
    record_line,
    say,
    write_result,
)
from kontext_async.cli.running import exit_on_output_error, run
from kontext_async.cli.tally import BatchTally, Tally
from kontext_async.cli.waiting import say_how_to_resume, wait_for_all
from kontext_async.client import DEFAULT_BASE_URL
from kontext_async.errors import KontextError
from kontext_async.outcomes import ErrorOutcome
from kontext_async.polling import DEFAULT_TIMEOUT

app = typer.Typer(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # plain tracebacks show no locals, which may hold the key
    rich_markup_mode=None,
    help=(
        "Create Flux Kontext image-generation tasks, and wait for them.\n\n"
        "The API key comes from the environment variable APIKLEY_API_KEY. To see the command at "
        "work without one: kontext demo."
    ),
    epilog=(
        "More about a command: kontext COMMAND -h.\n\n"
        "Exit codes: 0 all done; 1 a generation failed; 2 wrong usage; 3 a deadline passed; "
        "4 the API or the network failed, or the output could not be written; 130 interrupted by "
        "Ctrl-C; 141 the reader of the output closed it; 143 ended by SIGTERM. Where tasks end "
        "differently, the highest code counts."
    ),
)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer's way of calling it
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _kontext(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    be_quiet(wanted=False)  # a process may run several commands


def _ids(given: Iterable[str], source: str | None) -> list[str]:
    """Return the ids that are known at once; those on standard input come later."""
    given = list(given)
    if source == "-":
        return distinct_ids(given, None) if given else []
    return distinct_ids(given, source)


def get(
    task_id: Annotated[str, typer.Argument(metavar="ID", help="Task id.")],
    *,
    as_json: AsJson = False,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    allow_http: AllowHttp = False,
    proxy: Proxy = None,
    api_key_file: KeyFile = None,
) -> None:
    """Poll a task once, and print its state."""
    (known_id,) = distinct_ids([task_id], None)
    options = connection(
        base_url=base_url, api_key_file=api_key_file, allow_http=allow_http, proxy=proxy
    )

    async def poll() -> Exit:
        async with options.open() as (client, _):
            try:
                line = record_line(await client.record_info(known_id))
            except KontextError as error:
                if not is_one_terminal():
                    say(str(error))
                line = outcome_line(ErrorOutcome(task_id=known_id, error=error))
        write_result(line, as_json=as_json)
        return exit_code([line["outcome"]])

    run(poll())


def wait(
    task_ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="Task ids.", show_default=False)
    ] = None,
    *,
    source: Source = None,
    timeout: Timeout = DEFAULT_TIMEOUT,
    batch_timeout: BatchTimeout = math.inf,
    summary: Annotated[
        bool, typer.Option("--summary", help="Print a table of counts and times at the end.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    rate_limit: KnownLimit = None,
    no_memory: NoMemory = False,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    allow_http: AllowHttp = False,
    proxy: Proxy = None,
    api_key_file: KeyFile = None,
) -> None:
    """Wait for tasks, and print each when it ends.

    A terminal gets a line for people, a pipe or a file JSON Lines.
    """
    tally = Tally(_ids(task_ids or [], source))
    tally.is_complete = source != "-"
    options = connection(
        base_url=base_url,
        api_key_file=api_key_file,
        allow_http=allow_http,
        proxy=proxy,
        rate_limit=rate_limit,
        no_memory=no_memory,
    )
    log_polls(verbose)

    async def wait_for_tasks() -> Exit:
        async with options.open() as (client, _):
            code = await wait_for_all(
                client,
                tally,
                lambda outcome: write_result(outcome_line(outcome), as_json=as_json),
                source=source,
                timeout=timeout,
                batch_timeout=batch_timeout,
            )
        if summary:
            error_console().print(tally.summary())
        return code

    again = options.as_options()
    run(wait_for_tasks(), on_interrupt=lambda: say_how_to_resume(tally, source, again))


def batch(
    *,
    into: Into,
    source: Source = None,
    report: Report = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Poll failed generations again.")
    ] = False,
    timeout: Timeout = DEFAULT_TIMEOUT,
    batch_timeout: BatchTimeout = math.inf,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    rate_limit: KnownLimit = None,
    no_memory: NoMemory = False,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    allow_http: AllowHttp = False,
    allow_private: AllowPrivate = False,
    proxy: Proxy = None,
    api_key_file: KeyFile = None,
) -> None:
    """Wait for tasks, save their images, and record both in a ledger.

    The folder holds the images and the ledger. The same command continues a batch that was
    stopped: finished tasks are not polled again, and saved images are not downloaded again.
    Without --from, the ids come from the ledger.
    """
    # `--help` should not wait for the import of what keeps results.
    from kontext_async.cli.batch import (  # noqa: PLC0415
        batch_ids,
        make_folder,
        make_report,
        require_report,
        run_batch,
        say_how_to_continue,
    )

    if report:
        require_report()
    tally = BatchTally(batch_ids(source, into))
    tally.is_complete = source != "-"
    options = connection(
        base_url=base_url,
        api_key_file=api_key_file,
        allow_http=allow_http,
        proxy=proxy,
        rate_limit=rate_limit,
        no_memory=no_memory,
    )
    log_polls(verbose)
    make_folder(into)

    async def save_tasks() -> Exit:
        async with options.open() as (client, session):
            code = await run_batch(
                client,
                tally,
                into,
                lambda outcome, saved: write_result(outcome_line(outcome, saved), as_json=as_json),
                source=source,
                session=session,
                allow_private=allow_private,
                timeout=timeout,
                batch_timeout=batch_timeout,
                retry_failed=retry_failed,
            )
        return max(code, make_report(into)) if report else code

    again = options.as_options()
    again += ("--allow-private " if allow_private else "") + ("--report " if report else "")
    run(save_tasks(), on_interrupt=lambda: say_how_to_continue(tally, into, again))


def report(folder: Folder) -> None:
    """Write report.html, a page about a batch, into its folder."""
    from kontext_async.cli.batch import make_report, require_report  # noqa: PLC0415  # see `batch`

    require_report()
    raise typer.Exit(make_report(folder))


def status(folder: Folder) -> None:
    """Count a batch's tasks by state, also while it runs."""
    from kontext_async.cli.batch import show_status  # noqa: PLC0415  # see `batch`

    with exit_on_output_error():
        raise typer.Exit(show_status(folder))


def _simulated_limit(text: str) -> Any:
    """Read ``20/10``, 20 requests in any 10 seconds, or the same with a kind: ``fixed:20/10``."""
    from kontext_async.cli.local import read_limit  # noqa: PLC0415  # see `simulate`

    return read_limit(text)


def simulate(
    *,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, metavar="PORT", help="Port on 127.0.0.1; 0 takes a free one."
        ),
    ] = 0,
    duration: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Median duration of the tasks.")
    ] = 12.0,
    spread: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SIGMA",
            help="Log-normal sigma of the task durations; 0 makes them all equal.",
        ),
    ] = 0.3,
    failure_rate: Annotated[
        float,
        typer.Option(min=0, max=1, metavar="FRACTION", help="Fraction of tasks that fail, 0 to 1."),
    ] = 0.0,
    fault_rate: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            metavar="FRACTION",
            help="Fraction of polls and downloads that meet a fault, 0 to 1.",
        ),
    ] = 0.0,
    rate_limit: Annotated[
        Any,
        typer.Option(
            parser=_simulated_limit,
            metavar="[KIND:]REQUESTS/SECONDS",
            help="Refuse requests above this rate with 429: 20/10 is 20 in any 10 seconds. Kinds: "
            "sliding (the default) and fixed windows, or a token bucket of REQUESTS that refills "
            "in SECONDS (bucket).",
        ),
    ] = None,
    latency: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Delay before each reply.")
    ] = 0.0,
    auto_create: Annotated[
        bool, typer.Option(help="Create a task at the first poll of an unknown id.")
    ] = True,
    image_bytes: Annotated[
        int, typer.Option(min=0, metavar="BYTES", help="Minimum size of an image.")
    ] = 0,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", help="The same seed gives an id the same duration, outcome and faults."
        ),
    ] = 0,
) -> None:
    """Serve a simulated API on this machine until Ctrl-C or SIGTERM.

    The first line on standard output is JSON with its address, baseUrl.
    """
    from kontext_async.cli.local import run_simulator  # noqa: PLC0415  # only this needs it

    run_simulator(
        port=port,
        duration=duration,
        spread=spread,
        failure_rate=failure_rate,
        fault_rate=fault_rate,
        rate_limit=rate_limit,
        latency=latency,
        auto_create=auto_create,
        image_bytes=image_bytes,
        seed=seed,
    )


def demo() -> None:
    """Save the images of a dozen simulated tasks, without a key."""
    from kontext_async.cli.batch import make_folder  # noqa: PLC0415  # see `batch`
    from kontext_async.cli.local import demonstrate  # noqa: PLC0415  # as in `simulate`

    folder = Path(tempfile.mkdtemp(prefix="kontext-"), "demo")
    make_folder(folder)
    run(demonstrate(folder))


add_commands(
    app,
    {
        "Tasks": {
            "generate": generate,
            "edit": edit,
            "wait": wait,
            "batch": batch,
            "get": get,
            "credits": credits_left,
        },
        "Folders of results": {
            "status": status,
            "report": report,
            "unknown": unknown,
            "resolve": resolve,
        },
        "Without a key": {"demo": demo, "simulate": simulate},
        "Many machines": {"submit": submit, "worker": worker},
    },
)
app.add_typer(fleet_app, name="fleet", rich_help_panel="Many machines")
