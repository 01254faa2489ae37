"""The record-info request, and the task's record in its answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from kontext_async.errors import ConfigurationError, GenerationFailedError, KontextError
from kontext_async.models import TaskRecord, TaskStatus
from kontext_async.wire.envelope import Answer, http_date, read_answer
from kontext_async.wire.json_values import integer, is_array, is_object, kind_of
from kontext_async.wire.redaction import ApiKey

__all__ = ["RECORD_INFO", "check_task_id", "decode", "foreign_task_id", "server_age"]

RECORD_INFO: Final = "/api/v1/flux/kontext/record-info"
"""The path that answers with a task's record; the query's ``taskId`` names the task."""

# Codes that come with a record: success, a flagged prompt, a generation that failed. The record
# is returned whatever its flag. Of any other code, only one that has ended is.
_RECORD_CODES: Final = (200, 400, 501)
_MAX_FOREIGN_ID: Final = 200  # characters
_ANOTHER: Final = "data.taskId: the record is another task's"


def check_task_id(task_id: object) -> str:
    """Return the id; raise `ConfigurationError` if it is not a str, blank, or not printable."""
    if not isinstance(task_id, str):
        raise ConfigurationError(f"a task id must be a str, not {type(task_id).__name__}")
    if not task_id.strip():
        raise ConfigurationError("a task id must not be blank")
    if not task_id.isprintable():
        raise ConfigurationError(f"a task id must be printable: {task_id[:80]!a}")
    return str.__str__(task_id)  # a plain str, also of a subclass: JSON knows no other


def foreign_task_id(task_id: object) -> str | None:
    """Return an id that came from outside; None if it is not one, or has over 200 characters."""
    try:
        checked = check_task_id(task_id)
    except ConfigurationError:
        return None
    return checked if len(checked) <= _MAX_FOREIGN_ID else None


def decode(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    task_id: str,
    api_key: ApiKey,
    now: float,
) -> TaskRecord:
    """Return the record in an answer about ``task_id``, or raise the error it amounts to.

    ``now`` is the unix time, for a Retry-After date in an answer without a Date. Neither record
    nor error holds ``api_key``, even if the answer echoes it.

    Raises `ApiError` and its subclasses, `GenerationFailedError`, `ResponseFormatError`, and
    `TransportError` for a redirect.
    """
    answer = read_answer(status, headers, body, task_id=task_id, api_key=api_key, now=now)
    if answer.code is None:
        raise answer.refusal()
    record = _read_record(answer, task_id)
    if isinstance(record, str):
        raise _error(answer, task_id, record)
    if answer.code not in _RECORD_CODES and not _has_ended(record):
        raise answer.refusal()
    return record


def _error(answer: Answer, task_id: str, problem: str) -> KontextError:
    """Return the error for an envelope without a readable record."""
    if answer.code not in _RECORD_CODES:
        return answer.refusal()
    if answer.code == 200 and answer.data is None:
        # The envelope's own message is "success".
        return answer.not_found("the answer holds no record")
    if answer.code == 200 or problem == _ANOTHER:
        return answer.unreadable(problem)
    return _failure(answer, task_id)


def _failure(answer: Answer, task_id: str) -> GenerationFailedError:
    given = integer(answer.data.get("errorCode")) if is_object(answer.data) else None
    return GenerationFailedError(
        task_id=task_id,
        status=TaskStatus.GENERATE_FAILED,
        error_code=given or answer.code,
        error_message=answer.msg,
    )


def _has_ended(record: TaskRecord) -> bool:
    phase = record.status.phase
    return phase == "failed" or (phase == "ready" and record.result_image_url is not None)


def _read_record(answer: Answer, task_id: str) -> TaskRecord | str:
    """Return the record in an envelope's data, or the reason why it cannot be read.

    Only another task's id and a bad flag make it unreadable. Any other odd field reads as absent.
    """
    data = answer.data
    if not is_object(data):
        return f"data: expected an object, got {kind_of(data)}"
    if _is_another(data.get("taskId"), task_id):
        return _ANOTHER
    status = _status(data.get("successFlag"))
    if status is None:
        return _flag_problem(data)
    origin, result = _urls(data, answer.api_key)
    return TaskRecord(
        task_id=task_id,
        status=status,
        param_json=_text(data.get("paramJson")),
        create_time=_time(data.get("createTime")),
        complete_time=_time(data.get("completeTime")),
        origin_image_url=origin,
        result_image_url=result,
        error_code=integer(data.get("errorCode")),
        error_message=_text(data.get("errorMessage")) or "",
    )


def _is_another(named: object, task_id: str) -> bool:
    """Return True if a record's id, a string or a number, is not the id that was asked for."""
    if type(named) is float and not math.isfinite(named):
        return False
    return named != task_id and type(named) in (str, int, float) and str(named) != task_id


_FLAGS: Final = {flag: status for status in TaskStatus for flag in (int(status), str(int(status)))}


def _status(flag: object) -> TaskStatus | None:
    # By exact type: True and 1.0 would find the key 1.
    return _FLAGS.get(flag) if type(flag) is int or type(flag) is str else None


def _flag_problem(data: dict[str, Any]) -> str:
    if "successFlag" not in data:
        return "data.successFlag: missing"
    return f"data.successFlag: expected 0, 1, 2 or 3, got {kind_of(data['successFlag'])}"


def _text(value: object) -> str | None:
    return value if type(value) is str and value not in ("", "null") else None


def _urls(data: dict[str, Any], api_key: ApiKey) -> tuple[str | None, str | None]:
    """Return the URLs of the origin and the result, from wherever a service may put them."""
    response = data.get("response")
    if isinstance(response, str):
        if response.startswith(("http://", "https://")):
            return None, response
        response = _parsed(response, api_key)
    urls = response if is_object(response) else {}
    result = _text(urls.get("resultImageUrl")) or _first_text(urls.get("resultUrls"))
    return _text(urls.get("originImageUrl")), result or _text(data.get("resultImageUrl"))


def _parsed(text: str, api_key: ApiKey) -> Any:
    try:
        return api_key.load(text)
    except ValueError:
        return None


def _first_text(values: object) -> str | None:
    return next(filter(None, map(_text, values)), None) if is_array(values) else None


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def _time(value: object) -> datetime | None:
    """Read a time in any of the API's notations; None if unreadable or outside 2000 to 2999."""
    if value is None:
        return None
    if type(value) is str and not (value.isascii() and value.isdigit()):
        instant = _iso_time(value)
    else:
        instant = _epoch_time(value)
    return instant if instant and 2000 <= instant.year < 3000 else None


def _iso_time(text: str) -> datetime | None:
    if len(text) < len("2024-03-20 10:30:00"):  # a date alone
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


# An answer's Date and a create time further apart than this, in seconds, are not one clock's.
_MAX_AGE: Final = 3600


def server_age(headers: Mapping[str, str], record: TaskRecord) -> float | None:
    """Return the task's age in seconds by the service's own clock when it answered.

    None if the answer has no Date, the record no create time, or the age is not 0 to 3600 s.
    """
    answered = http_date(headers.get("Date", ""))
    if answered is None or record.create_time is None:
        return None
    age = answered - record.create_time.timestamp()
    return age if 0 <= age <= _MAX_AGE else None
