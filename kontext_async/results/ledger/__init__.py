"""The outcome of each task on disk, so that a restart continues where the last run stopped."""

from kontext_async.results.ledger.ledger import Ledger
from kontext_async.results.ledger.rows import LedgerEntry

__all__ = ["Ledger", "LedgerEntry"]
