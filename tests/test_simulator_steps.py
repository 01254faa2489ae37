"""Scripts, and the reply that each step's name stands for."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import re
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from types import SimpleNamespace

import aiohttp
import pytest

from kontext_async.models import TaskStatus
from kontext_async.simulator import FAULTS, IMAGE_STEPS, STEPS, Simulator, steps
from kontext_async.simulator.replies import Connection

pytestmark = pytest.mark.virtual_time

RECORD_INFO = "/api/v1/flux/kontext/record-info"
MIB = 1024 * 1024
RAW_POLL = (
    f"GET {RECORD_INFO}?taskId=t HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n\r\n"
).encode()


@pytest.fixture
async def simulator():
    async with Simulator(durations=10.0) as simulator:
        yield simulator


@pytest.fixture
async def session(simulator):
    async with aiohttp.ClientSession(
        simulator.base_url, headers={"Authorization": "Bearer k"}, auto_decompress=False
    ) as session:
        yield session


async def poll(session, task_id="t"):
    async with session.get(
        RECORD_INFO, params={"taskId": task_id}, allow_redirects=False
    ) as response:
        return SimpleNamespace(
            status=response.status, headers=response.headers, body=await response.read()
        )


async def answer(session, task_id="t"):
    return json.loads((await poll(session, task_id)).body)


async def record(session, task_id="t"):
    return (await answer(session, task_id))["data"]


RECORDS = {
    "generating": {"successFlag": 0, "response": None, "completeTime": None, "errorCode": None},
    "generating_sparse": {"successFlag": 0},
    "success": {"successFlag": 1, "errorCode": None, "errorMessage": ""},
    "success_nulls": {"successFlag": 1, "errorMessage": None},
    "success_no_url": {"successFlag": 1},
    "success_error_400": {"successFlag": 1, "errorCode": 400},
    "success_error_0": {"successFlag": 1, "errorCode": 0},
    "response_text": {"successFlag": 1},
    "response_empty": {"successFlag": 1, "response": {}},
    "response_null": {"successFlag": 1, "response": None},
    "flag_text": {"successFlag": "1"},
    "flag_missing": {"errorMessage": ""},
    "flag_unknown": {"successFlag": 7},
    "failed": {"successFlag": 3, "errorCode": 501, "response": None},
    "failed_create": {"successFlag": 2, "errorCode": 500},
    "failed_flagged": {"successFlag": 3, "errorCode": 400},
    "failed_code_text": {"successFlag": 3, "errorCode": "500"},
    "failed_code_blank": {"successFlag": 3, "errorCode": ""},
    "failed_code_null": {"successFlag": 3, "errorCode": None},
    "failed_code_unknown": {"successFlag": 3, "errorCode": 433},
    "failed_no_message": {"successFlag": 3, "errorMessage": None},
    "times_plain": {"successFlag": 1},
    "times_ms": {"successFlag": 1},
    "times_ms_text": {"successFlag": 1},
    "times_unreadable": {"createTime": "yesterday", "completeTime": "yesterday"},
    "params_broken": {"paramJson": '{"prompt": "a ligh'},
    "params_null": {"paramJson": None},
    "extra_fields": {"successFlag": 1, "progress": "1.00"},
    "no_task_id": {"successFlag": 1},
    "other_task": {"taskId": "somebody-elses-task"},
}


@pytest.mark.parametrize("name", RECORDS)
async def test_a_record_variant_differs_as_its_name_says(simulator, session, name):
    simulator.add_task("t", script=[name])
    got = await answer(session)
    assert (got["code"], got["msg"]) == (200, "success")
    assert RECORDS[name].items() <= got["data"].items()


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("generating_sparse", {"response", "completeTime", "errorCode", "errorMessage"}),
        ("flag_missing", {"successFlag"}),
        ("no_task_id", {"taskId"}),
        ("generating", set()),
        ("success", set()),
    ],
)
async def test_some_variants_leave_fields_out(simulator, session, name, missing):
    simulator.add_task("t", script=[name])
    assert (
        set(await record(session))
        == {
            *("taskId", "paramJson", "completeTime", "response"),
            *("successFlag", "errorCode", "errorMessage", "createTime"),
        }
        - missing
    )


async def test_urls_may_be_missing_or_hidden_in_a_string(simulator, session):
    simulator.add_task("t", script=["success_nulls", "success_no_url", "response_text"])
    no_origin, no_result, text = [(await record(session))["response"] for _ in range(3)]
    url = f"{simulator.base_url}/images/t.png"
    assert no_origin == {"originImageUrl": None, "resultImageUrl": url}
    assert no_result["resultImageUrl"] is None
    assert json.loads(text)["resultImageUrl"] == url


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("times_plain", lambda text: datetime.fromisoformat(text + "+00:00")),
        ("times_ms", lambda ms: datetime.fromisoformat("1970-01-01T00Z") + ms * MILLISECOND),
        (
            "times_ms_text",
            lambda t: datetime.fromisoformat("1970-01-01T00Z") + int(t) * MILLISECOND,
        ),
    ],
)
async def test_times_in_another_format_are_the_same_times(simulator, session, name, read):
    simulator.add_task("t", age=60, duration=12, script=[name])
    odd, plain = await record(session), await record(session)
    assert type(odd["createTime"]) is (int if name == "times_ms" else str)
    for field in ("createTime", "completeTime"):
        whole_second = read(odd[field]).replace(microsecond=0)
        assert whole_second == datetime.fromisoformat(plain[field])


MILLISECOND = timedelta(milliseconds=1)

CODES = [401, 402, 403, 404, 408, 422, 429, 451, 455, 500, 501, 502, 503, 504, 505, 524]


@pytest.mark.parametrize("code", CODES)
async def test_a_code_comes_in_an_envelope_with_http_200(simulator, session, code):
    simulator.add_task("t", script=[f"code_{code}"])
    got = await poll(session)
    assert got.status == 200
    envelope = json.loads(got.body)
    assert (envelope["code"], envelope["data"]) == (code, None)
    assert envelope["msg"]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("kind", ["http", "html", "empty"])
async def test_an_http_status_comes_with_json_html_or_nothing(simulator, session, status, kind):
    simulator.add_task("t", script=[f"{kind}_{status}"])
    got = await poll(session)
    assert got.status == status
    if kind == "http":
        assert json.loads(got.body)["code"] == status
    else:
        assert got.headers["Content-Type"].startswith("text/html")
        assert got.body.startswith(b"<html>") if kind == "html" else got.body == b""


@pytest.mark.parametrize(
    ("name", "status", "body"),
    [
        ("html_200", 200, b"<html>"),
        ("empty_200", 200, b""),
        ("html_403", 403, b"<html>"),
        ("gateway_403", 403, b"error code: 1010"),
        ("html_404", 404, b"<html>"),
        ("empty_404", 404, b""),
        ("not_an_object", 200, b"[1, 2, 3]"),
        ("data_missing", 200, b'{"code": 200, "msg": "success"}'),
        ("data_null", 200, b'{"code": 200, "msg": "success", "data": null}'),
        ("data_text", 200, b'{"code": 200, "msg": "success", "data": "pending"}'),
        ("not_found", 200, b'{"code": 422, "msg": "The record does not exist", "data": null}'),
        ("not_visible", 200, b'{"code": 422, "msg": "recordInfo is null", "data": null}'),
        ("code_text", 200, b'{"code": "200", "msg": "success", "data": {"taskId": "t"'),
        ("code_501_record", 200, b'{"code": 501, "msg": "Image generation failed", "data": {"t'),
    ],
)
async def test_other_replies(simulator, session, name, status, body):
    simulator.add_task("t", script=[name])
    got = await poll(session)
    assert got.status == status
    assert got.body.startswith(body)
    assert bool(got.body) is bool(body)


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [("rate_limited", 429, 429), ("html_503_retry_after", 503, None)],
)
async def test_retry_after_may_be_seconds(simulator, session, name, status, code):
    simulator.add_task("t", script=[name])
    got = await poll(session)
    assert (got.status, got.headers["Retry-After"]) == (status, "2")
    assert simulator.requests[-1].code == code


async def test_retry_after_may_be_a_date(simulator, session):
    simulator.add_task("t", script=["rate_limited_until"])
    headers = (await poll(session)).headers
    until, now = (parsedate_to_datetime(headers[name]) for name in ("Retry-After", "Date"))
    assert until - now == timedelta(seconds=2)


async def test_a_rate_limit_may_be_in_the_body_alone(simulator, session):
    simulator.add_task("t", script=["rate_limited_in_body"])
    got = await poll(session)
    assert (got.status, json.loads(got.body)["code"]) == (200, 429)
    assert "Retry-After" not in got.headers


@pytest.mark.parametrize(("name", "times"), [("reset", 2), ("closed", 2), ("not_http", 1)])
async def test_there_may_be_no_http_reply(simulator, session, name, times):
    # Twice, as aiohttp itself retries when a connection is lost before the reply.
    simulator.add_task("t", script=[name] * times)
    with pytest.raises(aiohttp.ClientError):
        await poll(session)
    assert simulator.requests[-1].status == 0
    assert (await record(session))["successFlag"] == 1


async def test_a_reset_is_a_reset(simulator):
    simulator.add_task("t", script=["reset"])
    host, port = simulator.base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(RAW_POLL)
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    with pytest.raises(ConnectionResetError):
        await writer.wait_closed()


@pytest.mark.parametrize("name", ["reset_mid_body", "truncated"])
async def test_a_body_may_end_too_early(simulator, session, name):
    simulator.add_task("t", script=[name])
    with pytest.raises(aiohttp.ClientPayloadError):
        await poll(session)
    assert simulator.requests[-1].status == 200


@pytest.mark.parametrize("name", ["stall", "stall_mid_body"])
async def test_a_stall_lasts_until_the_client_leaves(simulator, session, name):
    simulator.add_task("t", script=[name])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3600):
            await poll(session)


async def test_a_slow_body_takes_a_second(simulator, session):
    simulator.add_task("t", script=["slow"])
    begun = simulator.now
    await record(session)
    assert simulator.now - begun == pytest.approx(1.0, abs=0.1)


async def test_a_slow_body_may_be_empty(simulator, session):
    slow = steps.sent(steps.replies.slow(1.0), steps.http(200, ""))
    simulator.add_task("t", script=[slow])
    assert (await poll(session)).body == b""


async def test_a_body_may_go_on_after_its_announced_end(simulator):
    simulator.add_task("t", script=["overrun"])
    host, port = simulator.base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(RAW_POLL)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    announced = int(re.search(rb"Content-Length: (\d+)", head)[1])
    assert json.loads(body[:announced])["code"] == 200
    assert len(body) > announced
    writer.close()
    await writer.wait_closed()


async def test_a_good_reply_may_be_the_last_on_its_connection(simulator, session):
    simulator.add_task("t", script=["closed_after"])
    got = await poll(session)
    assert json.loads(got.body)["code"] == 200
    assert "Connection" not in got.headers


async def test_a_body_may_come_in_chunks(simulator, session):
    simulator.add_task("t", script=["chunked"])
    got = await poll(session)
    assert got.headers["Transfer-Encoding"] == "chunked"
    assert json.loads(got.body)["data"]["taskId"] == "t"


async def test_a_body_may_be_compressed(simulator, session):
    simulator.add_task("t", script=["gzip"])
    got = await poll(session)
    assert got.headers["Content-Encoding"] == "gzip"
    assert json.loads(gzip.decompress(got.body))["data"]["taskId"] == "t"


async def test_a_body_may_be_far_too_large(simulator, session):
    simulator.add_task("t", script=["oversized", "oversized_chunked", "oversized_gzip"])
    announced, chunked, packed = [await poll(session) for _ in range(3)]
    assert int(announced.headers["Content-Length"]) == len(announced.body) > 2 * MIB
    assert "Content-Length" not in chunked.headers
    assert len(chunked.body) > 2 * MIB
    assert len(packed.body) < 10_000
    assert len(gzip.decompress(packed.body)) > 2 * MIB
    assert json.loads(announced.body)["data"]["taskId"] == "t"


async def test_a_redirect_leads_to_this_server_under_another_name(simulator, session):
    simulator.add_task("t", script=["redirect"])
    got = await poll(session)
    assert got.status == 302
    port = simulator.base_url.rpartition(":")[2]
    assert got.headers["Location"] == f"http://localhost:{port}{RECORD_INFO}?taskId=t"


async def test_resetting_a_closed_connection_does_nothing():
    Connection(SimpleNamespace(transport=None), "").reset()


async def test_a_script_gives_each_poll_its_step(simulator, session):
    simulator.add_task("t", script=["not_found", "http_500", "html_502", "generating", "success"])
    statuses = [(await poll(session)).status for _ in range(5)]
    assert statuses == [200, 500, 502, 200, 200]
    assert [logged.code for logged in simulator.requests] == [422, 500, None, 200, 200]


async def test_after_its_script_a_task_without_a_duration_ends_at_the_next_poll(simulator, session):
    simulator.add_task("t", script=["generating", "generating"])
    assert [(await record(session))["successFlag"] for _ in range(4)] == [0, 0, 1, 1]


async def test_after_its_script_a_task_with_a_duration_lasts_that_long(simulator, session):
    simulator.add_task("t", script=["http_500"], duration=10.0)
    await poll(session)
    assert (await record(session))["successFlag"] == 0
    await asyncio.sleep(10)
    assert (await record(session))["successFlag"] == 1


async def test_a_step_that_ends_the_task_ends_it_for_good(simulator, session):
    simulator.add_task("t", script=["failed_flagged"], duration=1000.0, outcome="success")
    await asyncio.sleep(5)
    first = await record(session)
    await asyncio.sleep(5)
    assert await record(session) == first
    begun, ended = (datetime.fromisoformat(first[f"{what}Time"]) for what in ("create", "complete"))
    assert timedelta(seconds=4) <= ended - begun <= timedelta(seconds=6)


async def test_a_step_that_ends_an_ended_task_keeps_its_time(simulator, session):
    simulator.add_task("t", script=["success"], duration=2.0, age=60)
    got = await record(session)
    begun, ended = (datetime.fromisoformat(got[f"{what}Time"]) for what in ("create", "complete"))
    assert timedelta(seconds=1) <= ended - begun <= timedelta(seconds=3)


async def test_a_script_may_be_endless(simulator, session):
    simulator.add_task("t", script=itertools.repeat("http_503"))
    assert [(await poll(session)).status for _ in range(20)] == [503] * 20


def test_a_misspelt_step_is_refused_at_once_with_a_suggestion():
    with pytest.raises(ValueError, match=r"'sucess'; did you mean 'success'\?"):
        Simulator().add_task(script=["sucess"])
    with pytest.raises(ValueError, match=r"'qqq'$"):
        Simulator().add_task(script=["qqq"])


async def test_steps_can_be_customised(simulator, session):
    made = [
        steps.generating(progress="0.5"),
        steps.failed(400, "flagged", TaskStatus.CREATE_TASK_FAILED),
        steps.success(response={"resultImageUrl": "file:///etc/passwd"}),
        steps.refused(418, "teapot", status=503, retry_after=1.2),
        steps.refused(419),
        steps.rate_limited(),
        steps.http(599, "no", content_type="text/plain"),
        lambda request: request.record_reply(taskId=request.task.task_id.upper()),
    ]
    simulator.add_task("t", script=made)
    got = [await poll(session) for _ in made]
    assert json.loads(got[0].body)["data"]["progress"] == "0.5"
    failed = json.loads(got[1].body)["data"]
    assert (failed["successFlag"], failed["errorCode"], failed["errorMessage"]) == (
        2,
        400,
        "flagged",
    )
    assert json.loads(got[2].body)["data"]["response"]["resultImageUrl"] == "file:///etc/passwd"
    assert (got[3].status, got[3].headers["Retry-After"]) == (503, "2")
    assert json.loads(got[3].body) == {"code": 418, "msg": "teapot", "data": None}
    assert json.loads(got[4].body)["msg"] == "Error"
    assert (got[5].status, "Retry-After" in got[5].headers) == (429, False)
    assert (got[6].status, got[6].body) == (599, b"no")
    assert json.loads(got[7].body)["data"]["taskId"] == "T"


def test_faults_are_named_steps_and_harmless_to_the_task():
    assert set(FAULTS) <= set(STEPS)
    assert len(set(FAULTS)) == len(FAULTS)
    assert any(name in IMAGE_STEPS for name in FAULTS)


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_leaves_a_running_task_running(simulator, session, name):
    simulator.add_task("t", duration=1000.0, script=[name])
    try:
        async with asyncio.timeout(10):
            await poll(session)
    except (aiohttp.ClientError, TimeoutError):
        pass
    assert (await record(session))["successFlag"] == 0
