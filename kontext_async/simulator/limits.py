"""Rate limits a service may enforce. Only requests they admit are counted."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import attrs

__all__ = ["BucketLimit", "Limit", "SlidingLimit", "WindowLimit"]


class Limit(Protocol):
    """What decides whether a request is admitted."""

    def admit(self, now: float) -> float:
        """Admit a request and return 0, or refuse it and return the seconds until one may pass.

        ``now`` is in seconds since the simulator's start, and never goes back.
        """
        ...


@attrs.define(eq=False)
class WindowLimit:
    """At most ``max_requests`` in each window of ``period`` seconds, one window after the other.

    Windows are counted from the simulator's start, so around a boundary twice as many pass.
    """

    max_requests: int = attrs.field(validator=attrs.validators.ge(1))
    period: float = attrs.field(validator=attrs.validators.gt(0))
    _window: int = attrs.field(default=-1, init=False, repr=False)
    _used: int = attrs.field(default=0, init=False, repr=False)

    def admit(self, now: float) -> float:
        window = int(now // self.period)
        if window != self._window:
            self._window, self._used = window, 0
        if self._used >= self.max_requests:
            # Never 0, as rounding may have it.
            return max((window + 1) * self.period - now, 1e-9)
        self._used += 1
        return 0.0


@attrs.define(eq=False)
class SlidingLimit:
    """At most ``max_requests`` in any ``period`` seconds."""

    max_requests: int = attrs.field(validator=attrs.validators.ge(1))
    period: float = attrs.field(validator=attrs.validators.gt(0))
    _admitted: deque[float] = attrs.field(factory=deque[float], init=False, repr=False)

    def admit(self, now: float) -> float:
        admitted = self._admitted
        while admitted and admitted[0] + self.period <= now:
            admitted.popleft()
        if len(admitted) >= self.max_requests:
            return admitted[0] + self.period - now
        admitted.append(now)
        return 0.0


@attrs.define(eq=False)
class BucketLimit:
    """A bucket of ``capacity`` requests, full at first, refilled with ``per_second`` a second."""

    capacity: float = attrs.field(validator=attrs.validators.ge(1))
    per_second: float = attrs.field(validator=attrs.validators.gt(0))
    _level: float = attrs.field(init=False, repr=False)
    _filled_at: float = attrs.field(default=0.0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._level = self.capacity

    def admit(self, now: float) -> float:
        gained = (now - self._filled_at) * self.per_second
        self._level, self._filled_at = min(self._level + gained, self.capacity), now
        if self._level < 1:
            return (1 - self._level) / self.per_second
        self._level -= 1
        return 0.0
