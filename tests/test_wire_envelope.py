"""An answer's code, message and Retry-After, and the error that a refusal is."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest
from wire_answers import KEY, NOW, TASK, decode, refusal, sample

from kontext_async import wire
from kontext_async.errors import (
    ApiError,
    AuthenticationError,
    InvalidRequestError,
    MaintenanceError,
    RateLimitedError,
    ResponseFormatError,
    ServerError,
    TaskNotFoundError,
    TransportError,
)
from kontext_async.models import TaskStatus

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
        (403, ApiError),
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
    assert not error.from_gateway


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
def test_a_422_about_a_missing_record_is_a_task_not_found(msg):
    assert type(refusal({"code": 422, "msg": msg})) is TaskNotFoundError


@pytest.mark.parametrize(
    "msg",
    [
        "taskId is null",
        "inputImage not found",
        "The record's aspectRatio is not supported",
        "task" + " " * 81 + "not found",
        "",
        None,
        7,
    ],
)
def test_any_other_422_is_an_invalid_request(msg):
    assert type(refusal({"code": 422, "msg": msg})) is InvalidRequestError


@pytest.mark.parametrize("msg", [None, 5, ["x"], {"paramJson": "x"}])
def test_an_envelope_message_that_is_not_text_reads_as_empty(msg):
    assert refusal({"code": 500, "msg": msg}).msg == ""


def test_a_missing_record_is_a_task_not_found():
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
    b'{"code": 200, "data": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
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
        (199, ApiError),
    ],
)
def test_without_an_envelope_the_http_status_decides(body, status, kind):
    error = refusal(body, status)
    assert type(error) is kind
    assert (error.http_status, error.task_id) == (status, TASK)
    if isinstance(error, ApiError):
        assert (error.code, error.from_gateway) == (status, True)


@pytest.mark.parametrize(
    ("body", "msg"),
    [
        (sample("gateway_403"), "error code: 1010"),
        (sample("gateway_502"), "502 Bad Gateway"),
        (b"<h1>502 Bad Gateway</h1>", "502 Bad Gateway"),
        (b"\n <HTML>\n<P CLASS=x\n>Try <b>later</b>.", "Try later ."),
        (b"<title>Busy</title>", "Busy"),
        (b"<html><head><title>Busy</title></head><body> </body></html>", "Busy"),
        (b"<html><head><title>Busy</title></HEAD\n><body>Come back</body></html>", "Come back"),
        (b"<header>Busy</header>", "Busy"),
        (b"<script>var a = '<p>no</p>';</script>Busy<STYLE a=b>p {}</STYLE >!", "Busy !"),
        (b"<!-- <p>no</p> -->Busy<!--no", "Busy"),
        (b"<?xml version='1.0'?><!DOCTYPE html><p>Busy", "Busy"),
        (b"<p>5 &lt; 6 &amp; 7&nbsp;&#8211; caf&eacute;", "5 < 6 & 7 \N{EN DASH} caf\xe9"),
        (b"<p>1 < 2 <", "1 < 2 <"),
        (b"<p>a\x00b&#x202e;c", "a b c"),
        (b"<p>cut<p class=", "cut"),
        (b"<script>never closed", ""),
        (b"<html></html>", ""),
        (b"limit <b> reached", "limit <b> reached"),
        (b'{"error": "<b>limit</b>"}', '{"error": "<b>limit</b>"}'),
    ],
)
def test_the_message_of_a_gateways_page_is_its_text(body, msg):
    error = refusal(body, 502)
    assert error.msg.strip() == msg
    assert error.msg.isprintable()


@pytest.mark.parametrize(
    "part", [b"<head", b"<script ", b"<!--", b"<p", b"<head></head", b"< ", b"x"]
)
def test_a_long_page_is_read_in_a_moment_and_its_message_is_bounded(part):
    started = time.perf_counter()
    error = refusal(b"<p>Busy" + part * 80_000, 502)
    assert time.perf_counter() - started < 1.0
    assert len(error.msg) <= 200


def test_only_the_beginning_of_a_page_is_searched_for_its_text():
    assert refusal(b"<p>" + b" " * 4092 + b"Busy", 502).msg == "B"


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


# What JSON allows and a client may trip over.


def test_a_byte_order_mark_is_skipped():
    assert decode(b"\xef\xbb\xbf" + sample("success")).status is TaskStatus.SUCCESS


def test_the_last_of_duplicate_names_counts():
    body = b'{"code": 500, "code": 200, "data": {"successFlag": 3, "successFlag": 0}}'
    assert decode(body).status is TaskStatus.GENERATING


def test_a_message_with_control_characters_shows_none_of_them():
    error = refusal({"code": 500, "msg": "a\0b\x1b[31mc\r\n\u202ed"})
    assert str(error).isprintable()


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
        assert error.retry_after == seconds


@pytest.mark.parametrize(("length", "seconds"), [(40, 30.0), (41, 45.0)])
def test_a_date_of_more_than_40_characters_is_not_read(length, seconds):
    date = formatdate(NOW + 15, usegmt=True).ljust(length)
    headers = {"Retry-After": formatdate(NOW + 45, usegmt=True), "Date": date}
    assert wire.retry_after(headers, NOW) == seconds


def test_an_answer_without_retry_after_asks_for_no_wait():
    assert refusal(b"", 429).retry_after is None


@pytest.mark.parametrize("date", ["Wed, 20 Mar 2024 10:26:01 -0000", "Wed Mar 20 10:26:01 2024"])
def test_a_date_without_a_zone_is_in_utc_wherever_the_client_is(monkeypatch, date):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert wire.retry_after({"Retry-After": date}, NOW) == 31.0
    finally:
        monkeypatch.undo()
        time.tzset()
