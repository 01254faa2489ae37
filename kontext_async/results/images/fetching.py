"""Asking image hosts: without the API key, and never at an address a stranger may choose."""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from typing import Any

import aiohttp
from yarl import URL

from kontext_async._version import __version__
from kontext_async.results.errors import DownloadError
from kontext_async.wire import retry_after

__all__ = ["Fetcher", "failure", "is_busy", "is_public", "refusal"]

_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# All that IANA gives out for the Internet at large; `is_global` takes site-local ones for global.
_GIVEN_OUT = ipaddress.IPv6Network("2000::/3")

# Seconds; the whole of a download has a deadline of its own.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the Internet at large, also where it wraps another."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        ip = _wrapped(ip) or ip
    if isinstance(ip, ipaddress.IPv6Address) and ip not in _GIVEN_OUT:
        return False
    return ip.is_global and not ip.is_multicast


def _wrapped(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])


class _AddressRefusedError(OSError):
    """Raised instead of connecting to an address that is not public."""


def _public_socket(info: tuple[int, int, int, str, tuple[Any, ...]]) -> socket.socket:
    """A socket for an address about to be connected to: whatever a name meant a moment ago."""
    family, kind, proto, _, address = info
    if not is_public(str(address[0])):
        # Without the address: where all of a name's are refused, only equal errors stay ours.
        raise _AddressRefusedError(
            errno.EACCES, "it has no public address (allow_private=True allows it)"
        )
    return socket.socket(family, kind, proto)


def _new_session(**options: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        # The saver's slots bound the connections.
        connector=aiohttp.TCPConnector(limit=0, **options),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={
            "User-Agent": f"kontext-async/{__version__}",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
        },
        timeout=_TIMEOUT,
        read_bufsize=2**18,  # the size of asyncio's own reads
    )


def _url(text: str, task_id: str) -> URL:
    try:
        url = URL(text)
        if url.host:  # raises where it cannot be read
            str(url.raw_host).encode("idna")  # as the resolver will, which lets the error through
    except ValueError as exc:
        raise _refused(f"its URL is none: {exc}", task_id) from exc
    return url


def _refused(problem: str, task_id: str, status: int | None = None) -> DownloadError:
    return DownloadError(problem, task_id=task_id, http_status=status, retryable=False)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Fetcher:
    """Sends requests for images, and follows their redirects.

    The API's own origin is asked wherever it is; all else at public addresses, and by https
    unless at loopback.
    """

    def __init__(self, base_url: str, *, allow_private: bool) -> None:
        self._api = URL(base_url).origin()
        # Not one session for both: it would lend the one's connections to the other.
        self._trusting = _new_session()
        self._wary = (
            self._trusting if allow_private else _new_session(socket_factory=_public_socket)
        )

    async def aclose(self) -> None:
        """Close all connections."""
        try:
            await self._wary.close()
        finally:
            await self._trusting.close()

    async def get(self, text: str, task_id: str) -> aiohttp.ClientResponse:
        """The answer at the end of all redirects, its body unread. Raises `DownloadError`."""
        url = _url(text, task_id)
        redirects = 0
        while (response := await self._get(url, task_id)).status in _REDIRECTS:
            async with response:
                location = response.headers.get("Location", "")
            if redirects == _MAX_REDIRECTS:
                raise _refused(f"more than {_MAX_REDIRECTS} redirects", task_id, response.status)
            redirects += 1
            url = url.join(_url(location, task_id))
        return response

    async def _get(self, url: URL, task_id: str) -> aiohttp.ClientResponse:
        session = self._session(url, task_id)
        try:
            return await session.get(url, allow_redirects=False)
        except (aiohttp.ClientError, OSError) as exc:
            raise failure(exc, task_id) from exc

    def _session(self, url: URL, task_id: str) -> aiohttp.ClientSession:
        """Whom to ask with; raises `DownloadError` for a URL that is not to be asked."""
        if url.scheme not in ("http", "https") or not url.host:
            raise _refused(f"its URL is not http(s): {url.scheme}:", task_id)
        if url.user is not None or url.password is not None:
            raise _refused(f"its URL at {url.host} holds a password", task_id)
        if url.origin() == self._api:
            return self._trusting
        if url.scheme == "http" and not _is_loopback(url.host):
            raise _refused(f"its URL at {url.host} is plain http", task_id)
        return self._wary


# Raised where the host is not who it should be, or must not be asked.
_FINAL = (aiohttp.ClientConnectorCertificateError, aiohttp.InvalidURL)


def failure(exc: Exception, task_id: str) -> DownloadError:
    """What a failed request or body is for the user."""
    if isinstance(exc, aiohttp.ClientConnectorError) and isinstance(
        exc.os_error, _AddressRefusedError
    ):
        return _refused(f"{exc.host} is refused: {exc.os_error.strerror}", task_id)
    said = "no answer in time" if isinstance(exc, TimeoutError) else str(exc)
    return DownloadError(
        f"{type(exc).__name__}: {said}", task_id=task_id, retryable=not isinstance(exc, _FINAL)
    )


def refusal(response: aiohttp.ClientResponse, task_id: str) -> DownloadError:
    """What a status that brings no image is for the user."""
    status = response.status
    return DownloadError(
        f"{response.host} has no image for us",
        task_id=task_id,
        http_status=status,
        retryable=is_busy(status) or status in (403, 404),
        retry_after=retry_after(response.headers, time.time()),
    )


def is_busy(status: int) -> bool:
    """Whether a status speaks of the host's state, not of the image."""
    return status >= 500 or status in (408, 425, 429)
