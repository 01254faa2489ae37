"""Results kept: images on disk, the outcome of each task, and an HTML report."""

from kontext_async.results.errors import DownloadError, LedgerError, ResultExpiredError
from kontext_async.results.images import ImageSaver, SavedImage, download, save_outcomes
from kontext_async.results.ledger import (
    KeyedRequest,
    Ledger,
    LedgerEntry,
    RequestErrorOutcome,
    RequestOutcome,
    RequestResultOutcome,
    SubmissionEntry,
)
from kontext_async.results.report import write_report

__all__ = [
    "DownloadError",
    "ImageSaver",
    "KeyedRequest",
    "Ledger",
    "LedgerEntry",
    "LedgerError",
    "RequestErrorOutcome",
    "RequestOutcome",
    "RequestResultOutcome",
    "ResultExpiredError",
    "SavedImage",
    "SubmissionEntry",
    "download",
    "save_outcomes",
    "write_report",
]
