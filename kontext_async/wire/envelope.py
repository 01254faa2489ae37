"""The envelope of an answer, and the error that a refusal amounts to.

An envelope is a JSON object with an integer ``code``, also as digits in a string. Its code wins
over the HTTP status, which speaks only where the body is not an envelope.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import urlsplit

import attrs

from kontext_async.errors import (
    ApiError,
    AuthenticationError,
    InvalidRequestError,
    KontextError,
    MaintenanceError,
    RateLimitedError,
    ResponseFormatError,
    ServerError,
    TaskNotFoundError,
    TransportError,
)
from kontext_async.wire.json_values import integer, is_object
from kontext_async.wire.redaction import ApiKey, excerpt, page_text

__all__ = ["MAX_BODY", "Answer", "http_date", "read_answer", "retry_after"]

MAX_BODY: Final = 1024 * 1024
"""The most bytes that the body of an answer may have."""

# Ways in which a 422 says that the task is unknown or not visible yet: "The record does not
# exist", "recordInfo is null".
_NO_RECORD: Final = re.compile(
    r"\brecord.{0,80}?(?:not exist|n't exist|not found|is null)"
    r"|\btask.{0,80}?(?:not exist|n't exist|not found)",
    re.IGNORECASE,
)

_CLASSES: Final[Mapping[int, type[ApiError]]] = {
    401: AuthenticationError,
    422: InvalidRequestError,
    429: RateLimitedError,
    455: MaintenanceError,
}


def _error_class(code: int) -> type[ApiError]:
    return _CLASSES.get(code, ServerError if 500 <= code <= 599 else ApiError)


@attrs.define(repr=False)  # a repr would show the prompt
class Answer:
    """An answer of the API or of a gateway, and the errors it may amount to.

    ``value`` is the body's JSON value, or its text if it is not JSON. ``code`` and ``data`` are
    the envelope's; ``code`` is None where the body is not an envelope.
    """

    status: int
    headers: Mapping[str, str]
    task_id: str | None
    now: float
    api_key: ApiKey
    value: Any
    code: int | None
    data: Any

    @property
    def msg(self) -> str:
        """The envelope's message; empty where it is not text."""
        msg = self.value.get("msg")
        return msg if isinstance(msg, str) else ""

    def refusal(self) -> KontextError:
        """Return the error for the envelope's code, or for the HTTP status without an envelope."""
        if self.code is None:
            return self._bare_refusal()
        if self.code == 404 or (self.code == 422 and _NO_RECORD.search(self.msg)):
            return self.not_found(self.msg)
        return self._api_error(_error_class(self.code), self.msg)

    def not_found(self, msg: str) -> ApiError:
        """Return the error for an answer about a task that the API does not know."""
        return self._api_error(TaskNotFoundError, msg)

    def unreadable(self, problem: str) -> ResponseFormatError:
        """Return the error for an answer that the contract does not allow."""
        return ResponseFormatError(
            problem,
            task_id=self.task_id,
            http_status=self.status,
            excerpt=excerpt(self.value, self.api_key),
        )

    def _bare_refusal(self) -> KontextError:
        if 200 <= self.status <= 299:
            return self.unreadable("expected a JSON object with an integer code")
        if 300 <= self.status <= 399:
            return self._redirect()
        page = page_text(self.value) if isinstance(self.value, str) else self.value
        return self._api_error(_error_class(self.status), excerpt(page, self.api_key))

    def _redirect(self) -> TransportError:
        target = _host(self.api_key.redact(self.headers.get("Location", "")))
        return TransportError(
            f"redirected (HTTP {self.status}){target}; redirects are not followed: check base_url",
            task_id=self.task_id,
            retryable=False,
        )

    def _api_error(self, kind: type[ApiError], msg: str) -> ApiError:
        return kind(
            msg,
            code=self.status if self.code is None else self.code,
            http_status=self.status,
            retry_after=retry_after(self.headers, self.now),
            task_id=self.task_id,
            from_gateway=self.code is None,
        )


def read_answer(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    task_id: str | None,
    api_key: ApiKey,
    now: float,
) -> Answer:
    """Parse an answer about ``task_id``, None for no single task.

    Its strings come without ``api_key``. ``now`` is the unix time, for a Retry-After date in an
    answer without a Date.

    Raises `ResponseFormatError` if the body is larger than `MAX_BODY`.
    """
    value = _parse(body, api_key)
    envelope = value if is_object(value) else {}
    code, data = integer(envelope.get("code")), envelope.get("data")
    answer = Answer(status, headers, task_id, now, api_key, value, code, data)
    if len(body) > MAX_BODY:
        raise answer.unreadable(f"larger than {MAX_BODY} bytes")
    return answer


def _parse(body: bytes, api_key: ApiKey) -> Any:
    try:
        return api_key.load(body.removeprefix(codecs.BOM_UTF8).decode())
    except ValueError:
        return api_key.redact(body.decode(errors="replace"))


def _host(location: str) -> str:
    """Name a redirect's host, without user, path and query: they may hold credentials."""
    try:
        parts = urlsplit(location)
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    return f" to {parts.scheme or 'https'}://{host}" if host else ""


_SECONDS: Final = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the wait that Retry-After asks for, in seconds; None if there is none to read.

    A date counts from the answer's own Date, as the service's clock may be off; without one from
    ``now``, a unix time.
    """
    value = headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    until = http_date(value)
    if until is None:
        return None
    answered = http_date(headers.get("Date", ""))
    return max(0.0, until - (now if answered is None else answered))


@functools.lru_cache(maxsize=16)  # the answers of one second share a Date
def http_date(text: str) -> float | None:
    """Return the unix time of an HTTP date (RFC 9110, 5.6.7); None if it cannot be read."""
    if len(text) > 40:
        return None
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError, TypeError, IndexError):  # all of these, for garbage
        return None
    return date.replace(tzinfo=date.tzinfo or UTC).timestamp()
