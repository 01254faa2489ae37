"""The simulator's time: the loop's clock for what passes, the wall clock for what is written."""

from __future__ import annotations

import asyncio
import functools
import time
from datetime import UTC, datetime
from email.utils import formatdate

__all__ = ["Clock", "http_date", "iso_time"]


@functools.lru_cache(maxsize=1024)
def _iso_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def iso_time(unix: float) -> str:
    """A time as the provider's page writes it: UTC, whole seconds, with a ``Z``."""
    return _iso_second(int(unix))


@functools.lru_cache(maxsize=8)
def _http_second(second: int) -> str:
    return formatdate(second, usegmt=True)


def http_date(unix: float) -> str:
    """A time as HTTP headers write it."""
    return _http_second(int(unix))


class Clock:
    """Counts seconds from the simulator's start on the running loop's clock.

    One look at the wall clock, at the start, gives those seconds their dates: on a loop with
    virtual time the dates move with it.
    """

    def __init__(self) -> None:
        self._anchor = time.time()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = 0.0

    def start(self) -> None:
        """Begin to count; before, it is second 0."""
        self._anchor = time.time()
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self._loop.time() - self._started if self._loop else 0.0

    def unix(self, now: float) -> float:
        """The unix time of a second of this clock."""
        return self._anchor + now
