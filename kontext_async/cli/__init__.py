"""The ``kontext`` command; its libraries come with the extra ``cli`` and load when it runs."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line in ``sys.argv`` and exit."""
    try:
        from kontext_async.cli.app import app  # noqa: PLC0415 - needs the extra
        from kontext_async.cli.completion import complete_at_first_tab  # noqa: PLC0415
        from kontext_async.cli.output import drop_lost_messages  # noqa: PLC0415
        from kontext_async.cli.running import leave_at_once  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name not in {"platformdirs", "rich", "typer"}:
            raise
        sys.exit("kontext: the command line needs its extra: pip install 'kontext-async[cli]'")
    try:
        app(prog_name="kontext")
    except SystemExit as end:
        if "--install-completion" in sys.argv:
            complete_at_first_tab()
        drop_lost_messages()
        leave_at_once(end.code)
        raise
