"""The outcome of each task on disk, so that a restart continues where the last run stopped."""

from kontext_async.results.ledger.generation import (
    RequestErrorOutcome,
    RequestOutcome,
    RequestResultOutcome,
)
from kontext_async.results.ledger.ledger import Ledger
from kontext_async.results.ledger.rows import LedgerEntry
from kontext_async.results.ledger.submissions import KeyedRequest, SubmissionEntry

__all__ = [
    "KeyedRequest",
    "Ledger",
    "LedgerEntry",
    "RequestErrorOutcome",
    "RequestOutcome",
    "RequestResultOutcome",
    "SubmissionEntry",
]
