"""Tasks as frozen values, apart from how JSON and HTTP carry them."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Literal, Self

import attrs

__all__ = ["CompletedTask", "TaskRecord", "TaskStatus"]

# Lifetimes of a completed task's files (the provider's documentation).
_RESULT_LIFETIME = timedelta(days=14)
_ORIGIN_LIFETIME = timedelta(minutes=10)


class TaskStatus(enum.IntEnum):
    """The status of a task: the API's ``successFlag``.

    ``phase`` is ``"generating"``, ``"ready"`` or ``"failed"``; ``meaning`` is the provider's
    description.
    """

    phase: Literal["generating", "ready", "failed"]
    meaning: str

    GENERATING = 0, "generating", "The task is being processed."
    SUCCESS = 1, "ready", "The task completed and has a result."
    CREATE_TASK_FAILED = 2, "failed", "The task could not be created."
    GENERATE_FAILED = 3, "failed", "The task was created, but generating failed."

    def __new__(
        cls, value: int, phase: Literal["generating", "ready", "failed"], meaning: str
    ) -> Self:
        status = int.__new__(cls, value)
        status._value_ = value
        status.phase = phase
        status.meaning = meaning
        return status


@attrs.frozen(kw_only=True)
class _Task:
    """The fields that a record and a completed task share."""

    task_id: str
    param_json: str | None = attrs.field(default=None, repr=False)
    create_time: datetime | None = None
    complete_time: datetime | None = None
    origin_image_url: str | None = None

    @property
    def params(self) -> Mapping[str, Any]:
        """The request's parameters, parsed from ``param_json``; empty where it does not parse."""
        try:
            params = json.loads(self.param_json or "{}")
            # JSON may escape half a character (a lone surrogate), which cannot be encoded.
            safe = json.dumps(params, ensure_ascii=False).encode(errors="replace")
        except (ValueError, RecursionError):
            return {}
        return json.loads(safe) if isinstance(params, dict) else {}

    @property
    def duration(self) -> timedelta | None:
        """The task's duration by the service's own clock.

        None if a time is missing, or completion lies before creation.
        """
        if self.create_time is None or self.complete_time is None:
            return None
        taken = self.complete_time - self.create_time
        return taken if taken >= timedelta(0) else None


@attrs.frozen(kw_only=True)
class TaskRecord(_Task):
    """The state of a task at one poll.

    ``status`` alone says how the task stands; ``error_code`` and ``error_message`` explain a
    failure. ``create_time`` and ``complete_time`` are aware datetimes, None if absent or
    unreadable. ``param_json`` and ``params`` hold the prompt and are not in ``repr``.
    """

    status: TaskStatus
    result_image_url: str | None = None
    error_code: int | None = None
    error_message: str = ""


@attrs.frozen(kw_only=True)
class CompletedTask(_Task):
    """A task that succeeded, with the URL of its image."""

    result_image_url: str

    @classmethod
    def of(cls, record: TaskRecord) -> CompletedTask:
        """Return the completed task of a record; raise ValueError if it has no result URL."""
        if record.result_image_url is None:
            raise ValueError("the record has no result_image_url")
        return cls(
            task_id=record.task_id,
            param_json=record.param_json,
            create_time=record.create_time,
            complete_time=record.complete_time,
            origin_image_url=record.origin_image_url,
            result_image_url=record.result_image_url,
        )

    @property
    def expires_at(self) -> datetime | None:
        """The end of ``result_image_url``: 14 days after completion (provider's page)."""
        return self.complete_time and self.complete_time + _RESULT_LIFETIME

    @property
    def origin_expires_at(self) -> datetime | None:
        """The end of ``origin_image_url``: 10 minutes after completion (same source)."""
        return self.complete_time and self.complete_time + _ORIGIN_LIFETIME
