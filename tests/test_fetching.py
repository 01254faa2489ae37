"""Asking image hosts: without the API key, and never at an address a stranger may choose."""

from __future__ import annotations

import asyncio
import contextlib
import math
import pickle
import socket
import ssl
import traceback

import aiohttp
import pytest
import trustme
from aioresponses import aioresponses
from hypothesis import given
from hypothesis import strategies as st
from raw_server import http, raw_server
from virtual_time import VirtualTimeLoop

from kontext_async import __version__
from kontext_async.results import DownloadError, ResultExpiredError
from kontext_async.results.images.fetching import (
    Attempt,
    Fetcher,
    _public_socket,
    failure,
    is_host_trouble,
    is_public,
)
from kontext_async.transport import pooled

pytestmark = pytest.mark.usefixtures("fetcher")
virtual_time = pytest.mark.virtual_time
NOWHERE = "https://api.invalid"


@contextlib.asynccontextmanager
async def fetching(base_url=NOWHERE, *, allow_private=False):
    fetcher = Fetcher(base_url, session=None, allow_private=allow_private)
    try:
        yield fetcher
    finally:
        await fetcher.aclose()


async def body_of(fetcher, url):
    with await fetcher.get(url, "t", Attempt(math.inf)) as response:
        return response.status, await response.content.read()


async def error_of(fetcher, url):
    with pytest.raises(DownloadError) as caught:
        await fetcher.get(url, "t", Attempt(math.inf))
    assert caught.value.task_id == "t"
    return caught.value


async def refusal_of(fetcher, url):
    error = await error_of(fetcher, url)
    assert error.retryable is False
    return str(error)


def redirect(location, status=302):
    return http(b"moved", f"Location: {location}", status=status)


@pytest.fixture
def names(monkeypatch):
    """Return the addresses of host names; a test fills it, and other names do not exist."""
    known = {}

    def getaddrinfo(host, port, *args, **kwargs):
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        families = {True: socket.AF_INET6, False: socket.AF_INET}
        return [
            (families[":" in ip], socket.SOCK_STREAM, 6, "", (ip, port) + (0, 0) * (":" in ip))
            for ip in known[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        *["93.184.216.34", "1.1.1.1", "172.32.0.1", "2606:4700::1111"],
        *["::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::1"],
    ],
)
def test_addresses_of_the_internet_are_public(address):
    """An IPv4 address counts also if an IPv6 address embeds it."""
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *["127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1"],
        *["169.254.169.254", "100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1"],
        *["240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1"],
        *["fd00:ec2::254", "fec0::1", "ff02::1", "ff0e::1", "2001:db8::1", "100::1", "5f00::1"],
        *["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1"],
        *["::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1"],
        *["1:2", "fe80::1%a%b", "images.example"],
        *["2002:7f00:1::1", "2002:c0a8:101::", "2001:0:4136:e378:8000:63bf:80ff:fffe"],
    ],
)
def test_all_other_addresses_are_not_public(address):
    """Loopback, private, link-local, shared, multicast, reserved, also embedded; and no address."""
    assert not is_public(address)


@pytest.mark.parametrize(
    ("family", "address"),
    [(socket.AF_INET, ("1.1.1.1", 443)), (socket.AF_INET6, ("2606:4700::1", 443, 0, 0))],
)
def test_a_public_address_gets_a_socket(family, address):
    """The socket is not connected yet."""
    with _public_socket((family, socket.SOCK_STREAM, 6, "", address)) as made:
        assert (made.family, made.type) == (family, socket.SOCK_STREAM)


def test_the_address_of_a_vpn_program_is_named():
    """Its resolver answers every name from one range, so no image could be saved."""
    made_up = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("198.18.3.7", 443))
    with pytest.raises(OSError, match=r"198\.18\.0\.0/15, which a VPN .* --allow-private"):
        _public_socket(made_up)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST"])
async def test_loopback_is_refused_before_anything_is_sent(host):
    """This holds for numbers and names; allow_private=True admits the same URL."""
    async with raw_server(http(b"image")) as server:
        url = f"http://{host}:{server.base_url.rpartition(':')[2]}/x"
        async with fetching() as fetcher:
            assert "no public address" in await refusal_of(fetcher, url)
        assert server.connections == 0
        async with fetching(allow_private=True) as fetcher:
            assert await body_of(fetcher, url) == (200, b"image")


@pytest.mark.parametrize(
    "host",
    [
        *["10.0.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0"],
        *["[fd00::1]", "[fe80::1%25lo]", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"],
    ],
)
async def test_private_and_link_local_addresses_are_refused(host):
    """Nothing is sent to them."""
    async with fetching() as fetcher:
        assert "no public address" in await refusal_of(fetcher, f"https://{host}/x")


async def test_an_address_that_only_the_resolver_reads_is_refused():
    """Python reads one zone in an address at most."""
    async with fetching() as fetcher:
        assert "no public address" in await refusal_of(fetcher, "https://[fe80::1%25a%25b]/x")


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.0.0.1."])
async def test_other_spellings_of_an_address_are_refused_too(host):
    """They are names here; if the resolver reads them as addresses the socket is refused."""
    async with fetching() as fetcher:
        await refusal_of(fetcher, f"https://{host}:1/x")
        await refusal_of(fetcher, f"http://{host}:1/x")


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["::1", "127.0.0.1"], ["10.0.0.1", "169.254.1.1", "fd00::1"]]
)
async def test_a_name_is_judged_by_its_addresses_at_the_connection(names, addresses):
    """The address is checked at the connection; several private addresses are refused too."""
    names["images.example"] = addresses
    async with fetching() as fetcher:
        text = await refusal_of(fetcher, "https://images.example/x")
    assert "images.example is refused" in text


async def test_a_name_may_resolve_to_another_address_the_next_time(names):
    """With DNS rebinding each connection is checked again."""
    async with raw_server(http(b"image")) as server:
        port = server.base_url.rpartition(":")[2]
        async with fetching(f"http://api.example:{port}") as fetcher:
            assert (await error_of(fetcher, f"https://images.example:{port}/")).retryable
            names["images.example"] = ["127.0.0.1"]
            await refusal_of(fetcher, f"https://images.example:{port}/")
            assert server.connections == 0
            names["api.example"] = ["127.0.0.1"]
            assert await body_of(fetcher, f"http://api.example:{port}/") == (200, b"image")


# Whom to ask


@virtual_time
async def test_the_apis_own_origin_may_be_at_any_address():
    """A simulator serves its own images; other ports of the same host are not trusted."""
    async with raw_server(http(b"image")) as server, raw_server(http(b"secret")) as neighbour:
        async with fetching(server.base_url + "/gate/way") as fetcher:
            assert await body_of(fetcher, server.base_url + "/x") == (200, b"image")
            await refusal_of(fetcher, neighbour.base_url + "/x")
        assert neighbour.connections == 0


@virtual_time
async def test_a_request_names_only_the_library():
    """It has no key, cookies or referrer, and asks for no compression."""
    answer = http(b"image", "Set-Cookie: a=b; Path=/")
    async with raw_server(answer) as server, fetching(server.base_url) as fetcher:
        await body_of(fetcher, server.base_url + "/x?signature=a%2Bb%3D")
        await body_of(fetcher, server.base_url + "/x?signature=a%2Bb%3D")
    first, second = server.heads
    line, *headers = first.strip().split("\r\n")
    assert line == "GET /x?signature=a%2Bb%3D HTTP/1.1"
    assert set(headers) == {
        f"Host: {server.base_url.removeprefix('http://')}",
        f"User-Agent: kontext-async/{__version__}",
        "Accept: image/*",
        "Accept-Encoding: identity",
    }
    assert second == first


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://images.invalid/x", "plain http"),
        ("http://93.184.216.34/x", "plain http"),
        ("http://127.0.0.1.images.invalid/x", "plain http"),
        ("http://localhost.images.invalid/x", "plain http"),
        ("https://user@images.invalid/x", "contains a user name or password"),
        ("https://:secret@images.invalid/x", "contains a user name or password"),
        ("file:///etc/passwd", "not http(s): file:"),
        ("ftp://images.invalid/x", "not http(s): ftp:"),
        ("data:image/png;base64,AAAA", "not http(s): data:"),
        ("javascript:alert(1)", "not http(s)"),
        ("//images.invalid/x", "not http(s)"),
        ("/etc/passwd", "not http(s)"),
        ("https:///x", "its URL is not valid"),
        ("https:x", "its URL is not valid"),
        ("", "not http(s)"),
        ("\ud800", "its URL is not valid"),
        ("http://[", "its URL is not valid"),
        ("https://images.invalid:99999/x", "its URL is not valid"),
        ("https://images.invalid:x/x", "its URL is not valid"),
        ("https://images.invalid\r\nX-A: b/x", "it contains a control character"),
        ("https://images.invalid/x\r\nX-A: b", "it contains a control character"),
        ("https://images.invalid/a\tb", "it contains a control character"),
        ("https://images.invalid/a?b\x7f", "it contains a control character"),
        ("https://images.invalid/\ud800", "its URL is not valid"),
        ("https://\ud800/x", "its URL is not valid"),
        ("https://a..b/x", "its URL is not valid"),
        ("https://.../x", "its URL is not valid"),
        ("https://xn--a/x", "its URL is not valid"),
        ("https://user:secret@ex\u2100mple.com/x", "contains a user name or password"),
        ("https://[::1]@", "contains a user name or password"),
        ("https://[127.0.0.1:443]/x", "its URL is not valid"),
        ("https://[localhost:443]/x", "its URL is not valid"),
        ("https://[localhost]/x", "its URL is not valid"),
        ("https://[2:443]/x", "its URL is not valid"),
        ("https://[1:2]/x", "its URL is not valid"),
        ("https://[v1.a:b]/x", "its URL is not valid"),
        ("https://exa mple.com/x", "its URL is not valid"),
        ("https://exa\\mple.com/x", "its URL is not valid"),
        (f"https://{'a' * 70}.invalid/x", "its URL is not valid"),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("allow_private", [False, True])
async def test_a_hostile_url_is_refused_and_not_retryable(url, said, allow_private):
    """No request is sent, and the error does not contain the password."""
    async with fetching(allow_private=allow_private) as fetcher:
        text = await refusal_of(fetcher, url)
    assert said in text
    assert "secret" not in text


# The text of a URL, which a host may have signed
SIGNED = [
    *["/a%2Fb%27c%3A?x=%2F&y=a+b%20c&z=%3d", "/a'b(c)!*?sig=A%2fb/:@", "/a/../b/./c", "/%7e~//"],
    *["/[x]|{y}?[a]=^b", "/?a=&&b", "/100%?x=%zz"],
]


@pytest.mark.parametrize("redirected", [False, True])
@pytest.mark.parametrize("target", SIGNED)
async def test_a_url_is_requested_as_it_is_written(target, redirected):
    """Re-encoding it would break a signature of its text, also after a redirect."""
    async with raw_server(http(b"image")) as server:
        url = f"{server.base_url}{target}"
        async with raw_server(redirect(url)) as first, fetching(allow_private=True) as fetcher:
            await body_of(fetcher, first.base_url + "/x" if redirected else url)
        assert server.heads[0].startswith(f"GET {target} HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("location", "want"),
    [("/a%2Fb?c=%27", "/a%2Fb?c=%27"), ("b%2Fc", "/d%3A/b%2Fc"), ("?e=%3A", "/d%3A/x?e=%3A")],
)
async def test_a_relative_redirect_is_requested_as_it_is_written(location, want):
    """The part that comes from the first URL is kept as well."""
    async with raw_server(redirect(location)) as server, fetching(server.base_url) as fetcher:
        await error_of(fetcher, f"{server.base_url}/d%3A/x")
        assert server.heads[1].startswith(f"GET {want} HTTP/1.1\r\n")


@pytest.mark.parametrize("redirected", [False, True])
@pytest.mark.parametrize(
    ("target", "sent"),
    [
        (b"/a b%20c?d e", "/a%20b%20c?d%20e"),
        ("/\u043a%2F?\xe9=%27".encode(), "/%D0%BA%2F?%C3%A9=%27"),
        (b"/\xe9%2F", "/%E9%2F"),
        (b"/x?a=b ", "/x?a=b"),
    ],
    ids=ascii,
)
async def test_only_what_cannot_be_sent_is_encoded(target, sent, redirected):
    """Spaces and other characters than ASCII's are percent-encoded; what is encoded stays so."""
    async with raw_server(http(b"image")) as server:
        head = f"HTTP/1.1 302 Status\r\nLocation: {server.base_url}".encode()
        answer = head + target + b"\r\nContent-Length: 0\r\n\r\n"
        text = server.base_url + target.decode(errors="surrogateescape")
        async with raw_server(answer) as first, fetching(allow_private=True) as fetcher:
            await body_of(fetcher, first.base_url + "/x" if redirected else text)
        assert server.heads[0].startswith(f"GET {sent} HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "host", ["B\xfccher.example", "xn--Bcher-kva.example", "b\xdccher.example"], ids=ascii
)
async def test_a_host_is_normalized(names, host):
    """The API's own origin is recognized by any spelling."""
    async with raw_server(http(b"image")) as server:
        port = server.base_url.rpartition(":")[2]
        names["xn--bcher-kva.example"] = ["127.0.0.1"]
        async with fetching(f"http://b\xfccher.example:{port}") as fetcher:
            await body_of(fetcher, f"http://{host}:{port}/%2F")
        want = f"GET /%2F HTTP/1.1\r\nHost: xn--bcher-kva.example:{port}\r\n"
        assert server.heads[0].startswith(want)


async def test_any_number_of_hosts_can_be_asked(names):
    """The API's own is recognized after many others; few of them are kept."""
    async with raw_server(http(b"image")) as server:
        names["api.example"] = ["127.0.0.1"]
        url = f"http://api.example:{server.base_url.rpartition(':')[2]}"
        async with fetching(url) as fetcher:
            for number in range(99):
                names[f"{number}.example"] = ["10.0.0.1"]
                await refusal_of(fetcher, f"https://{number}.example/x")
                assert await body_of(fetcher, url) == (200, b"image")
            assert len(fetcher._routes) < 20


# Redirects


@virtual_time
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["{base}/there", "/there", "there"])
async def test_a_redirect_is_followed(status, location):
    """The location may be absolute or relative; the connection is reused."""
    async with raw_server(http(b"image")) as there:
        answer = redirect(location.format(base=there.base_url), status)
        async with raw_server(answer) as here, fetching(allow_private=True) as fetcher:
            if location.startswith("{"):
                assert await body_of(fetcher, here.base_url + "/x/y") == (200, b"image")
                head = there.heads[0]
            else:
                await error_of(fetcher, here.base_url + "/x/y")  # for ever to itself
                head = here.heads[1]
                assert here.connections == 1
    want = "GET /x/there " if location == "there" else "GET /there "
    assert head.startswith(want)
    assert not {"authorization", "cookie", "referer"} & set(head.lower().replace(":", "").split())


@virtual_time
@pytest.mark.parametrize("location", ["/x", "", "?a", "#b"])
async def test_redirects_end(location):
    """Five are followed; one without a Location leads to the same URL."""
    async with raw_server(redirect(location)) as server, fetching(server.base_url) as fetcher:
        error = await error_of(fetcher, server.base_url + "/x")
    assert "more than 5 redirects" in str(error)
    assert (error.retryable, error.http_status, len(server.heads)) == (False, 302, 6)


@pytest.mark.parametrize(
    "location",
    [
        *["file:///etc/passwd", "http://images.invalid/x", "https://169.254.169.254/latest"],
        *["https://user:pass@images.invalid/x", "//10.0.0.1/x", "http://localhost:1/x", "http://["],
        *["gopher://127.0.0.1/x", "https://[::1]/x", "https://a..b/", "//\xff\xfe/x", "//[::1]@"],
        "http:x",
    ],
    ids=ascii,
)
async def test_a_redirect_to_a_forbidden_url_is_refused(location):
    """The rules for the first URL hold for the next."""
    async with raw_server(redirect(location)) as server, fetching(server.base_url) as fetcher:
        await refusal_of(fetcher, server.base_url + "/x")
        assert len(server.heads) == 1


async def test_a_redirect_to_another_server_here_is_refused():
    """The API's origin is trusted, the targets of its redirects are not."""
    async with raw_server(http(b"secret")) as inner, raw_server(redirect(inner.base_url)) as server:
        async with fetching(server.base_url) as fetcher:
            await refusal_of(fetcher, server.base_url + "/x")
        assert inner.connections == 0


async def test_cookies_are_not_stored():
    """A redirect could use them to track a client."""
    answer = http(b"", "Location: /x", "Set-Cookie: a=b; Path=/", status=302)
    async with raw_server(answer) as server, fetching(allow_private=True) as fetcher:
        await error_of(fetcher, server.base_url.replace("127.0.0.1", "localhost") + "/x")
    assert "cookie" not in "".join(server.heads).lower()


# Over the connector alone, or by the session


async def test_both_ways_send_the_same_request(monkeypatch):
    """Byte by byte."""
    async with raw_server(http(b"image")) as server:
        for has_all in (True, False):
            monkeypatch.setattr(pooled, "_has_all", lambda has_all=has_all: has_all)
            async with fetching(server.base_url) as fetcher:
                await body_of(fetcher, server.base_url + "/%2F?a=b%20c#d")
    assert len(server.heads) == 2
    assert server.heads[0] == server.heads[1]


@given(st.text())
def test_a_url_adds_nothing_to_a_request_but_itself(text):
    """No other line or header, whatever a stranger puts into it."""

    async def main():
        async with raw_server(http(b"image")) as server, fetching(server.base_url) as fetcher:
            with contextlib.suppress(DownloadError):
                await body_of(fetcher, f"{server.base_url}/{text}")
            for head in server.heads:
                lines = head.split("\r\n")
                method, target, version = lines[0].split(" ")
                assert (method, version, len(lines)) == ("GET", "HTTP/1.1", 7)
                assert target.isascii()
                assert target.isprintable()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())


async def test_a_tool_that_answers_for_every_session_answers_for_images():
    """From the moment it begins until it ends."""
    async with raw_server(http(b"image")) as server, fetching(server.base_url) as fetcher:
        url = server.base_url + "/x"
        assert await body_of(fetcher, url) == (200, b"image")
        with aioresponses() as replies:
            replies.get(url, body=b"another")
            assert await body_of(fetcher, url) == (200, b"another")
        assert await body_of(fetcher, url) == (200, b"image")
        assert len(server.heads) == 2


async def test_a_tool_that_traces_every_session_sees_the_requests(traced_paths):
    """As instrumentations do."""
    async with raw_server(http(b"image")) as server, fetching(server.base_url) as fetcher:
        await body_of(fetcher, server.base_url + "/x")
    assert traced_paths == ["/x"]


@pytest.mark.parametrize(("is_read", "connections"), [(True, 1), (False, 2)])
async def test_a_connection_is_used_again_if_its_body_was_read(is_read, connections):
    """The rest of a body would be taken for the next response."""
    async with raw_server(http(b"x" * 2**22)) as server, fetching(server.base_url) as fetcher:
        for _ in range(2):
            with await fetcher.get(server.base_url + "/x", "t", Attempt(math.inf)) as response:
                if is_read:
                    await response.content.read()
            assert not fetcher._any_address.connector._acquired
        assert server.connections == connections


# What fails


async def test_a_host_that_does_not_listen_is_retryable(unused_port):
    """A name that does not resolve now is retryable as well."""
    url = f"http://127.0.0.1:{unused_port}"
    async with fetching(url) as fetcher:
        error = await error_of(fetcher, url + "/x")
    assert error.retryable
    assert error.http_status is None
    assert isinstance(error.__cause__, OSError)


@pytest.fixture
def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]  # bound, and nobody listens


async def test_a_certificate_that_does_not_verify_is_final():
    """A retry would meet the same certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with (
        raw_server(http(b"image"), ssl=context) as server,
        fetching(server.base_url) as fetcher,
    ):
        assert "does not verify" in await refusal_of(fetcher, server.base_url + "/x")
        assert server.heads == []


@virtual_time
@pytest.mark.parametrize(
    "answer",
    [[None], [b"garbage\r\n\r\n"], [b"HTTP/1.1 200 OK\r\n", None], http(b"", "X: " + "x" * 70_000)],
    ids=["closed", "garbage", "half a head", "endless header"],
)
async def test_an_invalid_response_is_a_download_error(answer):
    """All of aiohttp's errors become a DownloadError."""
    async with raw_server(answer) as server, fetching(server.base_url) as fetcher:
        assert (await error_of(fetcher, server.base_url + "/x")).retryable


async def test_a_long_header_is_accepted():
    """Signed locations and policies of browsers may be longer than aiohttp's default of 8 KiB."""
    answer = http(b"image", "X: " + "x" * 60_000)
    async with raw_server(answer) as server, fetching(server.base_url) as fetcher:
        assert await body_of(fetcher, server.base_url + "/x") == (200, b"image")


def test_a_failure_names_its_exception():
    """An exception without a message is named by its type."""
    error = failure(aiohttp.ClientPayloadError("cut"), "t")
    assert str(error) == "task t: image not saved: ClientPayloadError: cut"
    assert str(failure(TimeoutError(), "t")).endswith("TimeoutError: no answer in time")


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503, 599])
def test_some_statuses_are_host_trouble(status):
    """They are about the host's state."""
    assert is_host_trouble(status)


@pytest.mark.parametrize("status", [200, 206, 304, 400, 403, 404, 410, 451, 499])
def test_other_statuses_are_not_host_trouble(status):
    """They are about the image or the request."""
    assert not is_host_trouble(status)


async def test_closing_closes_both_sessions_even_where_it_is_cancelled():
    """A cancellation of the first close does not leave the second open."""
    fetcher = Fetcher(NOWHERE, session=None, allow_private=False)
    closing = asyncio.create_task(cancelled_before(fetcher.aclose()))
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert fetcher._public_only.closed
    assert fetcher._any_address.closed
    await fetcher.aclose()


async def cancelled_before(coroutine):
    asyncio.current_task().cancel()
    await coroutine
    await asyncio.sleep(0)


# The errors


@pytest.mark.parametrize("kind", [DownloadError, ResultExpiredError])
def test_an_error_survives_pickling_with_all_it_carries(kind):
    """An error may cross processes."""
    error = kind("gone", task_id="t", http_status=404, retryable=False, retry_after=2.5)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), vars(copy)) == (str(error), vars(error))
    assert str(copy) == "task t: image not saved (HTTP 404): gone"


def test_an_error_is_one_line_whatever_a_host_put_into_it():
    """Control characters are replaced."""
    text = str(DownloadError("a\r\nb\x1b[2Jc\u202e" + "x" * 9999, task_id="t\n\x07"))
    assert text.isprintable()
    assert len(text) < 1000
    assert "\n" not in "".join(traceback.format_exception_only(DownloadError("a\nb"))).strip()


async def test_a_defect_of_its_own_session_is_not_hidden(monkeypatch):
    """Only a session of the user's own may raise anything."""
    async with fetching() as fetcher:

        async def broken(*args, **options):
            raise LookupError("a defect")

        monkeypatch.setattr(fetcher._public_only.connector, "connect", broken)
        with pytest.raises(LookupError, match="a defect"):
            await fetcher.get("https://images.example/a.png", "t", Attempt(math.inf))
