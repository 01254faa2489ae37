"""Everything that can go wrong, by who must act.

The caller misused us (`ConfigurationError`, `ClientStateError`), the API answered no (`ApiError`),
the task ended badly (`GenerationFailedError`), the answer or the network failed
(`ResponseFormatError`, `TransportError`), or we stopped waiting (`WaitTimeoutError`).
"""

from __future__ import annotations

from typing import Any

from kontext_async.models import TaskRecord, TaskStatus

__all__ = [
    "ApiError",
    "AuthenticationError",
    "ClientStateError",
    "ConfigurationError",
    "GenerationFailedError",
    "InvalidRequestError",
    "KontextError",
    "MaintenanceError",
    "RateLimitedError",
    "ResponseFormatError",
    "ServerError",
    "TaskNotFoundError",
    "TransportError",
    "WaitTimeoutError",
]

# Text from outside is cut to this many characters in a message.
_SHOWN = 200


def _shown(text: str) -> str:
    """Text from outside, on one line, with nothing a terminal would act on."""
    line = "".join(c if c.isprintable() else " " for c in text[: 2 * _SHOWN])
    line = " ".join(line.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"


def _about(task_id: str | None) -> str:
    return "" if task_id is None else f"task {_shown(task_id)}: "


def _rebuild(cls: type[KontextError], args: tuple[Any, ...]) -> KontextError:
    error = cls.__new__(cls, *args)
    error.args = args  # an OSError, as TimeoutError is, takes them in __init__ only
    return error


class KontextError(Exception):
    """The root of all errors this library raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with `args` alone, which keyword-only parameters refuse.
        return _rebuild, (type(self), self.args), self.__dict__


class ConfigurationError(KontextError, ValueError):
    """Raised when an argument or a setting cannot be used; nothing has been sent."""


class ClientStateError(KontextError, RuntimeError):
    """Raised when a client is used after closing, or from another event loop than its first."""


class ApiError(KontextError):
    """Raised when the API, or a gateway before it, answers no.

    ``code`` is the envelope's code, or the HTTP status where the body is no envelope.
    ``http_status`` is None where no request was sent because the client is being held back.
    ``retry_after`` is the wait the service asks for in seconds, None where it names none.
    """

    _advice = ""

    def __init__(
        self,
        msg: str,
        *,
        code: int,
        http_status: int | None = None,
        retry_after: float | None = None,
        task_id: str | None = None,
    ) -> None:
        super().__init__(msg)
        self.msg = msg
        self.code = code
        self.http_status = http_status
        self.retry_after = retry_after
        self.task_id = task_id

    @property
    def asks_for_pause(self) -> bool:
        """Whether the service asks everybody for patience: 429, 455, or 503 with Retry-After."""
        return self.code in (429, 455) or (self.code == 503 and self.retry_after is not None)

    def __str__(self) -> str:
        http = "" if self.http_status in (None, self.code) else f" (HTTP {self.http_status})"
        said = _shown(self.msg) or "no message"
        wait = "" if self.retry_after is None else f"; retry after {self.retry_after:g} s"
        return f"{_about(self.task_id)}code {self.code}{http}: {said}{wait}{self._hint()}"

    def _hint(self) -> str:
        if self.code == 402:
            return "; the account has no credits left"
        if self.code == 404:
            return "; nothing is served there: check base_url"
        return self._advice


class AuthenticationError(ApiError):
    """Raised when the API does not accept the key (401, or 403 in an envelope)."""

    _advice = "; check the API key"


class TaskNotFoundError(ApiError):
    """Raised when the API knows no such task: it may be too new, too old, or another account's."""

    def _hint(self) -> str:
        return "; check the task id and that the key is of the account that made the task"


class InvalidRequestError(ApiError):
    """Raised when the API finds the request malformed (422)."""


class RateLimitedError(ApiError):
    """Raised when requests come faster than the account may send them (429)."""


class MaintenanceError(ApiError):
    """Raised while the service is under maintenance (455)."""


class ServerError(ApiError):
    """Raised when the service fails to answer (500 and other 5xx)."""


class GenerationFailedError(KontextError):
    """Raised when a task ended without an image.

    ``error_code`` and ``error_message`` are the record's ``errorCode`` (400: the prompt was
    flagged; 500: internal error; 501: generation failed; None where not given) and
    ``errorMessage``. ``record`` is None where the API told of the failure without a record.
    """

    def __init__(
        self,
        *,
        task_id: str,
        status: TaskStatus,
        error_code: int | None = None,
        error_message: str = "",
        record: TaskRecord | None = None,
    ) -> None:
        super().__init__(error_message)
        self.task_id = task_id
        self.status = status
        self.error_code = error_code
        self.error_message = error_message
        self.record = record

    def __str__(self) -> str:
        code = "no error code" if self.error_code is None else f"error {self.error_code}"
        said = _shown(self.error_message) or "no message"
        return f"{_about(self.task_id)}{self.status.name} ({code}): {said}"


class ResponseFormatError(KontextError):
    """Raised when an answer is not what the API's contract allows.

    ``excerpt`` is the beginning of the answer, at most 200 characters, without the API key and
    the task's parameters. ``http_status`` is the status it came with.
    """

    def __init__(
        self,
        problem: str,
        *,
        task_id: str | None = None,
        http_status: int | None = None,
        excerpt: str = "",
    ) -> None:
        super().__init__(problem)
        self.task_id = task_id
        self.http_status = http_status
        self.excerpt = excerpt

    def __str__(self) -> str:
        http = "" if self.http_status is None else f" (HTTP {self.http_status})"
        seen = f"; it begins: {_shown(self.excerpt)}" if self.excerpt else ""
        return f"{_about(self.task_id)}unreadable answer{http}: {self.args[0]}{seen}"


class TransportError(KontextError):
    """Raised when no whole answer came: DNS, connect, TLS, reset, time-out, or a redirect.

    ``retryable`` is False where asking again cannot help: a redirect, or a certificate that
    does not verify.
    """

    def __init__(self, problem: str, *, task_id: str | None = None, retryable: bool = True) -> None:
        super().__init__(problem)
        self.task_id = task_id
        self.retryable = retryable

    def __str__(self) -> str:
        return f"{_about(self.task_id)}{_shown(self.args[0])}"


class WaitTimeoutError(KontextError, TimeoutError):
    """Raised when a deadline passes before the task was seen to end.

    This is no failure: the task may still finish and be paid for. Wait for the same
    ``task_id`` again to get its result; do not submit it again. ``elapsed`` is in seconds,
    ``polls`` counts the looks taken. ``last_record`` is the last good answer, ``last_error`` the
    error of the last look that failed, or the pause that kept the client from looking; each is
    None where there was none.
    """

    def __init__(
        self,
        *,
        task_id: str,
        elapsed: float,
        polls: int,
        last_record: TaskRecord | None = None,
        last_error: KontextError | None = None,
    ) -> None:
        super().__init__(task_id)
        self.task_id = task_id
        self.elapsed = elapsed
        self.polls = polls
        self.last_record = last_record
        self.last_error = last_error

    def __str__(self) -> str:
        looks = "1 look" if self.polls == 1 else f"{self.polls} looks"
        last = "" if self.last_error is None else f" (last error: {self.last_error})"
        return (
            f"{_about(self.task_id)}not finished after {self.elapsed:.1f} s and {looks}{last}; "
            "it may still finish and be paid for: wait for the same id again"
        )
