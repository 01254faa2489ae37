"""Every stage of a paid request at which it can end, and the verdict on it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import gzip
import socket
import ssl

import aiohttp
import pytest
import trustme
from aiohttp.abc import AbstractResolver
from creation_world import REQUEST, answer, check_law, envelope, make_client, service, verdict_of

from kontext_async import ConfigurationError
from kontext_async.wire import Verdict

pytestmark = pytest.mark.virtual_time

NOT_SENT, REFUSED = Verdict.NOT_SENT, Verdict.REFUSED
ACCEPTED, UNKNOWN = Verdict.ACCEPTED, Verdict.UNKNOWN
CREATED = {"taskId": "task-1"}

# --- the connection stands ----------------------------------------------------------------------


def ends(end, *, after, made=False, sends=b""):
    """Read as far as ``after``, send some bytes, and end the connection."""

    async def script(connection):
        if made:
            await connection.make()
        elif after:
            await getattr(connection, after)()
        if sends:
            await connection.send(sends)
        await getattr(connection, end)()

    return script


HEAD = answer(b"", length=99)
BEFORE_ID = answer(b'{"code": 200, "data": {"taskId": "tas', length=99)
AFTER_ID = answer(b'{"code": 200, "data": {"taskId": "task-1"', length=99)
BROKEN_OFF = {
    f"{end}_{name}": (ends(end, **how), verdict)
    for end in ("close", "reset", "stall")
    for name, how, verdict in (
        ("at_once", {"after": None}, UNKNOWN),
        ("after_the_head", {"after": "head"}, UNKNOWN),
        ("in_the_body", {"after": "half"}, UNKNOWN),
        ("after_the_request", {"after": "whole"}, UNKNOWN),
        ("with_a_task", {"after": "whole", "made": True}, UNKNOWN),
        ("in_the_status_line", {"after": "whole", "made": True, "sends": b"HTTP/1.1 2"}, UNKNOWN),
        ("in_the_answers_head", {"after": "whole", "made": True, "sends": HEAD[:-3]}, UNKNOWN),
        ("after_the_answers_head", {"after": "whole", "made": True, "sends": HEAD}, UNKNOWN),
        ("in_the_id", {"after": "whole", "made": True, "sends": BEFORE_ID}, UNKNOWN),
        ("after_the_id", {"after": "whole", "made": True, "sends": AFTER_ID}, ACCEPTED),
        ("early_answer", {"after": None, "sends": envelope(422)}, REFUSED),
    )
}


def answers(*pieces, made=False):
    async def script(connection):
        await (connection.make() if made else connection.whole())
        for piece in pieces:
            await connection.send(piece)

    return script


def refusing(reply):
    return answers(reply), REFUSED


def losing(reply):
    return answers(reply, made=True), UNKNOWN


ENVELOPES = {
    **{f"code_{c}": refusing(envelope(c)) for c in (401, 402, 403, 404, 422, 429, 433, 455, 505)},
    **{f"code_{c}": losing(envelope(c)) for c in (200, 201, 400, 408, 451, 500, 501, 503, 524)},
    "code_402_with_http_402": refusing(envelope(402, status=402)),
    "code_422_with_http_500": refusing(envelope(422, status=500)),
    "code_500_with_http_429": losing(envelope(500, status=429)),
    "code_422_about_a_record": refusing(envelope(422, msg="The record does not exist")),
}
STATUSES = {
    **{f"http_{s}": refusing(answer(b"no", status=s)) for s in (301, 302, 307, 308)},
    **{
        f"http_{s}": refusing(answer(b"no", status=s))
        for s in (400, 401, 402, 403, 404, 409, 413, 421, 425, 429, 451, 455, 499)
    },
    **{
        f"http_{s}": losing(answer(b"no", status=s))
        for s in (200, 202, 204, 300, 303, 304, 408, 500, 502, 503, 504, 505, 520, 524)
    },
}
ODD = {
    "an_id": (answers(envelope(data=CREATED), made=True), ACCEPTED),
    "an_id_with_code_500": (answers(envelope(500, CREATED), made=True), ACCEPTED),
    "an_id_with_http_502": (answers(envelope(200, CREATED, status=502), made=True), ACCEPTED),
    "an_id_outside_data": (answers(answer({"code": 200, **CREATED}), made=True), ACCEPTED),
    "an_id_before_a_bad_chunk": (
        answers(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b'1c\r\n{"data": {"taskId": "task-1"\r\nZZ\r\n',
            made=True,
        ),
        ACCEPTED,
    ),
    "an_id_in_half_the_chunks": (
        answers(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b'1c\r\n{"data": {"taskId": "task-1"\r\n',
            made=True,
        ),
        ACCEPTED,
    ),
    "an_id_after_102": (
        answers(b"HTTP/1.1 102 Processing\r\n\r\n" + envelope(data=CREATED), made=True),
        ACCEPTED,
    ),
    "an_id_in_gzip": (
        answers(
            answer(gzip.compress(b'{"data": {"taskId": "task-1"}}'), "Content-Encoding: gzip"),
            made=True,
        ),
        ACCEPTED,
    ),
    "a_number_as_id": losing(envelope(data={"taskId": 5})),
    "a_blank_id": losing(envelope(data={"taskId": " "})),
    "an_unprintable_id": losing(envelope(data={"taskId": "a\nb"})),
    "a_null_id": losing(envelope(data={"taskId": None})),
    "an_endless_id": losing(envelope(data={"taskId": "x" * 999})),
    "an_id_in_a_message": losing(envelope(500, msg='"taskId": "other"')),
    "an_id_in_a_cut_message": losing(
        answer(b'{"code": 200, "msg": "\\"taskId\\": \\"other\\""', length=999)
    ),
    "an_id_in_no_json": losing(answer(b'Sorry: "taskId": "other"')),
    "not_http": losing(b"SSH-2.0-OpenSSH_9.9\r\n\r\n"),
    "a_bad_header": losing(b"HTTP/1.1 200 OK\r\nBad Name: 1\r\n\r\n"),
    "a_bad_chunk": losing(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n"),
    "a_bad_encoding": losing(answer(b"no gzip", "Content-Encoding: gzip")),
    "no_json": losing(answer(b"<html>welcome</html>")),
    "an_array": losing(answer([CREATED])),
    "too_much": losing(answer(b"[" + b" " * 2**20 + b"]")),
    "deep": losing(answer(b"[" * 100_000)),
    "nothing": losing(answer(b"")),
}
STAGES = {**BROKEN_OFF, **ENVELOPES, **STATUSES, **ODD}


@pytest.mark.parametrize("grace", [0, 20])
@pytest.mark.parametrize("name", STAGES)
async def test_no_stage_denies_a_task_or_sends_a_second_whole_request(name, grace):
    """Closed, reset and timed out at each stage, every code and status, and every odd answer."""
    script, expected = STAGES[name]
    async with service(script) as served, make_client(served.base_url) as client:
        verdict, found = await verdict_of(client.submit(REQUEST, submit_grace=grace))
        check_law(verdict, found, served)
        assert verdict is expected
        if name not in {"code_429", "code_455", "http_429", "http_455"}:
            assert served.whole <= 1


def test_there_are_stages_enough():
    assert len(STAGES) >= 100
    assert {verdict for _, verdict in STAGES.values()} == {REFUSED, ACCEPTED, UNKNOWN}


# --- before the hand-over -----------------------------------------------------------------------


class Resolver(AbstractResolver):
    """Knows no name, or never answers."""

    def __init__(self, *, stalls):
        self._stalls = stalls

    async def resolve(self, host, port=0, family=socket.AF_INET):
        if self._stalls:
            await asyncio.sleep(10_000)
        raise OSError(None, "no such name")

    async def close(self):
        pass


AUTHORITY = trustme.CA()
STRANGER = trustme.CA()


def served_by(authority, *names, **options):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names, **options).configure_cert(context)
    return context


def trusting():
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    return context


@contextlib.asynccontextmanager
async def a_refusing_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@contextlib.asynccontextmanager
async def a_black_hole():
    """Serve a port whose queue of connections is full: more are never answered."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            filler = sockets.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


accepts = ends("close", after="whole", made=True)
answers_plainly = ends("stall", after=None, sends=b"HTTP/1.1 400 Bad Request\r\n\r\n")

# TLS: the server's context or its plain script, and the trust of the client.
TLS = {
    "tls_untrusted": {"ssl": served_by(STRANGER, "localhost")},
    "tls_other_name": {"ssl": served_by(AUTHORITY, "elsewhere.example")},
    "tls_expired": {
        "ssl": served_by(AUTHORITY, "localhost", not_after=dt.datetime(2020, 1, 1, tzinfo=dt.UTC))
    },
    "tls_plain_server": {"script": answers_plainly},
    "tls_closed": {"script": ends("close", after=None)},
    "tls_reset": {"script": ends("reset", after=None)},
    "tls_stalled": {"script": ends("stall", after=None)},
}
UNTRUSTED = {"tls_untrusted", "tls_other_name", "tls_expired"}


@pytest.mark.parametrize("name", TLS)
async def test_trouble_with_tls_sends_nothing(name):
    """A bad certificate is raised at once, everything else after the grace."""
    how = dict(TLS[name])
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(service(how.pop("script", accepts), **how))
        base_url = served.base_url.replace("http://", "https://")
        connector = aiohttp.TCPConnector(ssl=trusting())
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        client = await stack.enter_async_context(make_client(base_url, session=session))
        began = asyncio.get_running_loop().time()
        verdict, error = await verdict_of(client.submit(REQUEST, submit_grace=40))
        check_law(verdict, error, served)
        assert verdict is NOT_SENT
        assert (asyncio.get_running_loop().time() - began < 1) is (name in UNTRUSTED)
        assert error.retryable is (name not in UNTRUSTED)


async def test_a_request_over_tls_may_be_lost_like_any_other():
    """The handshake was good, and the answer never came."""
    context = served_by(AUTHORITY, "localhost")
    async with (
        service(accepts, ssl=context) as served,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting())) as session,
        make_client(served.base_url, session=session) as client,
    ):
        verdict, error = await verdict_of(client.submit(REQUEST))
        check_law(verdict, error, served)
        assert verdict is UNKNOWN


@pytest.mark.parametrize("place", [a_refusing_port, a_black_hole])
async def test_a_connection_that_is_not_made_sends_nothing(place):
    async with place() as base_url, make_client(base_url) as client:
        verdict, error = await verdict_of(client.submit(REQUEST, submit_grace=0))
        assert verdict is NOT_SENT
        assert error.retryable
        assert "not sent" in str(error)


@pytest.mark.parametrize("stalls", [False, True])
async def test_a_name_that_does_not_resolve_sends_nothing(stalls):
    connector = aiohttp.TCPConnector(resolver=Resolver(stalls=stalls))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        make_client("https://api.example", session=session) as client,
    ):
        verdict, _ = await verdict_of(client.submit(REQUEST, submit_grace=0))
        assert verdict is NOT_SENT


async def test_a_full_pool_sends_nothing():
    """A borrowed connector may hold the request back until its timeout."""
    async with (
        service(ends("stall", after="head")) as served,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session,
        make_client(served.base_url, session=session) as client,
    ):
        other = asyncio.create_task(session.post(served.base_url, data=b"x"))
        await asyncio.sleep(1)
        verdict, error = await verdict_of(client.submit(REQUEST, submit_grace=0))
        assert verdict is NOT_SENT
        assert "no connection within 30 s" in str(error)
        other.cancel()
        await asyncio.wait([other])


async def connect_refused(connection):
    await connection._reader.readuntil(b"\r\n\r\n")
    await connection.send(b"HTTP/1.1 407 Login\r\nContent-Length: 0\r\n\r\n")


async def connect_closed(connection):
    await connection._reader.readuntil(b"\r\n\r\n")


async def connect_stalled(connection):
    await connection.stall()


@pytest.mark.parametrize("script", [connect_refused, connect_closed, connect_stalled])
async def test_a_proxy_that_does_not_connect_sends_nothing(script):
    async with (
        service(script) as proxy,
        aiohttp.ClientSession(proxy=proxy.base_url) as session,
        make_client("https://api.example", session=session) as client,
    ):
        verdict, error = await verdict_of(client.submit(REQUEST, submit_grace=0))
        check_law(verdict, error, proxy)
        assert verdict is NOT_SENT


async def test_a_proxy_that_cannot_be_reached_sends_nothing():
    async with (
        a_refusing_port() as proxy,
        aiohttp.ClientSession(proxy=proxy) as session,
        make_client("http://api.example", session=session) as client,
    ):
        assert (await verdict_of(client.submit(REQUEST, submit_grace=0)))[0] is NOT_SENT


@pytest.mark.parametrize(
    ("script", "expected"),
    [losing(answer(b"no", status=502)), refusing(envelope(402)), (accepts, UNKNOWN)],
)
async def test_a_proxy_for_plain_http_is_judged_like_the_service(script, expected):
    """It has the whole request in its hands."""
    async with (
        service(script) as proxy,
        aiohttp.ClientSession(proxy=proxy.base_url) as session,
        make_client("http://api.example", session=session) as client,
    ):
        verdict, found = await verdict_of(client.submit(REQUEST, submit_grace=0))
        check_law(verdict, found, proxy)
        assert verdict is expected
        assert proxy.whole == 1


# --- middlewares of a borrowed session ----------------------------------------------------------


async def retrying(request, handler):
    """Send a request again after any failure, as peers do."""
    for _ in range(3):
        with contextlib.suppress(aiohttp.ClientError):
            response = await handler(request)
            if response.status < 500:
                return response
    return await handler(request)


async def following(request, handler):
    """Follow a redirect with the same body."""
    response = await handler(request)
    if response.status == 307:
        request.url = request.url.with_path("/elsewhere")
        response = await handler(request)
    return response


async def failing_before(request, handler):
    raise LookupError("no login")


async def failing_after(request, handler):
    await handler(request)
    raise LookupError("cannot log")


async def slow(request, handler):
    """Look at the answer for a while, as one that writes a log does."""
    response = await handler(request)
    await asyncio.sleep(1)
    return response


async def reading(request, handler):
    """Read the body, as one that signs requests does."""
    assert b"lighthouse" in await request.body.as_bytes()
    return await handler(request)


MIDDLEWARES = {
    "retries_a_lost_answer": (retrying, accepts, UNKNOWN),
    "retries_a_502": (retrying, answers(answer(status=502), made=True), UNKNOWN),
    "retries_a_good_one": (retrying, answers(envelope(data=CREATED), made=True), ACCEPTED),
    "follows_a_redirect": (following, answers(answer(status=307)), UNKNOWN),
    "fails_before": (failing_before, accepts, NOT_SENT),
    "fails_after": (failing_after, answers(envelope(data=CREATED), made=True), UNKNOWN),
    "is_slow": (slow, ends("close", after="whole", made=True, sends=AFTER_ID), ACCEPTED),
    "reads": (reading, answers(envelope(data=CREATED), made=True), ACCEPTED),
}


@pytest.mark.parametrize("name", MIDDLEWARES)
async def test_a_middleware_cannot_make_a_second_task(name):
    middleware, script, expected = MIDDLEWARES[name]
    async with (
        service(script) as served,
        aiohttp.ClientSession(middlewares=[middleware]) as session,
        make_client(served.base_url, session=session) as client,
    ):
        verdict, found = await verdict_of(client.submit(REQUEST, submit_grace=0))
        check_law(verdict, found, served)
        assert verdict is expected
        assert served.whole <= 1


async def test_a_kept_connection_that_is_closed_is_not_used():
    """The client's own creations have a connection each, so a dead one loses no answer."""
    connections = 0

    async def script(connection):
        nonlocal connections
        connections += 1
        await connection.make()
        await connection.send(envelope(data={"taskId": connection.service.made[-1]}))

    async with service(script) as served, make_client(served.base_url) as client:
        tasks = [await client.submit(REQUEST) for _ in range(5)]
        assert [task.task_id for task in tasks] == served.made
        assert connections == 5
        assert all("Connection: close" in head for head in served.heads)


# --- cancelled, and closed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "seconds"),
    [(ends("stall", after="head"), 1), (ends("stall", after="whole", made=True), 1)],
)
@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_what_is_given_up_in_the_middle_is_not_sent_again(script, seconds, how):
    """A cancelled call raises CancelledError; one of a closed client says that it is uncertain."""
    async with service(script) as served, make_client(served.base_url) as client:
        submission = asyncio.create_task(verdict_of(client.submit(REQUEST)))
        await asyncio.sleep(seconds)
        if how == "cancel":
            submission.cancel()
            with pytest.raises(asyncio.CancelledError):
                await submission
        else:
            await client.aclose()
            assert (await submission)[0] is UNKNOWN
        await asyncio.sleep(200)
        assert served.whole <= 1
        assert len(served.heads) == 1


# --- the hook before the hand-over ---------------------------------------------------------------


class DiskError(Exception):
    pass


@pytest.mark.parametrize("error", [DiskError("disk"), OSError(28, "disk"), TimeoutError("disk")])
async def test_what_the_hook_raises_reaches_the_caller_and_nothing_is_sent(error):
    async def hook():
        raise error

    async with service(accepts) as served, make_client(served.base_url) as client:
        with pytest.raises(type(error)) as caught:
            await client.submit(REQUEST, before_sending=hook)
        assert caught.value is error
        assert served.whole == 0


async def test_the_hook_runs_when_the_connection_stands_and_before_the_first_byte():
    seen = []

    async def hook():
        await asyncio.sleep(5)
        seen.append(served.whole + len(served.heads))

    script = answers(envelope(data=CREATED), made=True)
    async with service(script) as served, make_client(served.base_url) as client:
        await client.submit(REQUEST, before_sending=hook)
        assert seen == [0]
        assert served.made == ["task-1"]


async def test_a_hook_that_takes_too_long_sends_nothing():
    """Also if it ends at the moment of the timeout."""
    for seconds in (29.9, 30.0, 30.1):

        async def hook(seconds=seconds):
            await asyncio.sleep(seconds)

        script = answers(envelope(data=CREATED), made=True)
        async with service(script) as served, make_client(served.base_url) as client:
            verdict, found = await verdict_of(
                client.submit(REQUEST, submit_grace=0, before_sending=hook)
            )
            check_law(verdict, found, served)
            await asyncio.sleep(1)
            assert len(served.made) == (verdict is ACCEPTED)


async def test_a_second_login_is_a_configuration_error(tmp_path, monkeypatch):
    """A login for this host from netrc collides with the key."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine localhost login a password b")
    monkeypatch.setenv("NETRC", str(netrc))
    async with (
        service(accepts) as served,
        aiohttp.ClientSession(trust_env=True) as session,
        make_client(served.base_url, session=session) as client,
    ):
        with pytest.raises(ConfigurationError, match="netrc"):
            await client.submit(REQUEST)
        assert served.whole == 0
