"""Log messages about a client's trouble: one when it begins, and one when it ends."""

from __future__ import annotations

import logging

from kontext_async.errors import Handling, KontextError
from kontext_async.pacing.pauses import Pause

__all__ = ["TroubleLog"]

_log = logging.getLogger("kontext_async")

# A bad poll or two are no news, nor are the short pauses of a rate limit that is being tried.
_MIN_FAILURES = 3
_MIN_SECONDS = 1.0


class TroubleLog:
    """The trouble of one client: a pause, an outage, or polls that fail in a row."""

    def __init__(self, pause: Pause) -> None:
        self._pause = pause
        self._failures = 0  # in a row, of any tasks
        self._logged: str | None = None
        self._began = 0.0

    def observe(self, error: KontextError | None, now: float) -> None:
        """Note the end of a request, which the pause has observed; log no text of the service."""
        state = self._pause.state
        if error is None and state.is_open and not self._failures and self._logged is None:
            return
        if not self._failures and self._logged is None:
            self._began = now
        self._failures = self._failures + 1 if _has_failed(error) else 0
        remaining = self._pause.remaining(now)
        if state.is_outage or (not state.is_open and remaining >= _MIN_SECONDS):
            what = "outage" if state.is_outage else "pause"
            self._begin(what, f"all polls wait, at first for {remaining:.0f} s", error)
        elif self._failures >= _MIN_FAILURES and now - self._began >= _MIN_SECONDS:
            self._begin("failures", f"{self._failures} polls in a row had no good answer", error)
        elif state.is_open and not self._failures and self._logged is not None:
            _log.info("the %s ended after %.0f s", self._logged, now - self._began)
            self._logged = None

    def _begin(self, what: str, effect: str, error: KontextError | None) -> None:
        if what != self._logged:
            self._logged = what
            _log.warning("%s: %s: %s", what, effect, type(error).__name__)


def _has_failed(error: KontextError | None) -> bool:
    return error is not None and error.handling is Handling.RETRY
