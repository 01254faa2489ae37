"""Requests and answers on the wire, against real servers."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
import ssl
import tracemalloc

import aiohttp
import pytest
import trustme
from client_world import KEY, error_of, turns
from raw_server import http, raw_server
from tenacity import wait_fixed

from kontext_async import (
    ApiError,
    ClientStateError,
    CompletedTask,
    KontextClient,
    RateLimit,
    ResponseFormatError,
    TaskStatus,
    TransportError,
    WaitTimeoutError,
    __version__,
)
from kontext_async.simulator import Simulator

pytestmark = pytest.mark.usefixtures("fetcher")
virtual_time = pytest.mark.virtual_time
MEBIBYTE = 1024 * 1024


def make_client(base_url, **options):
    return KontextClient(KEY, base_url=base_url, **options)


def body_of(**fields):
    record = {"taskId": "task", "successFlag": 0, "paramJson": None, **fields}
    return json.dumps({"code": 200, "msg": "success", "data": record}).encode()


# --- the request --------------------------------------------------------------------------------


async def test_a_request_has_the_key_and_a_user_agent():
    """It accepts JSON without compression, at the path of the API."""
    async with raw_server(http(body_of())) as server, make_client(server.base_url) as client:
        await client.record_info("task")
    line, *headers = server.heads[0].strip().split("\r\n")
    assert line == "GET /api/v1/flux/kontext/record-info?taskId=task HTTP/1.1"
    assert set(headers) == {
        f"Host: {server.base_url.removeprefix('http://')}",
        f"Authorization: Bearer {KEY}",
        f"User-Agent: kontext-async/{__version__}",
        "Accept: application/json",
        "Accept-Encoding: identity",
        "Cache-Control: no-cache",
    }


async def test_unusual_headers_are_no_trouble():
    """A header may be very long, as those of some gateways and authentication proxies."""
    answer = http(
        body_of(), f"X-Trace: {'a' * 60_000}", *[f"Set-Cookie: c{n}=1" for n in range(50)]
    )
    async with raw_server(answer) as server, make_client(server.base_url) as client:
        assert (await client.record_info("task")).status is TaskStatus.GENERATING


async def test_an_encoding_that_nobody_asked_for_is_named():
    """A name that is not one is no trouble; a body that cannot be decoded is named."""
    answer = http(body_of(), "Content-Encoding: none")
    async with raw_server(answer) as server, make_client(server.base_url) as client:
        assert (await client.record_info("task")).status is TaskStatus.GENERATING
    answer = http(body_of(), "Content-Encoding: br")
    async with raw_server(answer) as server, make_client(server.base_url) as client:
        error = await error_of(client.record_info("task"), TransportError)
        assert "Can not decode content-encoding" in str(error)


async def test_plain_http_to_a_tls_port_says_so():
    """Servers answer such a request with a page of their own."""
    page = b"<html><h1>400 Bad Request</h1>The plain HTTP request was sent to HTTPS port</html>"
    answer = http(page, "Content-Type: text/html", status=400)
    async with raw_server(answer) as server, make_client(server.base_url) as client:
        with pytest.raises(ApiError) as caught:
            await client.record_info("task")
    assert str(caught.value).endswith("this address is served over https: change base_url")


async def test_a_proxy_that_wants_a_login_is_named():
    """Polling again cannot help."""
    async with raw_server(http(b"", status=407)) as server, make_client(server.base_url) as client:
        with pytest.raises(ApiError) as caught:
            await client.record_info("task")
    assert str(caught.value).endswith("; the proxy wants a login")
    assert not caught.value.retryable


async def test_a_task_id_is_percent_encoded():
    """The service decodes the same id, whatever is in it."""
    task_id = "a b/ü?&=%2F#+"
    async with Simulator() as simulator, make_client(simulator.base_url) as client:
        simulator.add_task(task_id, script=["generating"])
        assert (await client.record_info(task_id)).task_id == task_id


async def test_a_path_in_the_base_url_goes_before_the_apis_own():
    """For a gateway that serves the API under a prefix."""
    async with raw_server(http(body_of())) as server:
        async with make_client(server.base_url + "/gate%20way/") as client:
            await client.record_info("task")
        assert server.heads[0].startswith("GET /gate%20way/api/v1/flux/kontext/record-info?")


async def test_cookies_are_not_stored():
    """A gateway's affinity cookie would tie all waits to one of its backends."""
    answer = http(body_of(), "Set-Cookie: gateway=1; Path=/")
    async with raw_server(answer) as server, make_client(server.base_url) as client:
        await client.record_info("task")
        await client.record_info("task")
    assert "cookie" not in "".join(server.heads).lower()


async def test_a_connection_serves_many_requests():
    """One after the other they share it; in parallel there are as many as requests in flight."""
    async with raw_server(http(body_of())) as server, make_client(server.base_url) as client:
        for _ in range(5):
            await client.record_info("task")
        assert server.connections == 1
        await asyncio.gather(*(client.record_info("task") for _ in range(4)))
        await asyncio.gather(*(client.record_info("task") for _ in range(4)))
        assert server.connections <= 4


# --- the answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        http(body_of()),
        [http(body_of())[:-9], 0.01, http(body_of())[-9:]],
        [b"HTTP/1.1 200 OK\r\n\r\n", 0.01, body_of()[:9], 0.01, body_of()[9:], None],
        [b"HTTP/1.1 102 Processing\r\n\r\n", 0.01, http(body_of())],
        http(gzip.compress(body_of()), "Content-Encoding: gzip"),
        http(body_of().ljust(MEBIBYTE)),
    ],
    ids=["whole", "in_two", "until_close", "processing", "gzip", "mebibyte"],
)
@virtual_time
async def test_a_good_answer_is_read_in_any_form(answer):
    """In pieces, without a length, after an interim answer, compressed, of 1 MiB."""
    async with raw_server(answer) as server, make_client(server.base_url) as client:
        assert (await client.record_info("task")).status is TaskStatus.GENERATING


@pytest.mark.parametrize(
    "answer",
    [
        http(body_of().ljust(MEBIBYTE + 1)),
        http(gzip.compress(body_of().ljust(MEBIBYTE + 1)), "Content-Encoding: gzip"),
    ],
    ids=["plain", "gzip"],
)
async def test_an_answer_of_more_than_a_mebibyte_is_refused(answer):
    """One byte more, compressed or not."""
    async with raw_server(answer) as server, make_client(server.base_url) as client:
        error = await error_of(client.record_info("task"), ResponseFormatError)
        assert "larger than 1048576 bytes" in str(error)
        assert len(error.excerpt) <= 200


@pytest.mark.parametrize("head", [b"", b"Content-Length: 99999999999\r\n"])
async def test_reading_stops_at_a_mebibyte(head):
    """The client closes the connection of an endless body, and what it read is bounded."""
    answer = [b"HTTP/1.1 200 OK\r\n" + head + b"\r\n"] + [b" " * 65536] * 2000
    async with raw_server(answer) as server, make_client(server.base_url) as client:
        await error_of(client.record_info("task"), ResponseFormatError)
        await asyncio.wait_for(server.hung_up.wait(), 5)
    # Socket buffers of both sides come on top of what was read.
    assert server.sent < 20 * MEBIBYTE


async def test_a_small_body_that_inflates_without_end_is_not_inflated():
    """64 MiB of zeros in 64 KB: memory is bounded by what may be read."""
    bomb = http(gzip.compress(bytes(64 * MEBIBYTE), 9), "Content-Encoding: gzip")
    async with raw_server(bomb) as server, make_client(server.base_url) as client:
        tracemalloc.start()
        try:
            await error_of(client.record_info("task"), ResponseFormatError)
            assert tracemalloc.get_traced_memory()[1] < 12 * MEBIBYTE
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (http(b"x" * 99)[:-9], "ClientPayloadError"),
        (b"HTTP/1.1 200 OK\r\n", "the connection was closed before the answer"),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "Bad status line"),
        (b"HTTP/1.1 200 OK\r\nBad Name: 1\r\n\r\n", "header"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 90000 + b"\r\n\r\n", "65536"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 999 + b"\r\n", "Too many headers"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", "chunk size"),
        (http(b"no gzip", "Content-Encoding: gzip"), "gzip"),
    ],
)
async def test_a_broken_answer_is_a_transport_error(answer, says):
    """It says what was wrong, in one line, and is retryable."""
    async with raw_server([answer, None]) as server, make_client(server.base_url) as client:
        error = await error_of(client.record_info("task"))
        assert type(error) is TransportError
        assert error.retryable
        assert error.task_id == "task"
        assert says in str(error)
        assert "\n" not in str(error)
        assert len(str(error)) < 300
        assert client.stats.errors == {"TransportError": 1}
        assert client.stats.in_flight == client.stats.waits == 0


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
@pytest.mark.parametrize("wait", [False, True])
async def test_a_redirect_is_not_followed_and_ends_a_wait(status, wait):
    """The key goes to the API alone: the other host gets no request."""
    async with raw_server(http(body_of())) as elsewhere:
        answer = http(b"", f"Location: {elsewhere.base_url}/?taskId=task", status=status)
        async with raw_server(answer) as server, make_client(server.base_url) as client:
            polling = client.wait_for_result("task") if wait else client.record_info("task")
            error = await error_of(polling, TransportError)
        assert not elsewhere.heads
    assert not error.retryable
    assert len(server.heads) == 1
    assert str(status) in str(error)
    assert elsewhere.base_url in str(error)


# --- timeouts and connections -------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        [999.0],
        [b"HTTP/1.1 200 OK\r\n", 999.0],
        [http(body_of())[:-9], 999.0],
        [part for byte in http(body_of()) for part in (bytes([byte]), 0.3)],
        [b"HTTP/1.1 102 Processing\r\n\r\n", 0.1] * 100,
    ],
    ids=["no_answer", "no_head", "no_end", "slow_drip", "never_final"],
)
@pytest.mark.parametrize("request_timeout", [0.7, 5.3])
@virtual_time
async def test_the_request_timeout_covers_the_whole_answer(answer, request_timeout):
    """Headers and body, however slowly they come, and to the moment."""
    loop = asyncio.get_running_loop()
    async with (
        raw_server(answer) as server,
        make_client(server.base_url, request_timeout=request_timeout) as client,
    ):
        error = await error_of(client.record_info("task"), TransportError)
        assert loop.time() == pytest.approx(request_timeout)
        assert f"{request_timeout} s" in str(error)
        assert error.retryable
        await asyncio.sleep(0.05)
        assert server.hung_up.is_set()


async def test_a_deadline_is_met_within_50_ms_in_real_time():
    """While the service does not answer, and while it does."""
    loop = asyncio.get_running_loop()
    async with Simulator() as simulator, make_client(simulator.base_url) as client:
        for script in (["stall"], ["generating"] * 999):
            task_id = simulator.add_task(script=script)
            began = loop.time()
            await error_of(
                client.wait_for_result(task_id, timeout=0.2, wait=wait_fixed(0.06)),
                WaitTimeoutError,
            )
            assert -0.001 < loop.time() - began - 0.2 < 0.05


async def test_a_refused_connection_is_retryable_and_names_the_address():
    """Its cause is the operating system's error, without the frames that held the headers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening
        base_url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with make_client(base_url) as client:
            error = await error_of(client.record_info("task"), TransportError)
    assert error.retryable
    assert base_url.removeprefix("http://") in str(error)
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.__traceback__ is None


async def test_an_unknown_host_is_retryable(monkeypatch):
    """Its name may resolve again a moment later."""

    async def unknown(*args, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)
    async with make_client("https://api.invalid") as client:
        error = await error_of(client.record_info("task"), TransportError)
    assert error.retryable
    assert "api.invalid" in str(error)


@virtual_time
async def test_a_connection_that_is_not_made_in_ten_seconds_is_given_up(monkeypatch):
    """Before the request's own time is up, so that a dead address is known earlier."""
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "sock_connect", lambda *args: loop.create_future())
    async with make_client("http://127.0.0.1:9") as client:
        error = await error_of(client.record_info("task"), TransportError)
    assert error.retryable
    assert loop.time() == pytest.approx(10)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


def tls_server(authority, *names, **options):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*names).configure_cert(context)
    return raw_server(http(body_of(successFlag=1, response={"resultImageUrl": "u"})), ssl=context)


@pytest.mark.parametrize("names", [["127.0.0.1"], ["elsewhere.example"]])
async def test_a_certificate_that_does_not_verify_ends_a_wait_at_once(authority, names):
    """An unknown authority, or another host's name: polling again cannot help."""
    async with tls_server(authority, *names) as server, make_client(server.base_url) as client:
        error = await error_of(client.wait_for_result("task"), TransportError)
        assert not error.retryable
        assert client.stats.requests == 1
        assert not server.heads
        assert isinstance(error.__cause__, ssl.SSLCertVerificationError | aiohttp.ClientSSLError)


@pytest.mark.parametrize("pinned", [False, True])
async def test_a_session_may_trust_a_private_authority_or_pin_a_certificate(authority, pinned):
    """Its connector's TLS options are used; a certificate that is not the pinned one is final."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    connector = aiohttp.TCPConnector(ssl=aiohttp.Fingerprint(b"\0" * 32) if pinned else context)
    async with (
        tls_server(authority, "127.0.0.1") as server,
        aiohttp.ClientSession(connector=connector) as session,
        make_client(server.base_url, session=session) as client,
    ):
        if pinned:
            assert not (await error_of(client.wait_for_result("task"), TransportError)).retryable
        else:
            assert isinstance(await client.wait_for_result("task"), CompletedTask)
        assert client.stats.requests == 1


async def test_a_server_without_tls_is_retryable():
    """It may be a gateway that is restarting."""

    async def refuse(reader, writer):
        await reader.read(1)
        writer.write(http(status=400))
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with make_client(f"https://127.0.0.1:{port}") as client:
            error = await error_of(client.record_info("task"), TransportError)
    assert error.retryable


async def test_a_request_that_was_cut_releases_its_permit(monkeypatch):
    """It counts as no error, and the next request may go."""

    async def cut(task_id, sent, until):
        return None

    client = make_client("http://127.0.0.1:9")
    monkeypatch.setattr(client._transport, "_get", cut)
    client._transport.check_open()
    for _ in range(3):
        sent = await client._transport.acquire(0.0, until=1.0, seen=True, deadline=1.0)
        assert await client._transport.poll("task", sent, until=1.0) is None
    assert (client.stats.in_flight, client.stats.errors) == (0, {})
    await client.aclose()


async def test_a_dead_idle_connection_is_replaced():
    """aiohttp sends the request again if the server closed the connection in between."""
    async with Simulator() as simulator, make_client(simulator.base_url) as client:
        task_id = simulator.add_task(script=["closed_after", "generating"])
        await client.record_info(task_id)
        assert (await client.record_info(task_id)).status is TaskStatus.GENERATING


# --- logging ------------------------------------------------------------------------------------


async def test_each_poll_is_one_line_in_the_log(caplog):
    """At DEBUG, in the library's logger, with the id and the outcome and nothing of the answer."""
    caplog.set_level(logging.DEBUG)
    async with Simulator() as simulator, make_client(simulator.base_url) as client:
        task_id = simulator.add_task("task", script=["generating", "http_500", "truncated"])
        await client.wait_for_result(task_id, wait=wait_fixed(0))
    records = [r for r in caplog.records if r.name.startswith("kontext_async")]
    assert [(r.name, r.levelname, r.getMessage()) for r in records] == [
        ("kontext_async", "DEBUG", "task task: GENERATING"),
        ("kontext_async", "DEBUG", "task task: ServerError"),
        ("kontext_async", "DEBUG", "task task: TransportError"),
        ("kontext_async", "DEBUG", "task task: SUCCESS"),
    ]


# --- closing ------------------------------------------------------------------------------------


@pytest.fixture(params=["own", "borrowed"])
async def session(request):
    """None for a client that makes its own."""
    if request.param == "own":
        yield None
        return
    async with aiohttp.ClientSession() as session:
        yield session
        assert not session.closed


def ours_scheduled():
    """Return the timers of this library that have not fired."""
    handles = (h for h in asyncio.get_running_loop()._scheduled if not h.cancelled())
    owners = (getattr(h._callback, "__self__", None) for h in handles)
    return [o for o in owners if type(o).__module__.startswith(("kontext_async", "asyncio.time"))]


@virtual_time
@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        ("wait", "sleeping"),
        *(
            (k, m)
            for k in ("wait", "poll")
            for m in ("in_flight", "in_body", "pause", "concurrency", "rate_limit")
        ),
    ],
)
async def test_closing_ends_what_is_pending(session, moment, kind):
    """With `ClientStateError`, at once, in any state; nothing is left of it."""
    script = {"in_flight": ["stall"], "in_body": ["stall_mid_body"], "concurrency": ["stall"]}
    options = {"request_timeout": 200.0}
    if moment == "concurrency":
        options["max_concurrency"] = 1
    if moment == "rate_limit":
        options["rate_limit"] = RateLimit(1, 100.0)
    async with Simulator() as simulator:
        client = make_client(simulator.base_url, session=session, **options)
        task_id = simulator.add_task(script=script.get(moment, ["generating"] * 9))
        call = client.wait_for_result if kind == "wait" else client.record_info
        before = []
        if moment == "pause":
            refused = simulator.add_task(script=["code_455"])
            await error_of(client.record_info(refused))
        if moment == "rate_limit":
            await client.record_info(task_id)
        if moment == "concurrency":
            before = [asyncio.create_task(client.record_info(task_id))]
            await turns()
        pending = asyncio.create_task(call(task_id))
        await asyncio.sleep(0.1)
        sent = len(simulator.requests)
        await client.aclose()
        errors = await asyncio.gather(pending, *before, return_exceptions=True)
        assert [type(error) for error in errors] == [ClientStateError] * len(errors)
        assert asyncio.get_running_loop().time() == pytest.approx(0.1)
        await asyncio.sleep(0.05)
        assert not ours_scheduled()
        assert asyncio.all_tasks() - {asyncio.current_task()} <= simulator_tasks(simulator)
        assert client.stats.waits == client.stats.in_flight == 0
        assert "ClientStateError" not in client.stats.errors
        await asyncio.sleep(300)
        assert len(simulator.requests) == sent


def simulator_tasks(simulator):
    return {task for task in asyncio.all_tasks() if "web_protocol" in repr(task.get_coro().cr_code)}


@virtual_time
@pytest.mark.parametrize("moment", range(60))
async def test_closing_in_any_turn_of_the_loop_ends_a_wait_cleanly(session, moment):
    """Also in the very turn of its permit, its answer, its deadline or its next poll."""
    script = ["generating", "http_500"]
    async with Simulator(latency=0.0) as simulator:
        client = make_client(simulator.base_url, session=session, max_concurrency=1)
        tasks = [simulator.add_task(script=script, duration=3.0) for _ in range(3)]
        waits = [
            asyncio.create_task(client.wait_for_result(t, wait=wait_fixed(0), timeout=0.001))
            for t in tasks
        ]
        await turns(moment)
        await client.aclose()
        sent = len(simulator.requests)
        errors = await asyncio.gather(*waits, return_exceptions=True)
        assert {type(error) for error in errors} <= {ClientStateError, WaitTimeoutError}
        assert client.stats.waits == client.stats.in_flight == 0
        assert not ours_scheduled()
        await asyncio.sleep(30)
        assert len(simulator.requests) <= sent + 1  # one may be on its way already


@virtual_time
@pytest.mark.parametrize("shift", [-1e-10, 1e-10])
async def test_closing_while_a_deadline_passes_raises_nothing_unexpected(session, shift):
    """The wait has timed out in the same turn of the loop, and does not know it yet."""
    loop = asyncio.get_running_loop()
    async with Simulator() as simulator:
        client = make_client(simulator.base_url, session=session)
        sleeping = simulator.add_task(script=["generating"] * 9)
        stalled = simulator.add_task(script=["stall"])
        waits = [
            asyncio.create_task(client.wait_for_result(t, wait=wait_fixed(99), timeout=5))
            for t in (sleeping, stalled)
        ]
        await turns()
        closing = []

        def close():
            coroutine = client.aclose()
            coroutine.send(None)
            closing.append(loop.create_task(coroutine))  # the rest of it

        # In the same turn of the loop as the deadlines, just before or after them.
        loop.call_at(5.0 + shift, close)
        errors = await asyncio.gather(*waits, return_exceptions=True)
        assert {type(error) for error in errors} == {ClientStateError}
        await asyncio.gather(*closing)
        assert loop.time() == pytest.approx(5)


@virtual_time
@pytest.mark.parametrize("delay", [0, 99])
async def test_a_wait_whose_answer_comes_as_the_client_closes_ends(session, delay):
    """It neither sends its next poll nor sleeps until it."""
    async with Simulator() as simulator:
        client = make_client(simulator.base_url, session=session)
        closing = client.aclose()
        stalled = client.wait_for_result(simulator.add_task(script=["stall"]))
        answered = client.wait_for_result(
            simulator.add_task(script=["generating"] * 9),
            wait=wait_fixed(delay),
            on_event=lambda event: closing.send(None),
        )
        errors = await asyncio.gather(stalled, answered, return_exceptions=True)
        assert [type(error) for error in errors] == [ClientStateError] * 2
        await asyncio.create_task(closing)  # the rest of it
        assert asyncio.get_running_loop().time() == 0
        assert len(simulator.requests) == 2


@virtual_time
async def test_a_permit_acquired_as_the_client_closes_is_not_used(session):
    """The wait that just ended released it a moment before."""
    async with Simulator() as simulator:
        client = make_client(simulator.base_url, session=session, max_concurrency=1)
        closing = client.aclose()
        first = client.wait_for_result(
            simulator.add_task(duration=0.0), on_event=lambda event: closing.send(None)
        )
        second = client.wait_for_result(simulator.add_task(duration=0.0))
        done, error = await asyncio.gather(first, second, return_exceptions=True)
        await asyncio.create_task(closing)  # the rest of it
        assert (type(done), type(error)) == (CompletedTask, ClientStateError)
        assert len(simulator.requests) == 1
        assert client.stats.in_flight == client.stats.waits == 0


@virtual_time
async def test_many_waits_are_ended_in_portions(session):
    """The loop runs in between, and all of them end."""
    async with Simulator() as simulator:
        client = make_client(simulator.base_url, session=session, rate_limit=RateLimit(1, 100.0))
        task_id = simulator.add_task(script=["generating"] * 9)
        waits = [asyncio.create_task(client.wait_for_result(task_id)) for _ in range(2500)]
        await asyncio.sleep(1)
        assert client.stats.waits == 2500
        await client.aclose()
        errors = await asyncio.gather(*waits, return_exceptions=True)
        assert {type(error) for error in errors} == {ClientStateError}
        assert len(simulator.requests) == 1


@virtual_time
async def test_the_clients_own_session_is_closed_even_if_closing_is_cancelled():
    """A hasty shutdown leaves nothing open."""
    async with Simulator() as simulator:
        client = make_client(simulator.base_url)
        waiting = asyncio.create_task(client.wait_for_result(simulator.add_task(script=["stall"])))
        await asyncio.sleep(1)
        closing = asyncio.create_task(client.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert client._transport._session.closed
        await error_of(waiting, ClientStateError)
