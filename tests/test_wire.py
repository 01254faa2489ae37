"""From (status, headers, body) to a record or an error, and nothing else."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from datetime import UTC, datetime, timedelta, timezone
from email.utils import formatdate
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kontext_async import wire
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

SAMPLES = Path(__file__).parent / "samples"
TASK = "task12345"
KEY = "sk-marker/0123456789abcdef"
PROMPT = "A lighthouse in a storm, oil on canvas"
ORIGIN = "https://files.example.com/origin/task12345.jpg"
RESULT = "https://files.example.com/result/task12345.jpg"
CREATED = datetime(2024, 3, 20, 10, 25, 0, tzinfo=UTC)
COMPLETED = datetime(2024, 3, 20, 10, 25, 14, tzinfo=UTC)
NOW = 1_710_930_330.0


def sample(name):
    return next(SAMPLES.glob(f"{name}.*")).read_bytes()


def success(**data):
    """A valid reply with some of its data replaced."""
    reply = json.loads(sample("success"))
    reply["data"].update(data)
    return reply


def decode(body, status=200, headers=None, *, task_id=TASK, api_key=KEY, now=NOW):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return wire.decode(status, headers or {}, body, task_id=task_id, api_key=api_key, now=now)


def refusal(body, status=200, headers=None, kind=KontextError, **options):
    with pytest.raises(kind) as caught:
        decode(body, status, headers, **options)
    return caught.value


def outcome_of(body, status=200, headers=None, **options):
    """The record, or the error of ours that came instead."""
    try:
        return decode(body, status, headers, **options)
    except KontextError as error:
        return error


# The documented reply and every variant seen of it.

EVERYTHING = {
    "task_id": TASK,
    "status": TaskStatus.SUCCESS,
    "create_time": CREATED,
    "complete_time": COMPLETED,
    "origin_image_url": ORIGIN,
    "result_image_url": RESULT,
    "error_code": None,
    "error_message": "",
}
NO_URLS = {"origin_image_url": None, "result_image_url": None}
RUNNING = {"status": TaskStatus.GENERATING, "complete_time": None, **NO_URLS}
FAILED = {
    "status": TaskStatus.GENERATE_FAILED,
    "complete_time": datetime(2024, 3, 20, 10, 25, 31, tzinfo=UTC),
    **NO_URLS,
}
FLAGGED = "Your prompt was flagged as violating content policies."
RECORDS = {
    "success": {},
    "generating_nulls": RUNNING,
    "generating_missing": RUNNING,
    "success_nulls": {"origin_image_url": None},
    "success_without_url": NO_URLS,
    "success_error_code_400": {"error_code": 400},
    "success_error_code_0": {"error_code": 0},
    "flag_as_digits": {},
    "create_task_failed": FAILED
    | {"status": TaskStatus.CREATE_TASK_FAILED, "error_code": 400, "error_message": FLAGGED},
    "generate_failed": FAILED
    | {"error_code": 501, "error_message": "Image generation task failed"},
    "error_code_digits": FAILED
    | {"error_code": 500, "error_message": "Internal Error, Please try again later."},
    "error_code_empty": {},
    "error_code_undocumented": FAILED | {"error_code": 433, "error_message": "Upstream is busy"},
    "response_json_string": {},
    "response_empty_object": NO_URLS,
    "response_empty_string": NO_URLS,
    "response_null": NO_URLS,
    "times_zoneless": {},
    "times_epoch": {},
    "times_epoch_digits": {},
    "param_json_broken": {"params": {}},
    "param_json_null": {"param_json": None, "params": {}},
    "extra_fields": {},
    "generation_failed_501_record": FAILED | {"error_code": 400, "error_message": FLAGGED},
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("status", [200, 500])
def test_each_readable_variant_gives_a_record_whatever_the_http_status(name, status):
    record = decode(sample(name), status)
    expected = EVERYTHING | RECORDS[name]
    assert {field: getattr(record, field) for field in expected} == expected


def test_the_parameters_are_kept_as_they_came_and_parsed():
    record = decode(sample("success"))
    assert json.loads(record.param_json) == record.params
    assert record.params["prompt"] == PROMPT


REFUSALS = {
    "unauthorized": (AuthenticationError, 401),
    "credits": (ApiError, 402),
    "unknown_task_404": (TaskNotFoundError, 404),
    "unknown_task_422": (TaskNotFoundError, 422),
    "not_visible_yet": (TaskNotFoundError, 422),
    "unknown_task_null": (TaskNotFoundError, 200),
    "invalid_request": (InvalidRequestError, 422),
    "rate_limited": (RateLimitedError, 429),
    "maintenance": (MaintenanceError, 455),
    "server_error": (ServerError, 500),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_refusal_in_the_envelope_wins_over_the_http_status(name, status):
    kind, code = REFUSALS[name]
    error = refusal(sample(name), status)
    assert type(error) is kind
    assert (error.code, error.http_status, error.task_id) == (code, status, TASK)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (401, AuthenticationError),
        (402, ApiError),
        (403, AuthenticationError),
        (404, TaskNotFoundError),
        (408, ApiError),
        (422, InvalidRequestError),
        (429, RateLimitedError),
        (451, ApiError),
        (455, MaintenanceError),
        (500, ServerError),
        (503, ServerError),
        (505, ServerError),
        (524, ServerError),
        (599, ServerError),
        (600, ApiError),
        (499, ApiError),
        (0, ApiError),
        (-1, ApiError),
        (201, ApiError),
        (302, ApiError),
        ("401", AuthenticationError),
        ("0", ApiError),
    ],
)
def test_each_envelope_code_has_its_error(code, kind):
    error = refusal({"code": code, "msg": "No."})
    assert type(error) is kind
    assert (error.code, error.msg) == (int(code), "No.")


@pytest.mark.parametrize(
    "msg",
    [
        "The record does not exist",
        "RECORD DOESN'T EXIST",
        "recordInfo is null",
        "record for task12345 not found",
        "Task not found",
        "the task does not exist",
    ],
)
def test_a_422_that_misses_the_record_is_a_task_not_found(msg):
    assert type(refusal({"code": 422, "msg": msg})) is TaskNotFoundError


@pytest.mark.parametrize("msg", ["taskId is null", "inputImage not found", "", None, 7])
def test_any_other_422_is_an_invalid_request(msg):
    assert type(refusal({"code": 422, "msg": msg})) is InvalidRequestError


@pytest.mark.parametrize("msg", [None, 5, ["x"], {"paramJson": "x"}])
def test_an_envelope_message_that_is_no_text_counts_as_none(msg):
    assert refusal({"code": 500, "msg": msg}).msg == ""


def test_a_record_that_is_missing_says_more_than_the_envelopes_success():
    for body in ({"code": 200, "msg": "success"}, {"code": 200, "msg": "success", "data": None}):
        error = refusal(body, kind=TaskNotFoundError)
        assert error.code == 200
        assert error.msg == "the answer holds no record"


# Answers without an envelope.

NO_ENVELOPE = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"200",
    b"{}",
    b"<html>no</html>",
    b"\xff\xfe{\x00",
    b'{"code": true}',
    b'{"code": 200.0}',
    b'{"code": "200.0"}',
    b'{"code": " 200"}',
    b'{"code": "+200"}',
    '{"code": "²00"}'.encode(),
    '{"code": "٢٠٠"}'.encode(),
    b'{"code": ""}',
    b'{"code": null}',
    b'{"code": NaN}',
    b'{"code": [200]}',
    b'{"code": 1000000000}',
    b'{"code": -1000000000}',
    b'{"code": "0000000200"}',
    b'{"code": 1' + b"0" * 5000 + b"}",
    b'{"code": 200, "data": {"successFlag": 1}',
    b'{"code": 200, "data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
]


@pytest.mark.parametrize("body", NO_ENVELOPE, ids=lambda body: repr(body[:24]))
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (200, ResponseFormatError),
        (204, ResponseFormatError),
        (299, ResponseFormatError),
        (400, ApiError),
        (401, AuthenticationError),
        (402, ApiError),
        (403, ApiError),
        (404, ApiError),
        (408, ApiError),
        (422, InvalidRequestError),
        (429, RateLimitedError),
        (455, MaintenanceError),
        (500, ServerError),
        (501, ServerError),
        (502, ServerError),
        (503, ServerError),
        (504, ServerError),
        (599, ServerError),
        (600, ApiError),
        (100, ApiError),
    ],
)
def test_without_an_envelope_the_http_status_decides(body, status, kind):
    error = refusal(body, status)
    assert type(error) is kind
    assert (error.http_status, error.task_id) == (status, TASK)
    if isinstance(error, ApiError):
        assert error.code == status


def test_a_gateways_page_is_the_message():
    assert refusal(sample("gateway_403"), 403).msg.strip() == "error code: 1010"
    assert "502 Bad Gateway" in str(refusal(sample("gateway_502"), 502))


def test_a_bare_404_points_to_the_base_url():
    assert "check base_url" in str(refusal(b"nothing here", 404))


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://login.example.com/sign-in?token=hush", " to https://login.example.com;"),
        ("https://me:hush@example.com:8443/hush", " to https://example.com:8443;"),
        ("//other.example.com/hush", " to https://other.example.com;"),
        ("/hush?token=hush", "(HTTP 302);"),
        ("https://[hush", "(HTTP 302);"),
        (f"https://{KEY.replace('/', '.')}.example.com/", "example.com;"),
        ("", "(HTTP 302);"),
    ],
)
def test_a_redirect_is_final_and_names_no_more_than_the_host(location, shown):
    error = refusal(b"", 302, {"Location": location}, kind=TransportError)
    assert not error.retryable
    assert error.task_id == TASK
    assert shown in str(error)
    assert "hush" not in str(error)


def test_the_key_is_not_shown_as_a_redirects_host():
    error = refusal(b"", 307, {"Location": "https://a.secret-host.b/"}, api_key="secret-host")
    assert " to https://a.***.b;" in str(error)


@pytest.mark.parametrize("status", [300, 301, 304, 308, 399])
def test_every_3xx_without_an_envelope_is_a_redirect(status):
    assert isinstance(refusal(b"<html>", status), TransportError)


def test_an_envelope_in_a_redirect_still_wins():
    assert decode(sample("success"), 302).status is TaskStatus.SUCCESS


def test_an_answer_over_one_mebibyte_is_refused():
    body = sample("success").ljust(wire.MAX_BODY)
    assert decode(body).status is TaskStatus.SUCCESS
    error = refusal(body + b" ", kind=ResponseFormatError)
    assert "larger than 1048576 bytes" in str(error)


# Failure told by the envelope.


def test_a_501_without_a_record_is_a_failed_generation():
    error = refusal(sample("generation_failed_501"), kind=GenerationFailedError)
    assert (error.task_id, error.status) == (TASK, TaskStatus.GENERATE_FAILED)
    assert (error.error_code, error.error_message) == (501, "Image generation task failed")
    assert error.record is None


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ({"errorCode": 400}, 400),
        ({"errorCode": "400", "successFlag": 9}, 400),
        ({"errorCode": 0}, 501),
        ({"errorCode": "x"}, 501),
        ({"taskId": 5, "successFlag": 3}, 501),
        ([], 501),
        ("gone", 501),
    ],
)
def test_a_501_with_an_unreadable_record_takes_what_can_be_read(data, code):
    error = refusal({"code": 501, "msg": "failed", "data": data}, kind=GenerationFailedError)
    assert (error.error_code, error.error_message) == (code, "failed")
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize("flag", TaskStatus)
def test_the_flag_of_a_readable_record_decides_in_a_501(flag):
    assert decode({**success(successFlag=int(flag)), "code": 501}).status is flag


@pytest.mark.parametrize("code", [200, 501])
@pytest.mark.parametrize("other", ["task99", ""])
def test_a_record_of_another_task_is_refused(code, other):
    reply = {**success(taskId=other, successFlag=None), "code": code}
    error = refusal(reply, kind=ResponseFormatError)
    assert "data.taskId: the record is another task's" in str(error)


def test_a_record_that_names_no_task_is_the_asked_ones():
    nameless = success()
    del nameless["data"]["taskId"]
    assert decode(nameless, task_id="asked").task_id == "asked"
    assert decode(success(taskId=None), task_id="asked").task_id == "asked"


# Fields, each by its exact type.


@pytest.mark.parametrize("flag", [*TaskStatus])
def test_a_flag_is_an_integer_or_its_digit(flag):
    assert decode(success(successFlag=int(flag))).status is flag
    assert decode(success(successFlag=str(int(flag)))).status is flag


@pytest.mark.parametrize(
    "flag",
    [True, False, 1.0, "1.0", " 1", "01", "+1", "", "٢", "SUCCESS", None, 4, -1, 10**30, [1], {}],
)
def test_nothing_else_is_a_flag(flag):
    error = refusal(success(successFlag=flag), kind=ResponseFormatError)
    assert "data.successFlag: expected 0, 1, 2 or 3" in str(error)


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("taskId", 12345, "data.taskId: expected a string or null, got a number"),
        ("paramJson", {}, "data.paramJson: expected a string or null, got an object"),
        ("errorMessage", True, "data.errorMessage: expected a string or null, got a boolean"),
        ("errorCode", 1.5, "data.errorCode: expected an integer or null, got a number"),
        ("errorCode", True, "data.errorCode: expected an integer or null, got a boolean"),
        ("errorCode", "E1", "data.errorCode: expected an integer or null, got a string"),
        ("errorCode", 10**9, "data.errorCode: expected an integer or null, got a number"),
        ("response", [], "data.response: expected an object or null, got an array"),
        ("response", 0, "data.response: expected an object or null, got a number"),
        ("response", "[1]", "data.response: expected an object or null, got an array"),
        ("response", '"{}"', "data.response: expected an object or null, got a string"),
        ("response", "no JSON", "data.response: "),
        ("response", "[" * 100_000, "data.response: nested too deeply"),
        (
            "response",
            {"resultImageUrl": 5},
            "data.response.resultImageUrl: expected a string or null, got a number",
        ),
        (
            "response",
            '{"originImageUrl": []}',
            "data.response.originImageUrl: expected a string or null, got an array",
        ),
    ],
)
def test_a_wrong_type_is_refused_and_its_place_named(field, value, place):
    error = refusal(success(**{field: value}), 203, kind=ResponseFormatError)
    assert place in error.args[0]
    assert (error.task_id, error.http_status) == (TASK, 203)
    assert error.excerpt.startswith('{"code": 200')


def test_all_wrong_places_are_named_at_once():
    error = refusal(success(successFlag=9, errorCode="x", response={"resultImageUrl": 1}))
    for place in ("data.successFlag", "data.errorCode", "data.response.resultImageUrl"):
        assert place in str(error)


def test_a_missing_flag_is_never_pending():
    error = refusal(sample("flag_missing"), kind=ResponseFormatError)
    assert "data.successFlag: missing" in str(error)
    assert "data.successFlag" in str(refusal(sample("flag_unknown"), kind=ResponseFormatError))


@pytest.mark.parametrize("data", [[], "", "{}", 0, 1.5, False])
def test_data_that_is_no_object_is_refused(data):
    error = refusal({"code": 200, "data": data}, kind=ResponseFormatError)
    assert "data: expected an object, got " in str(error)


def test_no_foreign_error_hangs_on_a_decode_error():
    for body in (
        success(successFlag=9),
        {"code": 200, "data": {}},
        b"nonsense",
        success(response="x"),
    ):
        error = refusal(body, kind=ResponseFormatError)
        assert error.__cause__ is None
        assert error.__context__ is None


def test_a_response_may_be_null_written_as_a_json_string():
    assert decode(success(response="null")).result_image_url is None


@pytest.mark.parametrize(
    ("value", "instant"),
    [
        ("2024-03-20T10:30:00Z", datetime(2024, 3, 20, 10, 30, tzinfo=UTC)),
        ("2024-03-20T10:30:00.250Z", datetime(2024, 3, 20, 10, 30, 0, 250_000, tzinfo=UTC)),
        (
            "2024-03-20T10:30:00+08:00",
            datetime(2024, 3, 20, 10, 30, tzinfo=timezone(timedelta(hours=8))),
        ),
        ("2024-03-20T10:30:00", datetime(2024, 3, 20, 10, 30, tzinfo=UTC)),
        ("2024-03-20 10:30:00", datetime(2024, 3, 20, 10, 30, tzinfo=UTC)),
        (1_710_930_600_250, datetime(2024, 3, 20, 10, 30, 0, 250_000, tzinfo=UTC)),
        ("1710930600250", datetime(2024, 3, 20, 10, 30, 0, 250_000, tzinfo=UTC)),
        ("2000-01-01T00:00:00Z", datetime(2000, 1, 1, tzinfo=UTC)),
        (32_503_679_999_999, datetime(2999, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)),
    ],
)
def test_each_notation_of_a_time_is_read(value, instant):
    record = decode(success(createTime=value, completeTime=value))
    assert record.create_time == record.complete_time == instant
    assert record.create_time.tzinfo is not None


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "soon",
        "2024-03-20",
        "10:30:00",
        "2024-13-20T10:30:00Z",
        "2024-03-20T10:30:00+99:00",
        "1999-12-31T23:59:59Z",
        "3000-01-01T00:00:00Z",
        "9999-12-31T23:59:59-23:59",
        "0001-01-01T00:00:00+23:59",
        "1710930600",
        "20240320",
        "9" * 5000,
        "٢" * 13,
        0,
        -1,
        10**400,
        32_503_680_000_000,
        True,
        1_710_930_600_000.0,
        math.inf,
        [],
        {},
    ],
    ids=lambda value: repr(value)[:24],
)
def test_any_other_time_is_none_and_never_an_error(value):
    record = decode(success(createTime=value, completeTime=value))
    assert record.create_time is None
    assert record.complete_time is None


# What JSON allows and a client may trip over.


def test_a_byte_order_mark_is_no_obstacle():
    assert decode(b"\xef\xbb\xbf" + sample("success")).status is TaskStatus.SUCCESS


def test_of_duplicate_names_the_last_one_counts():
    body = b'{"code": 500, "code": 200, "data": {"successFlag": 3, "successFlag": 0}}'
    assert decode(body).status is TaskStatus.GENERATING


def test_numbers_that_are_none_are_ignored_where_nobody_looks():
    assert decode({**success(progress=math.nan), "more": -math.inf}).status is TaskStatus.SUCCESS


def test_half_a_character_becomes_a_question_mark():
    half = "half \ud83d a face"
    response = {"resultImageUrl": half, "originImageUrl": half}
    record = decode(success(errorMessage=half, paramJson=half, response=json.dumps(response)))
    texts = (record.error_message, record.param_json, record.result_image_url)
    assert texts == ("half ? a face",) * 3
    record = decode(success(response=response))
    assert record.origin_image_url == "half ? a face"
    whole = decode(success(errorMessage="a \U0001f600 face"))
    assert whole.error_message == "a \U0001f600 face"


def test_parameters_with_half_a_character_can_be_written():
    record = decode(success(paramJson='{"prompt": "\\ud83d", "\\udc00": 1}'))
    assert record.params == {"prompt": "?", "?": 1}


def test_a_nul_in_a_message_never_reaches_a_terminal():
    error = refusal({"code": 500, "msg": "a\0b\x1b[31mc\r\n\u202ed"})
    assert str(error).isprintable()


# The excerpt.


def test_an_excerpt_is_short_and_printable():
    error = refusal(b"\x1b[2J\0\r\n" + b"x" * 5000)
    assert len(error.excerpt) == 200
    assert error.excerpt.isprintable()


@pytest.mark.parametrize(
    "body",
    [
        success(successFlag=9),
        {"code": 200, "data": [{"deep": {"paramJson": PROMPT}}]},
        {"code": 200, "data": {"response": json.dumps({"paramJson": PROMPT})}},
        {"code": 200, "data": {"response": json.dumps({"a": json.dumps({"paramJson": PROMPT})})}},
        {"paramJson": {"prompt": PROMPT}},
        {"request.paramJson": {"prompt": PROMPT}},
        json.dumps(success())[:-1].encode(),
        b"got: " + json.dumps(json.dumps(success())).encode(),
        b'{"p\\u0061ramJson": "' + PROMPT.encode() + b'", "data": ',
        b'{"p\\u0061ramJson": "' + PROMPT.encode() + b'"}',
        b"\xff" + json.dumps(success()).encode(),
    ],
    ids=lambda body: repr(body)[:40],
)
@pytest.mark.parametrize("status", [200, 400, 500])
def test_no_prompt_gets_into_an_excerpt(body, status):
    error = refusal(body, status)
    seen = f"{error} {error!r} {vars(error)}"
    assert "lighthouse" not in seen
    assert "prompt" not in seen


def test_an_excerpt_keeps_the_rest_of_what_held_the_parameters():
    error = refusal({"paramJson": PROMPT, "successFlag": 1})
    assert error.excerpt == '{"successFlag": 1}'


def test_an_excerpt_does_not_dig_down_for_ever():
    deep = {"code": 200, "data": [[[[[[[[[[{"paramJson": PROMPT}]]]]]]]]]]}
    assert refusal(deep).excerpt == '{"code": 200, "data": [[[[[[["…"]]]]]]]}'
    deep = {"code": 200, "data": {"1": {"2": {"3": {"4": {"5": {"6": {"7": {"8": 9}}}}}}}}}
    assert '{"7": "…"}' in refusal(deep).excerpt


# The key.


def spelled(text, how):
    """A text in one of JSON's many spellings, as it stands between the quotes."""
    if how == "plain":
        return json.dumps(text)[1:-1]
    if how == "slashes":
        return json.dumps(text)[1:-1].replace("/", "\\/")
    if how == "one":
        return f"\\u{ord(text[0]):04x}" + json.dumps(text[1:])[1:-1]
    return "".join(f"\\u{ord(c):04X}" for c in text)


def leaks(value, key):
    """Whether the key is in anything a user can get at, in any spelling a parser undoes."""
    if isinstance(value, TaskRecord):
        seen = [value.param_json, value.error_message, value.result_image_url]
        text = " ".join(map(str, [*seen, value.origin_image_url, value.params, value]))
    else:
        text = f"{value} {value!r} {value.args} {vars(value)}"
    for _ in range(3):
        if key in text:
            return True
        text = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)
        text = re.sub(r"\\+(.)", r"\1", text)
    return key in text


@pytest.mark.parametrize("how", ["plain", "slashes", "one", "all"])
@pytest.mark.parametrize("key", [KEY, 'quo"te\\and/slash', "0123456789", 'dGhl+/"'])
@pytest.mark.parametrize(
    "place",
    [
        '{"code": 200, "data": {"successFlag": 3, "errorMessage": "bad key Bearer @"}}',
        '{"code": 200, "data": {"successFlag": 1, "response": {"resultImageUrl": "x/@"}}}',
        '{"code": 200, "data": {"successFlag": 1, "response": {"originImageUrl": "x/@"}}}',
        '{"code": 200, "data": {"successFlag": 1, "paramJson": "@"}}',
        '{"code": 200, "data": {"successFlag": 9, "@": "@"}}',
        '{"code": 401, "msg": "bad key @"}',
        '{"code": 501, "msg": "bad key @"}',
        '{"code": 200, "data": "@"}',
        '{"headers": {"Authorization": "Bearer @"}}',
        "<html>Bearer @</html>",
        '{"code": 200, "data": {"successFlag": 1, "errorMessage": "@',
    ],
)
@pytest.mark.parametrize("status", [200, 401, 502])
def test_an_echoed_key_never_comes_back(place, key, how, status):
    body = place.replace("@", spelled(key, how)).encode()
    outcome = outcome_of(body, status, api_key=key)
    assert not leaks(outcome, key)
    assert "***" in f"{outcome} {getattr(outcome, 'param_json', '')}"


@pytest.mark.parametrize("how", ["plain", "slashes", "one", "all"])
def test_a_key_echoed_within_nested_json_never_comes_back(how):
    inner = f'{{"prompt": "{spelled(KEY, how)}", "resultImageUrl": "{spelled(KEY, how)}"}}'
    record = decode(success(paramJson=inner, response=inner))
    assert record.params["prompt"] == record.result_image_url == "***"
    assert not leaks(record, KEY)
    twice = decode(success(paramJson=json.dumps({"again": inner})))
    assert json.loads(twice.params["again"])["prompt"] == "***"


def test_a_key_echoed_as_a_number_is_not_in_the_excerpt():
    error = refusal(b'{"key": 9876543210}', api_key="9876543210")
    assert error.excerpt == '{"key": ***}'
    for padding in range(170, 200):
        error = refusal({"a": "." * padding, "b": 9876543210}, api_key="9876543210")
        assert "98" not in error.excerpt


def test_a_key_cut_by_the_excerpts_end_leaves_no_part_of_itself():
    for start in range(150, 205):
        error = refusal(b"." * start + KEY.encode() * 3)
        assert "sk-" not in error.excerpt


def test_a_key_too_short_to_be_one_does_not_eat_words():
    record = decode(success(), api_key="task1")
    assert record.result_image_url == RESULT
    assert decode(success(), api_key="").result_image_url == RESULT
    assert decode(success(errorMessage="\u00e9"), api_key="").error_message == "\u00e9"


# Retry-After.


@pytest.mark.parametrize(
    ("value", "date", "seconds"),
    [
        ("2", None, 2.0),
        (" 120 ", None, 120.0),
        ("0", None, 0.0),
        ("1.5", None, 1.5),
        ("999999999", None, 999_999_999.0),
        ("9999999999", None, None),
        ("-1", None, None),
        ("+1", None, None),
        ("1e3", None, None),
        ("٢", None, None),
        ("nan", None, None),
        ("", None, None),
        ("soon", None, None),
        (formatdate(NOW + 30, usegmt=True), None, 30.0),
        (formatdate(NOW - 30, usegmt=True), None, 0.0),
        (formatdate(NOW + 90, usegmt=True), formatdate(NOW + 60, usegmt=True), 30.0),
        (formatdate(NOW + 30, usegmt=True), "garbage", 30.0),
        ("Wednesday, 20-Mar-24 10:26:00 GMT", None, 30.0),
        ("Wed Mar 20 10:26:00 2024", None, 30.0),
        ("Wed, 20 Mar 99999999999 10:26:00 GMT", None, None),
        ("Wed, 20 Mar 2024 10:26:00 GMT" + " " * 50 + "x", None, None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(value, date, seconds):
    headers = {"Retry-After": value} | ({"Date": date} if date else {})
    for body, status in ((sample("rate_limited"), 200), (b"", 429), (b"", 503)):
        error = refusal(body, status, headers, kind=ApiError, now=NOW)
        assert error.retry_after == (None if seconds is None else pytest.approx(seconds, abs=1))


def test_an_answer_without_retry_after_asks_for_no_wait():
    assert refusal(b"", 429).retry_after is None


# Requests, and the age of a task.


@pytest.mark.parametrize("task_id", ["task12345", "a b", "ü/?&=#%", "x" * 300])
def test_an_id_that_can_be_sent_is_taken_as_it_is(task_id):
    assert wire.check_task_id(task_id) is task_id


@pytest.mark.parametrize("task_id", [None, 5, b"task", "", "  ", "a\nb", "a\0", "\ud800", "\u200b"])
def test_an_id_that_cannot_be_sent_or_printed_is_refused(task_id):
    with pytest.raises(ConfigurationError) as caught:
        wire.check_task_id(task_id)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("date", "created", "age"),
    [
        (formatdate(NOW, usegmt=True), datetime.fromtimestamp(NOW - 30, UTC), 30.0),
        (formatdate(NOW, usegmt=True), datetime.fromtimestamp(NOW, UTC), 0.0),
        (formatdate(NOW, usegmt=True), datetime.fromtimestamp(NOW - 3600, UTC), 3600.0),
        (formatdate(NOW, usegmt=True), datetime.fromtimestamp(NOW - 3601, UTC), None),
        (formatdate(NOW, usegmt=True), datetime.fromtimestamp(NOW + 1, UTC), None),
        (formatdate(NOW, usegmt=True), None, None),
        (None, CREATED, None),
        ("yesterday", CREATED, None),
    ],
)
def test_a_tasks_age_is_by_the_services_own_clock(date, created, age):
    record = TaskRecord(task_id=TASK, status=TaskStatus.GENERATING, create_time=created)
    assert wire.server_age({"Date": date} if date else {}, record) == age


# Properties.

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["", "0", "1", "200", "501", "{}", "\ud800", KEY, TASK, PROMPT, 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
statuses = st.sampled_from([200, 204, 302, 401, 403, 404, 422, 429, 455, 500, 501, 503]) | (
    st.integers(100, 999)
)
headers = st.dictionaries(
    st.sampled_from(["Retry-After", "Date", "Location"]),
    st.text(max_size=45)
    | st.integers().map(str)
    | st.integers(0, 2**36).map(lambda t: formatdate(t, usegmt=True))
    | st.text("0123456789 :,-+()GMTadeJnWMr", max_size=40).map("Wed, 20 Mar ".__add__),
)


def paths(value, path=()):
    """The way to every part of a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else ()
    for name, child in children:
        yield from paths(child, (*path, name))


@st.composite
def mutations(draw):
    """A valid reply, a few parts of it replaced, dropped or renamed."""
    reply = json.loads(sample(draw(st.sampled_from(sorted(RECORDS)))))
    for _ in range(draw(st.integers(1, 3))):
        *path, name = draw(st.sampled_from([path for path in paths(reply) if path]))
        parent = reply
        for step in path:
            parent = parent[step]
        value = parent.pop(name)
        match draw(st.sampled_from(["replace", "drop", "rename", "wrap"])):
            case "replace":
                parent[name] = draw(json_values)
            case "rename":
                parent[draw(st.text())] = value
            case "wrap":
                parent[name] = draw(st.sampled_from([[value], {"x": value}, json.dumps(value)]))
        if not any(paths(reply)):
            break
    return reply


def check(body, status, headers):
    """The outcome, seen to be a record or one of our errors, and fit for every use."""
    outcome = outcome_of(body, status, headers)
    assert not leaks(outcome, KEY)
    twin = pickle.loads(pickle.dumps(outcome))
    assert (type(twin), str(twin)) == (type(outcome), str(outcome))
    if isinstance(outcome, KontextError):
        check_error(outcome)
        assert vars(twin) == vars(outcome)
    else:
        check_record(outcome)
        assert twin == outcome
    return outcome


def check_error(error):
    assert str(error).isprintable()
    assert len(getattr(error, "excerpt", "")) <= 200
    assert (getattr(error, "retry_after", None) or 0.0) >= 0.0


def check_record(record):
    assert type(record) is TaskRecord
    assert record.task_id == TASK
    assert type(record.status) is TaskStatus
    assert record.duration is None or record.duration >= timedelta(0)
    urls = [record.origin_image_url, record.result_image_url]
    for text in (*urls, record.param_json, record.error_message, str(record.params)):
        assert text is None or text.encode() is not None


@given(body=json_values, status=statuses, headers=headers)
def test_any_json_gives_a_record_or_one_of_our_errors(body, status, headers):
    check(body, status, headers)


@given(
    body=st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")),
    status=statuses,
    headers=headers,
)
def test_any_bytes_give_one_of_our_errors(body, status, headers):
    assert isinstance(check(body, status, headers), KontextError)


@given(body=mutations(), status=statuses, headers=headers)
@settings(max_examples=300)
@example(body={"code": 501, "data": None}, status=200, headers={})
def test_any_mutation_of_a_valid_reply_gives_a_record_or_one_of_our_errors(body, status, headers):
    check(body, status, headers)


@given(cut=st.integers(0, 700), junk=st.binary(max_size=8), status=statuses)
def test_a_reply_cut_short_shows_no_prompt(cut, junk, status):
    outcome = check(sample("success")[:cut] + junk, status, {})
    assert "lighthouse" not in f"{outcome} {getattr(outcome, '__dict__', '')}"


@given(data=st.data(), reply=mutations(), status=statuses)
def test_a_key_in_any_spelling_at_any_place_never_comes_back(data, reply, status):
    """`check` looks for the key."""
    marked = copy.deepcopy(reply)
    for path in [path for path in paths(marked) if path]:
        parent = marked
        for step in path[:-1]:
            parent = parent[step]
        if isinstance(parent[path[-1]], str) and data.draw(st.booleans()):
            parent[path[-1]] += "@@@"
    spelling = "".join(
        data.draw(st.sampled_from([c, f"\\u{ord(c):04x}", f"\\u{ord(c):04X}"])) for c in KEY
    )
    check(json.dumps(marked).replace("@@@", spelling).encode(), status, {})
