"""Requests to image hosts: without the API key, and to public addresses only."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import re
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import Any, NamedTuple, Self
from urllib.parse import quote, urljoin

import aiohttp
import attrs
from multidict import CIMultiDictProxy
from yarl import URL

from kontext_async._version import __version__
from kontext_async.client import is_loopback
from kontext_async.results.errors import DownloadError
from kontext_async.transport import (
    CONNECT_TIMEOUT,
    MAX_HEADER,
    UNTRUSTED_SERVER,
    Deadline,
    PooledRequests,
    are_requests_replaced,
    can_fetch,
    describe_failure,
    safe_cause,
)
from kontext_async.wire import retry_after

__all__ = ["Attempt", "Fetcher", "Response", "failure", "is_host_trouble", "is_public", "refusal"]

_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PLAIN_URL = re.compile(r"https?://[!-~]+")
_CONTROL = re.compile(r"[\0-\x1f\x7f]")
_UNSENDABLE = re.compile(r"[^!-~]+")
# Scheme, authority, path and query of a URL (RFC 3986, appendix B).
_PARTS = re.compile(r"(?:([A-Za-z][A-Za-z0-9+.-]*):)?(?://([^/?#]*))?([^?#]*)(?:\?([^#]*))?")
# For benchmarks of networks (RFC 2544); "fake-IP" resolvers of VPN programs answer from it.
_FAKE = ipaddress.IPv4Network("198.18.0.0/15")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Global unicast by IANA; `is_global` is also True for site-local addresses.
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")

_HEADERS = {
    "User-Agent": f"kontext-async/{__version__}",
    "Accept": "image/*",
    "Accept-Encoding": "identity",
}
_MAX_SILENCE = 30.0  # s
# For sessions that may wait for other requests before they send one.
_BORROWED_TIMEOUT = aiohttp.ClientTimeout(sock_connect=10.0, sock_read=_MAX_SILENCE)
_MAX_ROUTES = 16  # that are kept: a batch's images come from few hosts
_READ_BUFSIZE = 2**18  # bytes: the size of asyncio's own reads


def is_public(address: str) -> bool:
    """Return True for a public IP address; one that embeds an IPv4 address is judged by that."""
    ip = _parsed(address)
    if isinstance(ip, ipaddress.IPv6Address):
        ip = _embedded(ip) or ip
    if isinstance(ip, ipaddress.IPv6Address) and ip not in _GLOBAL_UNICAST:
        return False
    return ip is not None and ip.is_global and not ip.is_multicast


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an address; None if Python cannot read it, also where a resolver can."""
    with suppress(ValueError):
        return ipaddress.ip_address(address)
    return None


def _embedded(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])


class _AddressRefusedError(OSError):
    """Raised instead of connecting to an address that is not public."""


def _problem(address: str) -> str:
    ip = _parsed(address)
    if ip is not None and ip in _FAKE:
        return (
            "it resolves to 198.18.0.0/15, which a VPN or proxy program on this machine makes up; "
            "if you trust it, allow private addresses (allow_private=True, --allow-private)"
        )
    return "it has no public address (allow_private=True or --allow-private allows it)"


def _public_socket(info: tuple[int, int, int, str, tuple[Any, ...]]) -> socket.socket:
    """Return a socket for an address, checked just before it is connected to."""
    family, kind, proto, _, address = info
    if not is_public(str(address[0])):
        # Without the address: aiohttp keeps the error of several addresses only if all are equal.
        raise _AddressRefusedError(errno.EACCES, _problem(str(address[0])))
    return socket.socket(family, kind, proto)


def _new_session(**options: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        # The saver's permits bound the connections.
        connector=aiohttp.TCPConnector(limit=0, **options),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def _parts(text: str) -> tuple[str, str, str, str]:
    parts = _PARTS.match(text)
    assert parts is not None, "all parts may be empty"
    scheme, authority, path, query = parts.groups("")
    return scheme, authority, path, query


def _absolute(text: str, task_id: str, base: str = "") -> str:
    """Return a URL as it is written, or joined to ``base``, which redirects to it."""
    if _PLAIN_URL.fullmatch(text):
        return text
    try:
        if _CONTROL.search(text):
            raise ValueError("it contains a control character")  # noqa: TRY301  # as below
        text.encode(errors="surrogateescape")  # as it will be sent
        text = text.strip(" ")
        return urljoin(base, text) if base and not _parts(text)[0] else text
    except ValueError as exc:
        raise _refused(f"its URL is not valid: {exc}", task_id) from exc


def _origin(scheme: str, authority: str, task_id: str) -> URL:
    """Return an origin, its host normalized. Raises `DownloadError` if it cannot be requested."""
    if scheme not in ("http", "https"):
        raise _refused(f"its URL is not http(s): {scheme}:", task_id)
    if "@" in authority:  # which no error may quote
        raise _refused("its URL contains a user name or password", task_id)
    try:
        origin = URL(f"{scheme}://{authority}")
        host = str(origin.raw_host or "")
        host.encode("idna")  # as the resolver will, without catching errors
        origin = origin.with_host(host)  # checks it, also one in brackets
        str(origin.host)  # raises if it cannot be decoded
    except (ValueError, IndexError) as exc:  # yarl raises either
        raise _refused(f"its URL is not valid: {exc}", task_id) from exc
    return origin


def _target(path: str, query: str) -> str:
    """Return a path and query as they are written, because a signature may cover their text.

    Only what cannot be sent is percent-encoded.
    """
    target = f"{path or '/'}?{query}" if query else path or "/"
    return _UNSENDABLE.sub(_percent_encoded, target)


def _percent_encoded(text: re.Match[str]) -> str:
    return quote(text[0], errors="surrogateescape")  # aiohttp reads headers so


def _refused(problem: str, task_id: str, status: int | None = None) -> DownloadError:
    return DownloadError(problem, task_id=task_id, http_status=status, retryable=False)


def _written_address(host: str) -> str | None:
    """Return the address that a host stands for without a resolver; None for any other name."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761
        return "127.0.0.1"
    with suppress(OSError):  # also reads 127.1, 0x7f.1 and 2130706433, as resolvers do
        return socket.inet_ntoa(socket.inet_aton(name))
    ip = _parsed(name)
    return None if ip is None else str(ip)


class Response(NamedTuple):
    """An image host's answer, its body unread. Its block releases the connection at the end."""

    host: str
    status: int
    headers: CIMultiDictProxy[str]
    content: aiohttp.StreamReader
    release: Callable[[], object]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    @property
    def content_length(self) -> int:
        """Bytes of the body as they are sent; 0 if that is not announced."""
        return int(self.headers.get("Content-Length", 0))


class Attempt(Deadline):
    """A request for an image, which ends by ``until``, and when its host is silent for too long."""

    __slots__ = ("_heard_at", "_now", "_until", "due")

    _heard_at: float | None

    def __init__(self, until: float) -> None:
        super().__init__()
        self._now = asyncio.get_running_loop().time
        self._until = until
        self.hear()
        self.due = self.ends_at()

    def hear(self) -> None:
        """Begin the silence anew: something was heard, or the host is waited for from now on."""
        self._heard_at = self._now()

    def pause(self) -> None:
        """Let the silence not be the host's, until it begins anew: something else is waited for."""
        self._heard_at = None

    def ends_at(self) -> float:
        """Return the loop's time at which to end it, as far as is known now."""
        heard_at = self._heard_at
        if heard_at is None:
            heard_at = self._now()
        return min(heard_at + _MAX_SILENCE, self._until)


@attrs.frozen
class _Route:
    """The way to an origin: the session's connector alone where that can be had, or the session."""

    origin: URL
    host: str
    session: aiohttp.ClientSession
    requests: PooledRequests | None
    is_borrowed: bool

    async def get(self, target: str, attempt: Attempt) -> Response:
        if self.requests is not None and not are_requests_replaced():
            connection, head, content = await self.requests.get(target)
            attempt.hear()
            return Response(self.host, head.code, head.headers, content, connection.release)
        timeout = CONNECT_TIMEOUT
        if self.is_borrowed:
            timeout = _BORROWED_TIMEOUT
            attempt.pause()
        answer = await self.session.get(
            URL(f"{self.origin}{target}", encoded=True),
            allow_redirects=False,
            raise_for_status=False,
            headers=_HEADERS,
            timeout=timeout,
            read_bufsize=_READ_BUFSIZE,
            max_line_size=MAX_HEADER,
            max_field_size=MAX_HEADER,
        )
        attempt.hear()
        return Response(self.host, answer.status, answer.headers, answer.content, answer.release)


class Fetcher:
    """Sends requests for images, and follows redirects.

    The API's own origin may be at any address. All other hosts must be at public addresses, and
    use https except at loopback. With a session of the user's own, only addresses that are written
    in a URL are checked.
    """

    def __init__(
        self, base_url: str, *, session: aiohttp.ClientSession | None, allow_private: bool
    ) -> None:
        self._api = URL(base_url).origin()
        self._allow_private = allow_private
        self._routes: dict[tuple[str, str], _Route] = {}
        self._own: list[aiohttp.ClientSession] = []
        if session is not None:
            self._any_address = self._public_only = session
            return
        # Two sessions, because one session would reuse connections between the two rules.
        self._any_address = self._public_only = _new_session()
        self._own.append(self._any_address)
        if not allow_private:
            self._public_only = _new_session(socket_factory=_public_socket)
            self._own.append(self._public_only)

    async def aclose(self) -> None:
        """Close all connections of the saver's own."""
        async with AsyncExitStack() as stack:
            for session in self._own:
                stack.push_async_callback(session.close)

    async def get(self, text: str, task_id: str, attempt: Attempt) -> Response:
        """Return the response after all redirects. Raises `DownloadError`.

        The caller ends the attempt when that is due.
        """
        url = _absolute(text, task_id)
        redirects = 0
        while (response := await self._get(url, task_id, attempt)).status in _REDIRECTS:
            with response:
                location = response.headers.get("Location", "")
            if redirects == _MAX_REDIRECTS:
                raise _refused(f"more than {_MAX_REDIRECTS} redirects", task_id, response.status)
            redirects += 1
            url = _absolute(location, task_id, base=url)
        return response

    async def _get(self, url: str, task_id: str, attempt: Attempt) -> Response:
        scheme, authority, path, query = _parts(url)
        route = self._route(scheme, authority, task_id)
        try:
            return await route.get(_target(path, query), attempt)
        except (aiohttp.ClientError, OSError) as exc:
            error, cause = failure(exc, task_id), safe_cause(exc)
        except Exception as exc:
            if self._own:
                raise
            # A connector or middlewares of the user's own may raise anything.
            error, cause = failure(exc, task_id), None
        raise error from cause  # after the block: aiohttp's may hold the password of a proxy

    def _route(self, scheme: str, authority: str, task_id: str) -> _Route:
        """Return the way to an origin; raises `DownloadError` if that is not allowed."""
        key = (scheme, authority)
        route = self._routes.get(key)
        if route is None:
            origin = _origin(scheme.lower(), authority, task_id)
            session = self._session(origin, task_id)
            is_borrowed = not self._own
            is_pooled = not is_borrowed and can_fetch(session)
            requests = _pooled(session, origin) if is_pooled else None
            route = _Route(origin, str(origin.host), session, requests, is_borrowed)
            if len(self._routes) >= _MAX_ROUTES:
                self._routes.clear()
            self._routes[key] = route
        return route

    def _session(self, origin: URL, task_id: str) -> aiohttp.ClientSession:
        """Return the session for an origin; raises `DownloadError` if that is not allowed."""
        if origin == self._api:
            return self._any_address
        host = str(origin.host)
        if origin.scheme == "http" and not is_loopback(host):
            raise _refused(f"its URL at {host} is plain http, not https", task_id)
        if not self._own and not self._allow_private:
            _check_written_address(host, task_id)
        return self._public_only


def _pooled(session: aiohttp.ClientSession, origin: URL) -> PooledRequests:
    return PooledRequests(session, origin, _HEADERS, read_bufsize=_READ_BUFSIZE)


def _check_written_address(host: str, task_id: str) -> None:
    address = _written_address(host)
    if address is not None and not is_public(address):
        raise _refused(f"{host} is refused: {_problem(address)}", task_id)


# A retry cannot help: the certificate does not verify, or the URL is not allowed.
_FINAL = (*UNTRUSTED_SERVER, aiohttp.InvalidURL)


def failure(exc: Exception, task_id: str) -> DownloadError:
    """Return the error of a request that failed, or of a body that broke off."""
    if isinstance(exc, aiohttp.ClientConnectorError) and isinstance(
        exc.os_error, _AddressRefusedError
    ):
        return _refused(f"{exc.host} is refused: {exc.os_error.strerror}", task_id)
    is_late = isinstance(exc, TimeoutError)
    said = f"{type(exc).__name__}: no answer in time" if is_late else describe_failure(exc)
    return DownloadError(said, task_id=task_id, retryable=not isinstance(exc, _FINAL))


def refusal(response: Response, task_id: str) -> DownloadError:
    """Return the error of a response without an image."""
    status = response.status
    return DownloadError(
        f"{response.host} did not return an image",
        task_id=task_id,
        http_status=status,
        retryable=is_host_trouble(status) or status in (403, 404),
        retry_after=retry_after(response.headers, time.time()),
    )


def is_host_trouble(status: int) -> bool:
    """Return True if a status is about the host's state, and not about the image."""
    return status >= 500 or status in (408, 425, 429)
