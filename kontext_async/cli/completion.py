"""Completion in a shell, as Typer installs it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

__all__ = ["complete_at_first_tab"]

_CALL = '[[ $zsh_eval_context[-1] == loadautofunc ]] && _kontext_completion "$@"\n'


def complete_at_first_tab() -> None:
    """Let the installed file for zsh complete when it is loaded, which the first Tab does.

    Typer's file only defines there what completes at the second.
    """
    path = Path.home() / ".zfunc" / "_kontext"
    with suppress(OSError):
        text = path.read_text(encoding="utf-8").removesuffix(_CALL)
        path.write_text(f"{text.rstrip()}\n{_CALL}", encoding="utf-8")
