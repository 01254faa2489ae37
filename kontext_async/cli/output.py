"""What the command says: JSON Lines for programs, text for people, exit codes for shells."""

from __future__ import annotations

import enum
import json
import os
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console

from kontext_async.errors import (
    ApiError,
    ConfigurationError,
    GenerationFailedError,
    KontextError,
    WaitTimeoutError,
)
from kontext_async.models import CompletedTask, TaskRecord, TaskStatus
from kontext_async.polling import TaskOutcome

# Where no terminal sets one, the width of a table: URLs should stay whole.
_UNBOUNDED = 200

_FIELDS = (
    "taskId",
    "outcome",
    "status",
    "resultImageUrl",
    "originImageUrl",
    "createTime",
    "completeTime",
    "duration",
    "expiresAt",
    "error",
    "errorCode",
    "message",
    "file",
)


class Exit(enum.IntEnum):
    """The command's exit codes."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    TIMEOUT = 3
    ERROR = 4
    INTERRUPTED = 130
    BROKEN_PIPE = 141


_GRAVEST_FIRST = (Exit.USAGE, Exit.ERROR, Exit.TIMEOUT, Exit.FAILED)

# The first class that an error belongs to names its outcome and its exit code.
_KINDS: tuple[tuple[type[KontextError], str, Exit], ...] = (
    (GenerationFailedError, "failed", Exit.FAILED),
    (WaitTimeoutError, "timeout", Exit.TIMEOUT),
    (ConfigurationError, "error", Exit.USAGE),
    (KontextError, "error", Exit.ERROR),
)


def kind(error: KontextError | None) -> tuple[str, Exit]:
    """The word and the exit code for how a task ended."""
    if error is None:
        return "success", Exit.DONE
    return next((word, code) for cls, word, code in _KINDS if isinstance(error, cls))


def gravest(codes: Iterable[Exit]) -> Exit:
    """The exit code for all of these together."""
    met = set(codes)
    return next((code for code in _GRAVEST_FIRST if code in met), Exit.DONE)


def _iso(instant: datetime | None) -> str | None:
    return None if instant is None else instant.isoformat()


def _times(task: CompletedTask | TaskRecord | None) -> dict[str, Any]:
    if task is None:
        return {}
    duration = task.duration
    return {
        "originImageUrl": task.origin_image_url,
        "createTime": _iso(task.create_time),
        "completeTime": _iso(task.complete_time),
        "duration": None if duration is None else duration.total_seconds(),
    }


def _completed(task: CompletedTask) -> dict[str, Any]:
    return {
        "outcome": "success",
        "status": TaskStatus.SUCCESS.name,
        "resultImageUrl": task.result_image_url,
        "expiresAt": _iso(task.expires_at),
        **_times(task),
    }


def code_of(error: KontextError) -> int | None:
    """The API's code for what went wrong; None where it gave none."""
    match error:
        case GenerationFailedError(error_code=code) | ApiError(code=code):
            return code
        case _:
            return None


def _failed(error: KontextError) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "outcome": kind(error)[0],
        "error": type(error).__name__,
        "errorCode": code_of(error),
        "message": str(error),
    }
    match error:
        case GenerationFailedError():
            fields |= {"status": error.status.name, "message": error.error_message}
            return fields | _times(error.record)
        case WaitTimeoutError(last_record=TaskRecord() as record):
            return fields | {"status": record.status.name} | _times(record)
        case _:
            return fields


def _line(task_id: str, **known: Any) -> dict[str, Any]:
    return dict.fromkeys(_FIELDS) | {"taskId": task_id} | known


def outcome_line(outcome: TaskOutcome) -> dict[str, Any]:
    """The fields for a task whose wait has ended; those that do not apply are None."""
    ended = _failed(outcome.error) if outcome.error else _completed(outcome.unwrap())
    return _line(outcome.task_id, **ended)


def record_line(record: TaskRecord) -> dict[str, Any]:
    """The same fields for a task that was looked at once."""
    if record.status.phase == "ready" and record.result_image_url is not None:
        return _line(record.task_id, **_completed(CompletedTask.of(record)))
    return _line(
        record.task_id,
        outcome={"ready": "success"}.get(record.status.phase, record.status.phase),
        status=record.status.name,
        errorCode=record.error_code,
        message=record.error_message or None,
        **_times(record),
    )


def write_line(fields: Mapping[str, Any]) -> None:
    """One JSON object on standard output, at once. Its escapes make it safe for a terminal."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def print_outcome(outcome: TaskOutcome) -> None:
    """A line of JSON for a task whose wait has ended."""
    write_line(outcome_line(outcome))


def plain(text: str) -> str:
    """Text from outside without anything a terminal would act on."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def error_console() -> Console:
    """Standard error, for people: text is shown as it is, never read as markup."""
    terminal = sys.stderr.isatty()
    return Console(
        stderr=True,
        markup=False,
        highlight=False,
        emoji=False,
        force_terminal=terminal,  # whatever FORCE_COLOR says: a log file is no place for cursors
        width=None if terminal else _UNBOUNDED,
    )


def say(text: str) -> None:
    """A line for people."""
    error_console().print(plain(text), soft_wrap=True)


def fail(problem: str) -> NoReturn:
    """End because of how the command was used; nothing has been sent."""
    for line in f"kontext: {problem}".split("\n"):
        say(line)
    raise typer.Exit(Exit.USAGE)


def silence_stdout() -> None:
    """After a broken pipe: keep the interpreter from failing once more when it flushes."""
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
