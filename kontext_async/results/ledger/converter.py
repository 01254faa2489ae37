"""Tasks from plain data that JSON can hold.

A ledger's odd field is an error, where an odd field of an answer reads as absent.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, get_args

from cattrs import Converter

from kontext_async.models import TaskStatus

__all__ = ["converter"]

_STATUSES: Final = {int(status): status for status in TaskStatus}


def _exact(value: object, kind: Any) -> Any:
    """Return the value as it is; raise TypeError if it is of another type."""
    if type(value) in (get_args(kind) or (kind,)):
        return value
    raise TypeError(f"expected {kind}, got {type(value).__name__}")


converter: Final = Converter(forbid_extra_keys=True)
"""Makes a `TaskRecord` of plain data.

Times are ISO 8601 strings and the status is its number. ``structure`` converts nothing else, and
raises `cattrs.ClassValidationError` for a wrong type, an unknown field, or a missing one.
"""
# cattrs' own hooks would make "None" of None, and "5" of 5.
for _kind in (str, str | None, int | None):
    converter.register_structure_hook(_kind, _exact)
converter.register_structure_hook(TaskStatus, lambda value, _: _STATUSES[_exact(value, int)])
converter.register_structure_hook(datetime, lambda value, _: datetime.fromisoformat(value))
