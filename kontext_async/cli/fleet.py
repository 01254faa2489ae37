"""Commands of a fleet: many workers on one database."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer
from rich.console import Group as RenderGroup
from rich.table import Column, Table

from kontext_async.cli.connection import connection
from kontext_async.cli.help import Group, add_commands
from kontext_async.cli.input import Problem, distinct_ids, fail_on, ids_from_stdin
from kontext_async.cli.options import (
    AllowHttp,
    AllowPrivate,
    BaseUrl,
    KeyFile,
    KnownLimit,
    Proxy,
    Source,
    Verbose,
)
from kontext_async.cli.output import (
    Exit,
    fail,
    log_events,
    plain,
    say,
    write_summary,
)
from kontext_async.cli.running import run
from kontext_async.client import DEFAULT_BASE_URL

if TYPE_CHECKING:
    from kontext_async.fleet import Fleet, FleetStatus

__all__ = ["fleet_app", "submit", "worker"]

_DSN_HELP = (
    "Connection string of PostgreSQL, such as postgresql://user@host/fleet; also the environment "
    "variable KONTEXT_FLEET_DSN. Leave the password to PGPASSWORD or ~/.pgpass: other users can "
    "see command lines."
)
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_VARIABLE = "KONTEXT_FLEET_DSN"
_Dsn = Annotated[
    str,
    typer.Option("--dsn", metavar="DSN", envvar=_VARIABLE, show_envvar=False, help=_DSN_HELP),
]
_DsnArgument = Annotated[
    str, typer.Argument(metavar="DSN", envvar=_VARIABLE, show_envvar=False, help=_DSN_HELP)
]

fleet_app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Prepare, inspect and clean up a database for many workers.",
)


def _fleet(dsn: str) -> Fleet:
    try:
        from kontext_async.fleet import Fleet  # noqa: PLC0415  # needs the extra
    except ModuleNotFoundError as error:
        fail(str(error))
    # The engine logs each failed chunk with a traceback; the fleet's own lines are enough.
    for name in ("procrastinate", "psycopg"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return Fleet(dsn)


def init(dsn: _DsnArgument) -> None:
    """Create the tables of a fleet that are missing."""

    async def create() -> Exit:
        async with _fleet(dsn) as fleet:
            await fleet.init()
        return Exit.DONE

    run(create())


def status(dsn: _DsnArgument) -> None:
    """Count tasks by state, and list the workers."""

    async def show() -> Exit:
        async with _fleet(dsn) as fleet:
            state = await fleet.status()
        write_summary(
            _tables(state),
            {
                **state.tasks,
                "queuedChunks": state.queued_chunks,
                "runningChunks": state.running_chunks,
                "workers": [
                    {
                        "name": worker.name,
                        "waits": worker.waits,
                        "rate": worker.rate,
                        "seenAt": worker.seen_at,
                    }
                    for worker in state.workers
                ],
            },
        )
        return Exit.DONE

    run(show())


def _tables(state: FleetStatus) -> RenderGroup:
    tasks = Table("Tasks", Column("Count", justify="right"))
    for name, count in state.tasks.items():
        tasks.add_row(name, f"{count:,}")
    tasks.add_row("chunks queued", f"{state.queued_chunks:,}")
    tasks.add_row("chunks running", f"{state.running_chunks:,}")
    numbers = (Column(name, justify="right") for name in ("Waits", "Requests/s"))
    workers = Table(Column("Worker", overflow="fold"), *numbers, "Last sign of life")
    for worker in state.workers:
        ago = f"{worker.seconds_ago:.0f} s ago"
        workers.add_row(plain(worker.name), f"{worker.waits:,}", f"{worker.rate:.1f}", ago)
    return RenderGroup(tasks, workers)


def _read_age(text: str) -> float:
    """Read ``30d`` as seconds."""
    age = re.fullmatch(r"(\d+)([smhd])", text)
    if age is None:
        raise typer.BadParameter("give a number and a unit: 45s, 90m, 12h or 30d")
    return int(age[1]) * _UNITS[age[2]]


def prune(
    dsn: _DsnArgument,
    *,
    older_than: Annotated[
        float,
        typer.Option(
            parser=_read_age, metavar="AGE", help="The age: 45s, 90m, 12h or 30d, for example."
        ),
    ],
) -> None:
    """Delete outcomes older than an age.

    Tasks without an outcome stay. A deleted id is unknown: it may be submitted again.
    """

    async def delete() -> Exit:
        async with _fleet(dsn) as fleet:
            pruned = await fleet.prune(older_than=older_than)
        say(f"{pruned} {'outcome' if pruned == 1 else 'outcomes'} deleted")
        return Exit.DONE

    run(delete())


add_commands(fleet_app, {"Commands": {"init": init, "status": status, "prune": prune}})


def submit(
    *,
    source: Source = None,
    dsn: _Dsn,
    chunk: Annotated[
        int, typer.Option(min=1, metavar="IDS", help="The most ids that a worker takes at once.")
    ] = 200,
) -> None:
    """Add task ids for the workers of a fleet; known ids are dropped."""
    if source is None:
        fail("no task ids: give them in a file with --from")
    ids = None if source == "-" else distinct_ids([], source)

    async def add() -> Exit:
        problems: list[str] = []
        async with _fleet(dsn) as fleet:
            new = await fleet.submit(_from_stdin(problems) if ids is None else ids, chunk=chunk)
        say(f"{new} new {'task' if new == 1 else 'tasks'}")
        fail_on(problems)
        return Exit.DONE

    run(add())


async def _from_stdin(problems: list[str]) -> AsyncGenerator[str]:
    async for items in ids_from_stdin():
        for item in items:
            if isinstance(item, Problem):
                problems.append(str(item))
            else:
                yield item


def worker(
    *,
    dsn: _Dsn,
    into: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Save the images of this worker's tasks there."),
    ] = None,
    max_chunks: Annotated[
        int, typer.Option(min=1, metavar="CHUNKS", help="The most chunks at a time.")
    ] = 20,
    heartbeat: Annotated[
        float,
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            help="Time between two signs of life. After five without one, others have taken over. "
            "Give all workers the same.",
        ),
    ] = 5.0,
    until_done: Annotated[
        bool, typer.Option("--until-done", help="End when no chunk is left.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings only.")] = False,
    verbose: Verbose = False,
    rate_limit: KnownLimit = None,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    allow_http: AllowHttp = False,
    allow_private: AllowPrivate = False,
    proxy: Proxy = None,
    api_key_file: KeyFile = None,
) -> None:
    """Wait for the tasks of a fleet, until SIGTERM or Ctrl-C.

    Then it takes no more, ends what ends within 5 seconds, and puts the rest back. Its start, its
    end, and times without the API or the database are logged to standard error.
    """
    log_events(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    options = connection(
        base_url=base_url,
        api_key_file=api_key_file,
        allow_http=allow_http,
        proxy=proxy,
        no_memory=True,  # the database has what the workers learn
    )
    # The page of `--help` ought not to wait for what keeps results.
    from kontext_async.cli.batch import make_folder  # noqa: PLC0415
    from kontext_async.results import ImageSaver  # noqa: PLC0415

    if into is not None:
        make_folder(into)

    async def work() -> Exit:
        async with AsyncExitStack() as stack:
            fleet = await stack.enter_async_context(_fleet(dsn))
            limit = None
            if rate_limit is not None:
                limit = await stack.enter_async_context(fleet.shared_limit(rate_limit))
            client, session = await stack.enter_async_context(
                attrs.evolve(options, rate_limit=limit).open()
            )
            saver = None
            if into is not None:
                saver = await stack.enter_async_context(
                    ImageSaver(
                        client, into, overwrite=True, allow_private=allow_private, session=session
                    )
                )
            await fleet.work(
                client,
                saver=saver,
                max_chunks=max_chunks,
                heartbeat=heartbeat,
                until_done=until_done,
            )
        return Exit.DONE

    run(work())
