"""The simulator, request by request over loopback."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import re
import statistics
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from types import SimpleNamespace

import aiohttp
import pytest
from yarl import URL

from kontext_async.simulator import Failure, FixedWindow, Reply, Simulator, lognormal

pytestmark = pytest.mark.virtual_time

RECORD_INFO = "/api/v1/flux/kontext/record-info"
KEY = {"Authorization": "Bearer some-key"}


async def poll(simulator, task_id="t", headers=KEY):
    """Poll once; return the response with its body."""
    params = {} if task_id is None else {"taskId": task_id}
    async with (
        aiohttp.ClientSession(simulator.base_url, headers=headers) as session,
        session.get(RECORD_INFO, params=params) as response,
    ):
        return SimpleNamespace(
            status=response.status,
            reason=response.reason,
            headers=response.headers,
            body=await response.read(),
        )


async def ask(simulator, task_id="t", headers=KEY):
    """Poll once; return the envelope."""
    return json.loads((await poll(simulator, task_id, headers)).body)


async def record_of(simulator, task_id="t"):
    """Poll once; return the record."""
    return (await ask(simulator, task_id))["data"]


async def test_it_serves_on_a_free_port_of_the_loopback():
    async with Simulator() as one, Simulator() as two:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", one.base_url)
        assert one.base_url != two.base_url


async def test_it_has_no_address_before_it_serves():
    with pytest.raises(RuntimeError, match="async with"):
        _ = Simulator().base_url


async def test_it_serves_once():
    async with Simulator() as simulator:
        pass
    with pytest.raises(RuntimeError, match="once"):
        await simulator.__aenter__()


async def test_closing_one_that_never_served_does_nothing():
    await Simulator().aclose()


async def test_the_record_of_a_running_task_is_as_on_the_providers_page():
    async with Simulator() as simulator:
        simulator.add_task("task12345", duration=10, params={"prompt": "a boat"})
        answer = await ask(simulator, "task12345")
    created = answer["data"].pop("createTime")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", created)
    assert answer == {
        "code": 200,
        "msg": "success",
        "data": {
            "taskId": "task12345",
            "paramJson": '{"prompt": "a boat"}',
            "completeTime": None,
            "response": None,
            "successFlag": 0,
            "errorCode": None,
            "errorMessage": None,
        },
    }


async def test_a_task_succeeds_when_its_duration_is_over():
    async with Simulator() as simulator:
        task_id = simulator.add_task(duration=10, outcome="success")
        await asyncio.sleep(9.9)
        assert (await record_of(simulator, task_id))["successFlag"] == 0
        await asyncio.sleep(0.2)
        record = await record_of(simulator, task_id)
    assert record["successFlag"] == 1
    assert record["errorCode"] is None
    assert record["errorMessage"] == ""
    assert record["response"] == {
        "originImageUrl": f"{simulator.base_url}/origins/{task_id}.png",
        "resultImageUrl": f"{simulator.base_url}/images/{task_id}.png",
    }
    times = [datetime.fromisoformat(record[name]) for name in ("createTime", "completeTime")]
    assert times[1] - times[0] == timedelta(seconds=10)


async def test_a_failed_task_gives_its_reason_in_an_envelope_with_code_200():
    async with Simulator() as simulator:
        simulator.add_task("t", duration=0, outcome=Failure(400, "flagged"))
        answer = await ask(simulator)
    assert (answer["code"], answer["msg"]) == (200, "success")
    assert answer["data"]["successFlag"] == 3
    assert (answer["data"]["errorCode"], answer["data"]["errorMessage"]) == (400, "flagged")
    assert answer["data"]["response"] is None
    assert answer["data"]["completeTime"] is not None


async def test_a_failure_can_be_one_of_the_documented_ones():
    async with Simulator() as simulator:
        for n in range(20):
            simulator.add_task(f"t{n}", duration=0, outcome="failure")
        records = [await record_of(simulator, f"t{n}") for n in range(20)]
    assert {record["successFlag"] for record in records} == {2, 3}
    assert {record["errorCode"] for record in records} == {400, 500, 501}
    assert all(record["errorMessage"] for record in records)


async def test_a_task_may_never_end():
    async with Simulator() as simulator:
        simulator.add_task("t", duration=math.inf)
        await asyncio.sleep(1e6)
        assert (await record_of(simulator))["successFlag"] == 0


async def test_an_id_is_taken_once():
    simulator = Simulator()
    simulator.add_task("t")
    with pytest.raises(ValueError, match="'t' already"):
        simulator.add_task("t")


async def test_tasks_can_be_added_before_it_serves_and_begin_with_it():
    simulator = Simulator()
    simulator.add_task("t", duration=5)
    await asyncio.sleep(100)
    async with simulator:
        assert (await record_of(simulator))["successFlag"] == 0


async def test_an_age_puts_the_creation_of_a_task_into_the_past():
    async with Simulator() as simulator:
        simulator.add_task("t", duration=10, age=3600)
        record = await record_of(simulator)
    created = datetime.fromisoformat(record["createTime"])
    assert 3599 <= (datetime.now(UTC) - created).total_seconds() <= 3602
    assert record["successFlag"] == 1


async def test_dates_move_with_the_loops_clock():
    async with Simulator() as simulator:
        dates = []
        for _ in range(2):
            response = await poll(simulator)
            dates.append(parsedate_to_datetime(response.headers["Date"]))
            await asyncio.sleep(86400)
        assert timedelta(days=1) <= dates[1] - dates[0] <= timedelta(days=1, seconds=1)
        assert simulator.now == pytest.approx(2 * 86400, abs=1)


async def test_an_unknown_id_is_refused_as_the_api_does():
    async with Simulator() as simulator:
        answer = await ask(simulator, "nobody")
    assert answer == {"code": 422, "msg": "The record does not exist", "data": None}


async def test_a_poll_needs_an_id():
    async with Simulator() as simulator:
        assert (await ask(simulator, None))["code"] == 422
        assert (await ask(simulator, ""))["code"] == 422


@pytest.mark.parametrize("task_id", ["../../x", "a b&c=d", "ключ", "%2F", "x" * 300])
async def test_any_id_can_be_asked_about(task_id):
    async with Simulator() as simulator:
        simulator.add_task(task_id, duration=0)
        record = await record_of(simulator, task_id)
        async with aiohttp.request("GET", record["response"]["resultImageUrl"]) as response:
            assert response.status == 200
    assert record["taskId"] == task_id
    assert simulator.requests[-1].task_id == task_id


async def test_unknown_ids_can_become_new_tasks():
    async with Simulator(auto_create=True, durations=5.0) as simulator:
        assert (await record_of(simulator, "anything"))["successFlag"] == 0
        await asyncio.sleep(5)
        assert (await record_of(simulator, "anything"))["successFlag"] == 1
        assert simulator.polls("anything") == 2


async def test_the_same_seed_gives_an_id_the_same_fate_in_any_order():
    async def fates(names, seed):
        async with Simulator(failure_rate=0.5, auto_create=True, seed=seed) as simulator:
            for name in names:
                await record_of(simulator, name)
            await asyncio.sleep(120)
            records = [await record_of(simulator, name) for name in sorted(names)]
            times = [datetime.fromisoformat(record["completeTime"]) for record in records]
            return [
                (record["successFlag"], record["errorCode"], time - times[0])
                for record, time in zip(records, times, strict=True)
            ]

    names = [f"t{n}" for n in range(10)]
    first = await fates(names, 1)
    again = await fates(names[::-1], 1)
    assert [fate[:2] for fate in first] == [fate[:2] for fate in again]
    # Whole seconds: a difference may be one off.
    assert all(abs(a[2] - b[2]) <= timedelta(seconds=1) for a, b in zip(first, again, strict=True))
    assert await fates(names, 2) != first


async def test_durations_may_be_drawn_by_a_function_of_ones_own():
    async with Simulator(durations=lambda draw: 20 + draw.random()) as simulator:
        simulator.add_task("t")
        await asyncio.sleep(19.9)
        assert (await record_of(simulator))["successFlag"] == 0
        await asyncio.sleep(1.2)
        assert (await record_of(simulator))["successFlag"] == 1


def test_lognormal_durations_lie_around_their_median():
    import random

    draw, durations = random.Random(1), lognormal(12.0, 0.3)
    drawn = sorted(durations(draw) for _ in range(2000))
    assert statistics.median(drawn) == pytest.approx(12, rel=0.05)
    within = sum(12 / math.exp(0.3) < duration < 12 * math.exp(0.3) for duration in drawn)
    assert within / 2000 == pytest.approx(0.68, abs=0.04)


async def test_the_failure_rate_is_the_fraction_that_fails():
    async with Simulator(failure_rate=0.25, durations=0.0, auto_create=True) as simulator:
        flags = [(await record_of(simulator, f"t{n}"))["successFlag"] for n in range(200)]
    assert sum(flag != 1 for flag in flags) == pytest.approx(50, abs=20)


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("Bearer right", True),
        ("bearer right", True),
        ("Bearer wrong", False),
        ("Basic right", False),
        ("right", False),
        (None, False),
    ],
)
async def test_the_wrong_key_is_refused_in_an_envelope_with_http_200(header, accepted):
    async with Simulator(api_key="right") as simulator:
        simulator.add_task("t")
        answer = await ask(simulator, "t", {"Authorization": header} if header else {})
    assert answer["code"] == (200 if accepted else 401)
    logged = simulator.requests[-1]
    assert logged.key_accepted is accepted
    assert logged.sent_authorization is (header is not None)
    assert (logged.status, logged.code) == (200, answer["code"])


async def test_any_key_is_accepted_by_default_and_a_missing_one_is_not():
    async with Simulator() as simulator:
        simulator.add_task("t")
        assert (await ask(simulator))["code"] == 200
        assert (await ask(simulator, "t", {}))["code"] == 401
        assert (await ask(simulator, "t", {"Authorization": "Bearer "}))["code"] == 401


async def test_the_log_never_holds_a_key():
    async with Simulator() as simulator:
        await ask(simulator, "t", {"Authorization": "Bearer marker-key"})
    assert "marker-key" not in repr(simulator.requests) + repr(vars(simulator))


async def test_the_log_holds_the_request_and_the_status_of_its_reply():
    async with Simulator() as simulator:
        simulator.add_task("t", script=["http_502"])
        await asyncio.sleep(3)
        await poll(simulator, headers={**KEY, "User-Agent": "me/1"})
    (logged,) = simulator.requests
    assert logged.time == pytest.approx(3, abs=0.1)
    assert (logged.method, logged.path, logged.task_id) == ("GET", RECORD_INFO, "t")
    assert (logged.user_agent, logged.status, logged.code) == ("me/1", 502, 502)


@pytest.mark.parametrize(("limit", "kept"), [(None, 5), (2, 2), (0, 0)])
async def test_the_log_keeps_as_many_requests_as_it_may(limit, kept):
    async with Simulator(log_limit=limit) as simulator:
        for n in range(5):
            await ask(simulator, f"t{n}")
    assert [logged.task_id for logged in simulator.requests] == [
        f"t{n}" for n in range(5 - kept, 5)
    ]


async def test_it_counts_polls_by_task():
    async with Simulator() as simulator:
        simulator.add_task("a")
        simulator.add_task("b")
        for name in "aab":
            await ask(simulator, name)
        assert (simulator.polls("a"), simulator.polls("b")) == (2, 1)
        with pytest.raises(KeyError):
            simulator.polls("c")


async def test_latency_comes_before_each_answer_and_shows_in_the_requests_in_flight():
    async with Simulator(latency=2.0) as simulator:
        simulator.add_task("t", duration=1.0)
        records = await asyncio.gather(*(record_of(simulator) for _ in range(5)))
        assert simulator.now == pytest.approx(2, abs=0.1)
    assert [record["successFlag"] for record in records] == [1] * 5
    assert simulator.max_in_flight == 5


async def test_over_the_rate_limit_it_refuses_and_counts():
    async with Simulator(rate_limit=FixedWindow(2, 10.0)) as simulator:
        simulator.add_task("t")
        responses = [await poll(simulator) for _ in range(4)]
    assert [(r.status, "Retry-After" in r.headers) for r in responses] == [
        *[(200, False)] * 2,
        *[(429, False)] * 2,
    ]
    assert [json.loads(r.body)["code"] for r in responses] == [200, 200, 429, 429]
    assert (simulator.answered, simulator.refused, simulator.polls("t")) == (2, 2, 2)


async def test_a_refusal_can_have_a_retry_after_header():
    async with Simulator(rate_limit=FixedWindow(1, 10.0), retry_after=True) as simulator:
        await asyncio.sleep(2.5)
        waits = [(await poll(simulator)).headers.get("Retry-After") for _ in range(2)]
    assert waits == [None, "8"]


async def test_a_limit_given_to_two_simulators_is_one_for_each():
    limit = FixedWindow(1, 1000.0)
    for _ in range(2):
        async with Simulator(rate_limit=limit) as simulator:
            await ask(simulator)
        assert simulator.refused == 0


async def test_a_wrong_key_does_not_count_towards_the_rate_limit():
    async with Simulator(rate_limit=FixedWindow(1, 1000.0), api_key="right") as simulator:
        assert (await ask(simulator))["code"] == 401
        assert (await ask(simulator, "t", {"Authorization": "Bearer right"}))["code"] == 422


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/nowhere"),
        ("GET", "/record-info"),
        ("POST", RECORD_INFO),
        ("OPTIONS", "*"),
        ("HEAD", "/images/t.png"),
    ],
)
async def test_what_it_does_not_serve_is_not_found(method, path):
    async with Simulator() as simulator:
        reader, writer = await asyncio.open_connection("127.0.0.1", URL(simulator.base_url).port)
        request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n\r\n"
        writer.write(request.encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 404 ")
        writer.close()
        await writer.wait_closed()


async def test_a_client_that_asks_for_it_has_its_connection_closed():
    async with Simulator() as simulator:
        reader, writer = await asyncio.open_connection("127.0.0.1", URL(simulator.base_url).port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 404 ")


async def test_a_connection_serves_many_requests():
    async def count(*_):
        made.append(1)

    made, trace = [], aiohttp.TraceConfig()
    trace.on_connection_create_end.append(count)
    async with (
        Simulator() as simulator,
        aiohttp.ClientSession(simulator.base_url, headers=KEY, trace_configs=[trace]) as session,
    ):
        for _ in range(3):
            async with session.get(RECORD_INFO) as response:
                await response.read()
    assert len(made) == 1


@pytest.mark.parametrize("step", ["stall", "stall_mid_body", "slow"])
async def test_closing_ends_the_requests_that_are_still_open(step):
    simulator = Simulator()
    async with simulator, asyncio.TaskGroup() as group:
        simulator.add_task("t", script=[step])
        request = group.create_task(_error_of(record_of(simulator)))
        await asyncio.sleep(0.5)
        await simulator.aclose()
        assert simulator.now < 1
    assert isinstance(request.result(), aiohttp.ClientError)


async def _error_of(coroutine):
    try:
        await coroutine
    except aiohttp.ClientError as error:
        return error


async def test_a_client_that_leaves_ends_its_request():
    async with Simulator(latency=1000.0) as simulator:
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(5):
                    await record_of(simulator)
        await asyncio.sleep(1)
        assert simulator.max_in_flight == 1


async def test_a_step_that_raises_is_a_500_and_in_the_servers_log(caplog):
    def broken(request):
        raise RuntimeError("in my step")

    async with Simulator() as simulator:
        simulator.add_task("t", script=[broken])
        assert (await poll(simulator)).status == 500
    assert "in my step" in caplog.text


async def test_replies_may_be_given_raw():
    async with Simulator() as simulator:
        simulator.add_task("t", script=[Reply(201, {"X-A": "b"}, b"c"), (299, {}, b"d")])
        got = [await poll(simulator) for _ in range(2)]
    assert [(r.status, r.reason, r.headers.get("X-A"), r.body) for r in got] == [
        (201, "Created", "b", b"c"),
        (299, "Unknown", None, b"d"),
    ]


async def test_a_hundred_thousand_tasks_are_cheap():
    import tracemalloc

    simulator = Simulator(log_limit=0)
    gc.collect()
    tracemalloc.start()
    for n in range(2000):
        simulator.add_task(f"task-{n}")
    per_task = tracemalloc.get_traced_memory()[0] / 2000
    tracemalloc.stop()
    assert per_task < 600  # bytes


async def test_random_faults_come_at_their_rate_and_are_the_same_each_time():
    async def codes():
        async with Simulator(
            durations=math.inf, fault_rate=0.3, faults=["code_500", "http_502"], seed=3
        ) as simulator:
            simulator.add_task("t")
            return [(await ask(simulator))["code"] for _ in range(100)]

    first = await codes()
    assert set(first) == {200, 500, 502}
    assert sum(code != 200 for code in first) == pytest.approx(30, abs=15)
    assert await codes() == first


@pytest.mark.parametrize("rate", ["failure_rate", "fault_rate"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_rate_is_a_fraction(rate, value):
    with pytest.raises(ValueError, match="from 0 to 1"):
        Simulator(**{rate: value})


async def test_there_may_be_no_faults_to_draw_from():
    async with Simulator(fault_rate=1.0, faults=[]) as simulator:
        simulator.add_task("t")
        assert (await ask(simulator))["code"] == 200


async def test_scripted_polls_meet_no_random_faults():
    async with Simulator(fault_rate=1.0, faults=["code_500"]) as simulator:
        simulator.add_task("t", script=["generating"])
        assert [(await ask(simulator))["code"] for _ in range(2)] == [200, 500]


def test_random_faults_are_known_by_name():
    with pytest.raises(ValueError, match="http_500"):
        Simulator(faults=["http_5000"])


async def test_params_are_the_records_own_json():
    async with Simulator() as simulator:
        simulator.add_task("t", params={"prompt": "<script>", "aspectRatio": "1:1"})
        record = await record_of(simulator)
    assert json.loads(record["paramJson"]) == {"prompt": "<script>", "aspectRatio": "1:1"}
