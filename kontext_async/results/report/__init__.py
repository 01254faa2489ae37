"""One HTML page about a folder of results."""

from kontext_async.results.report.page import write_report

__all__ = ["write_report"]
