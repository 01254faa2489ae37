"""Creating tasks: the request, when it is sent again, and what is certain afterwards."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import logging
import pickle
import re
from pathlib import Path

import aiohttp
import pytest
from client_world import KEY, error_of
from creation_world import PROMPT, REQUEST, answer, envelope, service
from hypothesis import example, given
from hypothesis import strategies as st

from kontext_async import (
    ApiError,
    AuthenticationError,
    ClientStateError,
    ConfigurationError,
    GenerationFailedError,
    ImageRequest,
    InvalidRequestError,
    KontextClient,
    KontextError,
    MaintenanceError,
    RateLimit,
    RateLimitedError,
    ResponseFormatError,
    SubmissionUnknownError,
    TransportError,
    WaitTimeoutError,
)
from kontext_async.creation import _OneShotBody
from kontext_async.simulator import Simulator, SlidingWindow
from kontext_async.wire import (
    CREATION_POLICY,
    MAX_BODY,
    ApiKey,
    Verdict,
    read_creation,
    read_credits,
)

virtual_time = pytest.mark.virtual_time


def make_client(simulator, **options):
    return KontextClient(KEY, base_url=simulator.base_url, **options)


def posts(simulator):
    return [request for request in simulator.requests if request.method == "POST"]


# --- the request ---------------------------------------------------------------------------------

EVERYTHING = {
    "prompt": PROMPT,
    "inputImage": "https://example.com/day.png?signature=secret-part",
    "model": "flux-kontext-max",
    "aspectRatio": "16:21",
    "outputFormat": "png",
    "safetyTolerance": 2,
    "enableTranslation": False,
    "promptUpsampling": True,
    "uploadCn": False,
    "watermark": "mine",
    "seed": 5,
}


def test_a_request_has_the_apis_own_names():
    """There and back; what is not given is not sent, nor is null."""
    request = ImageRequest.from_json(EVERYTHING)
    assert request.to_json() == EVERYTHING
    assert (request.aspect_ratio, request.extra) == ("16:21", {"seed": 5})
    assert ImageRequest(prompt="a").to_json() == {"prompt": "a"}
    assert ImageRequest.from_json({"prompt": "a", "model": None}) == ImageRequest(prompt="a")
    assert hash(request) == hash(ImageRequest.from_json(EVERYTHING))
    assert pickle.loads(pickle.dumps(request)) == copy.deepcopy(request) == request


def test_prompt_and_input_are_not_in_the_repr():
    shown = repr(ImageRequest.from_json({**EVERYTHING, "note": "private"}))
    assert "flux-kontext-max" in shown
    assert not [word for word in (PROMPT, "secret-part", "private") if word in shown]


BAD = [
    ({}, "needs a prompt"),
    ({"prompt": " "}, "prompt must be text"),
    ({"prompt": 5}, "prompt must be text"),
    ({"model": "flux"}, "model must be one of"),
    ({"aspectRatio": "2:1"}, "aspect_ratio must be one of"),
    ({"outputFormat": "webp"}, "output_format must be one of"),
    ({"safetyTolerance": 7}, "0 to 6"),
    ({"safetyTolerance": -1}, "0 to 6"),
    ({"safetyTolerance": True}, "0 to 6"),
    ({"safetyTolerance": "2"}, "0 to 6"),
    ({"safetyTolerance": 3, "inputImage": "https://example.com/a"}, "0 to 2"),
    ({"inputImage": "a.png"}, "input_image"),
    ({"inputImage": "ftp://example.com/a"}, "input_image"),
    ({"inputImage": "https://me:word@example.com/a"}, "input_image"),
    ({"inputImage": "https:///a"}, "input_image"),
    ({"inputImage": "https://[::1"}, "input_image"),
    ({"inputImage": "https://example.com/a b"}, "input_image"),
    ({"inputImage": 5}, "input_image"),
    ({"enableTranslation": 1}, "enable_translation must be True"),
    ({"watermark": ""}, "watermark must be text"),
    ({"callBackUrl": "https://example.com"}, "callback_url"),
    ({"aspect_ratio": "1:1"}, "did you mean 'aspectRatio'"),
    ({"aspectratio": "1:1"}, "did you mean 'aspectRatio'"),
    ({"promt": "a"}, "did you mean 'prompt'"),
    ({"extras": object()}, "values that JSON has"),
    ({"extras": float("nan")}, "values that JSON has"),
]


@pytest.mark.parametrize(("fields", "says"), BAD, ids=str)
def test_a_request_that_cannot_be_paid_for_is_refused_when_it_is_made(fields, says):
    """Without a word of the prompt in the message."""
    given = fields if not fields else {"prompt": PROMPT, **fields}
    with pytest.raises(ConfigurationError, match=re.escape(says)) as caught:
        ImageRequest.from_json(given)
    assert PROMPT not in str(caught.value)


@pytest.mark.parametrize(
    "extra", [{"prompt": "b"}, {"callBackUrl": "x"}, {5: 5}, [1], {"seed": None}]
)
def test_extra_takes_only_what_has_no_argument_of_its_own(extra):
    with pytest.raises(ConfigurationError, match="extra must"):
        ImageRequest(prompt="a", extra=extra)


def test_a_request_that_is_no_mapping_or_has_no_prompt_is_refused():
    with pytest.raises(ConfigurationError, match="mapping"):
        ImageRequest.from_json(["a"])
    with pytest.raises(ConfigurationError, match="prompt must be text"):
        ImageRequest(prompt=None)


# --- from a prompt to an image -------------------------------------------------------------------


@virtual_time
async def test_a_submitted_task_has_the_id_the_request_and_the_time():
    """The service gets exactly the request, as JSON, with the key."""
    async with Simulator(durations=3.0) as simulator, make_client(simulator) as client:
        task = await client.submit(ImageRequest.from_json(EVERYTHING | {"aspectRatio": "1:1"}))
        assert simulator.created == [task.task_id]
        assert task.request.aspect_ratio == "1:1"
        assert task.submitted_at.tzinfo is not None
        assert PROMPT not in repr(task)
        record = await client.record_info(task.task_id)
        assert record.params == EVERYTHING | {"aspectRatio": "1:1"}
    (post,) = posts(simulator)
    assert (post.key_accepted, post.user_agent.split("/")[0]) == (True, "kontext-async")


@virtual_time
async def test_an_edit_sends_no_ratio_that_nobody_asked_for():
    request = ImageRequest(prompt="make it night", input_image="https://example.com/day.png")
    async with Simulator() as simulator, make_client(simulator) as client:
        task = await client.submit(request)
        assert set((await client.record_info(task.task_id)).params) == {"prompt", "inputImage"}


@virtual_time
async def test_run_creates_and_waits():
    """``on_submitted`` has the id before the wait begins."""
    seen = []
    async with Simulator(durations=12.0) as simulator, make_client(simulator) as client:
        done = await client.run(
            REQUEST, on_submitted=lambda task: seen.append((task, client.stats.requests))
        )
        ((task, polls),) = seen
        assert [done.task_id] == [task.task_id] == simulator.created
        assert polls == 0


@virtual_time
async def test_every_error_of_a_run_has_the_task_id():
    async with (
        Simulator(failure_rate=1.0, durations=3.0) as simulator,
        make_client(simulator) as client,
    ):
        error = await error_of(client.run(REQUEST), GenerationFailedError)
        assert [error.task_id] == simulator.created
        error = await error_of(client.run(REQUEST, timeout=0), WaitTimeoutError)
        assert error.task_id == simulator.created[1]


@virtual_time
@pytest.mark.parametrize(
    "keywords",
    [{"timeout": -1}, {"wait": 5}, {"error_grace": "x"}, {"on_submitted": 5}, {"on_event": 5}],
    ids=str,
)
async def test_a_bad_argument_of_run_is_refused_before_anything_is_paid(keywords):
    async with Simulator() as simulator, make_client(simulator) as client:
        await error_of(client.run(REQUEST, **keywords), ConfigurationError)
        assert not simulator.requests


@virtual_time
async def test_a_bad_argument_of_submit_is_refused_before_anything_is_paid():
    async def on_submitted(task):
        pass

    async with Simulator() as simulator, make_client(simulator) as client:
        await error_of(client.submit("a prompt"), ConfigurationError)
        await error_of(client.submit(REQUEST, submit_grace=-1), ConfigurationError)
        await error_of(client.run(REQUEST, on_submitted=on_submitted), ConfigurationError)
        assert not simulator.requests


@virtual_time
async def test_an_exception_of_on_submitted_reaches_the_caller():
    def on_submitted(task):
        raise LookupError(task.task_id)

    async with Simulator() as simulator, make_client(simulator) as client:
        with pytest.raises(LookupError) as caught:
            await client.run(REQUEST, on_submitted=on_submitted)
        assert [str(caught.value.args[0])] == simulator.created


@virtual_time
async def test_a_callback_address_has_a_token_of_its_own_for_each_task():
    """Or the one that the caller gives."""
    url = "https://example.com/done/{token}?a=1"
    async with Simulator() as simulator, make_client(simulator, callback_url=url) as client:
        tasks = [await client.submit(REQUEST), await client.submit(REQUEST)]
        tasks.append(await client.submit(REQUEST, token="mine"))
        urls = [(await client.record_info(t.task_id)).params["callBackUrl"] for t in tasks]
        assert len(set(urls)) == 3
        assert urls[2] == "https://example.com/done/mine?a=1"
        assert all(re.fullmatch(r"https://example.com/done/[\w-]{20,}\?a=1", u) for u in urls[:2])


@pytest.mark.parametrize("url", [5, "ftp://example.com", "example.com/{token}", "http://[::1"])
def test_a_callback_address_must_be_a_url(url):
    with pytest.raises(ConfigurationError, match="callback_url"):
        KontextClient(KEY, callback_url=url)


def test_a_creation_limit_must_be_a_rate_limit():
    with pytest.raises(ConfigurationError, match="creation_limit"):
        KontextClient(KEY, creation_limit=20)


# --- sent again, and never sent again ------------------------------------------------------------


@virtual_time
async def test_a_request_that_was_not_sent_is_sent_again_until_the_grace():
    """With growing delays; then `TransportError` says that nothing was sent."""
    loop = asyncio.get_running_loop()
    attempts = []

    async def failing(request, handler):
        attempts.append(loop.time())
        raise OSError(111, "refused")

    async with (
        aiohttp.ClientSession(middlewares=[failing]) as session,
        KontextClient(KEY, session=session) as client,
    ):
        error = await error_of(client.submit(REQUEST), TransportError)
        assert "not sent" in str(error)
        delays = [after - before for before, after in itertools.pairwise(attempts)]
        assert delays[:6] == pytest.approx([0.5, 1, 2, 4, 8, 15])
        assert 105 < attempts[-1] <= 120
        began = len(attempts)
        await error_of(client.submit(REQUEST, submit_grace=0), TransportError)
        assert len(attempts) == began + 1


@virtual_time
async def test_a_request_gets_through_once_the_network_is_back():
    failures = [1, 2, 3]

    async def failing(request, handler):
        if failures:
            failures.pop()
            raise OSError(111, "refused")
        return await handler(request)

    async with (
        Simulator() as simulator,
        aiohttp.ClientSession(middlewares=[failing]) as session,
        make_client(simulator, session=session) as client,
    ):
        task = await client.submit(REQUEST)
        assert simulator.created == [task.task_id]
        assert len(posts(simulator)) == 1


@virtual_time
async def test_a_rate_limit_pauses_creations_alone():
    """Polls go on meanwhile; the request is sent again after the pause."""
    loop = asyncio.get_running_loop()
    script = [(429, {"Retry-After": "40"}, b"")]
    async with Simulator(generate_script=script) as simulator, make_client(simulator) as client:
        task_id = simulator.add_task(duration=9.0, outcome="success")
        submission = asyncio.create_task(client.submit(REQUEST))
        await client.wait_for_result(task_id)
        assert loop.time() < 15
        assert client.stats.pause == 0
        await submission
        assert loop.time() == pytest.approx(40, abs=0.1)
        assert [post.status for post in posts(simulator)] == [429, 200]


@virtual_time
async def test_a_rate_limit_that_lasts_is_raised_after_the_grace():
    """It says how long to wait; one that is longer than the grace is raised at once."""
    loop = asyncio.get_running_loop()
    async with (
        Simulator(generate_script=["code_429"] * 99) as simulator,
        make_client(simulator) as client,
    ):
        error = await error_of(client.submit(REQUEST), RateLimitedError)
        assert 30 < loop.time() <= 120
        assert error.retry_after > 0
    script = [(429, {"Retry-After": "200"}, b"")]
    async with Simulator(generate_script=script) as simulator, make_client(simulator) as client:
        began = loop.time()
        error = await error_of(client.submit(REQUEST), RateLimitedError)
        assert loop.time() - began < 1
        assert error.retry_after == 200
    assert simulator.created == []


@virtual_time
async def test_maintenance_pauses_the_whole_client():
    """Neither a poll nor a creation is sent in the pause."""
    async with (
        Simulator(generate_script=["code_455"]) as simulator,
        make_client(simulator) as client,
    ):
        task_id = simulator.add_task(duration=1.0, outcome="success")
        submission = asyncio.create_task(client.submit(REQUEST))
        await asyncio.sleep(0.1)
        assert client.stats.pause > 4
        await client.wait_for_result(task_id)
        await submission
        times = [request.time for request in simulator.requests]
        assert times[0] < 0.1
        assert times[1] == pytest.approx(5, abs=0.1)


@virtual_time
async def test_a_pause_of_the_polls_holds_creations_back():
    async with Simulator() as simulator, make_client(simulator) as client:
        task_id = simulator.add_task(script=["code_455"], outcome="success")
        await error_of(client.record_info(task_id), MaintenanceError)
        await client.submit(REQUEST)
        assert simulator.now == pytest.approx(5, abs=0.1)


@virtual_time
async def test_creations_stay_within_their_own_rate_limit():
    """Twenty in ten seconds by default; the service refuses not one."""
    async with (
        Simulator(creation_limit=SlidingWindow(20, 10.0)) as simulator,
        make_client(simulator) as client,
    ):
        await asyncio.gather(*(client.submit(REQUEST) for _ in range(50)))
        assert simulator.now == pytest.approx(20, abs=0.5)
        assert {post.status for post in posts(simulator)} == {200}
        assert len(set(simulator.created)) == 50


@virtual_time
async def test_an_unknown_creation_limit_is_discovered():
    async with (
        Simulator(creation_limit=SlidingWindow(5, 1.0)) as simulator,
        make_client(simulator, creation_limit=None) as client,
    ):
        await asyncio.gather(*(client.submit(REQUEST) for _ in range(30)))
        assert len(simulator.created) == 30


LOST = ["made_reset", "made_closed", "made_stall", "made_http_502", "made_code_500"]
LOST += ["made_truncated", "made_no_id"]
UNMADE = {"made_reset": "reset", "made_closed": "closed", "made_stall": "stall"}
UNMADE |= {"made_http_502": "html_502", "made_code_500": "code_500"}
UNMADE |= {"made_truncated": None, "made_no_id": "data_null"}


@virtual_time
@pytest.mark.parametrize("step", LOST)
async def test_a_lost_answer_is_uncertain_and_never_asked_for_again(step):
    """The error says to look; and with no task made, it is the very same error."""
    async with (
        Simulator(generate_script=[step]) as simulator,
        make_client(simulator, callback_url="https://example.com/{token}") as client,
    ):
        error = await error_of(client.submit(REQUEST, token="t1"), SubmissionUnknownError)
        await asyncio.sleep(300)
        assert len(simulator.created) == len(posts(simulator)) == 1
        assert error.token == "t1"
        assert not error.retryable
        assert not isinstance(error, (OSError, TransportError))
        assert "provider's log" in str(error)
        assert PROMPT not in str(error)
    if UNMADE[step]:
        async with (
            Simulator(generate_script=[UNMADE[step]]) as simulator,
            make_client(simulator) as client,
        ):
            twin = await error_of(client.submit(REQUEST), SubmissionUnknownError)
            assert simulator.created == []
            assert (twin.code, twin.http_status) == (error.code, error.http_status)


@virtual_time
async def test_an_answer_that_breaks_off_after_the_id_is_good():
    async with (
        Simulator(generate_script=["made_truncated_after_id"]) as simulator,
        make_client(simulator) as client,
    ):
        assert [(await client.submit(REQUEST)).task_id] == simulator.created


@virtual_time
async def test_an_answer_may_take_two_minutes():
    """A timeout of the polls does not give up on it."""
    async with Simulator(latency=110.0) as simulator, make_client(simulator) as client:
        assert [(await client.submit(REQUEST)).task_id] == simulator.created


@virtual_time
@pytest.mark.parametrize(
    ("step", "kind", "code"),
    [
        ("code_401", AuthenticationError, 401),
        ("code_402", ApiError, 402),
        ("code_403", ApiError, 403),
        ("code_404", ApiError, 404),
        ("code_422", InvalidRequestError, 422),
        ("code_505", ApiError, 505),
        ("not_found", InvalidRequestError, 422),
        ("html_403", ApiError, 403),
        ("redirect", ApiError, 302),
    ],
)
async def test_a_refusal_is_raised_at_once(step, kind, code):
    async with Simulator(generate_script=[step]) as simulator, make_client(simulator) as client:
        error = await error_of(client.submit(REQUEST), kind)
        assert error.code == code
        assert error.task_id is None
        assert simulator.now < 1
        assert len(simulator.requests) == 1


async def test_a_refusal_that_repeats_the_prompt_is_raised_without_it():
    """Whole or in pieces, in the envelope or in a page."""
    pieces = f"{PROMPT[:20]}… and {PROMPT} and {PROMPT[8:]}"
    for reply in (
        envelope(422, msg=f"invalid: {pieces}"),
        envelope(500, msg=f"invalid: {pieces}"),
        answer(f"<p>{pieces}</p>".encode(), status=400),
    ):

        async def script(connection, reply=reply):
            await connection.whole()
            await connection.send(reply)

        async with service(script) as served:
            async with KontextClient(KEY, base_url=served.base_url) as client:
                error = await error_of(client.submit(REQUEST))
            texts = f"{error} {error!r} {vars(error)}"
            assert "…" in texts
            assert not [n for n in range(len(PROMPT) - 12) if PROMPT[n : n + 12] in texts]


@virtual_time
async def test_nothing_of_a_request_is_logged(caplog):
    caplog.set_level(logging.DEBUG)
    script = ["code_429"]
    async with Simulator(generate_script=script) as simulator, make_client(simulator) as client:
        await client.submit(REQUEST)
    assert "created" in caplog.text
    assert PROMPT not in caplog.text
    assert KEY not in caplog.text


# --- the life of a client ------------------------------------------------------------------------


async def test_a_closed_client_creates_nothing():
    async with Simulator() as simulator:
        client = make_client(simulator)
        await client.aclose()
        await error_of(client.submit(REQUEST), ClientStateError)
        session = aiohttp.ClientSession()
        await session.close()
        async with make_client(simulator, session=session) as client:
            await error_of(client.submit(REQUEST), ClientStateError)
        assert not simulator.requests


@virtual_time
async def test_closing_ends_a_submission_that_waits_for_its_turn():
    """Nothing is sent afterwards, and nothing is left."""
    limit = RateLimit(1, 100.0)
    async with Simulator() as simulator, make_client(simulator, creation_limit=limit) as client:
        await client.submit(REQUEST)
        waiting = asyncio.create_task(error_of(client.submit(REQUEST), ClientStateError))
        await asyncio.sleep(1)
        await asyncio.gather(client.aclose(), client.aclose())
        await waiting
        await asyncio.sleep(300)
        assert len(simulator.requests) == 1


async def test_a_body_that_was_given_up_is_not_handed_over():
    """Not even if the hook before it ends later; nor a second time."""
    ready = asyncio.Event()
    written = []

    class Writer:
        async def write(self, data):
            written.append(data)

    body = _OneShotBody(b"{}", before_sending=ready.wait, scope=asyncio.timeout(None))
    writing = asyncio.create_task(body.write(Writer()))
    await asyncio.sleep(0)
    assert body.revoke()
    ready.set()
    with pytest.raises(RuntimeError, match="given up"):
        await writing
    async with asyncio.timeout(None) as scope:
        body = _OneShotBody(b"{}", before_sending=None, scope=scope)
        await body.write(Writer())
        with pytest.raises(RuntimeError, match="sent once"):
            await body.write(Writer())
    assert not body.revoke()
    assert written == [b"{}"]


async def test_a_programming_error_of_ours_is_not_hidden(monkeypatch):
    async with Simulator() as simulator, make_client(simulator) as client:
        monkeypatch.setattr(aiohttp.ClientSession, "post", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await client.submit(REQUEST)


# --- the balance ---------------------------------------------------------------------------------


async def test_the_balance_is_a_number_of_credits():
    async with Simulator(credits=5, api_key=KEY) as simulator, make_client(simulator) as client:
        await client.submit(REQUEST)
        assert await client.credits() == 4.0
        async with KontextClient("other", base_url=simulator.base_url) as stranger:
            await error_of(stranger.credits(), AuthenticationError)


@pytest.mark.parametrize("data", ["5", None, True, [5], 1e999])
async def test_a_balance_that_is_no_number_is_unreadable(data):
    async def script(connection):
        await connection.get()
        await connection.send(envelope(data=data))

    async with service(script) as served, KontextClient(KEY, base_url=served.base_url) as client:
        error = await error_of(client.credits(), ResponseFormatError)
        assert error.task_id is None


def test_a_balance_that_is_too_large_is_unreadable():
    body = b'{"code": 200}' + b" " * MAX_BODY
    with pytest.raises(ResponseFormatError) as caught:
        read_credits(200, {}, body, api_key=ApiKey(KEY), now=0.0)
    assert caught.value.task_id is None
    assert str(caught.value).startswith("unreadable answer (HTTP 200): larger than")


@virtual_time
async def test_a_balance_that_does_not_come_is_a_transport_error():
    async def script(connection):
        await connection.stall()

    async with service(script) as served, KontextClient(KEY, base_url=served.base_url) as client:
        error = await error_of(client.credits(), TransportError)
        assert "no whole answer within 30 s" in str(error)
        await client.aclose()
        await error_of(client.credits(), ClientStateError)


async def test_whatever_a_middleware_raises_is_a_transport_error_of_the_balance(monkeypatch):
    async def failing(request, handler):
        raise LookupError("no login")

    async with Simulator() as simulator:
        async with (
            aiohttp.ClientSession(middlewares=[failing]) as session,
            make_client(simulator, session=session) as client,
        ):
            await error_of(client.credits(), TransportError)
        async with make_client(simulator) as client:
            monkeypatch.setattr(aiohttp.ClientSession, "get", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await client.credits()


async def test_no_error_refers_to_the_headers_of_the_request():
    """They hold the key; what error reporters collect does not."""

    async def hook():
        raise LookupError("disk")

    async with Simulator(generate_script=["made_reset", "code_422", "html_200"]) as simulator:
        async with make_client(simulator) as client:
            errors = [await error_of(client.submit(REQUEST)) for _ in range(3)]
            with pytest.raises(LookupError) as caught:
                await client.submit(REQUEST, before_sending=hook)
            errors.append(caught.value)
        base_url = simulator.base_url
    async with KontextClient(KEY, base_url=base_url) as client:
        errors.append(await error_of(client.submit(REQUEST, submit_grace=0)))
        errors.append(await error_of(client.credits()))
    for error in errors:
        assert not isinstance(error.__context__, aiohttp.ClientError)
        linked = {} if error.__cause__ is None else vars(error.__cause__)
        assert KEY not in repr(linked)
        assert KEY not in f"{error!r} {error} {vars(error)}"


@pytest.mark.parametrize("raw", ["9" * 5000, "NaN", "1e999", "[" * 20_000 + "]" * 20_000])
def test_no_value_of_another_field_hides_the_id_of_a_task_that_is_paid_for(raw):
    body = f'{{"code": {raw}, "seed": {raw}, "data": {{"taskId": "task", "seed": {raw}}}}}'
    creation = read_creation(
        200,
        {},
        body.encode(),
        broken_off=None,
        request=REQUEST,
        api_key=ApiKey(KEY),
        now=0.0,
    )
    assert (creation.task_id, creation.error) == ("task", None)


# --- any answer ----------------------------------------------------------------------------------

BODIES = st.binary(max_size=300) | st.builds(
    lambda value, cut: json.dumps(value).encode()[:cut],
    st.recursive(
        st.none() | st.integers() | st.text() | st.sampled_from([PROMPT, KEY, "task-1"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["code", "data", "taskId", "msg"]) | st.text(max_size=5),
                inner,
                max_size=4,
            )
        ),
        max_leaves=10,
    ),
    st.none() | st.integers(0, 80),
)


@given(
    status=st.integers(100, 999),
    headers=st.dictionaries(st.sampled_from(["Retry-After", "Location"]), st.text(max_size=20)),
    body=BODIES,
    broken_off=st.none() | st.just("reset"),
)
@example(status=200, headers={}, body=b'{"data":{"taskId":"\\u0000"}', broken_off="reset")
@example(status=200, headers={}, body=b'"taskId": "\\x"', broken_off="reset")
@example(status=200, headers={}, body=b"[" * 99_999, broken_off="reset")
def test_any_answer_gives_an_id_or_one_of_our_errors(status, headers, body, broken_off):
    """An id was there in full; and no error has the key or the prompt."""
    creation = read_creation(
        status,
        headers,
        body,
        broken_off=broken_off,
        request=REQUEST,
        api_key=ApiKey(KEY),
        now=0.0,
    )
    assert (creation.task_id is None) is (creation.rule.verdict is not Verdict.ACCEPTED)
    if creation.task_id is not None:
        assert KEY not in creation.task_id
        assert creation.task_id.isprintable()
        return
    error = creation.error
    assert isinstance(error, KontextError)
    assert isinstance(error, SubmissionUnknownError) is (creation.rule.verdict is Verdict.UNKNOWN)
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), str(twin)) == (type(error), str(error))
    assert PROMPT not in str(error) + repr(vars(error))
    assert KEY not in str(error) + repr(vars(error))


def test_words_of_extra_and_short_prompts_are_hidden_too():
    request = ImageRequest(prompt="nudes", extra={"more": [{"a": "private detail"}, 5]})
    reply = json.dumps({"code": 422, "msg": "no nudes, no private detail, to be sure"}).encode()
    creation = read_creation(
        200, {}, reply, broken_off=None, request=request, api_key=ApiKey(KEY), now=0.0
    )
    assert creation.error.msg == "no …, no …, to be sure"


# --- the page ------------------------------------------------------------------------------------


def test_the_page_shows_the_policy_as_the_code_has_it():
    """Never paying twice: each row of the table is a row of `CREATION_POLICY`."""
    page = Path(__file__).parent.parent / "docs" / "never-paying-twice.md"
    text = page.read_text("utf-8").partition("## How it is certain")[0]
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert rows[1:] == [
        (rule.came, rule.verdict.value, rule.action.value) for rule in CREATION_POLICY
    ]


def test_an_answer_without_an_id_that_is_too_large_leaves_the_task_unknown():
    body = b'{"code": 200}' + b" " * MAX_BODY
    creation = read_creation(
        200, {}, body, broken_off=None, request=REQUEST, api_key=ApiKey(KEY), now=0.0
    )
    assert creation.rule.verdict is Verdict.UNKNOWN
    assert "larger than" in str(creation.error)
