"""What can go wrong when results are kept."""

from __future__ import annotations

from kontext_async.errors import KontextError, _about, _shown

__all__ = ["DownloadError", "LedgerError", "ResultExpiredError"]


class DownloadError(KontextError):
    """Raised when an image could not be saved; its task succeeded all the same.

    ``http_status`` is what the image's host answered, None where it is not at fault or did not
    answer. ``retryable`` is False where asking the host again cannot help: a URL that is refused,
    an image too large, a file that cannot be written. ``retry_after`` is the wait that the host
    asks for in seconds, None where it names none. ``task_id`` is None where it is the folder that
    cannot be used.
    """

    def __init__(
        self,
        problem: str,
        *,
        task_id: str | None = None,
        http_status: int | None = None,
        retryable: bool = True,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(problem)
        self.task_id = task_id
        self.http_status = http_status
        self.retryable = retryable
        self.retry_after = retry_after

    def __str__(self) -> str:
        http = "" if self.http_status is None else f" (HTTP {self.http_status})"
        return f"{_about(self.task_id)}image not saved{http}: {_shown(self.args[0])}"


class ResultExpiredError(DownloadError):
    """Raised when an image is gone for good from where the service kept it."""


class LedgerError(KontextError):
    """Raised when a ledger cannot be opened, read or written; what it holds is left as it is."""
