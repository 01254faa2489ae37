"""The simulator's time: seconds by the loop's clock, dates by the wall clock."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from email.utils import formatdate

__all__ = ["Clock"]


class Clock:
    """Seconds since the simulator's start, by the running loop's clock, and their dates.

    The wall clock is read once, at the start: on a loop with virtual time the dates move along.
    """

    def __init__(self) -> None:
        self._anchor = time.time()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = 0.0

    def start(self) -> None:
        """Start at second 0."""
        self._anchor = time.time()
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()

    @property
    def now(self) -> float:
        """Seconds since the start; 0 before it."""
        return self._loop.time() - self._started if self._loop else 0.0

    def unix(self, second: float) -> float:
        """Return the Unix time of a second of this clock."""
        return self._anchor + second

    def iso(self, second: float) -> str:
        """Write a second's date as the provider does: UTC, whole seconds, with a ``Z``."""
        date = datetime.fromtimestamp(int(self.unix(second)), UTC)
        return date.strftime("%Y-%m-%dT%H:%M:%SZ")

    def http_date(self, second: float) -> str:
        """Write a second's date as HTTP headers do."""
        return formatdate(int(self.unix(second)), usegmt=True)
