"""Options that several commands have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from kontext_async.cli.output import be_quiet
from kontext_async.pacing import RateLimit


def _limit(seconds: float) -> float | None:
    """Return a time limit as the client takes it: None for no limit."""
    return None if math.isinf(seconds) else seconds


def _seconds(help_text: str) -> Any:
    """Return an option that takes a time limit."""
    return typer.Option(min=0, callback=_limit, metavar="SECONDS", help=help_text)


BaseUrl = Annotated[
    str,
    typer.Option(
        metavar="URL",
        envvar="KONTEXT_BASE_URL",
        show_envvar=False,
        help="Address of the API; also the environment variable KONTEXT_BASE_URL.",
    ),
]
AllowHttp = Annotated[
    bool,
    typer.Option(
        "--allow-http", help="Permit plain http to another machine; the key travels unencrypted."
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File with the API key. Without it the key comes from the environment variable "
        "APIKLEY_API_KEY.",
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FILE|-",
        help="File with task ids, or - for standard input, which is read while it is being "
        "written. A line holds an id, or JSON with taskId. CSV has a first line with the names of "
        "its columns, one of them taskId. Blank lines and lines that begin with # are skipped.",
    ),
]
Timeout = Annotated[
    float | None,
    _seconds("Time limit of each task, from its first poll; 0 polls once, inf is no limit."),
]
BatchTimeout = Annotated[
    float | None, _seconds("Time limit of all tasks together; inf is no limit.")
]
Proxy = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="HTTP proxy for the API and the images. Without it the environment variables "
        "HTTPS_PROXY, HTTP_PROXY and NO_PROXY count.",
    ),
]
AllowPrivate = Annotated[
    bool,
    typer.Option(
        "--allow-private",
        help="Permit image hosts at private addresses, such as those that a VPN program makes up.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Write JSON Lines to a terminal too, as to a pipe.")
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        is_eager=True,
        callback=be_quiet,
        help="Print no progress and no summary, only results.",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log each poll to standard error.")]


def read_rate(text: str) -> RateLimit:
    """Read ``20/10``: 20 requests in any 10 seconds."""
    requests, _, seconds = text.partition("/")
    try:
        return RateLimit(int(requests), float(seconds or 1))
    except ValueError as error:
        raise typer.BadParameter("give REQUESTS/SECONDS, such as 20/10") from error


KnownLimit = Annotated[
    RateLimit | None,
    typer.Option(
        "--rate-limit",
        parser=read_rate,
        metavar="REQUESTS/SECONDS",
        help="The account's limit, if you know it: 20/10 is 20 requests in any 10 seconds. The "
        "default is to discover it.",
    ),
]
NoMemory = Annotated[
    bool,
    typer.Option(
        "--no-memory",
        help="Neither use the task durations that earlier runs have learned, nor save this run's.",
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that --into named.")]
Into = Annotated[
    Path, typer.Option(metavar="FOLDER", help="Folder for the results; it is made if missing.")
]
Report = Annotated[bool, typer.Option("--report", help="Write report.html at the end.")]
