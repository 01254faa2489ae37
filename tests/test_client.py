"""The client's public face: its arguments, single polls, sessions, event loops, many waits."""

from __future__ import annotations

import asyncio
import copy
import enum
import gc
import json
import math
import pickle
import re

import aiohttp
import pytest
from aioresponses import aioresponses
from client_world import KEY, error_of, make_client
from raw_server import http, raw_server
from tenacity import wait_fixed

from kontext_async import (
    ApiError,
    ClientStateError,
    CompletedTask,
    ConfigurationError,
    DurationModel,
    GenerationFailedError,
    KontextClient,
    KontextError,
    MaintenanceError,
    RateLimit,
    RateLimitedError,
    ResponseFormatError,
    ServerError,
    TaskNotFoundError,
    TaskStatus,
    TransportError,
    WaitTimeoutError,
    __version__,
)
from kontext_async.simulator.replies import refused

virtual_time = pytest.mark.virtual_time


def refused_with(*args, **options):
    with pytest.raises(ConfigurationError) as caught:
        KontextClient(*args, **options)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


# --- arguments ----------------------------------------------------------------------------------


async def authorization_sent(*args, **options):
    async with (
        raw_server(http(status=404)) as server,
        KontextClient(*args, base_url=server.base_url, **options) as client,
    ):
        await error_of(client.record_info("task"), ApiError)
    (header,) = re.findall("(?m)^Authorization: (.*?)\r?$", server.heads[0])
    return header


async def test_the_key_comes_from_the_environment(monkeypatch):
    """If no argument gives one; it is read when the client is made."""
    monkeypatch.setenv("APIKLEY_API_KEY", "key-of-the-environment")
    assert await authorization_sent() == "Bearer key-of-the-environment"
    assert await authorization_sent("key-of-the-call") == "Bearer key-of-the-call"


async def test_white_space_around_a_key_is_stripped(monkeypatch):
    """Key files end in a newline."""
    monkeypatch.setenv("APIKLEY_API_KEY", "\t key-of-a-file\r\n")
    assert await authorization_sent() == "Bearer key-of-a-file"
    assert await authorization_sent("  key-of-the-call\n") == "Bearer key-of-the-call"


@pytest.mark.parametrize("key", ["", "   ", "\n"])
def test_a_client_without_a_key_says_how_to_give_one(monkeypatch, key):
    """Without an argument and a variable, or with blank ones."""
    monkeypatch.delenv("APIKLEY_API_KEY", raising=False)
    assert "APIKLEY_API_KEY" in refused_with()
    assert "APIKLEY_API_KEY" in refused_with(key)
    monkeypatch.setenv("APIKLEY_API_KEY", key)
    assert "APIKLEY_API_KEY" in refused_with()


@pytest.mark.parametrize("key", ["Bearer abc", "a\nb", "a\r\nX: y", "a\0b", "schlüssel", "a\x7f"])
def test_a_key_that_cannot_be_a_header_is_refused_without_showing_it(monkeypatch, key):
    """The message names the source, not the key."""
    message = refused_with(key)
    assert message.startswith("api_key")
    assert key not in message
    monkeypatch.setenv("APIKLEY_API_KEY", key.replace("\0", "\1"))
    assert refused_with().startswith("APIKLEY_API_KEY")


@pytest.mark.parametrize("key", [b"bytes", 5, ["list"]])
def test_a_key_that_is_not_a_str_is_refused_without_showing_it(key):
    """Such as bytes from a file opened in binary mode."""
    message = refused_with(key)
    assert "str" in message
    assert str(key) not in message


@pytest.mark.parametrize(
    ("base_url", "shown"),
    [
        ("https://api.example.com", "https://api.example.com"),
        ("https://api.example.com/", "https://api.example.com"),
        ("https://api.example.com//", "https://api.example.com"),
        ("https://api.example.com:8443/v2/", "https://api.example.com:8443/v2"),
        ("HTTPS://API.example.com", "https://api.example.com"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.1.2.3", "http://127.1.2.3"),
        ("http://localhost:8000/", "http://localhost:8000"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("https://[2001:db8::1]/api", "https://[2001:db8::1]/api"),
    ],
)
def test_a_base_url_may_be_https_or_plain_http_to_this_machine(base_url, shown):
    """With a port, a path, a trailing slash, an IPv6 address."""
    assert repr(KontextClient(KEY, base_url=base_url)) == f"<KontextClient {shown}>"


@pytest.mark.parametrize(
    "base_url",
    [
        "http://api.example.com",
        "http://10.0.0.1",
        "http://0.0.0.0",
        "http://localhost.example.com",
        "http://127.0.0.1.example.com",
        "http://[2001:db8::1]",
    ],
)
def test_plain_http_to_another_host_needs_allow_http(base_url):
    """The key would travel unencrypted."""
    assert "allow_http" in refused_with(KEY, base_url=base_url)
    assert base_url in repr(KontextClient(KEY, base_url=base_url, allow_http=True))


@pytest.mark.parametrize(
    "base_url",
    [
        "",
        "api.example.com",
        "//api.example.com",
        "https://",
        "https:///path",
        "ftp://api.example.com",
        "file:///etc/passwd",
        "https://user:password@api.example.com",
        "https://user@api.example.com",
        "https://:password@api.example.com",
        "https://api.example.com/?page=1",
        "https://api.example.com/#top",
        "https://api.example.com:99999",
        "https://api.example.com:port",
        "https://[::1",
        None,
        5,
        b"https://api.example.com",
    ],
)
@pytest.mark.parametrize("allow_http", [False, True])
def test_a_base_url_that_cannot_be_used_is_refused(base_url, allow_http):
    """Another scheme, no host, credentials, a query, a bad port, not a str."""
    message = refused_with(KEY, base_url=base_url, allow_http=allow_http)
    assert "base_url" in message
    assert "password" not in message.partition("no user")[0]


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, True, "30", None])
def test_a_request_timeout_is_a_positive_number_of_seconds(value):
    """A request has to end."""
    assert "request_timeout" in refused_with(KEY, request_timeout=value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "64", None])
def test_max_concurrency_is_a_positive_whole_number(value):
    """With 0 nothing would ever be sent."""
    message = refused_with(KEY, max_concurrency=value)
    assert message == f"max_concurrency must be an int of 1 or more, not {value!r}"


async def test_a_session_must_be_aiohttps_own(simulator):
    """Another object is refused when the client is made."""
    assert "ClientSession" in refused_with(KEY, session="session")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_a_session_with_credentials_is_refused():
    """They would collide with the key."""
    async with aiohttp.ClientSession(auth=aiohttp.BasicAuth("user", "word")) as session:
        assert "auth" in refused_with(KEY, session=session)


# --- a single poll ------------------------------------------------------------------------------


@virtual_time
@pytest.mark.parametrize(
    ("step", "status"),
    [
        ("generating", TaskStatus.GENERATING),
        ("success", TaskStatus.SUCCESS),
        ("success_no_url", TaskStatus.SUCCESS),
        ("failed_create", TaskStatus.CREATE_TASK_FAILED),
        ("failed", TaskStatus.GENERATE_FAILED),
        ("code_501_record", TaskStatus.GENERATE_FAILED),
    ],
)
async def test_record_info_returns_a_record_whatever_the_status(simulator, client, step, status):
    """A failed task is not a failed poll."""
    record = await client.record_info(simulator.add_task("task", script=[step]))
    assert (record.task_id, record.status) == ("task", status)


@virtual_time
@pytest.mark.parametrize(
    ("step", "kind"),
    [
        ("http_500", ServerError),
        ("code_429", RateLimitedError),
        ("not_visible", TaskNotFoundError),
        ("code_501", GenerationFailedError),
        ("truncated", TransportError),
        ("empty_200", ResponseFormatError),
        ("gateway_403", ApiError),
    ],
)
async def test_record_info_does_not_retry(simulator, client, step, kind):
    """Any error is raised, even one that a wait would retry."""
    error = await error_of(client.record_info(simulator.add_task("task", script=[step])))
    assert type(error) is kind
    assert error.task_id == "task"
    assert simulator.polls("task") == 1


@pytest.mark.parametrize("task_id", ["", " ", "a\nb", "a\x1b[0m", None, 5, b"task"])
async def test_a_task_id_that_is_not_one_is_refused_before_any_request(simulator, client, task_id):
    """Blank, unprintable, or not a str."""
    await error_of(client.record_info(task_id), ConfigurationError)
    await error_of(client.wait_for_result(task_id), ConfigurationError)
    assert not simulator.requests


async def pause(simulator, client, seconds, code=429):
    task_id = simulator.add_task(script=[refused(code, status=code, retry_after=seconds)])
    await error_of(client.record_info(task_id), ApiError)
    return len(simulator.requests)


@virtual_time
async def test_record_info_in_a_long_pause_raises_and_sends_nothing(simulator, client):
    """From any task that caused the pause; the error says how long it will last."""
    sent = await pause(simulator, client, 60, code=455)
    await asyncio.sleep(10)
    error = await error_of(client.record_info("task"), RateLimitedError)
    assert (error.http_status, error.task_id) == (None, "task")
    assert error.retry_after == pytest.approx(50)
    assert "not sent" in str(error)
    assert len(simulator.requests) == sent
    assert asyncio.get_running_loop().time() == 10


@virtual_time
async def test_record_info_waits_for_the_end_of_a_pause_shorter_than_request_timeout(
    simulator, client
):
    """By default of 30 s."""
    await pause(simulator, client, 29)
    record = await client.record_info(simulator.add_task(script=["generating"]))
    assert record.status is TaskStatus.GENERATING
    assert asyncio.get_running_loop().time() == pytest.approx(29)


@virtual_time
async def test_polls_in_a_pause_probe_it_one_at_a_time(simulator):
    """The first one meets the same refusal, and the pause is then too long for the others."""
    async with make_client(simulator, request_timeout=5.0) as client:
        refuse = refused(429, status=429, retry_after=4)
        task_id = simulator.add_task(script=[refuse, refuse])
        await error_of(client.record_info(task_id), RateLimitedError)
        polls = [client.record_info(task_id) for _ in range(3)]
        errors = await asyncio.gather(*polls, return_exceptions=True)
        assert {type(error) for error in errors} == {RateLimitedError}
        assert sorted(error.http_status or 0 for error in errors) == [0, 0, 429]
        assert [request.time for request in simulator.requests] == pytest.approx([0, 4])
        assert asyncio.get_running_loop().time() == pytest.approx(5)


@virtual_time
async def test_record_info_is_not_sent_under_an_exhausted_rate_limit(simulator):
    """An explicit rate limit has no permit within request_timeout."""
    async with make_client(simulator, rate_limit=RateLimit(1, 100.0)) as client:
        task_id = simulator.add_task(script=["generating"] * 9)
        await client.record_info(task_id)
        error = await error_of(client.record_info(task_id), RateLimitedError)
        assert error.retry_after == pytest.approx(100)
        await asyncio.sleep(80)
        await client.record_info(task_id)
    assert [request.time for request in simulator.requests] == pytest.approx([0, 100])


@virtual_time
async def test_record_info_is_not_sent_at_max_concurrency(simulator):
    """It waits for a permit for request_timeout at most."""
    async with make_client(simulator, max_concurrency=1, request_timeout=5.0) as client:
        stalled = simulator.add_task(script=["stall"] * 2)
        polls = []
        for _ in range(2):
            polls.append(asyncio.create_task(client.record_info(stalled)))
            await asyncio.sleep(0.5)
        error = await error_of(client.record_info("task"), RateLimitedError)
        assert asyncio.get_running_loop().time() == pytest.approx(6)
        assert (error.http_status, error.retry_after) == (None, None)
    errors = await asyncio.gather(*polls, return_exceptions=True)
    assert [type(error) for error in errors] == [TransportError, ClientStateError]
    assert len(simulator.requests) == 2


async def test_a_poll_without_a_permit_is_not_sent(client, monkeypatch):
    """`acquire` returns None if none came in time."""

    async def no_permit(at, **options):
        return None

    monkeypatch.setattr(client._transport, "acquire", no_permit)
    await error_of(client.record_info("task"), RateLimitedError)


# --- sessions -----------------------------------------------------------------------------------


@pytest.fixture
async def session():
    async with aiohttp.ClientSession() as session:
        yield session


@virtual_time
async def test_a_borrowed_session_that_is_closed_is_an_error(simulator, session):
    """Polls and waits end at once."""
    async with make_client(simulator, session=session) as client:
        await session.close()
        await error_of(client.record_info("task"), ClientStateError)
        await error_of(client.wait_for_result("task"), ClientStateError)


async def test_a_netrc_login_that_collides_with_the_key_is_an_error(
    simulator, tmp_path, monkeypatch
):
    """The session reads it with trust_env."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password word")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    async with (
        aiohttp.ClientSession(trust_env=True) as session,
        make_client(simulator, session=session) as client,
    ):
        error = await error_of(client.record_info("task"), ConfigurationError)
        assert "netrc" in str(error)


async def test_an_id_may_be_of_a_subclass_of_str(simulator, client):
    """Such as a member of a StrEnum: its plain value is the id."""
    one = simulator.add_task(duration=0.0, outcome="success")
    member = enum.StrEnum("Known", {"ONE": one}).ONE
    assert type((await client.record_info(member)).task_id) is str
    assert (await client.wait_for_result(member)).task_id == one
    (outcome,) = await client.wait_for_results([member])
    assert type(outcome.task_id) is str
    assert outcome.unwrap().task_id == one


@pytest.mark.parametrize("wrong", [{"rate_limit": (20, 10)}, {"durations": 5}])
def test_a_limit_or_model_of_another_type_is_refused(wrong):
    """A pair is a likely slip."""
    assert next(iter(wrong)) in refused_with(KEY, **wrong)


async def test_a_borrowed_session_is_left_open(simulator, session):
    """By leaving the block, and by aclose."""
    async with make_client(simulator, session=session) as client:
        await client.record_info(simulator.add_task(script=["generating"]))
    assert not session.closed
    client = make_client(simulator, session=session)
    await client.record_info(simulator.add_task(script=["generating"]))
    await client.aclose()
    async with session.get(simulator.base_url) as response:
        assert response.status == 404


@virtual_time
async def test_the_clients_own_session_is_made_at_first_use_and_closed(simulator):
    """A client that is never used opens nothing."""
    client = make_client(simulator)
    assert client._transport._session is None
    async with client:
        await client.record_info(simulator.add_task(script=["generating"]))
    assert client._transport._session.closed


@virtual_time
async def test_the_clients_headers_and_timeout_override_the_sessions(simulator):
    """Authorization, User-Agent and time limit are the client's; other headers stay."""
    headers = {"Authorization": "Basic dGhlaXJz", "User-Agent": "theirs", "X-Theirs": "kept"}
    timeout = aiohttp.ClientTimeout(total=0.01)
    answer = [0.5, http(status=404)]
    async with (
        raw_server(answer) as server,
        aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
        KontextClient(KEY, base_url=server.base_url, session=session) as client,
    ):
        await error_of(client.record_info("task"), ApiError)
    (head,) = server.heads
    assert f"Authorization: Bearer {KEY}\r\n" in head
    assert f"User-Agent: kontext-async/{__version__}\r\n" in head
    assert "X-Theirs: kept\r\n" in head
    assert "dGhlaXJz" not in head
    assert session.headers["User-Agent"] == "theirs"


@virtual_time
async def test_a_sessions_middlewares_and_tracing_see_each_request(simulator):
    """They are the user's way to watch and change requests."""
    seen = []

    async def middleware(request, handler):
        request.headers["X-Middleware"] = "here"
        response = await handler(request)
        seen.append(response.status)
        return response

    async def on_start(session, context, params):
        seen.append(params.url.query["taskId"])

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(on_start)
    async with (
        aiohttp.ClientSession(middlewares=[middleware], trace_configs=[trace]) as session,
        make_client(simulator, session=session) as client,
    ):
        await client.record_info(simulator.add_task("task", script=["generating"]))
    assert seen == ["task", 200]


@virtual_time
@pytest.mark.parametrize("exception", [ZeroDivisionError, ValueError])
async def test_an_exception_of_a_middleware_is_a_transport_error(simulator, exception):
    """It releases the permit, and names what was raised, without the key."""

    async def middleware(request, handler):
        raise exception(f"{KEY} is in here")

    async with (
        aiohttp.ClientSession(middlewares=[middleware]) as session,
        make_client(simulator, session=session, max_concurrency=1) as client,
    ):
        for _ in range(2):
            waiting = client.wait_for_result("task", error_grace=0)
            error = await error_of(waiting, TransportError)
            assert str(error) == f"task task: {exception.__name__}: *** is in here"
            assert (error.__cause__, error.__context__) == (None, None)
        assert client.stats.in_flight == client.stats.waits == 0


@virtual_time
async def test_a_session_that_raises_for_status_changes_nothing(simulator):
    """A status of 500 is decoded as always, and an envelope in it too."""
    async with (
        aiohttp.ClientSession(raise_for_status=True, auto_decompress=False) as session,
        make_client(simulator, session=session) as client,
    ):
        script = ["http_500", "html_502", "gzip", "success"]
        task_id = simulator.add_task(script=script)
        error = await error_of(client.record_info(task_id), ServerError)
        assert error.msg == "Server error"
        assert isinstance(await client.wait_for_result(task_id), CompletedTask)


@virtual_time
async def test_a_sessions_own_base_url_is_ignored(simulator):
    """The client's base_url is absolute."""
    async with (
        aiohttp.ClientSession(base_url="http://elsewhere.invalid/") as session,
        make_client(simulator, session=session) as client,
    ):
        await client.record_info(simulator.add_task(script=["generating"]))


@virtual_time
async def test_a_sessions_connection_limit_holds(simulator):
    """Below max_concurrency too; every wait has its result."""
    simulator._latency = 0.1
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=2)) as session,
        make_client(simulator, session=session, max_concurrency=20) as client,
    ):
        tasks = [simulator.add_task(duration=0.0) for _ in range(20)]
        await asyncio.gather(*map(client.wait_for_result, tasks))
        assert simulator.max_in_flight == 2
        assert asyncio.get_running_loop().time() == pytest.approx(1.0)


# --- loops and ends -----------------------------------------------------------------------------


def test_a_client_can_be_made_without_a_loop():
    """Such as at import time; it belongs to the loop of its first use."""
    client = KontextClient(KEY)

    async def use():
        await error_of(client.wait_for_result("task", timeout=-1), ConfigurationError)
        client._transport.check_open()
        await client._transport._session.close()

    asyncio.run(use())
    with pytest.raises(RuntimeError, match="loop"):
        asyncio.run(client.record_info("task"))
    with pytest.raises(ClientStateError, match="loop"):
        asyncio.run(client.wait_for_result("task"))
    with pytest.raises(ClientStateError, match="loop"):
        asyncio.run(client.__aenter__())
    with pytest.raises(ClientStateError, match="loop"):
        asyncio.run(client.aclose())


@virtual_time
async def test_a_closed_client_raises(simulator, client):
    """At every call except closing it again."""
    await client.aclose()
    await client.aclose()
    assert "closed" in repr(client)
    for use in (
        client.record_info("task"),
        client.wait_for_result("task"),
        client.wait_for_results(["task"]),
        client.__aenter__(),
        client.as_completed(["task"]).__aenter__(),
    ):
        assert "closed" in str(await error_of(use, ClientStateError))
    assert not simulator.requests
    assert client.stats.requests == 0


async def test_a_client_never_used_can_be_closed():
    """In any loop."""
    client = KontextClient(KEY)
    await client.aclose()
    await error_of(client.record_info("task"), ClientStateError)


@virtual_time
async def test_closing_from_another_task_ends_the_wait_inside_the_block(simulator):
    """The block ends with that error; closing again has no effect."""
    client = make_client(simulator)

    async def use():
        async with client:
            await client.wait_for_result(simulator.add_task(script=["stall"]))

    using = asyncio.create_task(use())
    await asyncio.sleep(1)
    await asyncio.gather(client.aclose(), client.aclose())
    await error_of(using, ClientStateError)
    assert asyncio.get_running_loop().time() == 1


@virtual_time
async def test_an_error_in_the_block_is_raised_and_the_client_closed(simulator, client):
    """As with any context manager."""
    with pytest.raises(ZeroDivisionError):
        async with client:
            raise ZeroDivisionError
    await error_of(client.record_info("task"), ClientStateError)


async def test_an_unclosed_client_is_noticed(simulator):
    """aiohttp's session warns when it is dropped."""
    reported = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    client = make_client(simulator)
    await client.record_info(simulator.add_task(script=["generating"]))
    connector = client._transport._session.connector
    with pytest.warns(ResourceWarning, match="Unclosed client session"):  # noqa: PT031  # one act
        del client
        gc.collect()
    assert [context["message"] for context in reported] == ["Unclosed client session"]
    reported.clear()
    await connector.close()


@virtual_time
async def test_stats_count_requests_and_errors(simulator, client):
    """By class, with refusals, the pause, and what is under way."""
    before = client.stats
    assert (before.requests, before.errors, before.waits, before.in_flight) == (0, {}, 0, 0)
    script = ["http_500", "truncated", "html_503_retry_after", "empty_200", "code_429", "failed"]
    task_id = simulator.add_task(script=script)
    await error_of(client.wait_for_result(task_id, wait=wait_fixed(1)), GenerationFailedError)
    stats = client.stats
    assert stats.requests == 6
    assert stats.errors == {
        "ServerError": 2,
        "TransportError": 1,
        "ResponseFormatError": 1,
        "RateLimitedError": 1,
    }
    assert (stats.rate_limited, stats.pause, stats.rate) == (1, 0, 1_000_000)


@virtual_time
async def test_stats_count_waits_and_requests_in_flight(simulator):
    """And the seconds of a pause."""
    async with make_client(simulator, max_concurrency=2, rate_limit=None) as client:
        waits = [
            asyncio.create_task(client.wait_for_result(simulator.add_task(script=["stall"])))
            for _ in range(5)
        ]
        await asyncio.sleep(1)
        assert (client.stats.waits, client.stats.in_flight, client.stats.rate) == (5, 2, None)
    await asyncio.gather(*waits, return_exceptions=True)
    async with make_client(simulator) as client:
        await pause(simulator, client, 60)
        await asyncio.sleep(20)
        assert client.stats.pause == pytest.approx(40)


def test_a_clients_repr_has_its_address_and_not_its_key():
    """The default address is the provider's."""
    client = KontextClient(KEY)
    assert repr(client) == "<KontextClient https://api.apikley.ru>"
    assert client.base_url == "https://api.apikley.ru"


# --- many at once -------------------------------------------------------------------------------


@virtual_time
@pytest.mark.parametrize("limit", [1, 7, 64])
async def test_no_more_requests_are_in_flight_than_allowed(simulator, limit):
    """And no fewer, if there is work for them."""
    simulator._latency = 0.1
    async with make_client(simulator, max_concurrency=limit) as client:
        tasks = [simulator.add_task(duration=0.0) for _ in range(100)]
        await asyncio.gather(*map(client.wait_for_result, tasks))
    assert simulator.max_in_flight == limit
    assert asyncio.get_running_loop().time() == pytest.approx(math.ceil(100 / limit) * 0.1)


@virtual_time
async def test_three_hundred_waits_each_get_their_own(simulator, client):
    """Their own record or error and their own events: retry states are not shared."""
    endings = ["success", "failed", "code_402", "code_422", "redirect"]
    events = {}

    async def one(number):
        task_id = f"task-{number}"
        script = ["generating"] * (number % 4) + ["not_found"] * (number % 3)
        simulator.add_task(task_id, script=[*script, endings[number % 5]])
        mine = events[task_id] = []
        try:
            done = await client.wait_for_result(
                task_id, wait=wait_fixed(1 + number % 7), on_event=mine.append
            )
        except KontextError as error:
            return error
        else:
            return done

    outcomes = await asyncio.gather(*map(one, range(300)))
    for number, outcome in enumerate(outcomes):
        task_id = f"task-{number}"
        assert outcome.task_id == task_id
        assert type(outcome) is {
            "success": CompletedTask,
            "failed": GenerationFailedError,
            "redirect": TransportError,
        }.get(endings[number % 5], type(outcome))
        assert getattr(outcome, "code", None) in {"code_402": [402], "code_422": [422]}.get(
            endings[number % 5], [None]
        )
        if isinstance(outcome, CompletedTask):
            assert outcome.result_image_url.endswith(f"/images/{task_id}.png")
        about = {(event.record or event.error).task_id for event in events[task_id]}
        assert about == {event.task_id for event in events[task_id]} == {task_id}
        assert len(events[task_id]) == number % 4 + number % 3 + 1


@virtual_time
@pytest.mark.parametrize("name", ["timeout", "error_grace", "not_found_grace", "batch_timeout"])
async def test_a_batch_checks_its_arguments_at_once(simulator, client, name):
    """As a single wait does."""
    with pytest.raises(ConfigurationError, match=name):
        client.as_completed(["task"], **{name: -1})
    await error_of(client.wait_for_results(["task"], **{name: -1}), ConfigurationError)
    assert not simulator.requests


# --- without a server ---------------------------------------------------------------------------


def url_of(task_id, base_url="https://api.apikley.ru"):
    return f"{base_url}/api/v1/flux/kontext/record-info?taskId={task_id}"


def payload(flag, **fields):
    data = {"taskId": "task12345", "successFlag": flag, **fields}
    return {"code": 200, "msg": "success", "data": data}


@pytest.fixture
def replies():
    with aioresponses() as replies:
        yield replies


async def test_the_providers_own_example_is_a_completed_task(replies):
    """At the provider's address."""
    replies.get(
        url_of("task12345"),
        payload=payload(
            1,
            paramJson=json.dumps({"prompt": "A serene mountain landscape"}),
            completeTime="2024-03-20T10:30:00Z",
            createTime="2024-03-20T10:25:00Z",
            response={
                "originImageUrl": "https://example.com/original.jpg",
                "resultImageUrl": "https://example.com/result.jpg",
            },
            errorCode=None,
            errorMessage="",
        ),
    )
    async with KontextClient(KEY) as client:
        done = await client.wait_for_result("task12345")
    assert done.result_image_url == "https://example.com/result.jpg"
    assert done.duration.total_seconds() == 300


@virtual_time
@pytest.mark.parametrize(
    "exception",
    [
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError("cut short"),
        aiohttp.ClientConnectionError("Connector is closed."),
        ConnectionResetError(104, "Connection reset by peer"),
        OSError("no route to host"),
        TimeoutError(),
        aiohttp.SocketTimeoutError("Timeout on reading data from socket"),
    ],
    ids=lambda exception: type(exception).__name__,
)
async def test_whatever_the_network_raises_is_translated_and_retried(replies, exception):
    """It is a `TransportError`, and the next poll has the result."""
    replies.get(url_of("task12345"), exception=exception)
    replies.get(url_of("task12345"), payload=payload(1, response={"resultImageUrl": "https://r"}))
    events = []
    async with KontextClient(KEY) as client:
        await client.wait_for_result("task12345", on_event=events.append)
    assert type(events[0].error) is TransportError
    assert events[1].error is None


@virtual_time
async def test_a_timeout_of_aiohttps_own_is_not_mistaken_for_the_deadline(replies):
    """A TimeoutError that neither the deadline nor request_timeout caused is a `TransportError`."""
    replies.get(url_of("task12345"), exception=TimeoutError(), repeat=True)
    async with KontextClient(KEY) as client:
        waiting = client.wait_for_result("task12345", timeout=20, error_grace=0)
        assert type(await error_of(waiting)) is TransportError


@virtual_time
async def test_durations_learned_by_one_client_serve_another(simulator):
    """The model is the user's to save."""
    model = DurationModel()
    async with make_client(simulator, durations=model) as client:
        await asyncio.gather(
            *(client.wait_for_result(simulator.add_task(duration=10.0)) for _ in range(30))
        )
    known = DurationModel.from_json(model.to_json())
    async with make_client(simulator, durations=known) as client:
        task_id = simulator.add_task(duration=10.0)
        await client.wait_for_result(task_id)
        assert simulator.polls(task_id) <= 6


@virtual_time
async def test_errors_survive_pickling_and_copying(simulator, client):
    """As a client raises them, without their causes."""
    script = ["http_500", "empty_200", "truncated", "code_501", "failed", "redirect", "code_455"]
    errors = []
    for step in script:
        task_id = simulator.add_task(script=[step] * 2)
        waiting = client.wait_for_result(task_id, error_grace=0, timeout=3)
        errors.append(await error_of(waiting))
    assert isinstance(errors[-1], WaitTimeoutError)
    assert isinstance(errors[-1].last_error, MaintenanceError)
    for error in errors:
        for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
            assert (type(twin), str(twin)) == (type(error), str(error))
            assert twin.__dict__.keys() == error.__dict__.keys()
