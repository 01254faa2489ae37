"""The two ways to poll: what the lean one leans on, when it is used, and what both send."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import platform
import socket
import struct
import subprocess
import sys

import aiohttp
import pytest
from aioresponses import aioresponses
from client_world import KEY, error_of
from hypothesis import given
from hypothesis import strategies as st
from raw_server import http, raw_server
from virtual_time import VirtualTimeLoop

from kontext_async import KontextClient, KontextError, TaskStatus, TransportError
from kontext_async.transport import pooled
from kontext_async.transport.pooled import PooledFetcher
from kontext_async.transport.session import SessionFetcher


def make_client(base_url, **options):
    return KontextClient(KEY, base_url=base_url, **options)


def body_of(task_id="task", flag=0):
    record = {"taskId": task_id, "successFlag": flag}
    return json.dumps({"code": 200, "msg": "success", "data": record}).encode()


def fetcher_of(client):
    client._transport.check_open()
    return type(client._transport._fetcher)


# --- which of them is used ----------------------------------------------------------------------


async def test_this_aiohttp_has_what_the_lean_way_needs():
    """A client with a session of its own uses it."""
    async with make_client("http://127.0.0.1:9") as client:
        assert fetcher_of(client) is PooledFetcher


# Prints the pages that the system had to provide for 100 reads, before and with a client.
READS = """
import asyncio, resource, socket
from kontext_async import KontextClient

here, there = socket.socketpair()
memory = [bytearray(120_000) for _ in range(200)]  # leaves no block of 256 KiB

def provided():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        there.send(b"x")
        here.recv(256 * 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

async def main():
    first = provided()
    async with KontextClient("a-key", base_url="http://127.0.0.1:9"):
        print(first, provided())

asyncio.run(main())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_the_memory_of_reads_is_kept():
    """Without a client, most interpreters have the system provide it anew for each read."""
    command = [sys.executable, "-c", READS]
    without, kept = subprocess.run(command, check=True, capture_output=True).stdout.split()
    if int(without) < 100:
        pytest.skip("this interpreter has freed a larger block before")
    assert int(kept) < 50


@pytest.mark.parametrize("needed", pooled._NEEDED, ids=lambda n: f"{n[0].__name__}.{n[1]}")
@pytest.mark.parametrize("lacks", ["name", "parameter"])
async def test_an_aiohttp_that_lacks_a_part_is_used_by_its_sessions(monkeypatch, needed, lacks):
    """A name or a parameter may be gone in a later version."""
    parameters = pooled._NEEDED[needed]
    monkeypatch.delitem(pooled._NEEDED, needed)
    if lacks == "name":
        needed = (needed[0], "renamed")
    elif not callable(getattr(*needed)):
        pytest.skip("not callable")
    else:
        parameters = (*parameters, "renamed")
    monkeypatch.setitem(pooled._NEEDED, needed, parameters)
    monkeypatch.setattr(pooled, "_has_all", pooled._has_all.__wrapped__)
    async with (
        raw_server(http(body_of())) as server,
        make_client(server.base_url) as client,
    ):
        assert fetcher_of(client) is SessionFetcher
        assert (await client.record_info("task")).status is TaskStatus.GENERATING


async def test_a_session_of_the_users_own_is_used_with_all_its_features():
    """Its tracing, its proxies and its middlewares."""
    seen = []

    async def middleware(request, handler):
        seen.append(request.url.path)
        return await handler(request)

    async with (
        raw_server(http(body_of())) as server,
        aiohttp.ClientSession(middlewares=[middleware]) as session,
        make_client(server.base_url, session=session) as client,
    ):
        assert fetcher_of(client) is SessionFetcher
        await client.record_info("task")
    assert seen == ["/api/v1/flux/kontext/record-info"]


async def test_a_tool_that_traces_every_session_sees_the_polls(traced_paths):
    """As instrumentations do."""
    async with raw_server(http(body_of())) as server, make_client(server.base_url) as client:
        await client.record_info("task")
    assert traced_paths == ["/api/v1/flux/kontext/record-info"]


class _Pretending:
    """Wraps a function, and pretends to be it, as wrappers of instrumentations do."""

    def __init__(self, function, seen):
        self._function = function
        self._seen = seen

    __class__ = property(lambda self: type(self._function))
    __hash__ = None

    def __eq__(self, other):
        return self._function == other

    def __getattr__(self, name):
        return getattr(self._function, name)

    def __get__(self, session, owner):
        return functools.partial(self, session)

    def __call__(self, session, method, url, **options):
        self._seen.append(url.path)
        return self._function(session, method, url, **options)


def _wrapping(function, seen):
    @functools.wraps(function)
    async def wrapper(session, method, url, **options):
        seen.append(url.path)
        return await function(session, method, url, **options)

    return wrapper


@pytest.mark.parametrize("wrapped_by", [_Pretending, _wrapping])
async def test_a_tool_that_wraps_the_requests_of_every_session_sees_the_polls(
    monkeypatch, wrapped_by
):
    """Whatever the wrapper pretends to be."""
    seen = []
    wrapper = wrapped_by(aiohttp.ClientSession._request, seen)
    async with raw_server(http(body_of())) as server, make_client(server.base_url) as client:
        await client.record_info("task")
        monkeypatch.setattr(aiohttp.ClientSession, "_request", wrapper)
        await client.record_info("task")
    assert seen == ["/api/v1/flux/kontext/record-info"]


async def test_a_tool_that_answers_for_every_session_answers_the_polls():
    """From the moment it begins until it ends."""
    async with raw_server(http(body_of())) as server, make_client(server.base_url) as client:
        for is_mocked in (False, True, False):
            if is_mocked:
                with aioresponses() as replies:
                    url = f"{server.base_url}/api/v1/flux/kontext/record-info?taskId=task"
                    replies.get(url, body=body_of(flag=2))
                    assert (await client.record_info("task")).status is not TaskStatus.GENERATING
            else:
                assert (await client.record_info("task")).status is TaskStatus.GENERATING
        assert len(server.heads) == 2


# --- what they send -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "/gate%20way", "/ü"])
async def test_both_ways_send_the_same_request(monkeypatch, path):
    """Byte by byte, for an id that needs no encoding."""
    async with raw_server(http(body_of("a-Z_0.9~"))) as server:
        for has_all in (True, False):
            monkeypatch.setattr(pooled, "_has_all", lambda has_all=has_all: has_all)
            async with make_client(server.base_url + path) as client:
                await client.record_info("a-Z_0.9~")
    assert len(server.heads) == 2
    assert server.heads[0] == server.heads[1]


@given(st.text(min_size=1).filter(lambda text: text.isprintable() and text.strip()))
def test_an_id_adds_nothing_to_a_request_but_itself(task_id):
    """No other line, header or parameter, whatever is in it."""

    async def main():
        async with raw_server(http(body_of())) as server, make_client(server.base_url) as client:
            with contextlib.suppress(KontextError):  # the record is another task's
                await client.record_info(task_id)
            (head,) = server.heads
            lines = head.split("\r\n")
            method, target, version = lines[0].split(" ")
            assert (method, version, len(lines)) == ("GET", "HTTP/1.1", 9)
            assert target.count("&") == target.count("#") == 0
            assert target.count("?") == target.count("=") == 1

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())


# --- connections --------------------------------------------------------------------------------


class _Hasty:
    """Answers the first request of each connection, and closes it at the second."""

    def __init__(self, good, *, reset):
        self.good = good
        self.reset = reset
        self.connections = self.requests = 0

    async def serve(self, reader, writer):
        self.connections += 1
        for i in range(2):
            await reader.readuntil(b"\r\n\r\n")
            self.requests += 1
            if i >= self.good:
                break
            writer.write(http(body_of()))
        if self.reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()


@pytest.mark.usefixtures("fetcher")
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("good", "requests"), [(1, 3), (0, 2)])
async def test_a_request_whose_connection_was_closed_is_sent_again_once(reset, good, requests):
    """On a connection that served before, and on a new one; then the poll has failed."""
    hasty = _Hasty(good, reset=reset)
    async with await asyncio.start_server(hasty.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with make_client(f"http://127.0.0.1:{port}") as client:
            if good:
                await client.record_info("task")
                await client.record_info("task")
            else:
                error = await error_of(client.record_info("task"), TransportError)
                assert error.retryable
            assert hasty.requests == requests
            assert hasty.connections == 2
            assert not client._transport._session.connector._acquired


@pytest.mark.usefixtures("fetcher")
async def test_a_connection_with_more_than_the_answer_is_not_used_again():
    """Bytes after an answer would be taken for the answer to the next request."""
    answer = http(body_of()) + http(body_of("another"))
    async with raw_server(answer) as server, make_client(server.base_url) as client:
        for _ in range(3):
            assert (await client.record_info("task")).task_id == "task"
        assert server.connections == 3


@pytest.mark.usefixtures("fetcher")
async def test_a_connection_that_switches_protocols_is_not_used_again():
    """Nobody asked for it."""
    answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
    async with raw_server([answer, 0.1, None]) as server, make_client(server.base_url) as client:
        for _ in range(2):
            await error_of(client.record_info("task"))
        assert server.connections >= 2
        assert not client._transport._session.connector._conns


async def test_a_connection_that_is_closed_at_once_is_replaced(monkeypatch):
    """Between its making and the request; the second time the poll fails."""
    async with raw_server(http(body_of())) as server, make_client(server.base_url) as client:
        client._transport.check_open()
        connector = client._transport._session.connector
        connect, closed = connector.connect, []

        async def closed_at_once(*args):
            connection = await connect(*args)
            if len(closed) in (0, 2, 3):
                connection.transport.close()
            closed.append(connection)
            return connection

        monkeypatch.setattr(connector, "connect", closed_at_once)
        await client.record_info("task")
        assert len(closed) == 2
        error = await error_of(client.record_info("task"), TransportError)
        assert error.retryable
        assert len(closed) == 4
        assert not connector._acquired
