"""Tasks as a ledger's rows. Text is JSON: SQLite takes no lone surrogates and no long numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, cast

import attrs
from cattrs import ClassValidationError

from kontext_async.errors import (
    ApiError,
    GenerationFailedError,
    Handling,
    KontextError,
    WaitTimeoutError,
)
from kontext_async.models import CompletedTask, TaskRecord, TaskStatus
from kontext_async.outcomes import ErrorOutcome, ResultOutcome, TaskOutcome
from kontext_async.results.errors import LedgerError
from kontext_async.results.ledger.converter import converter
from kontext_async.results.ledger.store import Row

__all__ = [
    "COLUMNS",
    "RECALLED",
    "LedgerEntry",
    "TaskState",
    "entry_of",
    "error_text",
    "readable",
    "recalled",
    "record_text",
    "state_of",
]

TaskState: TypeAlias = Literal["waiting", "done", "failed", "unfinished", "error"]

# The columns of an entry, and those of a recalled outcome.
COLUMNS = (
    "task_id, state, attempts, record, error, saved_path, sha256, size, created_at, updated_at"
)
RECALLED = "task_id, state, record, error, saved_path, sha256, size, kind"


@attrs.frozen(kw_only=True)
class LedgerEntry:
    """A ledger's knowledge of one task.

    ``state``: ``"waiting"`` has no outcome yet; ``"done"`` has an image; ``"failed"`` is a
    generation that failed; ``"unfinished"`` timed out or met trouble that may pass; ``"error"``
    is any other error, such as a refused key. ``attempts`` counts the waits begun for it.

    ``record`` is the last one known. The ``error_…`` fields say why there is no image, or why an
    image could not be saved: the error's class, the API's code, and the message.
    ``saved_path`` is relative to the ledger's folder, ``sha256`` in hex, ``size`` in bytes; the
    three are None if nothing is saved. Times are aware, in UTC: ``created_at`` when the id was
    added, ``updated_at`` of the last change.
    """

    task_id: str
    state: TaskState
    attempts: int
    record: TaskRecord | None = None
    error_type: str | None = None
    error_code: int | None = None
    error_message: str = ""
    saved_path: str | None = None
    sha256: str | None = None
    size: int | None = None
    created_at: datetime
    updated_at: datetime


def state_of(error: KontextError | None) -> TaskState:
    """Return the state of a task whose wait ended with this error, or without one."""
    if error is None:
        return "done"
    if isinstance(error, GenerationFailedError):
        return "failed"
    may_pass = error.handling in {Handling.RETRY, Handling.BACK_OFF}
    return "unfinished" if may_pass or isinstance(error, WaitTimeoutError) else "error"


def record_text(outcome: TaskOutcome) -> str | None:
    """Return the last record that an outcome knows of, as JSON."""
    match outcome:
        case ResultOutcome(result=task):
            return _pack(task, TaskStatus.SUCCESS)
        case (
            ErrorOutcome(error=GenerationFailedError(record=TaskRecord() as record))
            | ErrorOutcome(error=WaitTimeoutError(last_record=TaskRecord() as record))
        ):
            code, message = _json(record.error_code), _json(record.error_message)
            more = f', "error_code": {code}, "error_message": {message}'
            return _pack(record, record.status, more)
        case _:
            return None


_json = json.JSONEncoder().encode


def _pack(task: TaskRecord | CompletedTask, status: TaskStatus, more: str = "") -> str:
    # Put together by hand: a dict and `json.dumps` take twice as long (benchmarks/ledger_cost.py).
    # The id is a column of its own.
    return (
        f'{{"param_json": {_json(task.param_json)}, "create_time": {_time(task.create_time)}, '
        f'"complete_time": {_time(task.complete_time)}, '
        f'"origin_image_url": {_json(task.origin_image_url)}, '
        f'"result_image_url": {_json(task.result_image_url)}, "status": {int(status)}{more}}}'
    )


def _time(instant: datetime | None) -> str:
    return "null" if instant is None else f'"{instant.isoformat()}"'


def _record(task_id: str, text: str | None) -> TaskRecord | None:
    if text is None:
        return None
    return converter.structure({**json.loads(text), "task_id": task_id}, TaskRecord)


def error_text(error: KontextError | None) -> str | None:
    """Return the class, code and message of an error, as JSON."""
    if error is None:
        return None
    fields: dict[str, Any] = {
        "type": type(error).__name__,
        "code": None,
        "message": _message(error),
    }
    if isinstance(error, GenerationFailedError):
        fields |= {"code": error.error_code, "status": int(error.status)}
    elif isinstance(error, ApiError):
        fields["code"] = error.code
    return json.dumps(fields)


def _message(error: KontextError) -> str:
    """Return the message without the task's id, so that equal errors have equal messages."""
    if not isinstance(error, WaitTimeoutError):
        return str(error.args[0]) if error.args else ""
    message = "not finished in time"
    return f"{message}: {_message(error.last_error)}" if error.last_error else message


# What reading a row may raise that something other than this module has written.
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    ClassValidationError,
    LookupError,
    TypeError,
    ValueError,
)


@contextmanager
def readable(name: object, kind: str = "task") -> Generator[None]:
    """Raise `LedgerError` for an entry that something other than this package has written."""
    try:
        yield
    except _UNREADABLE as exc:
        raise LedgerError(f"the ledger's entry of {kind} {name!r} is unreadable: {exc!r}") from exc


def entry_of(row: Row) -> LedgerEntry:
    """Return the entry in a row of `COLUMNS`."""
    task_id, state, attempts, record, error, path, sha256, size, created, updated = row
    with readable(task_id):
        fields: Mapping[str, Any] = json.loads(error) if error else {}
        return LedgerEntry(
            task_id=task_id,
            state=state,
            attempts=attempts,
            record=_record(task_id, record),
            error_type=fields.get("type"),
            error_code=fields.get("code"),
            error_message=fields.get("message", ""),
            saved_path=None if path is None else os.fsdecode(path),
            sha256=sha256,
            size=size,
            created_at=datetime.fromtimestamp(created, UTC),
            updated_at=datetime.fromtimestamp(updated, UTC),
        )


def recalled(row: Row) -> tuple[Row | None, TaskOutcome]:
    """Return the image columns and the outcome in a row of `RECALLED`."""
    task_id, state, text, error, *image = row
    with readable(task_id):
        record = _record(task_id, text)
        if state == "failed":
            return None, ErrorOutcome(task_id=task_id, error=_failure(task_id, error, record))
        result = CompletedTask.of(cast("TaskRecord", record))
        return tuple(image) if image[0] else None, ResultOutcome(task_id=task_id, result=result)


def _failure(task_id: str, error: str, record: TaskRecord | None) -> GenerationFailedError:
    fields = json.loads(error)
    return GenerationFailedError(
        task_id=task_id,
        status=converter.structure(fields["status"], TaskStatus),
        error_code=fields["code"],
        error_message=fields["message"],
        record=record,
    )
