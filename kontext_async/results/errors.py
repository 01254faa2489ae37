"""Errors of keeping results, under the library's own root."""

from __future__ import annotations

from kontext_async.errors import Handling, KontextError

__all__ = ["DownloadError", "LedgerError", "ResultExpiredError"]


class DownloadError(KontextError):
    """Raised when the image of a task that succeeded could not be saved.

    ``http_status`` is the answer of the image's host, None where there was none or the fault lies
    elsewhere. ``retryable`` is False where another request cannot help: a refused URL, an image
    that is too large, a file that cannot be written. ``retry_after`` is the wait that the host
    asks for in seconds, None where it names none. ``task_id`` is None if the folder itself cannot
    be used.
    """

    title = "Image not saved"

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
        self.retry_after = retry_after
        self._retryable = retryable

    @property
    def handling(self) -> Handling:
        return Handling.RETRY if self._retryable else Handling.RAISE

    def __str__(self) -> str:
        http = "" if self.http_status is None else f" (HTTP {self.http_status})"
        return f"{self._about()}image not saved{http}: {self._one_line(self.args[0])}"


class ResultExpiredError(DownloadError):
    """Raised when the service has deleted an image after its lifetime."""

    title = "Image expired"


class LedgerError(KontextError):
    """Raised when a ledger cannot be opened, read or written; its contents are left as they are."""

    title = "Ledger trouble"
