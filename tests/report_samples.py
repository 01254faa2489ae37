"""Entries of a ledger and their images, for the tests of the report."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

from pngs import plain_png

from kontext_async import TaskRecord, TaskStatus
from kontext_async.results import LedgerEntry

MADE = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def record(task_id="task-1", *, status=TaskStatus.SUCCESS, seconds=12.5, **params):
    return TaskRecord(
        task_id=task_id,
        status=status,
        param_json=json.dumps(params),
        create_time=MADE,
        complete_time=None if seconds is None else MADE + timedelta(seconds=seconds),
    )


def entry(task_id="task-1", *, state="done", **fields):
    """Return an entry with defaults for what a test does not name."""
    return LedgerEntry(
        **{
            "task_id": task_id,
            "state": state,
            "record": None,
            "error_type": None,
            "error_code": None,
            "error_message": "",
            "attempts": 3,
            "saved_path": None,
            "sha256": None,
            "size": None,
            "created_at": MADE,
            "updated_at": MADE + timedelta(minutes=1),
        }
        | fields
    )


def failed(task_id="task-1", *, code=400, message="The prompt was flagged.", **fields):
    known = {"error_type": "GenerationFailedError", "error_code": code, "error_message": message}
    return entry(task_id, state="failed", **known | fields)


def saved(folder, name, *, task_id="task-1", seconds=12.5, colour=b"\x20\x80\x70", **params):
    """Write an image into the folder and return the entry of its task."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plain_png(64, 48, colour))
    known = record(task_id, seconds=seconds, **{"prompt": f"Prompt of {task_id}", **params})
    return entry(task_id, record=known, saved_path=name, size=path.stat().st_size)
