"""The pause of a whole client: the service asked for time, or there is an outage.

Pure: every method takes the time, in seconds of one monotonic clock.
"""

from __future__ import annotations

import enum
import math

from kontext_async.errors import (
    ApiError,
    Handling,
    KontextError,
    MaintenanceError,
    ResponseFormatError,
    ServerError,
    TransportError,
)

__all__ = ["Pause", "PauseState"]

_MAX_RETRY_AFTER = 300.0  # s; a longer Retry-After counts as this

# Seconds; pauses of an unknown length double from the first to the longest.
_FIRST_PAUSE = 1.0
_FIRST_MAINTENANCE_PAUSE = 5.0
# A refusal by a rate: short, because many limiters admit the next request soon, and growing
# faster, because others refuse to the end of a minute (tests/test_limits.py).
_FIRST_REFUSAL_PAUSE = 0.25
_REFUSAL_GROWTH = 3.0
_MAX_PAUSE = 60.0
# A probe that is not answered in this time may hang: the next request probes too, after twice the
# time the one after it, and so on (tests/test_chaos.py has single requests that hang).
_FIRST_PATIENCE = 1.0

# Evidence of an outage, from distinct tasks that begin to fail in a row with no success between:
# 5 tasks that had a good answer before are enough, or 50 new ones. tests/test_faults.py: ids that
# always fail, in any share and order, then leave the others alone.
_OUTAGE_EVIDENCE = 50
_KNOWN_TASK_EVIDENCE = 10
_NEW_TASK_EVIDENCE = 1


class PauseState(enum.Enum):
    """The states of a `Pause`; its docstring has the transitions."""

    OPEN = "open"
    BACK_OFF = "back off"  # the service asked for time
    OUTAGE = "outage"
    PROBING_BACK_OFF = "probing back off"
    PROBING_OUTAGE = "probing outage"

    def __init__(self, label: str) -> None:
        self.is_outage = "outage" in label
        # Attributes, because the hot path reads them and Python 3.11 is slow to look up members.
        self.is_open = label == "open"
        self.is_probing = label in {"probing back off", "probing outage"}


_PROBING = {
    PauseState.BACK_OFF: PauseState.PROBING_BACK_OFF,
    PauseState.OUTAGE: PauseState.PROBING_OUTAGE,
}
_PROBE_LOST = {probing: paused for paused, probing in _PROBING.items()}


class Pause:
    """The pause of a client, and the single requests that probe for its end.

    ================  ================  =====================  ==========  ===========
    state             a permit is       asked for time         probe       probe
                      acquired          / outage               answered    lost
    ================  ================  =====================  ==========  ===========
    OPEN                                BACK_OFF / OUTAGE
    BACK_OFF          PROBING_BACK_OFF
    OUTAGE            PROBING_OUTAGE
    PROBING_BACK_OFF                    BACK_OFF / OUTAGE      OPEN        BACK_OFF
    PROBING_OUTAGE                      BACK_OFF / OUTAGE      OPEN        OUTAGE
    ================  ================  =====================  ==========  ===========

    An empty cell leaves the state as it is. OPEN gives permits at once, BACK_OFF and OUTAGE when
    the pause is over, and the others none until the probe ends, or seems to hang.

    A request sent before the pause was over is evidence of the time before: its result changes no
    state. If it asks for more time while the pause is on, counted from its sending because its
    answer may be late, the pause gets longer.
    """

    def __init__(self) -> None:
        self.state = PauseState.OPEN
        self._cause: KontextError | None = None
        self._was_outage = False  # the pause that began last
        self._began = 0.0
        self._until = -math.inf
        self._probe_hangs_at = 0.0
        self._patience = _FIRST_PATIENCE
        self._past = 0.0  # seconds of earlier pauses that the service asked for
        self._streak = 0  # pauses since the last good answer
        self._evidence: dict[str | None, int] = {}  # by task, since the last good answer

    def opens_at(self, now: float) -> float:
        """Return when the next permit is free."""
        if self.state.is_open:
            return now
        return max(now, self._probe_hangs_at if self.state.is_probing else self._until)

    def remaining(self, now: float) -> float:
        """Return the seconds until the pause is over."""
        return max(0.0, self._until - now)

    def spent(self, now: float) -> float:
        """Return the seconds spent up to now in pauses that the service asked for."""
        return self._past + (0.0 if self._was_outage else self._elapsed(now))

    def _elapsed(self, now: float) -> float:
        return max(0.0, min(now, self._until) - self._began)

    def blocked_by(self, task_id: str, now: float) -> KontextError | None:
        """Return an error about this task that says why the client pauses; None if open."""
        if self.state.is_open:
            return None
        assert self._cause is not None, "a pause has a cause"
        if self.state.is_outage:
            cause = self._cause.for_task(None)
            return TransportError(f"the polls of several tasks failed: {cause}", task_id=task_id)
        remaining = self.remaining(now)
        return self._cause.for_task(task_id, retry_after=remaining, http_status=None)

    def acquire(self, now: float) -> None:
        """Note that a permit was acquired: in a pause, by a probe."""
        if self.state.is_open:
            return
        self._patience = 2 * self._patience if self.state.is_probing else _FIRST_PATIENCE
        self._probe_hangs_at = now + self._patience
        self.state = _PROBING.get(self.state, self.state)

    def observe(
        self,
        error: KontextError | None,
        *,
        now: float,
        sent: float,
        first: bool = False,
        failing: bool = False,
        refused: bool = False,
    ) -> None:
        """Start, lengthen or clear the pause after the end of a request sent at ``sent``.

        ``first``: it was the task's first poll; ``failing``: the one before it failed too.
        ``refused``: the error is a refusal by a rate, whatever its number.
        """
        if error is None:
            self._observe_success(sent)
        elif refused or error.handling is Handling.BACK_OFF:
            self._start(error, now=now, sent=sent, refused=refused)
        elif isinstance(error, (ServerError, TransportError, ResponseFormatError)):
            self._observe_failure(error, now=now, sent=sent, first=first, failing=failing)
        else:
            self._observe_success(sent)  # the service works, and refused this request

    def probe_lost(self, *, sent: float) -> None:
        """Let the next request probe if the one cancelled, sent at ``sent``, was the probe."""
        if self.state.is_probing and sent >= self._until:
            self.state = _PROBE_LOST[self.state]

    def _observe_success(self, sent: float) -> None:
        self._evidence.clear()
        if not self.state.is_open:
            self._clear(sent=sent)

    def _observe_failure(
        self, error: KontextError, *, now: float, sent: float, first: bool, failing: bool
    ) -> None:
        # An unreadable answer is evidence neither of an outage nor against one. Nor is a task that
        # fails again and again: it may be broken.
        if not failing and not isinstance(error, ResponseFormatError):
            self._evidence[error.task_id] = _NEW_TASK_EVIDENCE if first else _KNOWN_TASK_EVIDENCE
        probed_outage = self.state is PauseState.PROBING_OUTAGE
        if probed_outage or sum(self._evidence.values()) >= _OUTAGE_EVIDENCE:
            # The probe of a task without a good answer may have met a broken task.
            self._start(error, now=now, sent=sent, longer=not (probed_outage and first))
        else:  # the service no longer asks for time, and this task alone fails
            self._clear(sent=sent)

    def _start(
        self,
        error: KontextError,
        *,
        now: float,
        sent: float,
        longer: bool = True,
        refused: bool = False,
    ) -> None:
        retry_after = error.retry_after if isinstance(error, ApiError) else None
        asked = min(retry_after, _MAX_RETRY_AFTER) if retry_after else None
        if self.state in _PROBING:
            if asked and now < self._until:
                self._until = max(self._until, sent + asked)
        elif sent >= self._until:
            is_asked = refused or error.handling is Handling.BACK_OFF
            self._past = self.spent(now)
            self._was_outage = not is_asked
            self._streak += longer
            self.state = PauseState.BACK_OFF if is_asked else PauseState.OUTAGE
            self._cause = error
            self._began = now
            self._until = now + (asked or self._grown(error, refused=refused))

    def _grown(self, error: KontextError, *, refused: bool) -> float:
        first, growth = _FIRST_PAUSE, 2.0
        if refused:
            first, growth = _FIRST_REFUSAL_PAUSE, _REFUSAL_GROWTH
        elif isinstance(error, MaintenanceError):
            first = _FIRST_MAINTENANCE_PAUSE
        steps = min(self._streak - 1, 10)  # a float overflows at 1024
        return min(first * growth**steps, _MAX_PAUSE)

    def _clear(self, *, sent: float) -> None:
        if sent >= self._until:
            self.state = PauseState.OPEN
            self._streak = 0
