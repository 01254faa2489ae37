"""The simulator's HTTP, as raw sockets and other clients see it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil

import pytest
from yarl import URL

from kontext_async.simulator import Simulator

GENERATE = "/api/v1/flux/kontext/generate"
KEY = "Authorization: Bearer k"


@contextlib.asynccontextmanager
async def connected(simulator):
    port = URL(simulator.base_url).port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


async def head_of(reader):
    """Return the status line and the headers of the next answer."""
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    return status, dict(line.split(": ", 1) for line in lines)


@pytest.fixture
async def simulator():
    async with Simulator() as simulator:
        simulator.add_task("t", duration=0)
        yield simulator


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("path", "status"), [("/images/t.png", 200), ("/images/x.png", 404), ("/nowhere", 404)]
)
async def test_the_answer_to_head_is_that_to_get_without_the_body(simulator, path, status):
    async with connected(simulator) as (reader, writer):
        heads = []
        for method in ("HEAD", "GET"):
            writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            heads.append(await head_of(reader))
        assert heads[0] == heads[1]
        assert heads[0][0].startswith(f"HTTP/1.1 {status} ")
        assert len(await reader.readexactly(int(heads[1][1]["Content-Length"]))) > 0


async def test_a_client_that_hangs_up_before_its_answer_leaves_no_word_in_the_log(
    simulator, caplog, monkeypatch
):
    """As a command does that is ended by Ctrl-C."""
    reply_to = simulator._reply

    async def hung_up_on(request, logged):
        reply = await reply_to(request, logged)
        request.transport.close()
        return reply

    monkeypatch.setattr(simulator, "_reply", hung_up_on)
    async with connected(simulator) as (reader, writer):
        writer.write(b"GET /images/t.png HTTP/1.1\r\nHost: x\r\n\r\n")
        assert not await reader.read()
    assert [logged.status for logged in simulator.requests] == [200]
    assert not simulator._running
    assert not caplog.records


@pytest.mark.virtual_time
async def test_a_fault_of_the_connection_meets_head_as_well(simulator):
    simulator.add_task("u", duration=0, image_script=["closed"])
    async with connected(simulator) as (reader, writer):
        writer.write(b"HEAD /images/u.png HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await reader.read() == b""


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("version", "asked", "told"),
    [
        ("1.0", "keep-alive", "keep-alive"),
        ("1.0", None, "close"),
        ("1.1", None, None),
        ("1.1", "close", "close"),
    ],
)
async def test_it_tells_what_becomes_of_the_connection(simulator, version, asked, told):
    line = f"Connection: {asked}\r\n" if asked else ""
    request = f"GET /nowhere HTTP/{version}\r\nHost: x\r\n{line}\r\n".encode()
    async with connected(simulator) as (reader, writer):
        writer.write(request)
        _, headers = await head_of(reader)
        assert headers.get("Connection") == told
        await reader.readexactly(int(headers["Content-Length"]))
        if told == "close":
            assert await reader.read() == b""
        else:
            writer.write(request)
            assert (await head_of(reader))[0].startswith("HTTP/1.1 404")


@pytest.mark.virtual_time
async def test_a_client_that_expects_it_is_told_to_send_its_body(simulator):
    body = json.dumps({"prompt": "a boat"}).encode()
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\n{KEY}\r\nContent-Length: {len(body)}\r\n"
    async with connected(simulator) as (reader, writer):
        writer.write(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        status, headers = await head_of(reader)
        assert status == "HTTP/1.1 200 OK"
        answer = json.loads(await reader.readexactly(int(headers["Content-Length"])))
    assert simulator.created == [answer["data"]["taskId"]]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize(
    "options",
    [
        ["-I", "{url}/images/t.png"],
        ["-0", "-H", "Connection: keep-alive", "{url}/images/t.png", "{url}/images/t.png"],
        ["-H", "Expect: 100-continue", "-H", KEY, "-d", '{{"prompt": "a"}}', "{url}" + GENERATE],
    ],
    ids=["head", "http_1.0", "expect"],
)
async def test_curl_is_at_ease_with_it(simulator, options):
    command = [option.format(url=simulator.base_url) for option in options]
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sSf", "--expect100-timeout", "30", "-m", "20", "-o", "/dev/null", *command),
        *("-o", "/dev/null", "-w", "%{http_code} %{num_connects} "),
        env={"no_proxy": "*", "PATH": "/usr/bin:/bin"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert errors == b""
    expected = "200 1 200 0 " if "-0" in options else "200 1 "
    assert output.decode() == expected
