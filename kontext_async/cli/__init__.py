"""The ``kontext`` command; its libraries come with the extra ``cli`` and load when it runs."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line in ``sys.argv`` and exit."""
    try:
        from kontext_async.cli.app import app  # noqa: PLC0415 - needs the extra
    except ModuleNotFoundError as error:
        if error.name not in {"rich", "typer"}:
            raise
        sys.exit("kontext: the command line needs its extra: pip install 'kontext-async[cli]'")
    app(prog_name="kontext")
