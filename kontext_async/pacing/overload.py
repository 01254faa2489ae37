"""The evidence of an overloaded service: its refusals, among the failures of broken tasks.

Pure: every method takes the time, in seconds of one monotonic clock.
"""

from __future__ import annotations

import math

from kontext_async.errors import ApiError, Handling, KontextError, MaintenanceError

__all__ = ["Overload"]

# The next polls of refused tasks are judged for this many seconds after a refusal, when the rate
# is lower: before that, an overloaded service may refuse them again.
_JUDGED_FOR = 30.0

# Without a good answer for this many seconds the service is down, and not only overloaded.
_DOWN_AFTER = 1.0

# The share of 503s among the latest answers, smoothed over about so many, from which on they are
# refusals. Fewer are accidents, and so are those among as many other failures: they say nothing
# about the rate (tests/test_chaos.py).
_SHARE_SMOOTHING = 1 / 32
_REFUSED_SHARE = 0.05

# The share of refused polls whose next poll is answered, smoothed over about this many; below a
# half they are of broken tasks (tests/test_faults.py has ids that are always answered 503).
_SMOOTHING = 1 / 8
_BELIEVED = 0.5


class Overload:
    """Tells a bare 503 of an overloaded service from one of a broken task.

    nginx refuses so by default, and so do HAProxy and many others. Of an overloaded service the
    next poll of the same task is likely to be answered; of a broken task it never is.
    """

    def __init__(self) -> None:
        self._answered_at = -_DOWN_AFTER
        self._recovery = 1.0
        self._share = 0.0  # of 503s
        self._other_share = 0.0  # of other failures
        self._refused_at = -math.inf
        self._is_down = False

    @property
    def is_believed(self) -> bool:
        """False while most polls that were refused were refused again, or the service is down."""
        return self._recovery >= _BELIEVED and not self._is_down

    def observe(self, error: KontextError | None, *, now: float, failing: bool) -> bool:
        """Note the end of a request, and return True if the service refused it for its rate.

        It says so with 429, and with 503 and the time to wait. A bare 503 is judged by what else
        is answered. ``failing``: the poll of the same task before it failed too.
        """
        if error is None and not failing:  # nearly every poll: the rest of this in short
            self._answered_at = now
            self._share -= self._share * _SHARE_SMOOTHING
            self._other_share -= self._other_share * _SHARE_SMOOTHING
            self._is_down = False
            return False
        is_503 = isinstance(error, ApiError) and error.code == 503 and error.retry_after is None
        is_answered = error is None or (isinstance(error, ApiError) and error.code < 500)
        asks_for_time = error is not None and error.handling is Handling.BACK_OFF
        was_lowered = now - self._refused_at < _JUDGED_FOR
        if failing and was_lowered and (is_503 or is_answered):
            self._recovery += (is_answered - self._recovery) * _SMOOTHING
        if is_answered:
            self._answered_at = now
        if not failing:
            self._share += (is_503 - self._share) * _SHARE_SMOOTHING
            is_other = not (is_503 or is_answered or asks_for_time)
            self._other_share += (is_other - self._other_share) * _SHARE_SMOOTHING
        self._is_down = is_503 and now - self._answered_at >= _DOWN_AFTER
        is_frequent = self._share >= max(_REFUSED_SHARE, self._other_share)
        is_overload = is_503 and is_frequent and self.is_believed and not failing
        if is_overload:
            self._refused_at = now
        return is_overload or (asks_for_time and not isinstance(error, MaintenanceError))
