"""Callbacks: checked, passed on as a reason to poll, and never a way to cause more than that."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import io
import json
import statistics
from datetime import UTC, datetime

import aiohttp
import pytest
from aiohttp import web
from client_world import UNBOUND, error_of, run_on_virtual_time
from hypothesis import example, given
from hypothesis import strategies as st
from tenacity import wait_fixed

from kontext_async import (
    ClientStateError,
    ConfigurationError,
    ImageRequest,
    KontextClient,
    WaitTimeoutError,
)
from kontext_async.callbacks import (
    CallbackError,
    CallbackNotice,
    CallbackReceiver,
    verify_callback,
)
from kontext_async.results import Ledger
from kontext_async.simulator import Simulator, lognormal

virtual_time = pytest.mark.virtual_time

KEY = "callback-key"
NOW = 1_790_000_000.0
REQUEST = ImageRequest(prompt="a lighthouse")


def signature(task_id, timestamp, key=KEY):
    message = f"{task_id}.{timestamp}".encode()
    return base64.b64encode(hmac.new(key.encode(), message, hashlib.sha256).digest()).decode()


def signed(task_id="task", timestamp=int(NOW), key=KEY):
    return {
        "X-Webhook-Timestamp": str(timestamp),
        "X-Webhook-Signature": signature(task_id, timestamp, key),
    }


def body(task_id="task", code=200, **data):
    return json.dumps(
        {"code": code, "msg": "success", "data": {"taskId": task_id, **data}}
    ).encode()


# --- the signature -------------------------------------------------------------------------------


def test_a_signed_callback_is_a_notice():
    """Of the task, the code, the message and the time; there are no URLs in it."""
    urls = {"info": {"resultImageUrl": "https://forged.example/a.png"}}
    notice = verify_callback(signed(), body(**urls), KEY, now=NOW + 100)
    assert notice == CallbackNotice(
        task_id="task", code=200, message="success", sent_at=datetime.fromtimestamp(NOW, UTC)
    )
    assert "forged" not in repr(notice)


@pytest.mark.parametrize(
    "text",
    [
        b'{"data": {"task_id": "task"}}',
        b'{"taskId": "task"}',
        b'\xef\xbb\xbf{"data": {"taskId": "task"}, "code": "200", "msg": 5}',
        b'{"data": {"taskId": 5, "task_id": "task"}}',
    ],
)
def test_the_id_is_found_in_each_place_that_pages_name(text):
    notice = verify_callback(signed(), text, KEY, now=NOW)
    assert (notice.task_id, notice.code, notice.message) == ("task", None, "")


@pytest.mark.parametrize("raw", ["9" * 5000, "NaN", "-1e999", "[" * 9_000 + "]" * 9_000])
@pytest.mark.parametrize("field", ["code", "msg", "seed", "taskId"])
def test_no_value_of_another_field_hides_the_id(raw, field):
    text = f'{{"{field}": {raw}, "data": {{"taskId": "task", "seed": {raw}}}}}'
    assert verify_callback(signed(), text.encode(), KEY, now=NOW).task_id == "task"


def test_header_names_may_be_of_any_case_and_keys_may_be_several():
    """While the key is being replaced, both are good."""
    headers = {name.lower(): value for name, value in signed().items()}
    assert verify_callback(headers, body(), ["new", KEY], now=NOW).task_id == "task"
    assert verify_callback(headers, body(), f" {KEY}\n", now=NOW).task_id == "task"


@pytest.mark.parametrize(
    ("headers", "text", "status", "says"),
    [
        ({}, body(), 401, "not signed"),
        ({"X-Webhook-Timestamp": "1"}, body(), 401, "not signed"),
        (signed(key="other"), body(), 401, "wrong"),
        (signed("other"), body(), 401, "wrong"),
        (signed() | {"X-Webhook-Signature": "\udcff"}, body(), 401, "wrong"),
        (signed(timestamp=int(NOW) - 301), body(), 401, "too old"),
        (signed(timestamp=int(NOW) + 301), body(), 401, "too old"),
        (signed(timestamp="1e9"), body(), 401, "too old"),
        (signed(timestamp="٣"), body(), 401, "too old"),
        (signed(timestamp="9" * 5000), body(), 401, "too old"),
        (signed(), b"", 400, "not JSON"),
        (signed(), b"\xff", 400, "not JSON"),
        (signed(), b"[" * 60_000, 400, "not JSON"),
        (signed(), b"[" * 30_000 + b"]" * 30_000, 400, "does not name a task"),
        (signed(), b"[]", 400, "does not name a task"),
        (signed(), b"{}", 400, "does not name a task"),
        (signed(), body(""), 400, "does not name a task"),
        (signed(), body("a\nb"), 400, "does not name a task"),
        (signed(), body("x" * 201), 400, "does not name a task"),
        (signed(), b" " * 65_537, 400, "too large"),
    ],
)
def test_what_is_no_callback_is_refused(headers, text, status, says):
    with pytest.raises(CallbackError, match=says) as caught:
        verify_callback(headers, text, KEY, now=NOW)
    assert caught.value.http_status == status
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["", " ", [], [""], [5]])
def test_a_key_that_is_none_is_refused_at_once(key):
    with pytest.raises(ConfigurationError, match="callback key"):
        verify_callback(signed(), body(), key)
    with pytest.raises(ConfigurationError, match="callback key"):
        CallbackReceiver(None, key=key)


class Client:
    def __init__(self):
        self.noticed = []

    def notice(self, task_id):
        self.noticed.append(task_id)
        return False

    def is_callback_token(self, token):
        return token == "known"


names = st.sampled_from(["X-Webhook-Timestamp", "X-Webhook-Signature", "x-webhook-signature"])
bodies = st.binary(max_size=200) | st.recursive(
    st.none() | st.integers() | st.text() | st.just("task"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["data", "taskId", "task_id", "code", "msg"]) | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode())


@given(
    headers=st.dictionaries(names | st.text(max_size=9), st.text(max_size=40), max_size=4),
    text=bodies,
    token=st.none() | st.just("known") | st.text(max_size=9),
)
@example(headers=signed(), text=body("\ud800"), token=None)
@example(headers={}, text=body(), token="\ud800")
def test_any_headers_and_body_give_a_notice_or_a_refusal(headers, text, token):
    """Nothing unsigned is believed where there is a key; and nothing raises from a receiver."""
    with contextlib.suppress(CallbackError):
        verify_callback(headers, text, KEY)
        raise AssertionError
    client = Client()

    async def receive():
        assert await CallbackReceiver(client, key=KEY).receive(headers, text, token=token) in {
            400,
            401,
        }
        assert client.noticed == []
        status = await CallbackReceiver(client).receive(headers, text, token=token)
        assert status in {200, 400, 404}
        assert bool(client.noticed) is (status == 200)

    asyncio.run(receive())


# --- a receiver and its client -------------------------------------------------------------------


@contextlib.asynccontextmanager
async def receiving(simulator, *, key=None, on_token=None, path="/done/{token}", **options):
    """Yield a client whose callbacks reach it over an aiohttp.web application."""
    app = web.Application()
    runner = web.AppRunner(app)
    holder = []

    async def handle(request):
        return await holder[0].handle(request)

    app.router.add_post(path, handle)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    options = {"creation_limit": UNBOUND, **options}
    try:
        async with KontextClient(
            "key",
            base_url=simulator.base_url,
            **{"callback_url": f"http://127.0.0.1:{port}{path}", **options},
        ) as client:
            holder.append(CallbackReceiver(client, key=key, on_token=on_token))
            client.port = port
            yield client
    finally:
        await runner.cleanup()


async def post(client, path, data, headers=None):
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://127.0.0.1:{client.port}{path}", data=data, headers=headers) as reply,
    ):
        return reply.status


@virtual_time
@pytest.mark.parametrize("kind", ["sent", "twice", "early", "late"])
async def test_a_callback_ends_the_wait(kind):
    """Also a repeated one, one that overtakes the answer, and one that is late."""
    async with (
        Simulator(durations=30.0, callback_script=[kind], callback_key=KEY) as simulator,
        receiving(simulator, key=KEY) as client,
    ):
        done = await client.run(REQUEST, wait=wait_fixed(100))
        assert [done.task_id] == simulator.created
        expected = {"sent": 30, "twice": 30, "late": 35, "early": 104}[kind]
        assert simulator.now == pytest.approx(expected, abs=0.2)
        await asyncio.sleep(1)
        assert {sent.status for sent in simulator.callbacks} == {200}
        assert len(simulator.callbacks) == (2 if kind == "twice" else 1)
        gets = [request for request in simulator.requests if request.method == "GET"]
        # An early one is followed by two more polls, 1 and 3 s later, and then by the schedule.
        assert len(gets) == (4 if kind == "early" else 2)


@virtual_time
async def test_a_lost_callback_leaves_the_schedule():
    async with (
        Simulator(durations=30.0, callback_script=["lost"]) as simulator,
        receiving(simulator) as client,
    ):
        await client.run(REQUEST, wait=wait_fixed(50), timeout=None)
        assert 50 < simulator.now < 80  # the first poll is when most tasks have not ended yet
        assert simulator.callbacks == []


@virtual_time
async def test_a_new_task_may_be_waited_for_without_a_limit():
    async with Simulator(durations=9.0) as simulator, receiving(simulator) as client:
        task = await client.submit(REQUEST)
        done = await client.wait_for_result(task.task_id, timeout=None)
        assert done.task_id == task.task_id


@virtual_time
async def test_the_deadline_and_the_client_bound_the_first_sleep_too():
    """The timeout counts from the call, 0 polls at once, and closing ends the wait."""
    async with Simulator(durations=300.0) as simulator, receiving(simulator) as client:
        error = await error_of(client.run(REQUEST, timeout=3), WaitTimeoutError)
        assert simulator.now == pytest.approx(3, abs=0.1)
        assert error.polls
        await error_of(client.run(REQUEST, timeout=0), WaitTimeoutError)
        assert simulator.now == pytest.approx(3, abs=0.2)
        task = await client.submit(REQUEST)
        waiting = client.wait_for_result(task.task_id, timeout=None)
        closed = asyncio.create_task(error_of(waiting, ClientStateError))
        await asyncio.sleep(1)
        await client.aclose()
        await closed


@virtual_time
async def test_a_failed_task_calls_back_too():
    async with (
        Simulator(durations=7.0, failure_rate=1.0) as simulator,
        receiving(simulator) as client,
    ):
        with contextlib.suppress(Exception):
            await client.run(REQUEST, wait=wait_fixed(100))
        assert simulator.now == pytest.approx(7, abs=0.1)


@virtual_time
async def test_strangers_are_refused_and_cause_no_request():
    """Of another key, an unknown token, an old time, or with nothing that can be read."""
    async with (
        Simulator(durations=1000.0, callback_key=KEY) as simulator,
        receiving(simulator, key=KEY) as client,
    ):
        waiting = asyncio.create_task(client.run(REQUEST, wait=wait_fixed(500)))
        await asyncio.sleep(10)
        (task_id,) = simulator.created
        record = await client.record_info(task_id)
        good = record.params["callBackUrl"].rpartition("/")[2]
        before = len(simulator.requests)
        time = datetime.now(UTC).timestamp()
        now, old = int(time), int(time) - 400
        for token, headers, text, expected in (
            (good, {}, body(task_id), 401),
            (good, signed(task_id, now, "forged"), body(task_id), 401),
            (good, signed(task_id, old), body(task_id), 401),
            ("unknown", signed(task_id, now), body(task_id), 404),
            (good, signed(task_id, now), b"{", 400),
            (good, signed(task_id, now), io.BytesIO(b" " * 2_000_000), 400),
        ):
            for _ in range(20 if isinstance(text, bytes) else 1):
                assert await post(client, f"/done/{token}", text, headers) == expected
        await asyncio.sleep(10)
        assert len(simulator.requests) == before
        # A flood of good ones is one notice: a poll and two more. Those of others are none.
        for _ in range(100):
            headers = signed(task_id, now)
            assert await post(client, f"/done/{good}", body(task_id), headers) == 200
            headers = signed("nobody waits", now)
            assert await post(client, f"/done/{good}", body("nobody waits"), headers) == 200
            await asyncio.sleep(0.1)
        assert len(simulator.requests) == before + 3
        waiting.cancel()
        await asyncio.wait([waiting])


@virtual_time
async def test_the_token_may_be_in_the_query():
    async with Simulator(durations=3.0) as simulator, receiving(simulator, path="/done") as client:
        client._creator.callback_url += "?token={token}"
        await client.run(REQUEST, wait=wait_fixed(100))
        assert simulator.now == pytest.approx(3, abs=0.1)
        assert [sent.status for sent in simulator.callbacks] == [200]
        assert await post(client, "/done?token=unknown", body()) == 404
        assert await post(client, "/done", body()) == 200


@virtual_time
async def test_a_lost_id_is_found_again_by_its_callback(tmp_path):
    """The answer to the request is lost; the ledger has the task from its callback's token."""
    async with contextlib.AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(
            Simulator(durations=5.0, lost_answer_rate=0.5, callback_key=KEY)
        )
        ledger = await stack.enter_async_context(Ledger(tmp_path / "l.sqlite3"))
        client = await stack.enter_async_context(
            receiving(simulator, key=KEY, on_token=ledger.add_candidate)
        )
        requests = [ImageRequest(prompt=f"prompt {n % 5}") for n in range(20)]
        outcomes = [outcome async for outcome in ledger.generate(client, requests)]
        assert {outcome.unwrap().task_id for outcome in outcomes} == set(simulator.created)
        assert len(simulator.created) == 20
        for outcome in outcomes:
            assert outcome.request.prompt in simulator._store[outcome.task_id].param_json
        assert await ledger.add_candidate("unknown", "task") is False
        assert await ledger.add_candidate("\ud800", "task") is False


@virtual_time
async def test_tokens_are_remembered_up_to_a_limit(monkeypatch):
    monkeypatch.setattr("kontext_async.creation._MAX_TOKENS", 2)
    async with Simulator() as simulator, receiving(simulator) as client:
        for token in ("a", "b", "c"):
            await client.submit(REQUEST, token=token)
        assert [client.is_callback_token(t) for t in "abc"] == [False, True, True]
        assert client.expects_callbacks
        assert client.callback_url.endswith("/done/{token}")


# --- the simulator -------------------------------------------------------------------------------


@virtual_time
async def test_the_simulator_calls_this_machine_only():
    async with Simulator(durations=1.0) as simulator:
        for url in ("http://192.0.2.1/a", "https://example.com/a"):
            client = KontextClient("key", base_url=simulator.base_url, callback_url=url)
            async with client:
                await client.run(REQUEST)
        assert simulator.callbacks == []


@virtual_time
async def test_the_simulator_tries_three_times_more():
    """Where nobody answers, or not with 200."""
    async with Simulator(durations=1.0) as simulator:
        url = "http://localhost:1/nobody"
        async with KontextClient("key", base_url=simulator.base_url, callback_url=url) as client:
            await client.run(REQUEST)
        await asyncio.sleep(5)
        assert [sent.status for sent in simulator.callbacks] == [0] * 4


@virtual_time
async def test_a_callback_of_a_task_without_a_duration_comes_when_it_ends():
    async with Simulator(durations=5.0) as simulator, receiving(simulator) as client:
        task = await client.submit(REQUEST)
        simulator._store[task.task_id].duration = None
        await asyncio.sleep(10)
        await client.record_info(task.task_id)
        await asyncio.sleep(1)
        assert len(simulator.callbacks) == 1


def test_the_simulator_refuses_unknown_callbacks():
    with pytest.raises(ValueError, match="no callback 'never'"):
        Simulator(callback_script=["never"])


# --- what callbacks are good for -----------------------------------------------------------------


def measured(*, called_back, lost=0.0, tasks=120, seed):
    """Return the seconds from each task's end to the end of its wait, and the polls."""

    options = {} if called_back else {"callback_url": None}

    async def main():
        loop = asyncio.get_running_loop()
        async with (
            Simulator(
                durations=lognormal(12.0, 0.4), lost_callback_rate=lost, seed=seed, latency=0.05
            ) as simulator,
            receiving(simulator, rate_limit=UNBOUND, **options) as client,
        ):

            async def lag(number):
                await asyncio.sleep(number * 0.1)
                done = await client.run(REQUEST)
                task = simulator._store[done.task_id]
                return loop.time() - simulator._clock._started - task.created - task.duration

            found = await asyncio.gather(*(lag(number) for number in range(tasks)))
            polls = sum(request.method == "GET" for request in simulator.requests)
            return found, polls

    return run_on_virtual_time(main)


def pooled(*, seeds=2, **options):
    """Return the same for several seeds together; the polls for one."""
    runs = [measured(seed=seed, **options) for seed in range(1, seeds + 1)]
    return [lag for found, _ in runs for lag in found], sum(polls for _, polls in runs) / seeds


def test_callbacks_end_waits_sooner_and_with_no_more_requests():
    """Mean lag at most 0.3 of that by polls alone; with a tenth lost, 95 % within 2.5 s."""
    alone, polls_alone = pooled(called_back=False)
    called, polls_called = pooled(called_back=True)
    some, polls_some = pooled(called_back=True, lost=0.1, seeds=8)  # their p95 is of few tasks
    p95 = statistics.quantiles(some, n=20)[-1]
    print(  # noqa: T201  # the figures, with `pytest -s`
        f"mean lag {statistics.mean(alone):.2f} s by polls, {statistics.mean(called):.2f} s with "
        f"callbacks, {statistics.mean(some):.2f} s with a tenth lost (p95 {p95:.2f} s); "
        f"polls {polls_alone}, {polls_called}, {polls_some}"
    )
    assert statistics.mean(called) <= 0.3 * statistics.mean(alone)
    assert polls_called <= polls_alone
    assert p95 <= 2.5
    assert polls_some <= polls_alone
