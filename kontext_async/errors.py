"""The exception tree, and the one classification of it.

The branches are by who must act: the caller misused the library (`ConfigurationError`,
`ClientStateError`), the API refused (`ApiError`), the task ended without an image
(`GenerationFailedError`), the answer or the network failed (`ResponseFormatError`,
`TransportError`), or the wait reached its deadline (`WaitTimeoutError`).
"""

from __future__ import annotations

import copy
import enum
from typing import Any, ClassVar, Self

from kontext_async.models import TaskRecord, TaskStatus

__all__ = [
    "ApiError",
    "AuthenticationError",
    "ClientStateError",
    "ConfigurationError",
    "GenerationFailedError",
    "Handling",
    "InvalidRequestError",
    "KontextError",
    "MaintenanceError",
    "RateLimitedError",
    "ResponseFormatError",
    "ServerError",
    "SubmissionUnknownError",
    "TaskNotFoundError",
    "TransportError",
    "WaitTimeoutError",
]

# Characters of a text from outside that a message shows.
_SHOWN = 200


class Handling(enum.Enum):
    """The treatment of an error that a poll of a wait raises."""

    RAISE = enum.auto()  # polling again cannot help
    RETRY = enum.auto()  # poll again, for at most `error_grace`
    RETRY_NOT_FOUND = enum.auto()  # poll again, for at most `not_found_grace`
    BACK_OFF = enum.auto()  # pause the whole client, then poll again until the deadline


def _rebuild(cls: type[KontextError], args: tuple[Any, ...]) -> KontextError:
    error = cls.__new__(cls, *args)
    error.args = args  # an OSError, as TimeoutError is, takes them in __init__ only
    return error


class KontextError(Exception):
    """The root of all errors this library raises.

    ``task_id`` is the task it is about, None where it is about no single task.
    """

    title: ClassVar[str] = ""
    """A few words for people, such as a heading of a group of such errors."""

    task_id: str | None = None

    @property
    def handling(self) -> Handling:
        """The treatment of this error by a wait whose poll raises it."""
        return Handling.RAISE

    @property
    def retryable(self) -> bool:
        """True if the same call may succeed later, without a change by the caller."""
        return self.handling is not Handling.RAISE

    def for_task(self, task_id: str | None, **changes: object) -> Self:
        """Return the same error about another task, with some attributes changed."""
        error = copy.copy(self)
        error.__dict__.update(changes, task_id=task_id)
        return error

    def _about(self) -> str:
        return "" if self.task_id is None else f"task {self._one_line(self.task_id)}: "

    @staticmethod
    def _one_line(text: str) -> str:
        """Return text from outside on one line, without what a terminal would interpret."""
        line = "".join(c if c.isprintable() else " " for c in text[: 2 * _SHOWN])
        line = " ".join(line.split())
        return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with `args` alone, which keyword-only parameters refuse.
        return _rebuild, (type(self), self.args), self.__dict__


class ConfigurationError(KontextError, ValueError):
    """Raised when an argument or a setting cannot be used; nothing has been sent."""


class ClientStateError(KontextError, RuntimeError):
    """Raised when a client, saver or ledger is not open, or belongs to another event loop."""


class ApiError(KontextError):
    """Raised when the API, or a gateway in front of it, refuses a request.

    ``code`` is the envelope's code. It is the HTTP status where the body is not an envelope;
    ``from_gateway`` is then True. ``is_transient`` is True where earlier good answers of the same
    client contradict the refusal, such as a 401 between accepted requests. ``http_status`` is
    None where the client sent no request because of a pause or a full rate limit.
    ``retry_after`` is the wait the service asks for in seconds, None where it names none.
    """

    def __init__(
        self,
        msg: str,
        *,
        code: int,
        http_status: int | None = None,
        retry_after: float | None = None,
        task_id: str | None = None,
        from_gateway: bool = False,
    ) -> None:
        super().__init__(msg)
        self.msg = msg
        self.code = code
        self.http_status = http_status
        self.retry_after = retry_after
        self.task_id = task_id
        self.from_gateway = from_gateway
        self.is_transient = False

    @property
    def handling(self) -> Handling:
        return Handling.RETRY if self.is_transient else self._own_handling()

    def _own_handling(self) -> Handling:
        if self.code in (429, 455) or (self.code == 503 and self.retry_after is not None):
            return Handling.BACK_OFF
        # 505 says that the feature is disabled (the provider's sibling pages). Most 4xx without an
        # envelope are a gateway's, and pass: a rollout, a challenge page. 3xx is a redirect.
        is_final = self.code == 505 or (
            self.code < 400 or self.code in (402, 404, 407, 422)
            if self.from_gateway
            else 400 <= self.code < 500 and self.code != 408
        )
        return Handling.RAISE if is_final else Handling.RETRY

    def __str__(self) -> str:
        http = "" if self.http_status in (None, self.code) else f" (HTTP {self.http_status})"
        message = self._one_line(self.msg) or "no message"
        wait = "" if self.retry_after is None else f"; retry after {self.retry_after:g} s"
        return f"{self._about()}code {self.code}{http}: {message}{wait}{self._hint()}"

    def _hint(self) -> str:
        if self.code == 402:
            return "; the account has no credits left"
        if self.code == 407:
            return "; the proxy wants a login"
        if self.from_gateway and "HTTPS port" in self.msg:  # nginx, Apache, HAProxy say so
            return "; this address is served over https: change base_url"
        if self.code == 404:
            return "; nothing is served at this address: check base_url"
        return "; check the API key" if self.code == 401 else ""


class AuthenticationError(ApiError):
    """Raised when the API does not accept the key (401)."""

    title = "API key refused"

    def _own_handling(self) -> Handling:
        return Handling.RAISE


class TaskNotFoundError(ApiError):
    """Raised when the API does not know the task.

    The task may be too new or too old, or belong to another account.
    """

    title = "Task unknown"

    def _own_handling(self) -> Handling:
        return Handling.RETRY_NOT_FOUND

    def _hint(self) -> str:
        return "; check the task id and that the key is of the account that made the task"


class InvalidRequestError(ApiError):
    """Raised when the API rejects the request as malformed (422)."""

    title = "Invalid request"


class RateLimitedError(ApiError):
    """Raised when requests exceed the account's rate limit (429)."""

    title = "Rate limited"


class MaintenanceError(ApiError):
    """Raised while the service is under maintenance (455)."""

    title = "Maintenance"


class ServerError(ApiError):
    """Raised when the service fails to answer (500 and other 5xx)."""

    title = "Server error"


class GenerationFailedError(KontextError):
    """Raised when a task ended without an image.

    ``error_code`` and ``error_message`` are the record's ``errorCode`` (400: the prompt was
    flagged; 500: internal error; 501: generation failed; None where not given) and
    ``errorMessage``. ``record`` is None where the API reported the failure without a record.
    """

    title = "Generation failed"

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
        self.task_id: str = task_id  # pyright: ignore[reportIncompatibleVariableOverride]
        self.status = status
        self.error_code = error_code
        self.error_message = error_message
        self.record = record

    def __str__(self) -> str:
        code = "no error code" if self.error_code is None else f"error {self.error_code}"
        message = self._one_line(self.error_message) or "no message"
        return f"{self._about()}{self.status.name} ({code}): {message}"


class ResponseFormatError(KontextError):
    """Raised when an answer is not what the API's contract allows.

    ``excerpt`` is the beginning of the answer, at most 200 characters, without the API key and
    the task's parameters. ``http_status`` is the answer's HTTP status.
    """

    title = "Unreadable answer"

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

    @property
    def handling(self) -> Handling:
        return Handling.RETRY

    def __str__(self) -> str:
        http = "" if self.http_status is None else f" (HTTP {self.http_status})"
        seen = f"; it begins: {self._one_line(self.excerpt)}" if self.excerpt else ""
        return f"{self._about()}unreadable answer{http}: {self.args[0]}{seen}"


class TransportError(KontextError):
    """Raised when no whole answer arrives: DNS, connect, TLS, reset, timeout, or a redirect.

    ``retryable`` is False for a redirect and for a certificate that does not verify.
    """

    title = "Network trouble"

    def __init__(self, problem: str, *, task_id: str | None = None, retryable: bool = True) -> None:
        super().__init__(problem)
        self.task_id = task_id
        self._retryable = retryable

    @property
    def handling(self) -> Handling:
        return Handling.RETRY if self._retryable else Handling.RAISE

    def __str__(self) -> str:
        return f"{self._about()}{self._one_line(self.args[0])}"


class SubmissionUnknownError(KontextError):
    """Raised when the answer to the request for a task is lost: the task may have been created.

    It may be paid for, so the client does not send the request again by itself. Look for the task
    in the provider's log before you do. ``code`` is the answer's envelope code and ``http_status``
    its HTTP status, None where there was none. ``token`` is the one in the callback's address,
    None without one: a callback that brings it names the task.
    """

    title = "Creation uncertain"

    def __init__(
        self,
        problem: str,
        *,
        code: int | None = None,
        http_status: int | None = None,
        token: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.code = code
        self.http_status = http_status
        self.token = token

    def __str__(self) -> str:
        code = "" if self.code is None else f", code {self.code}"
        http = "" if self.http_status is None else f" (HTTP {self.http_status}{code})"
        return (
            f"the task may have been created{http}: {self._one_line(self.args[0])}; it may be "
            "paid for: look for it in the provider's log before you send the request again"
        )


class WaitTimeoutError(KontextError, TimeoutError):
    """Raised when a deadline passes before the task is seen to end.

    This is not a failure: the task may still finish and be paid for. Wait for the same
    ``task_id`` again to get its result; do not submit it again. ``elapsed`` is in seconds,
    ``polls`` counts the requests about the task. ``last_record`` is the last good answer.
    ``last_error`` is the error of the last failed poll, or of the pause that held the client at
    the deadline. Each is None where there was none.
    """

    title = "Not finished in time"

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
        self.task_id: str = task_id  # pyright: ignore[reportIncompatibleVariableOverride]
        self.elapsed = elapsed
        self.polls = polls
        self.last_record = last_record
        self.last_error = last_error

    @property
    def retryable(self) -> bool:
        return True

    def __str__(self) -> str:
        polls = "1 poll" if self.polls == 1 else f"{self.polls} polls"
        last = "" if self.last_error is None else f" (last error: {self.last_error})"
        return (
            f"{self._about()}not finished after {self.elapsed:.1f} s and {polls}"
            f"{self._reported()}{last}; it may still finish and be paid for: "
            "wait for the same id again"
        )

    def _reported(self) -> str:
        """Return what the service said beside the flag of a task that was still generating."""
        record = self.last_record
        if record is None or not (record.error_code or record.error_message):
            return ""
        code = "" if record.error_code is None else f" error {record.error_code}"
        message = self._one_line(record.error_message) or "no message"
        return f", while the service reported{code}: {message}"
