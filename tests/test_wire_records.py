"""The task's record in an answer, field by field."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from email.utils import formatdate

import pytest
from wire_answers import (
    COMPLETED,
    CREATED,
    NOW,
    ORIGIN,
    PROMPT,
    RESULT,
    TASK,
    decode,
    outcome_of,
    refusal,
    sample,
    success,
)

from kontext_async import wire
from kontext_async.errors import (
    ConfigurationError,
    GenerationFailedError,
    RateLimitedError,
    ResponseFormatError,
    ServerError,
)
from kontext_async.models import TaskRecord, TaskStatus
from kontext_async.wire.json_values import parse

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
    "response_url": {"origin_image_url": None},
    "response_result_urls": {"origin_image_url": None},
    "result_url_in_data": {"origin_image_url": None},
    "null_strings": {"origin_image_url": None, "param_json": None},
    "odd_fields": {
        "origin_image_url": None,
        "param_json": None,
        "create_time": None,
        "complete_time": None,
    },
    "failed_in_500": FAILED
    | {"error_code": 500, "error_message": "Internal Error, Please try again later."},
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


# Failure in the envelope.


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("generation_failed_501", 501, "Image generation task failed"),
        ("flagged_400", 400, FLAGGED),
        ("flagged_400_without_task", 400, FLAGGED),
    ],
)
def test_a_400_or_501_without_a_record_is_a_failed_generation(name, code, message):
    error = refusal(sample(name), kind=GenerationFailedError)
    assert (error.task_id, error.status) == (TASK, TaskStatus.GENERATE_FAILED)
    assert (error.error_code, error.error_message) == (code, message)
    assert error.record is None


@pytest.mark.parametrize("code", [400, 501])
@pytest.mark.parametrize(
    ("data", "given"),
    [
        ({"errorCode": 500}, 500),
        ({"errorCode": "500", "successFlag": 9}, 500),
        ({"errorCode": 0}, None),
        ({"errorCode": "x"}, None),
        ({"taskId": TASK, "successFlag": None}, None),
        ([], None),
        ("gone", None),
    ],
)
def test_a_400_or_501_with_an_unreadable_record_takes_what_can_be_read(code, data, given):
    error = refusal({"code": code, "msg": "failed", "data": data}, kind=GenerationFailedError)
    assert (error.error_code, error.error_message) == (given or code, "failed")
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize("flag", TaskStatus)
@pytest.mark.parametrize("code", [200, 400, 501])
def test_the_flag_of_a_readable_record_decides_in_a_400_or_501(code, flag):
    assert decode({**success(successFlag=int(flag)), "code": code}).status is flag


@pytest.mark.parametrize("code", [401, 404, 422, 429, 500, 0])
@pytest.mark.parametrize("flag", [1, 2, 3])
def test_a_record_that_has_ended_decides_in_an_envelope_of_any_code(code, flag):
    assert decode({**success(successFlag=flag), "code": code}, 503).status == flag


@pytest.mark.parametrize(
    "data",
    [
        {"successFlag": 0},
        {"successFlag": 1, "response": None},
        {"successFlag": 9},
        {"taskId": "task99"},
    ],
)
def test_any_other_record_leaves_the_decision_to_the_code(data):
    assert type(refusal({**success(**data), "code": 429})) is RateLimitedError


@pytest.mark.parametrize("code", [None, True, 200.0, "ok"])
def test_a_record_without_an_envelope_does_not_count(code):
    assert type(refusal({**success(), "code": code})) is ResponseFormatError
    assert type(refusal({**success(), "code": code}, 503)) is ServerError


@pytest.mark.parametrize("code", [200, 400, 501])
@pytest.mark.parametrize("other", ["task99", "", "null", 12345, 12345.0])
def test_a_record_of_another_task_is_refused(code, other):
    reply = {**success(taskId=other, successFlag=None), "code": code}
    error = refusal(reply, kind=ResponseFormatError)
    assert "data.taskId: the record is another task's" in str(error)


def test_a_record_without_a_task_id_is_the_asked_tasks():
    nameless = success()
    del nameless["data"]["taskId"]
    assert decode(nameless, task_id="asked").task_id == "asked"


@pytest.mark.parametrize("named", [None, 12345, "12345", True, [], ["task99"], {}])
def test_an_id_that_is_equal_in_digits_or_odd_is_the_asked_tasks(named):
    assert decode(success(taskId=named), task_id="12345").task_id == "12345"


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


ABSENT = [
    ("paramJson", "param_json", None),
    ("errorMessage", "error_message", ""),
    ("errorCode", "error_code", None),
]


@pytest.mark.parametrize(("field", "attribute", "absent"), ABSENT)
@pytest.mark.parametrize("value", [None, "", "null", {}, [], {"text": "x"}, True, False, 1.5])
@pytest.mark.parametrize("flag", TaskStatus)
def test_an_odd_field_reads_as_absent_and_the_flag_stands(flag, field, attribute, absent, value):
    record = decode(success(successFlag=int(flag), **{field: value}))
    assert record.status is flag
    assert getattr(record, attribute) == absent
    assert record.result_image_url == RESULT


@pytest.mark.parametrize(
    "value", ["E1", "-1", "+1", "1.0", "\u0662", " 5", 10**9, -(10**9), "0" * 10]
)
def test_an_error_code_that_is_not_a_small_integer_reads_as_absent(value):
    assert decode(success(successFlag=3, errorCode=value)).error_code is None


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (433, 433),
        ("433", 433),
        ("0", 0),
        (-1, -1),
        (999_999_999, 999_999_999),
        ("999999999", 999_999_999),
        (-999_999_999, -999_999_999),
    ],
)
def test_an_error_code_is_an_integer_or_its_digits(value, code):
    assert decode(success(successFlag=3, errorCode=value)).error_code == code


@pytest.mark.parametrize("field", ["paramJson", "errorMessage"])
@pytest.mark.parametrize("value", [0, 7, 10**400])
def test_a_number_is_not_a_text(field, value):
    record = decode(success(**{field: value}))
    assert (record.param_json if field == "paramJson" else record.error_message) in (None, "")


@pytest.mark.parametrize("value", [None, "", "null", 5, True, [], {}, [ORIGIN]])
def test_an_odd_origin_url_reads_as_absent(value):
    record = decode(success(response={"originImageUrl": value, "resultImageUrl": RESULT}))
    assert (record.origin_image_url, record.result_image_url) == (None, RESULT)


@pytest.mark.parametrize("value", [None, "", "null", 5, True, [], {}, [RESULT]])
def test_a_success_with_an_odd_result_url_is_a_record_without_one(value):
    record = decode(success(response={"originImageUrl": ORIGIN, "resultImageUrl": value}))
    assert record.status is TaskStatus.SUCCESS
    assert (record.origin_image_url, record.result_image_url) == (ORIGIN, None)


OTHER = "https://files.example.com/other.jpg"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_response_may_be_the_plain_url(scheme):
    url = f"{scheme}://files.example.com/r%2Fx.jpg?a=%3A%27"
    record = decode(success(response=url))
    assert (record.origin_image_url, record.result_image_url) == (None, url)


@pytest.mark.parametrize(
    ("data", "url"),
    [
        ({"response": {"resultUrls": [RESULT, OTHER]}}, RESULT),
        ({"response": {"resultUrls": [None, 5, "", RESULT, OTHER]}}, RESULT),
        ({"response": {"resultImageUrl": 5, "resultUrls": [RESULT]}}, RESULT),
        ({"response": {"resultImageUrl": RESULT, "resultUrls": [OTHER]}}, RESULT),
        ({"response": json.dumps({"resultUrls": [RESULT]})}, RESULT),
        ({"response": {"resultUrls": []}}, None),
        ({"response": {"resultUrls": [5, {}]}}, None),
        ({"response": {"resultUrls": RESULT}}, None),
        ({"response": {"resultUrls": {RESULT: RESULT}}}, None),
        ({"response": None, "resultImageUrl": RESULT}, RESULT),
        ({"response": {}, "resultImageUrl": RESULT}, RESULT),
        ({"response": "x", "resultImageUrl": RESULT}, RESULT),
        ({"response": {"resultUrls": [RESULT]}, "resultImageUrl": OTHER}, RESULT),
        ({"response": {"resultImageUrl": RESULT}, "resultImageUrl": OTHER}, RESULT),
        ({"response": RESULT, "resultImageUrl": OTHER}, RESULT),
        ({"response": None, "resultImageUrl": 5}, None),
    ],
)
def test_the_result_url_is_found_wherever_services_put_it(data, url):
    assert decode(success(**data)).result_image_url == url


@pytest.mark.parametrize(
    "response",
    [
        None,
        [],
        0,
        True,
        "",
        "no JSON",
        "ftp://x/r.jpg",
        "null",
        "{}",
        "[1]",
        '"{}"',
        f'"{RESULT}"',
        "[" * 100_000,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_an_odd_response_reads_as_absent(response):
    record = decode(success(response=response))
    assert record.status is TaskStatus.SUCCESS
    assert (record.origin_image_url, record.result_image_url) == (None, None)


@pytest.mark.parametrize(
    ("flag", "kind"),
    [
        (None, "null"),
        (True, "a boolean"),
        (4, "a number"),
        (1.5, "a number"),
        ("x", "a string"),
        ([1], "an array"),
        ({}, "an object"),
    ],
)
def test_an_unreadable_flag_is_named_by_its_kind(flag, kind):
    error = refusal(success(successFlag=flag), kind=ResponseFormatError)
    assert error.args[0] == f"data.successFlag: expected 0, 1, 2 or 3, got {kind}"


def test_a_record_without_a_flag_is_unreadable():
    error = refusal(sample("flag_missing"), kind=ResponseFormatError)
    assert "data.successFlag: missing" in str(error)
    assert "data.successFlag" in str(refusal(sample("flag_unknown"), kind=ResponseFormatError))


@pytest.mark.parametrize("data", [[], "", "{}", 0, 1.5, False])
def test_data_that_is_not_an_object_is_refused(data):
    error = refusal({"code": 200, "data": data}, kind=ResponseFormatError)
    assert "data: expected an object, got " in str(error)


def test_no_other_error_is_chained_to_an_unreadable_answer():
    for body in (success(successFlag=9), {"code": 200, "data": {}}, b"nonsense"):
        error = refusal(body, kind=ResponseFormatError)
        assert error.__cause__ is None
        assert error.__context__ is None


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
        ("001710930600250", datetime(2024, 3, 20, 10, 30, 0, 250_000, tzinfo=UTC)),
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
        "2024-03-20T10:30Z",
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
        10**14,
        3 * 10**14,
        "9" * 15,
        "0001710930600250",
        True,
        1_710_930_600_000.0,
        math.inf,
        [],
        {},
    ],
    ids=lambda value: repr(value)[:24],
)
def test_any_other_time_reads_as_absent(value):
    record = decode(success(createTime=value, completeTime=value))
    assert record.create_time is None
    assert record.complete_time is None


def test_nan_and_infinity_are_accepted_in_undocumented_fields():
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


def test_an_id_from_outside_is_not_believed_if_it_is_long():
    assert wire.foreign_task_id("x" * 200) == "x" * 200
    assert wire.foreign_task_id("x" * 201) is None
    assert wire.foreign_task_id(None) is None


def test_the_message_about_a_bad_id_shows_its_first_80_characters():
    with pytest.raises(ConfigurationError, match="must be printable: '" + "x" * 80 + "'$"):
        wire.check_task_id("x" * 99 + "\n")


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


# Values that Python cannot hold, or not as JSON has them.
HUGE = {
    "digits": "9" * 5000,
    "negative_digits": "-" + "9" * 5000,
    "nan": "NaN",
    "infinity": "1e999",
    "nested_arrays": "[" * 50_000 + "]" * 50_000,
    "nested_objects": '{"a":' * 10_000 + "1" + "}" * 10_000,
    "nested_with_strings": '["[{\\"", {"]}": ' * 5_000 + "1" + "}]" * 5_000,
}
SIDE_FIELDS = [
    *("paramJson", "createTime", "completeTime", "errorCode", "errorMessage", "extra", "taskId"),
    *("response.originImageUrl", "response.extra", "envelope.msg", "envelope.extra"),
]


def with_raw(path, raw, reply):
    """Return a reply's text with a raw value in one field, added if it is not there."""
    place, _, name = path.rpartition(".")
    data = reply["data"]
    {"": data, "response": data["response"], "envelope": reply}[place][name] = "RAW"
    return json.dumps(reply).replace('"RAW"', raw).encode()


@pytest.mark.parametrize("raw", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("path", SIDE_FIELDS)
def test_no_value_of_a_side_field_vetoes_a_paid_result(path, raw):
    record = decode(with_raw(path, raw, success()))
    assert record.status is TaskStatus.SUCCESS
    assert record.result_image_url == RESULT


def test_beside_a_value_that_python_cannot_hold_others_are_read_up_to_a_bound():
    """Integers of 4,000 digits, and values 64 levels deep."""
    huge = f'{{"huge": {HUGE["digits"]}, '
    assert parse(huge + f'"n": {"9" * 4000}}}')["n"] == int("9" * 4000)
    assert parse(huge + f'"n": {"9" * 4001}}}')["n"] is None
    deep = "[" * 62 + "%s" + "]" * 62
    assert parse(huge + f'"a": {deep % "[]"}}}')["a"] == json.loads(deep % "[]")
    assert parse(huge + f'"a": {deep % "[[]]"}}}')["a"] == json.loads(deep % "[null]")


@pytest.mark.parametrize("raw", HUGE.values(), ids=HUGE)
def test_no_value_of_a_side_field_vetoes_a_refusal(raw):
    reply = {"code": 402, "msg": "no credits", "data": {}}
    assert refusal(with_raw("extra", raw, {**reply, "data": {"response": {}}})).code == 402
    again = {"code": 429, "msg": "slowly", "data": {"response": {}}}
    assert isinstance(refusal(with_raw("envelope.extra", raw, again)), RateLimitedError)


@pytest.mark.parametrize("raw", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("path", ["successFlag", "response.resultImageUrl"])
def test_a_flag_or_a_result_that_cannot_be_held_is_as_any_other_odd_one(path, raw):
    outcome = outcome_of(with_raw(path, raw, success()))
    is_flag = path == "successFlag"
    assert isinstance(outcome, ResponseFormatError) if is_flag else not outcome.result_image_url


def test_a_huge_number_in_a_response_that_is_text_does_not_veto_its_result():
    text = '{"resultImageUrl": "' + RESULT + '", "seed": ' + HUGE["digits"] + "}"
    assert decode(success(response=text)).result_image_url == RESULT
