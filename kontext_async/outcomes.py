"""The end of one task's wait: a result or an error."""

from __future__ import annotations

from typing import NoReturn, TypeAlias

import attrs

from kontext_async.errors import KontextError
from kontext_async.models import CompletedTask

__all__ = ["ErrorOutcome", "ResultOutcome", "TaskOutcome"]


@attrs.frozen(kw_only=True)
class ResultOutcome:
    """The end of a wait that returned a completed task: ``error`` is None."""

    task_id: str
    result: CompletedTask
    error: None = attrs.field(default=None, init=False)

    def unwrap(self) -> CompletedTask:
        """Return the result."""
        return self.result


@attrs.frozen(kw_only=True)
class ErrorOutcome:
    """The end of a wait that raised an error: ``result`` is None."""

    task_id: str
    result: None = attrs.field(default=None, init=False)
    error: KontextError

    def unwrap(self) -> NoReturn:
        """Raise the error."""
        raise self.error


# Two classes, so that a check of one field tells a type checker what the other is.
TaskOutcome: TypeAlias = ResultOutcome | ErrorOutcome
