"""The API's HTTP answers, read by pure functions: no sockets, no clock.

`decode` turns a status, headers and a body into a `TaskRecord` or a raised error, and nothing
else looks at a status or a code. The outcome is in the body's ``code``; the HTTP status speaks
only where the body is no envelope.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeGuard
from urllib.parse import urlsplit

import attrs
from cattrs import ClassValidationError, Converter
from cattrs.gen import make_dict_structure_fn, override

from kontext_async.errors import (
    ApiError,
    AuthenticationError,
    ConfigurationError,
    GenerationFailedError,
    InvalidRequestError,
    KontextError,
    MaintenanceError,
    RateLimitedError,
    ResponseFormatError,
    ServerError,
    TaskNotFoundError,
    TransportError,
)
from kontext_async.models import TaskRecord, TaskStatus

__all__ = ["MAX_BODY", "RECORD_INFO", "check_task_id", "decode", "retry_after", "server_age"]

RECORD_INFO: Final = "/api/v1/flux/kontext/record-info"
"""Where the API tells how a task stands; the query's ``taskId`` names it."""

MAX_BODY: Final = 1024 * 1024
"""The most bytes an answer may have."""


def check_task_id(task_id: object) -> str:
    """The same id; `ConfigurationError` if it is no str, is blank, or cannot be printed."""
    if not isinstance(task_id, str):
        raise ConfigurationError(f"a task id must be a str, not {type(task_id).__name__}")
    if not task_id.strip():
        raise ConfigurationError("a task id must not be blank")
    if not task_id.isprintable():
        raise ConfigurationError(f"a task id must be printable: {task_id[:80]!a}")
    return str.__str__(task_id)  # of a subclass the plain str, as JSON has it


def decode(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    task_id: str,
    api_key: str,
    now: float,
) -> TaskRecord:
    """The record in an answer about ``task_id``, or the error the answer amounts to.

    ``now`` is the unix time, for a Retry-After date in an answer that has no Date of its own.
    Nothing that comes out holds ``api_key``, not even where the answer echoes it.

    Raises `ApiError` and its kin, `GenerationFailedError`, `ResponseFormatError`, and
    `TransportError` for a redirect.
    """
    secret = _secret(api_key)
    value = _parse(body, secret)
    envelope = value if _is_object(value) else {}
    answer = _Answer(status, headers, task_id, now, secret, value, envelope)
    if len(body) > MAX_BODY:
        raise answer.unreadable(f"larger than {MAX_BODY} bytes")
    code = _integer(envelope.get("code"))
    if code is None:
        raise _bare_error(answer)
    if code == 200:
        return _record(answer)
    if code == 501:
        return _record_of_failure(answer)
    raise _envelope_error(answer, code)


def server_age(headers: Mapping[str, str], record: TaskRecord) -> float | None:
    """How many seconds old the task was by the service's own clock when it answered.

    None where the answer has no Date, the record no create time, or the two do not lie within
    an hour of each other.
    """
    answered = _http_date(headers.get("Date", ""))
    if answered is None or record.create_time is None:
        return None
    age = answered - record.create_time.timestamp()
    return age if 0 <= age <= 3600 else None


# Errors by code. An HTTP status without an envelope may be a gateway's: its 403 and 404 say
# nothing of the key and the task.
_BY_STATUS: Final[Mapping[int, type[ApiError]]] = {
    401: AuthenticationError,
    422: InvalidRequestError,
    429: RateLimitedError,
    455: MaintenanceError,
}
_BY_CODE: Final = {**_BY_STATUS, 403: AuthenticationError, 404: TaskNotFoundError}

# How a 422 says that there is no such task, or not yet: "The record does not exist",
# "recordInfo is null".
_NO_RECORD: Final = re.compile(
    r"\brecord.{0,80}?(?:not exist|n't exist|not found|is null)"
    r"|\btask.{0,80}?(?:not exist|n't exist|not found)",
    re.IGNORECASE,
)


def _error_class(code: int, table: Mapping[int, type[ApiError]]) -> type[ApiError]:
    return table.get(code, ServerError if 500 <= code <= 599 else ApiError)


def _bare_error(answer: _Answer) -> KontextError:
    """What an answer without an envelope amounts to, by its HTTP status."""
    status = answer.status
    if 200 <= status <= 299:
        return answer.unreadable("expected a JSON object with an integer code")
    if 300 <= status <= 399:
        return _redirect(answer)
    return answer.refusal(_error_class(status, _BY_STATUS), status, answer.excerpt())


def _redirect(answer: _Answer) -> TransportError:
    target = _host(answer.secret.scrub(answer.headers.get("Location", "")))
    return TransportError(
        f"redirected (HTTP {answer.status}){target}; redirects are not followed: check base_url",
        task_id=answer.task_id,
        retryable=False,
    )


def _host(location: str) -> str:
    """Whither a redirect leads, without user, path and query: they may hold credentials."""
    try:
        parts = urlsplit(location)
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    return f" to {parts.scheme or 'https'}://{host}" if host else ""


def _envelope_error(answer: _Answer, code: int) -> ApiError:
    msg = answer.msg()
    if code == 422 and _NO_RECORD.search(msg):
        return answer.refusal(TaskNotFoundError, code, msg)
    return answer.refusal(_error_class(code, _BY_CODE), code, msg)


def _record(answer: _Answer) -> TaskRecord:
    data = answer.envelope.get("data")
    if data is None:
        # The envelope's own message is "success".
        raise answer.refusal(TaskNotFoundError, 200, "the answer holds no record")
    if not _is_object(data):
        raise answer.unreadable(f"data: {_mismatch('an object', data)}")
    try:
        record: TaskRecord = _structure_record(_flat(data, answer.task_id), TaskRecord)
    except ClassValidationError as exc:
        problems = "; ".join(_problems(exc))
    except TypeError as exc:
        problems = str(exc)
    else:
        return record
    # Raised out here, it drags no cattrs error along as its context.
    raise answer.unreadable(problems)


def _flat(data: dict[str, Any], task_id: str) -> dict[str, Any]:
    """The envelope's data with the id that was asked for, and the response's URLs in one level."""
    named = data.get("taskId")
    if named is not None and named != task_id:
        is_id = type(named) is str
        problem = _ANOTHER if is_id else f"data.taskId: {_mismatch('a string or null', named)}"
        raise TypeError(problem)
    urls = _urls(data.get("response"))
    origin, result = urls.get("originImageUrl"), urls.get("resultImageUrl")
    return {
        **data,
        "taskId": task_id,
        "originImageUrl": None if origin == "" else origin,
        "resultImageUrl": None if result == "" else result,
    }


_ANOTHER: Final = "data.taskId: the record is another task's"


def _record_of_failure(answer: _Answer) -> TaskRecord:
    """The record in an envelope that says 501: where it can be read, its flag decides."""
    data = answer.envelope.get("data")
    named = data.get("taskId") if _is_object(data) else None
    if isinstance(named, str) and named != answer.task_id:
        raise answer.unreadable(_ANOTHER)
    try:
        return _record(answer)
    except (ResponseFormatError, TaskNotFoundError):
        given = _integer(data.get("errorCode")) if _is_object(data) else None
    raise GenerationFailedError(
        task_id=answer.task_id,
        status=TaskStatus.GENERATE_FAILED,
        error_code=given or 501,
        error_message=answer.msg(),
    )


@attrs.define
class _Answer:
    """One answer: what was asked, what came, and how to speak of it."""

    status: int
    headers: Mapping[str, str]
    task_id: str
    now: float
    secret: _Secret
    value: object  # the parsed body, or its text where it is no JSON
    envelope: dict[str, Any]  # the value, if it is an object

    def msg(self) -> str:
        msg = self.envelope.get("msg")
        return msg if isinstance(msg, str) else ""

    def refusal(self, kind: type[ApiError], code: int, msg: str) -> ApiError:
        return kind(
            msg,
            code=code,
            http_status=self.status,
            retry_after=retry_after(self.headers, self.now),
            task_id=self.task_id,
        )

    def unreadable(self, problem: str) -> ResponseFormatError:
        return ResponseFormatError(
            problem, task_id=self.task_id, http_status=self.status, excerpt=self.excerpt()
        )

    def excerpt(self) -> str:
        """The body's first 200 characters without the key and paramJson, fit to print."""
        public = _public(self.value)
        text = public if isinstance(public, str) else json.dumps(public, ensure_ascii=False)
        text = self.secret.scrub(text)[:_EXCERPT]  # again: a key may be a number
        return "".join(c if c.isprintable() else " " for c in text)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """The wait that Retry-After asks for, in seconds; None where it cannot be read."""
    value = headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    until = _http_date(value)
    if until is None:
        return None
    # The service's clock may be off: count from its own Date.
    answered = _http_date(headers.get("Date", ""))
    return max(0.0, until - (now if answered is None else answered))


_SECONDS: Final = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")


@functools.lru_cache(maxsize=16)  # a service's Date is the same for a second's answers
def _http_date(text: str) -> float | None:
    """The unix time of a date in HTTP's notation (RFC 9110, 5.6.7); None where unreadable."""
    if len(text) > 40:
        return None
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError, TypeError, IndexError):  # it is not careful with garbage
        return None
    return date.replace(tzinfo=date.tzinfo or UTC).timestamp()


_FLAGS: Final = {flag: status for status in TaskStatus for flag in (int(status), str(int(status)))}
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_JSON_NAMES: Final[Mapping[type, str]] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def _is_object(value: object) -> TypeGuard[dict[str, Any]]:
    return type(value) is dict


def _is_array(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _mismatch(wanted: str, value: object) -> str:
    # By its kind only: the value itself may be private.
    return f"expected {wanted}, got {_JSON_NAMES[type(value)]}"


def _integer(value: object) -> int | None:
    """The integer in a number or in ASCII digits, if below 10⁹; None for anything else."""
    if type(value) is str and len(value) <= 9 and value.isascii() and value.isdigit():
        return int(value)
    return value if type(value) is int and -(10**9) < value < 10**9 else None


def _structure_str(value: object, _: Any) -> str | None:
    if value is None or type(value) is str:
        return value
    raise TypeError(_mismatch("a string or null", value))


def _structure_message(value: object, _: Any) -> str:
    return _structure_str(value, _) or ""


def _structure_int(value: object, _: Any) -> int | None:
    code = _integer(value)
    if code is None and value is not None and value != "":
        raise TypeError(_mismatch("an integer or null", value))
    return code


def _structure_flag(value: object, _: Any) -> TaskStatus:
    # By exact type: True and 1.0 would find the key 1.
    status = _FLAGS.get(value) if type(value) is int or type(value) is str else None
    if status is None:
        raise TypeError(_mismatch("0, 1, 2 or 3", value))
    return status


def _structure_time(value: object, _: Any) -> datetime | None:
    """A time in any of the API's notations; None where unreadable or outside 2000 to 2999."""
    if value is None:
        return None
    if type(value) is str and not (value.isascii() and value.isdigit()):
        instant = _iso_time(value)
    else:
        instant = _epoch_time(value)
    return instant if instant and 2000 <= instant.year < 3000 else None


def _iso_time(text: str) -> datetime | None:
    if len(text) < len("2024-03-20 10:30:00"):  # a bare date is no time
        return None
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        return None
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


def _epoch_time(value: object) -> datetime | None:
    milliseconds = int(value) if type(value) is str and len(value) <= 15 else value
    if type(milliseconds) is not int or not 0 <= milliseconds < 10**14:
        return None
    return _EPOCH + timedelta(milliseconds=milliseconds)


def _urls(value: object) -> dict[str, Any]:
    """The response: an object, one written as a JSON string, or none at all."""
    found = value
    if type(value) is str and value:
        try:
            found = _load(value, _secret(""))
        except ValueError as exc:
            raise TypeError(f"data.response: {exc}") from None
    if _is_object(found):
        return found
    if found is None or found == "":
        return {}
    raise TypeError(f"data.response: {_mismatch('an object or null', found)}")


_converter: Final = Converter(detailed_validation=True)
# For the optional types as they stand: cattrs' own way with None would be one more call a field.
_converter.register_structure_hook(str | None, _structure_str)
_converter.register_structure_hook(int | None, _structure_int)
_converter.register_structure_hook(TaskStatus, _structure_flag)
_converter.register_structure_hook(datetime | None, _structure_time)
_converter.register_structure_hook(str, _structure_message)

# Where the document has what the model calls otherwise.
_PLACES: Final = {
    "task_id": "taskId",
    "status": "successFlag",
    "param_json": "paramJson",
    "create_time": "createTime",
    "complete_time": "completeTime",
    "origin_image_url": "originImageUrl",
    "result_image_url": "resultImageUrl",
    "error_code": "errorCode",
    "error_message": "errorMessage",
}
_structure_record: Final = make_dict_structure_fn(
    TaskRecord,
    _converter,
    # Typed as if the overrides could be options, too.
    **{name: override(rename=place) for name, place in _PLACES.items()},  # type: ignore[arg-type]
)


def _problems(exc: ClassValidationError) -> Iterator[str]:
    """What was wrong and where, in the document's own names."""
    for problem, note in exc.group_exceptions()[0]:
        place = "data.response." if note.name.endswith("_image_url") else "data."
        said = "missing" if isinstance(problem, KeyError) else problem
        yield f"{place}{_PLACES[note.name]}: {said}"


def _parse(body: bytes, secret: _Secret) -> object:
    """The body's JSON value, or its text where it is none; without the key either way."""
    try:
        return _load(body.removeprefix(codecs.BOM_UTF8).decode(), secret)
    except ValueError:
        return secret.scrub(body.decode(errors="replace"))


def _load(text: str, secret: _Secret) -> Any:
    """A JSON text's value, its strings without the key and fit for UTF-8; or ValueError."""
    try:
        value = json.loads(text)
        return _map_strings(value, secret.cleanse) if secret.suspected(text) else value
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _map_strings(value: object, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if _is_array(value):
        return [_map_strings(item, change) for item in value]
    if _is_object(value):
        return {change(name): _map_strings(item, change) for name, item in value.items()}
    return value


@attrs.frozen
class _Secret:
    """The API key, to be found in whatever an answer echoes."""

    needle: str = attrs.field(repr=False)
    pattern: re.Pattern[str] = attrs.field(repr=False)

    def suspected(self, text: str) -> bool:
        """Whether the key may be in a JSON text, or a surrogate that UTF-8 cannot hold.

        Both need the slow way of reading, and this question must cost next to nothing.
        """
        return self.needle in text or "\\u" in text

    def scrub(self, text: str) -> str:
        return self.pattern.sub("***", text) if self.suspected(text) else text

    def cleanse(self, text: str) -> str:
        return self.scrub(text).encode(errors="replace").decode()


# A key shorter than this is no secret, but it may well be a part of every URL.
_SHORTEST_KEY: Final = 6


@functools.lru_cache(maxsize=16)
def _secret(api_key: str) -> _Secret:
    if len(api_key) < _SHORTEST_KEY:
        return _Secret("\\u", re.compile("(?!)"))
    # JSON may put a backslash before these three; what is between them stands as it is.
    needle = max(re.split(r'["\\/]', api_key), key=len)
    return _Secret(needle, _escaped(api_key))


def _escaped(word: str) -> re.Pattern[str]:
    """The word in any of JSON's spellings, also in JSON within JSON, a few levels down."""
    return re.compile(
        "".join(rf"(?:\\{{0,8}}{re.escape(c)}|\\{{1,8}}u(?i:{ord(c):04x}))" for c in word)
    )


_EXCERPT: Final = 200
_PARAMS: Final = _escaped("paramJson")


def _public(value: object, depth: int = 0) -> object:
    """A JSON value without paramJson, wherever in it that may be, cut to what an excerpt shows."""
    if isinstance(value, str):
        return _PARAMS.split(value[:_EXCERPT], maxsplit=1)[0]
    if _is_array(value):
        return [_public(item, depth + 1) for item in value[:_EXCERPT]] if depth < 8 else "…"
    if _is_object(value):
        names = [name for name in value if not _PARAMS.search(name)][:_EXCERPT]
        return {name: _public(value[name], depth + 1) for name in names} if depth < 8 else "…"
    return value
