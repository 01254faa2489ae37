"""The evidence that a 503 is the refusal of an overloaded service, and not a broken task's.

Pure: every method takes the time, in seconds of one monotonic clock.
"""

from __future__ import annotations

import math

from kontext_async.errors import ApiError, KontextError, RateLimitedError

__all__ = ["Overload", "is_refusal"]

# The next polls of refused tasks are judged for this many seconds after a refusal, when the rate
# is lower: before that, an overloaded service may refuse them again.
_JUDGED_FOR = 30.0

# Without a good answer for this many seconds the service is down, and not only overloaded.
_DOWN_AFTER = 1.0

# The share of 503s among the latest answers, smoothed over about so many, from which on they are
# refusals; fewer are accidents, which say nothing about the rate (tests/test_chaos.py).
_SHARE_SMOOTHING = 1 / 32
_REFUSED_SHARE = 0.05

# The share of refused polls whose next poll is answered, smoothed over about this many; below a
# half they are of broken tasks (tests/test_faults.py has ids that are always answered 503).
_SMOOTHING = 1 / 8
_BELIEVED = 0.5


def is_refusal(error: KontextError | None) -> bool:
    """Return True for a refusal by its number: 429, and 503 with the time to wait."""
    if isinstance(error, RateLimitedError):
        return True
    return isinstance(error, ApiError) and error.code == 503 and error.retry_after is not None


class Overload:
    """Tells a bare 503 of an overloaded service from one of a broken task.

    nginx refuses so by default, and so do HAProxy and many others. Of an overloaded service the
    next poll of the same task is likely to be answered; of a broken task it never is.
    """

    def __init__(self) -> None:
        self._answered_at = -_DOWN_AFTER
        self._recovery = 1.0
        self._share = 0.0
        self._refused_at = -math.inf
        self._is_down = False

    @property
    def is_believed(self) -> bool:
        """False while most polls that were refused were refused again, or the service is down."""
        return self._recovery >= _BELIEVED and not self._is_down

    def observe(self, error: KontextError | None, *, now: float, failing: bool) -> bool:
        """Note the end of a request, and return True if it is a refusal by overload.

        ``failing``: the poll of the same task before it failed too.
        """
        is_503 = isinstance(error, ApiError) and error.code == 503 and error.retry_after is None
        is_answered = error is None or (isinstance(error, ApiError) and error.code < 500)
        was_lowered = now - self._refused_at < _JUDGED_FOR
        if failing and was_lowered and (is_503 or is_answered):
            self._recovery += (is_answered - self._recovery) * _SMOOTHING
        self._share += (is_503 - self._share) * _SHARE_SMOOTHING
        if is_answered:
            self._answered_at = now
        self._is_down = is_503 and now - self._answered_at >= _DOWN_AFTER
        is_frequent = self._share >= _REFUSED_SHARE
        is_refusal = is_503 and is_frequent and self.is_believed and not failing
        if is_refusal:
            self._refused_at = now
        return is_refusal
