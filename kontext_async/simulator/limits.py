"""Rate limits that a service may enforce. Only the requests they admit count towards them."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import attrs

__all__ = ["FixedWindow", "Limit", "SlidingWindow", "TokenBucket"]


class Limit(Protocol):
    """A rate limit."""

    def admit(self, now: float) -> float:
        """Admit a request and return 0, or refuse it and return the seconds until one may pass.

        ``now`` is in seconds since the simulator's start, and never decreases.
        """
        ...


@attrs.define(eq=False)
class FixedWindow:
    """At most ``max_requests`` in each of the windows of ``period`` seconds that follow each other.

    The first begins at the simulator's start. Around a boundary up to twice as many pass.
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
            # Rounding could make it 0, which would admit the request.
            return max((window + 1) * self.period - now, 1e-9)
        self._used += 1
        return 0.0


@attrs.define(eq=False)
class SlidingWindow:
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
class TokenBucket:
    """At most ``capacity`` requests at once, and ``per_second`` a second in the long run."""

    capacity: float = attrs.field(validator=attrs.validators.ge(1))
    per_second: float = attrs.field(validator=attrs.validators.gt(0))
    _tokens: float = attrs.field(init=False, repr=False)
    _filled_at: float = attrs.field(default=0.0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._tokens = self.capacity

    def admit(self, now: float) -> float:
        gained = (now - self._filled_at) * self.per_second
        self._tokens, self._filled_at = min(self._tokens + gained, self.capacity), now
        if self._tokens < 1:
            return (1 - self._tokens) / self.per_second
        self._tokens -= 1
        return 0.0
