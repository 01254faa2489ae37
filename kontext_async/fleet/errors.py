"""The error of a fleet's database."""

from __future__ import annotations

from kontext_async.errors import Handling, KontextError

__all__ = ["FleetError"]


class FleetError(KontextError):
    """Raised when a fleet's database cannot be reached, read or written.

    It is retryable where the database was away, and not where it refused the login or the
    statement.
    """

    title = "Database trouble"

    def __init__(self, problem: str, *, retryable: bool) -> None:
        super().__init__(problem)
        self._retryable = retryable

    @property
    def handling(self) -> Handling:
        return Handling.RETRY if self._retryable else Handling.RAISE
