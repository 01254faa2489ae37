"""JSON Lines for programs, text for people, and exit codes for shells."""

from __future__ import annotations

import enum
import json
import os
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import typer
from rich.console import Console

from kontext_async.errors import ApiError, GenerationFailedError, KontextError, WaitTimeoutError
from kontext_async.models import CompletedTask, TaskRecord, TaskStatus
from kontext_async.polling import TaskOutcome
from kontext_async.results import SavedImage

# An outcome's image, or the error that prevented saving it; None if nothing was to be saved.
Saved: TypeAlias = SavedImage | KontextError | None

# Columns of a table outside a terminal: wide enough for a URL on one line.
_DEFAULT_WIDTH = 200


class Exit(enum.IntEnum):
    """The command's exit codes. Where tasks end differently, the highest counts."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    TIMEOUT = 3
    ERROR = 4
    INTERRUPTED = 130
    BROKEN_PIPE = 141


# Of a wait's outcomes, a ledger's states, and images.
_EXIT_CODES: Final[Mapping[str, Exit]] = {
    **dict.fromkeys(("success", "generating", "done", "saved"), Exit.DONE),
    "failed": Exit.FAILED,
    **dict.fromkeys(("timeout", "waiting", "unfinished"), Exit.TIMEOUT),
    **dict.fromkeys(("error", "notSaved"), Exit.ERROR),
}


def exit_code(results: Iterable[str]) -> Exit:
    """Return the exit code for these outcomes, states of a ledger, and images together."""
    return max((_EXIT_CODES[result] for result in results), default=Exit.DONE)


def classify(error: KontextError | None) -> str:
    """Return the outcome of a wait that ended with this error, or without one."""
    match error:
        case None:
            return "success"
        case GenerationFailedError():
            return "failed"
        case WaitTimeoutError():
            return "timeout"
        case _:
            return "error"


def code_of(error: KontextError) -> int | None:
    """Return the API's code for an error; None if it gave none."""
    match error:
        case GenerationFailedError(error_code=code) | ApiError(code=code):
            return code
        case _:
            return None


def record_line(record: TaskRecord) -> dict[str, Any]:
    """Return the fields for a task that was polled once; those that do not apply are None."""
    phase = record.status.phase
    if phase == "ready" and record.result_image_url is not None:
        return outcome_line(TaskOutcome(task_id=record.task_id, result=CompletedTask.of(record)))
    return {
        **_line(record.task_id, record, record.status),
        "outcome": "success" if phase == "ready" else phase,
        "errorCode": record.error_code,
        "message": record.error_message or None,
    }


def outcome_line(outcome: TaskOutcome, saved: Saved = None) -> dict[str, Any]:
    """Return the same fields for a task whose wait has ended."""
    error = outcome.error
    task: CompletedTask | TaskRecord | None = outcome.result
    status = TaskStatus.SUCCESS if task else None
    match error:
        case GenerationFailedError():
            task, status = error.record, error.status
        case WaitTimeoutError(last_record=TaskRecord() as record):
            task, status = record, record.status
        case _:
            pass
    line = {**_line(outcome.task_id, task, status), "outcome": classify(error)}
    if isinstance(saved, SavedImage):
        line["file"] = str(saved.path)
    elif saved is not None:
        error = saved
    if error is not None:
        message = error.error_message if isinstance(error, GenerationFailedError) else str(error)
        line |= {"error": type(error).__name__, "errorCode": code_of(error), "message": message}
    return line


def _line(
    task_id: str, task: CompletedTask | TaskRecord | None, status: TaskStatus | None
) -> dict[str, Any]:
    completed = task if isinstance(task, CompletedTask) else None
    return {
        "taskId": task_id,
        "outcome": None,
        "status": None if status is None else status.name,
        "resultImageUrl": completed and completed.result_image_url,
        "originImageUrl": task and task.origin_image_url,
        "createTime": task and task.create_time,
        "completeTime": task and task.complete_time,
        "duration": task and task.duration,
        "expiresAt": completed and completed.expires_at,
        "error": None,
        "errorCode": None,
        "message": None,
        "file": None,
    }


def write_line(fields: Mapping[str, Any]) -> None:
    """Write a JSON object to standard output at once; its escapes are safe for a terminal."""
    sys.stdout.write(json.dumps(fields, default=_time_to_json) + "\n")
    sys.stdout.flush()


def _time_to_json(time: datetime | timedelta) -> str | float:
    return time.isoformat() if isinstance(time, datetime) else time.total_seconds()


def print_outcome(outcome: TaskOutcome, saved: Saved = None) -> None:
    """Write the JSON line of a task that needs no more work."""
    write_line(outcome_line(outcome, saved))


def plain(text: str) -> str:
    """Replace what a terminal would interpret in text from outside."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def error_console() -> Console:
    """Return a console on standard error that shows text as it is, without markup."""
    terminal = sys.stderr.isatty()
    return Console(
        stderr=True,
        markup=False,
        highlight=False,
        emoji=False,
        force_terminal=terminal,  # against FORCE_COLOR: log files get no cursor movements
        width=None if terminal else _DEFAULT_WIDTH,
    )


def say(text: str) -> None:
    """Print a line for people, to standard error."""
    error_console().print(plain(text), soft_wrap=True)


def fail(problem: str) -> NoReturn:
    """Exit because of wrong usage; nothing has been sent."""
    for line in f"kontext: {problem}".split("\n"):
        say(line)
    raise typer.Exit(Exit.USAGE)


def silence_stdout() -> None:
    """Redirect standard output after a broken pipe, so that the interpreter's flush succeeds."""
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
