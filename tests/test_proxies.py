"""A proxy between the command and everything else, given by hand or by the environment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
import traceback
import warnings
from base64 import b64encode

import aiohttp
import pytest
import trustme
from command import COMMAND, environment
from pngs import plain_png
from raw_server import http, raw_server

from kontext_async import (
    CompletedTask,
    ConfigurationError,
    ImageRequest,
    KontextClient,
    KontextError,
    TransportError,
)
from kontext_async.cli.connection import connection
from kontext_async.results import DownloadError, ImageSaver, download
from kontext_async.simulator import Simulator

KEY = "marker-key-9b02"
PASSWORD = "marker-password-31"


async def tunnel(target, reader, writer):
    """Pass on what comes from either side, until one of them ends."""
    name, _, port = target.rpartition(":")
    there_in, there_out = await asyncio.open_connection(name, int(port))
    writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")

    async def copy(source, sink):
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
        sink.close()

    await asyncio.gather(copy(reader, there_out), copy(there_in, writer))


@contextlib.asynccontextmanager
async def proxy(refuse=False, drops_kept=False, connections=None):
    """Serve an HTTP proxy; give its port and the heads of the requests for it.

    ``drops_kept``: it offers to keep connections, and closes each at its second request.
    ``connections``: it keeps connections, and adds the methods of each to this list. Another
    process may still poll a server that had this port before: what asks for a path, and not for a
    URL or a host, is refused and not counted.
    """
    heads = []
    writers = set()

    async def forward(reader, writer):
        writers.add(writer)
        methods = []
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, target, _ = head.split("\r\n", 1)[0].split(" ")
                if target.startswith("/"):
                    writer.write(b"HTTP/1.1 400 Not for a proxy\r\nContent-Length: 0\r\n\r\n")
                    continue
                heads.append(head)
                methods.append(method)
                if connections is not None and len(methods) == 1:
                    connections.append(methods)
                if refuse:
                    writer.write(b"HTTP/1.1 407 Login, please\r\nContent-Length: 0\r\n\r\n")
                    continue
                if method == "CONNECT":
                    await tunnel(target, reader, writer)
                    break
                length = re.search(r"Content-Length: (\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                host, _, path = target.removeprefix("http://").partition("/")
                name, _, port = host.partition(":")
                there_in, there_out = await asyncio.open_connection(name, int(port))
                rest = head.split("\r\n", 1)[1].replace("keep-alive", "close")
                line = f"{method} /{path} HTTP/1.1\r\nConnection: close\r\n"
                there_out.write(f"{line}{rest}".encode() + body)
                answer = await there_in.read()
                there_out.close()
                if not drops_kept and connections is None:
                    writer.write(answer)
                    break
                writer.write(answer.replace(b"Connection: close", b"Connection: keep-alive", 1))
                if connections is not None:
                    continue
                await reader.readuntil(b"\r\n\r\n")
                break
        writer.close()

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], heads
    finally:
        server.close()
        for writer in writers:
            writer.close()


async def kontext(*arguments, **variables):
    """Run the command, and return its exit code, its results and its messages."""
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, *map(str, arguments)),
        env=environment(APIKLEY_API_KEY=KEY, **variables),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode, [json.loads(line) for line in out.splitlines()], err.decode()


@pytest.mark.parametrize("is_given", [True, False])
async def test_the_command_goes_through_a_proxy(is_given, tmp_path):
    """For polls and images, by --proxy or the environment; the password is in no output."""
    async with Simulator() as simulator, proxy() as (port, heads):
        task_id = simulator.add_task(duration=0, outcome="success")
        (tmp_path / "ids").write_text(task_id)
        url = f"http://user:{PASSWORD}@127.0.0.1:{port}"
        files = ("--from", tmp_path / "ids", "--into", tmp_path / "out")
        code, (line,), err = await kontext(
            *("batch", *files, "--verbose", "--base-url", simulator.base_url),
            *(("--proxy", url) if is_given else ()),
            **({} if is_given else {"HTTP_PROXY": url}),
        )
    assert code == 0, err
    assert line["file"]
    login = b64encode(f"user:{PASSWORD}".encode()).decode()
    assert len(heads) == 2
    assert all(f"Proxy-Authorization: Basic {login}" in head for head in heads)
    assert [KEY in head for head in heads] == [True, False]
    assert PASSWORD not in err + json.dumps(line)


@pytest.mark.parametrize("is_given", [True, False])
@pytest.mark.parametrize(
    ("command", "requests"),
    [
        (["credits"], 1),
        (["generate", "a boat", "--into", "{}", "--dry-run"], 1),
        (["generate", "a boat", "--into", "{}"], 3),
        (["edit", "https://example.com/a.png", "a boat", "--into", "{}"], 3),
    ],
    ids=["credits", "plan", "generate", "edit"],
)
async def test_commands_that_create_go_through_a_proxy(command, requests, is_given, tmp_path):
    """For the paid request, the poll and the image, by --proxy or the environment."""
    async with Simulator(durations=0.0) as simulator, proxy() as (port, heads):
        url = f"http://user:{PASSWORD}@127.0.0.1:{port}"
        code, lines, err = await kontext(
            *(word.format(tmp_path / "out") for word in command),
            *("--base-url", simulator.base_url),
            *(("--proxy", url) if is_given else ()),
            **({} if is_given else {"HTTP_PROXY": url}),
        )
        assert code == 0, err
        assert len(heads) == len(simulator.requests) == requests
    assert PASSWORD not in err + json.dumps(lines)


async def test_a_paid_request_has_a_connection_of_its_own(tmp_path):
    """A proxy that closes a kept connection at the next request loses no answer."""
    async with Simulator(durations=0.0) as simulator, proxy(drops_kept=True) as (port, _):
        code, lines, err = await kontext(
            *("generate", "a", "b", "c", "--into", tmp_path, "--creation-limit", "1/0.3"),
            *("--base-url", simulator.base_url, "--proxy", f"http://127.0.0.1:{port}"),
        )
    assert code == 0, err
    assert [line["outcome"] for line in lines].count("success") == 3


@pytest.mark.parametrize("is_given", [True, False])
async def test_all_but_paid_requests_reuse_connections(is_given, tmp_path):
    """Each POST has a connection of its own; polls and images have few for many."""
    connections = []
    async with (
        Simulator(durations=0.0) as simulator,
        proxy(connections=connections) as (port, _),
    ):
        url = f"http://127.0.0.1:{port}"
        code, _, err = await kontext(
            *("generate", *"abcdef", "--into", tmp_path, "--creation-limit", "1/0.2"),
            *("--base-url", simulator.base_url),
            *(("--proxy", url) if is_given else ()),
            **({} if is_given else {"HTTP_PROXY": url}),
        )
    assert code == 0, err
    assert connections.count(["POST"]) == 6
    rest = [methods for methods in connections if methods != ["POST"]]
    assert {method for methods in rest for method in methods} == {"GET"}
    assert sum(map(len, rest)) >= 12
    assert len(rest) <= 4


async def test_the_commands_session_reuses_connections_too(monkeypatch):
    """The same within one process: a task is created, and polled twice by one connection."""
    monkeypatch.setenv("APIKLEY_API_KEY", KEY)
    connections = []
    async with (
        Simulator(durations=0.0) as simulator,
        proxy(connections=connections) as (port, _),
        connection(
            base_url=simulator.base_url,
            api_key_file=None,
            allow_http=False,
            proxy=f"http://127.0.0.1:{port}",
            no_memory=True,
        ).open() as (client, session),
    ):
        task = await client.submit(ImageRequest(prompt="a boat"))
        for _ in range(2):
            await client.record_info(task.task_id)
        assert not session.closed
    assert connections == [["POST"], ["GET", "GET"]]
    assert session.closed


async def test_the_environment_may_except_hosts():
    """Those of NO_PROXY are asked directly."""
    async with Simulator() as simulator, proxy() as (port, heads):
        task_id = simulator.add_task(duration=0, outcome="success")
        variables = {"HTTP_PROXY": f"http://127.0.0.1:{port}", "NO_PROXY": "127.0.0.1"}
        code, _, err = await kontext("wait", task_id, "--base-url", simulator.base_url, **variables)
    assert (code, heads) == (0, []), err


@pytest.mark.parametrize("url", ["socks5://127.0.0.1:1", "127.0.0.1:8080", "http://", "http://["])
async def test_an_unusable_proxy_is_wrong_usage(url):
    """The message says what can be used, and does not quote what may hold a password."""
    code, _, err = await kontext("get", "t", "--proxy", url)
    assert code == 2
    assert "--proxy must be an http:// or https:// URL" in err
    assert "127.0.0.1" not in err


async def test_a_proxy_that_cannot_be_reached_or_refuses_is_named():
    """The message says that it was the proxy that said no."""
    async with proxy(refuse=True) as (port, _):
        for url, said in (
            ("http://127.0.0.1:9", "the proxy 127.0.0.1:9 cannot be reached: Connection refused"),
            (f"http://127.0.0.1:{port}", "the proxy refuses to forward: 407 Login, please"),
        ):
            async with (
                aiohttp.ClientSession(proxy=url) as session,
                KontextClient(KEY, base_url="https://127.0.0.1:8", session=session) as client,
            ):
                with pytest.raises(TransportError) as caught:
                    await client.record_info("t")
            assert said in str(caught.value)


async def test_images_use_a_session_of_the_users_own(tmp_path):
    """It is not closed, and serves a proxy; the key is in no request for an image."""
    async with Simulator() as simulator, proxy() as (port, heads):
        task_id = simulator.add_task(duration=0, outcome="success")
        async with (
            aiohttp.ClientSession(proxy=f"http://127.0.0.1:{port}") as session,
            KontextClient(KEY, base_url=simulator.base_url) as client,
        ):
            done = await client.wait_for_result(task_id)
            async with ImageSaver(client, tmp_path / "a", session=session) as saver:
                await saver.save(done)
            await download(client, done, tmp_path / "b", session=session)
            assert not session.closed
    assert len(heads) == 2
    assert all("User-Agent: kontext-async/" in head and KEY not in head for head in heads)


def tls():
    """Return a server's TLS and a client's that trusts it."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


async def test_through_a_tunnel_only_the_api_sees_the_key(tmp_path):
    """A proxy of an https API forwards what it cannot read, and image hosts get no key."""
    server, trusting = tls()
    async with (
        raw_server(http(b"{}"), ssl=server) as api,
        raw_server(http(plain_png(1, 1, b"abc")), ssl=server) as images,
        proxy() as (port, heads),
        aiohttp.ClientSession(
            proxy=f"http://user:{PASSWORD}@127.0.0.1:{port}",
            connector=aiohttp.TCPConnector(ssl=trusting),
        ) as session,
        KontextClient(KEY, base_url=api.base_url, session=session) as client,
    ):
        with pytest.raises(KontextError):
            await client.record_info("t")
        done = CompletedTask(task_id="t", result_image_url=f"{images.base_url}/x")
        await download(client, done, tmp_path, session=session, allow_private=True)
    assert [head.split(" ")[0] for head in heads] == ["CONNECT", "CONNECT"]
    assert KEY in api.heads[0]
    login = b64encode(f"user:{PASSWORD}".encode()).decode()
    for head in (*heads, *images.heads):
        assert KEY not in head
    for head in (*api.heads, *images.heads):
        assert login not in head


def everything_in(error):
    """Return all texts of an error and of what it was caused by."""
    texts = traceback.format_exception(error)
    while error is not None:
        texts += [repr(error), repr(error.args), repr(vars(error))]
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


@pytest.mark.parametrize("refuse", [True, False], ids=["refused", "untrusted"])
async def test_the_proxys_password_is_in_no_error(refuse, tmp_path, caplog):
    """Neither where the proxy refuses nor where the certificate behind it does not verify."""
    caplog.set_level("DEBUG")
    async with (
        raw_server(http(b"{}"), ssl=tls()[0]) as server,
        proxy(refuse=refuse) as (port, _),
        aiohttp.ClientSession(proxy=f"http://user:{PASSWORD}@127.0.0.1:{port}") as session,
        KontextClient(KEY, base_url=server.base_url, session=session) as client,
    ):
        done = CompletedTask(task_id="t", result_image_url=f"{server.base_url}/x")
        for failing in (
            client.record_info("t"),
            download(client, done, tmp_path, session=session, timeout=0.2),
        ):
            with pytest.raises(KontextError) as caught:
                await failing
            said = "the proxy refuses to forward: 407" if refuse else "does not verify"
            assert said in str(caught.value)
            assert PASSWORD not in everything_in(caught.value)
    assert PASSWORD not in caplog.text


def session_with_login():
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return aiohttp.ClientSession(auth=aiohttp.BasicAuth("a", "b"))


async def test_a_session_of_the_users_own_is_checked(tmp_path):
    """It must be a session without a login; an address in a URL must be public all the same."""
    async with KontextClient(KEY) as client:
        for session in ("no session", session_with_login()):
            with pytest.raises(ConfigurationError):
                ImageSaver(client, tmp_path, session=session)
        await session.close()


class Borrowed(aiohttp.BaseConnector):
    """A connector that raises what only its own library knows."""

    async def connect(self, *args, **options):
        raise LookupError("no such tunnel")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://10.0.0.1/a.png", "10.0.0.1 is refused: it has no public address"),
        ("https://198.18.0.9/a.png", "198.18.0.0/15, which a VPN"),
        *[
            (f"{scheme}://{host}/a.png", f"{host} is refused: it has no public address")
            for scheme, host in (
                *[("http", "localhost"), ("https", "localhost"), ("https", "localhost.")],
                *[("https", "127.1"), ("https", "2130706433"), ("https", "0x7f.1")],
                *[("https", "10.0.0.1."), ("https", "a.localhost")],
            )
        ],
        ("https://images.example/a.png", "LookupError: no such tunnel"),
    ],
)
async def test_what_a_borrowed_session_cannot_fetch_is_a_download_error(url, said, tmp_path):
    """No matter what its connector raises, and with an address that is written in the URL."""
    async with (
        Simulator() as simulator,
        aiohttp.ClientSession(connector=Borrowed()) as session,
        KontextClient(KEY, base_url=simulator.base_url) as client,
    ):
        done = await client.wait_for_result(simulator.add_task(duration=0, outcome="success"))
        done = type(done)(task_id="t", result_image_url=url)
        with pytest.raises(DownloadError) as caught:
            await download(client, done, tmp_path, session=session, timeout=0.5)
    assert said in str(caught.value)
