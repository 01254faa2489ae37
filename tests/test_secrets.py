"""Nothing reveals the API key, whatever happens and whatever a server echoes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import pickle
import ssl
import traceback
import types

import aiohttp
import attrs
import pytest
import trustme
from raw_server import http, raw_server
from tenacity import wait_fixed

from kontext_async import (
    CompletedTask,
    ConfigurationError,
    ImageRequest,
    KontextClient,
    KontextError,
    RateLimit,
    TransportError,
)
from kontext_async.results import download
from kontext_async.simulator import CREATION_STEPS, STEPS, Simulator

virtual_time = pytest.mark.virtual_time
# Long enough to be cut in the middle of a shortened message.
KEY = "marker-" + "0123456789" * 4 + "-key"
PIECE = "56789012345"
PROMPT = "A lighthouse at dusk"


class Outlet:
    """Collects values and log records as text."""

    def __init__(self, caplog):
        self.texts = []
        self.caplog = caplog

    def take(self, *values):
        """Add every text form of some values."""
        for value in values:
            self.texts += [repr(value), str(value), f"{value}"]
            self.texts.append(pickle.dumps(value).decode("latin-1"))
            if attrs.has(type(value)):
                self.texts.append(repr(attrs.asdict(value)))
            if isinstance(value, BaseException):
                self.texts += traceback.format_exception(value)

    def seen(self):
        lines = (f"{r.getMessage()} {r.__dict__}" for r in self.caplog.records)
        return "\n".join([*self.texts, *lines, self.caplog.text])


@pytest.fixture
def outlet(caplog):
    caplog.set_level(logging.DEBUG)
    outlet = Outlet(caplog)
    yield outlet
    seen = outlet.seen()
    assert len(seen) > 100
    assert PIECE not in seen


@pytest.fixture(autouse=True)
async def debugging():
    """Turn on asyncio's debug mode, which logs callbacks and their arguments."""
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 0.0 if type(loop).__name__ != "VirtualTimeLoop" else 1.0


def reachable(value, seen=None):
    """Return all that a value refers to by attributes and containers; frames do not count."""
    seen = {} if seen is None else seen
    if id(value) in seen or isinstance(value, (type, types.ModuleType, types.TracebackType)):
        return seen
    seen[id(value)] = value
    parts = list(getattr(value, "__dict__", {}).values())
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names = [slots] if isinstance(slots, str) else slots
        parts += [getattr(value, name, None) for name in names]
    if isinstance(value, BaseException):
        parts += [value.args, value.__cause__, value.__context__]
    if isinstance(value, dict):
        parts += [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        parts += value
    for part in parts:
        reachable(part, seen)
    return seen


def assert_keeps_the_key(error):
    """Assert that an error and its causes do not refer to the key or to request headers."""
    for value in reachable(error).values():
        assert not isinstance(value, (aiohttp.ClientRequest, aiohttp.RequestInfo))
        assert not isinstance(value, (aiohttp.ClientSession, KontextClient))
        assert PIECE not in repr(value)


async def errors_of(client, task_id, outlet):
    """Collect what a poll and a wait return or raise."""
    waiting = client.wait_for_result(
        task_id,
        timeout=3,
        wait=wait_fixed(0.1),
        error_grace=0,
        not_found_grace=0,
        on_event=outlet.take,
    )
    for awaitable in (client.record_info(task_id), waiting):
        try:
            outlet.take(await awaitable)
        except KontextError as error:
            outlet.take(error)
            assert_keeps_the_key(error)


@virtual_time
@pytest.mark.parametrize("name", STEPS)
async def test_no_answer_reveals_the_key(outlet, name):
    """In errors, their pickles and tracebacks, in events, records, stats and the log."""
    async with (
        Simulator() as simulator,
        KontextClient(KEY, base_url=simulator.base_url, request_timeout=2.0) as client,
    ):
        await errors_of(client, simulator.add_task(script=[name] * 4), outlet)
        outlet.texts += [repr(client), repr(vars(client)), repr(client.stats)]


ECHO = KEY.encode()
ESCAPED = "".join(f"\\u{ord(c):04x}" for c in KEY)
RECORD = {"taskId": "task", "successFlag": 3, "errorMessage": f"no credits on {KEY}"}


def envelope(code=200, msg="success", **data):
    return http(json.dumps({"code": code, "msg": msg, "data": data or None}).encode())


ECHOES = {
    "in_a_message": envelope(402, f"the key {KEY} has no credits"),
    "in_a_record": envelope(**RECORD, paramJson=json.dumps({"prompt": KEY})),
    "in_a_url": envelope(**{**RECORD, "successFlag": 1, "response": {"resultImageUrl": KEY}}),
    "in_an_unreadable_record": envelope(**{**RECORD, "successFlag": KEY, KEY: KEY}),
    "escaped": http(f'{{"code": 402, "msg": "the key {ESCAPED}"}}'.encode()),
    "in_a_page": http(b"<html>Authorization: Bearer " + ECHO, status=502),
    "in_a_page_that_is_no_error": http(b"Authorization: Bearer " + ECHO),
    "at_the_edge_of_an_excerpt": http(b" " * 170 + ECHO),
    "in_headers": http(b"", f"Authorization: Bearer {KEY}", f"Retry-After: {KEY}", status=429),
    "in_a_location": http(b"", f"Location: https://{KEY}:{KEY}@{KEY}.example/{KEY}", status=302),
    "in_the_reason": b"HTTP/1.1 500 " + ECHO + b"\r\nContent-Length: 0\r\n\r\n",
    "in_the_status": b"HTTP/1.1 " + ECHO + b"\r\nContent-Length: 0\r\n\r\n",
    "for_an_answer": b"Authorization: Bearer " + ECHO + b"\r\n\r\n",
    "in_a_bad_header": b"HTTP/1.1 200 OK\r\nX-Echo: " + ECHO + b"\0\r\n\r\n",
    "as_a_bad_header": b"HTTP/1.1 200 OK\r\nBearer " + ECHO + b"\r\n\r\n",
    "in_a_long_header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 60 + ECHO * 300 + b"\r\n\r\n",
    "in_half_a_head": b"HTTP/1.1 200 OK\r\nX-Echo: " + ECHO + b"\r\n",
    "in_half_a_body": http(ECHO * 9)[:-9],
    "in_a_bad_length": b"HTTP/1.1 200 OK\r\nContent-Length: " + ECHO + b"\r\n\r\n",
    "in_a_bad_chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + ECHO + b"\r\n",
    "in_a_bad_encoding": http(ECHO, "Content-Encoding: gzip"),
    "in_the_name_of_an_encoding": http(b"{}", f"Content-Encoding: {KEY}"),
    "in_a_cookie": http(b"", f"Set-Cookie: session={KEY}; Path=/", status=403),
    "after_an_answer": http(b"") + ECHO,
}


@virtual_time
@pytest.mark.parametrize("name", ECHOES)
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_server_that_echoes_the_key_does_not_reveal_it(outlet, name, at_once):
    """In the body, in headers or elsewhere, in one piece or cut in the middle."""
    answer = ECHOES[name]
    middle = answer.find(ECHO) + 20
    pieces = [answer, None] if at_once else [answer[:middle], 0.05, answer[middle:], None]
    async with (
        raw_server(pieces) as server,
        KontextClient(KEY, base_url=server.base_url, request_timeout=1.0) as client,
    ):
        await errors_of(client, "task", outlet)
        assert server.heads


async def test_a_connection_that_fails_does_not_reveal_the_key(outlet):
    """Refused, without TLS, a certificate that does not verify, a name that does not resolve."""

    class Resolver(aiohttp.abc.AbstractResolver):
        async def resolve(self, host, port=0, family=0):
            raise OSError(None, "no such name")

        async def close(self):
            """Nothing to close."""

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with raw_server(http(b""), ssl=context) as server:
        port = server.base_url.rpartition(":")[2]
        for base_url in (server.base_url, f"http://127.0.0.1:{port}", "http://127.0.0.1:9"):
            async with KontextClient(KEY, base_url=base_url, request_timeout=0.5) as client:
                await errors_of(client, "task", outlet)
    connector = aiohttp.TCPConnector(resolver=Resolver())
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        KontextClient(KEY, base_url="https://api.invalid", session=session) as client,
    ):
        await errors_of(client, "task", outlet)


@virtual_time
async def test_an_error_of_aiohttp_that_holds_the_request_is_not_chained():
    """A response error holds the request's headers; only its text is passed on."""

    async def middleware(request, handler):
        response = await handler(request)
        response.raise_for_status()

    async with (
        raw_server(http(b"", status=418)) as server,
        aiohttp.ClientSession(middlewares=[middleware]) as session,
        KontextClient(KEY, base_url=server.base_url, session=session) as client,
    ):
        with pytest.raises(TransportError, match="418") as caught:
            await client.record_info("task")
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert_keeps_the_key(caught.value)


@pytest.mark.parametrize("key", [f"Bearer {KEY}", f"{KEY}\n{KEY}", f"{KEY}é"])
@pytest.mark.parametrize("from_environment", [False, True])
async def test_an_invalid_key_is_not_in_the_message_that_refuses_it(
    outlet, monkeypatch, key, from_environment
):
    """As an argument and as a variable."""
    monkeypatch.setenv("APIKLEY_API_KEY", key)
    with pytest.raises(ConfigurationError) as caught:
        KontextClient(None if from_environment else key)
    outlet.take(caught.value)
    outlet.texts.append("-" * 100)


@virtual_time
async def test_a_batch_does_not_reveal_the_key(outlet):
    """In its outcomes, its events, and the model that learned from it."""
    async with (
        Simulator(fault_rate=0.3) as simulator,
        KontextClient(KEY, base_url=simulator.base_url, request_timeout=1.0) as client,
    ):
        tasks = [simulator.add_task(duration=3.0) for _ in range(20)]
        outlet.take(*await client.wait_for_results([*tasks, "unknown"], on_event=outlet.take))
        outlet.texts.append(client._transport.durations.to_json())


async def test_a_client_that_is_dropped_does_not_reveal_the_key(outlet):
    """In its warning, and in what the loop reports."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: outlet.texts.append(repr(context)))
    async with Simulator() as simulator:
        client = KontextClient(KEY, base_url=simulator.base_url)
        await client.record_info(simulator.add_task(script=["generating"]))
        connector = client._transport._session.connector
        with pytest.warns(ResourceWarning) as warned:  # noqa: PT031  # one act
            del client
            gc.collect()
        outlet.texts += [str(warning.message) for warning in warned]
        await connector.close()


@virtual_time
async def test_a_wait_that_is_cancelled_or_times_out_does_not_reveal_the_key(outlet):
    """Nor does a pause, an exhausted rate limit, or a callback's own error."""
    async with (
        Simulator() as simulator,
        KontextClient(KEY, base_url=simulator.base_url, rate_limit=RateLimit(2, 60.0)) as client,
    ):
        stalled = simulator.add_task(script=["stall"])
        waiting = asyncio.create_task(client.wait_for_result(stalled))
        await asyncio.sleep(1)
        outlet.texts += [repr(waiting), repr(waiting.get_coro())]
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError) as cancelled:
            await waiting
        outlet.texts += traceback.format_exception(cancelled.value)
        with pytest.raises(ZeroDivisionError) as raised:
            await client.wait_for_result(
                simulator.add_task(script=["http_500"]), on_event=lambda event: 1 / 0
            )
        outlet.texts += traceback.format_exception(raised.value)
        await errors_of(client, stalled, outlet)


@virtual_time
async def test_the_log_has_neither_prompt_nor_answer(caplog):
    """Nor does an event, an error or a record's repr have the prompt."""
    caplog.set_level(logging.DEBUG, "kontext_async")
    outlet = Outlet(caplog)
    async with (
        Simulator() as simulator,
        KontextClient(KEY, base_url=simulator.base_url) as client,
    ):
        script = ["generating", "flag_unknown", "other_task", "success_no_url", "failed"]
        task_id = simulator.add_task(script=script)
        with pytest.raises(KontextError) as caught:
            await client.wait_for_result(
                task_id, wait=wait_fixed(1), on_event=lambda e: outlet.texts.append(repr(e))
            )
    outlet.texts += [repr(caught.value), *traceback.format_exception(caught.value)]
    assert len(outlet.texts) > 5
    assert PROMPT not in outlet.seen()
    assert 'resultImageUrl":' not in outlet.seen()


# Error reporters, such as Sentry, show the repr of each frame's variables and of their attributes.


def attributes(value):
    names = [*getattr(value, "__dict__", ())]
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return [(name, getattr(value, name, None)) for name in names]


def leaking_variables(error):
    """Name the variables that show the key in the frames of an error and its causes."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for name, value in frame.f_locals.items():
                for attribute, part in [("", value), *attributes(value)]:
                    with contextlib.suppress(AttributeError):  # of an object half made
                        if PIECE in repr(part):
                            yield f"{frame.f_code.co_qualname}: {name}.{attribute}"
        error = error.__cause__


async def kinds_that_hide_the_key(*awaitables):
    """Await all, and return the kinds of the errors; no frame of them may show the key."""
    kinds, leaks = set(), []
    for awaitable in awaitables:
        try:
            await awaitable
        except KontextError as error:
            leaks += leaking_variables(error)
            kinds.add(type(error).__name__)
    assert leaks == []
    return kinds


@virtual_time
async def test_no_frame_of_a_failed_poll_shows_the_key():
    """For all that the service may answer; the kinds are all that a poll may raise."""
    kinds = set()
    for name in STEPS:
        async with (
            Simulator() as simulator,
            KontextClient(KEY, base_url=simulator.base_url, request_timeout=2.0) as client,
        ):
            task = simulator.add_task(script=[name] * 9)
            options = {"timeout": 3, "wait": wait_fixed(1), "error_grace": 0, "not_found_grace": 0}
            kinds |= await kinds_that_hide_the_key(
                client.record_info(task), client.wait_for_result(task, **options)
            )
    assert kinds == {
        *("ApiError", "AuthenticationError", "TaskNotFoundError", "InvalidRequestError"),
        *("RateLimitedError", "MaintenanceError", "ServerError", "GenerationFailedError"),
        *("ResponseFormatError", "TransportError", "WaitTimeoutError"),
    }


@virtual_time
@pytest.mark.parametrize("name", ECHOES)
async def test_no_frame_shows_a_key_that_the_service_echoes(name):
    async with (
        raw_server([ECHOES[name], None]) as server,
        KontextClient(KEY, base_url=server.base_url, request_timeout=1.0) as client,
    ):
        options = {"timeout": 3, "wait": wait_fixed(1), "error_grace": 0, "not_found_grace": 0}
        assert await kinds_that_hide_the_key(
            client.record_info("task"),
            client.wait_for_result("task", **options),
            client.submit(ImageRequest(prompt=PROMPT), submit_grace=0),
            client.credits(),
        )


@virtual_time
async def test_no_frame_of_a_failed_creation_shows_the_key():
    kinds = set()
    for name in CREATION_STEPS:
        async with (
            Simulator(generate_script=[name] * 9) as simulator,
            KontextClient(KEY, base_url=simulator.base_url, request_timeout=2.0) as client,
        ):
            submission = client.submit(ImageRequest(prompt=PROMPT), submit_grace=0)
            kinds |= await kinds_that_hide_the_key(submission)
    assert kinds > {"ApiError", "RateLimitedError", "SubmissionUnknownError"}


async def test_no_frame_shows_the_key_where_nothing_answers(tmp_path):
    """Neither of polls, of creations, nor of a download from the API's own origin."""
    async with KontextClient(KEY, base_url="http://127.0.0.1:9") as client:
        task = CompletedTask(task_id="task", result_image_url="http://127.0.0.1:9/image")
        kinds = await kinds_that_hide_the_key(
            client.record_info("task"),
            client.wait_for_result("task", error_grace=0),
            client.submit(ImageRequest(prompt=PROMPT), submit_grace=0),
            client.credits(),
            download(client, task, tmp_path, timeout=0.5),
        )
    assert kinds == {"TransportError", "DownloadError"}
    assert await kinds_that_hide_the_key(client.record_info("task")) == {"ClientStateError"}


@pytest.mark.parametrize("options", [{"base_url": "ftp://a.example"}, {"max_concurrency": 0}])
@pytest.mark.parametrize("key", [KEY, f"Bearer {KEY}", KEY.encode()])
async def test_no_frame_of_a_client_that_cannot_be_made_shows_the_key(options, key):
    with pytest.raises(ConfigurationError) as caught:
        KontextClient(key, **options)
    frames = [place for place in leaking_variables(caught.value) if "test_no_" not in place]
    assert frames == []
