"""Tasks as a ledger's rows, in JSON: SQLite takes no half characters and no long numbers."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, cast

import attrs

from kontext_async.batch import TaskOutcome
from kontext_async.errors import (
    ApiError,
    ClientStateError,
    GenerationFailedError,
    Handling,
    KontextError,
    WaitTimeoutError,
)
from kontext_async.models import CompletedTask, TaskRecord, TaskStatus
from kontext_async.results.errors import LedgerError
from kontext_async.results.ledger.store import Row

__all__ = [
    "COLUMNS",
    "RECALLED",
    "LedgerEntry",
    "TaskState",
    "entry_of",
    "error_text",
    "recalled",
    "record_text",
    "state_of",
]

TaskState: TypeAlias = Literal["waiting", "done", "failed", "unfinished", "error"]

_STATUSES = {int(status): status for status in TaskStatus}

# What makes an entry, and what makes an outcome again.
COLUMNS = (
    "task_id, state, attempts, record, error, saved_path, sha256, size, created_at, updated_at"
)
RECALLED = "task_id, state, record, error, saved_path, sha256, size, kind"


@attrs.frozen(kw_only=True)
class LedgerEntry:
    """What a ledger knows of one task.

    ``state``: ``"waiting"`` has no outcome yet, ``"done"`` has an image, ``"failed"`` is a
    generation that failed, ``"unfinished"`` timed out or met trouble that passes, ``"error"`` is
    any other error, such as a refused key. ``attempts`` counts the waits begun for it.

    ``record`` is the last one known. The ``error_…`` fields tell why there is no image, or why
    a finished one could not be saved: the error's class, the API's code, and what was said.
    ``saved_path`` is relative to the ledger's folder, ``sha256`` in hex, ``size`` in bytes; the
    three are None where nothing was saved. Times are aware, in UTC: when the id was put down, and
    when its entry last changed.
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
    """The state of a task whose wait ended so."""
    if error is None:
        return "done"
    if isinstance(error, GenerationFailedError):
        return "failed"
    if isinstance(error, (ClientStateError, WaitTimeoutError)):
        return "unfinished"
    passes = error.handling in {Handling.RETRY, Handling.BACK_OFF}
    return "unfinished" if passes else "error"


def record_text(outcome: TaskOutcome) -> str | None:
    """The last record that an outcome knows of."""
    match outcome:
        case TaskOutcome(result=CompletedTask() as task):
            return _pack(task, TaskStatus.SUCCESS, result_image_url=task.result_image_url)
        case (
            TaskOutcome(error=GenerationFailedError(record=TaskRecord() as record))
            | TaskOutcome(error=WaitTimeoutError(last_record=TaskRecord() as record))
        ):
            return _pack(
                record,
                record.status,
                result_image_url=record.result_image_url,
                error_code=record.error_code,
                error_message=record.error_message,
            )
        case _:
            return None


def _pack(task: TaskRecord | CompletedTask, status: TaskStatus, **fields: Any) -> str:
    fields |= {
        "status": int(status),
        "param_json": task.param_json,
        "create_time": _iso(task.create_time),
        "complete_time": _iso(task.complete_time),
        "origin_image_url": task.origin_image_url,
    }
    return json.dumps(fields)


def _iso(instant: datetime | None) -> str | None:
    return None if instant is None else instant.isoformat()


def _record(task_id: str, text: str | None) -> TaskRecord | None:
    if text is None:
        return None
    fields = json.loads(text)
    fields["status"] = _STATUSES[fields["status"]]
    for name in ("create_time", "complete_time"):
        fields[name] = fields[name] and datetime.fromisoformat(fields[name])
    return TaskRecord(task_id=task_id, **fields)


def error_text(error: KontextError | None) -> str | None:
    """The class, code and message of an error."""
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
    """What was said, without the task's id: so equal errors have equal messages."""
    if not isinstance(error, WaitTimeoutError):
        return str(error.args[0]) if error.args else ""
    said = "not finished in time"
    return f"{said}: {_message(error.last_error)}" if error.last_error else said


@contextmanager
def _readable(task_id: object) -> Generator[None]:
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as exc:
        raise LedgerError(f"the ledger's entry of task {task_id!r} is unreadable: {exc!r}") from exc


def entry_of(row: Row) -> LedgerEntry:
    """The entry in a row of `COLUMNS`."""
    task_id, state, attempts, record, error, path, sha256, size, created, updated = row
    with _readable(task_id):
        fields: Mapping[str, Any] = json.loads(error) if error else {}
        return LedgerEntry(
            task_id=task_id,
            state=state,
            attempts=attempts,
            record=_record(task_id, record),
            error_type=fields.get("type"),
            error_code=fields.get("code"),
            error_message=fields.get("message", ""),
            saved_path=path,
            sha256=sha256,
            size=size,
            created_at=datetime.fromtimestamp(created, UTC),
            updated_at=datetime.fromtimestamp(updated, UTC),
        )


def recalled(row: Row) -> tuple[Row | None, TaskOutcome]:
    """The image and the outcome of a task that has ended, in a row of `RECALLED`."""
    task_id, state, text, error, *image = row
    with _readable(task_id):
        record = _record(task_id, text)
        if state == "failed":
            return None, TaskOutcome(task_id=task_id, error=_failure(task_id, error, record))
        result = CompletedTask.of(cast("TaskRecord", record))
        return tuple(image) if image[0] else None, TaskOutcome(task_id=task_id, result=result)


def _failure(task_id: str, error: str, record: TaskRecord | None) -> GenerationFailedError:
    fields = json.loads(error)
    return GenerationFailedError(
        task_id=task_id,
        status=_STATUSES[fields["status"]],
        error_code=fields["code"],
        error_message=fields["message"],
        record=record,
    )
