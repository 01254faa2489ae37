"""Requests by a session's connector alone: a third of the CPU time of ``session.get``.

The connector's pool, DNS, TLS and response parser are aiohttp's. The request's bytes are ours.
aiohttp's public documentation does not cover all of this. So `_NEEDED` names what is used of it,
and `can_fetch` tells if this aiohttp has it: a connector's ``connect`` takes a `ClientRequest`,
traces and a `ClientTimeout` and returns a connection, which has ``transport``, ``protocol``,
``release`` and ``close``; its protocol is a `ResponseHandler`, whose ``read`` gives a message's
head and a `StreamReader`, after ``set_response_params``.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Mapping
from types import FunctionType
from typing import Final, NamedTuple
from urllib.parse import quote

import aiohttp
from aiohttp import StreamReader
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError, RawResponseMessage
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from kontext_async.transport.answers import Fetcher, RawAnswer, read_body
from kontext_async.transport.session import CONNECT_TIMEOUT, MAX_HEADER

__all__ = ["PooledAnswer", "PooledFetcher", "PooledRequests", "are_requests_replaced", "can_fetch"]

# What is used of aiohttp, each with the parameters that it is given.
_NEEDED: Final[Mapping[tuple[type, str], tuple[str, ...]]] = {
    (aiohttp.ClientRequest, "__init__"): ("method", "url", "headers", "loop", "session"),
    (aiohttp.ClientRequest, "connection_key"): (),
    (aiohttp.TCPConnector, "connect"): ("req", "traces", "timeout"),
    (Connection, "transport"): (),
    (Connection, "protocol"): (),
    (Connection, "release"): (),
    (Connection, "close"): (),
    (ResponseHandler, "set_response_params"): (
        "read_until_eof",
        "read_bufsize",
        "max_line_size",
        "max_field_size",
    ),
    (ResponseHandler, "read"): (),
    (StreamReader, "readany"): (),
    (StreamReader, "at_eof"): (),
}

# Tools that see or answer the requests of every session replace one of these.
_SESSION_METHODS: Final = ("get", "_request")


def can_fetch(session: aiohttp.ClientSession) -> bool:
    """Return True if nothing but the session's connector takes part in its requests.

    False if this aiohttp lacks something that is needed, and where a tool traces every session.
    """
    return _has_all() and not session.trace_configs


@functools.cache
def _has_all() -> bool:
    """Return True if this aiohttp has what is needed."""
    return all(_takes(getattr(owner, name, None), *p) for (owner, name), p in _NEEDED.items())


def _takes(member: object, *parameters: str) -> bool:
    if not callable(member):
        return member is not None and not parameters
    return set(parameters) <= set(inspect.signature(member).parameters)


def are_requests_replaced() -> bool:
    """Return True while a tool sees or answers the requests of every session."""
    own, members = aiohttp.client.__dict__, vars(aiohttp.ClientSession)
    for name in _SESSION_METHODS:
        method = members.get(name)
        # By the exact type, because a wrapper may pretend to be what it wraps.
        if type(method) is not FunctionType or method.__globals__ is not own:
            return True
    return False


class PooledAnswer(NamedTuple):
    """The head of an answer, its unread body, and the connection, which is to be released."""

    connection: Connection
    head: RawResponseMessage
    content: StreamReader


class PooledRequests:
    """GET requests to the origin of ``url``, by the connector of a session.

    ``read_bufsize``: half the bytes of a body that may wait to be read.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: URL,
        headers: Mapping[str, str],
        *,
        read_bufsize: int = 2**16,
    ) -> None:
        assert session.connector is not None, "the session is open"
        self._connector = session.connector
        self._read_bufsize = read_bufsize
        self._url = url
        # The connector reads the host and its options from it; it is never sent itself.
        self._request = aiohttp.ClientRequest(
            "GET", url, headers=headers, loop=asyncio.get_running_loop(), session=session
        )
        self._after_target = " HTTP/1.1\r\n{}\r\n\r\n".format(
            "\r\n".join(f"{name}: {value}" for name, value in self._request.headers.items())
        )
        _keep_read_buffers()

    async def get(self, target: str) -> PooledAnswer:
        """Send a request, and return its answer.

        ``target``: the path and query, percent-encoded.
        """
        try:
            return await self._get(target)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            # The server may have closed an idle connection. A GET may be sent twice (RFC 9110,
            # 9.2.2), and ``session.get`` does so in the same cases.
            return await self._get(target)

    async def _get(self, target: str) -> PooledAnswer:
        try:
            connection = await self._connector.connect(self._request, [], CONNECT_TIMEOUT)
        except TimeoutError as exc:
            raise aiohttp.ConnectionTimeoutError(f"no connection to {self._url.host}") from exc
        try:
            protocol = self._send(target, connection)
            head, content = await protocol.read()
            while 100 <= head.code <= 199 and head.code != 101:
                head, content = await protocol.read()
        except HttpProcessingError as exc:
            connection.close()
            raise aiohttp.ClientResponseError(
                aiohttp.RequestInfo(self._url, "GET", _NO_HEADERS),
                (),
                status=exc.code,
                message=exc.message,
            ) from exc
        except BaseException:
            connection.close()
            raise
        return PooledAnswer(connection, head, content)

    def _send(self, target: str, connection: Connection) -> ResponseHandler:
        """Send a request, and return what reads its answer."""
        transport, protocol = connection.transport, connection.protocol
        if transport is None or protocol is None or transport.is_closing():
            raise aiohttp.ServerDisconnectedError
        protocol.set_response_params(
            read_until_eof=True,
            read_bufsize=self._read_bufsize,
            max_line_size=MAX_HEADER,
            max_field_size=MAX_HEADER,
        )
        transport.write(f"GET {target}{self._after_target}".encode())
        return protocol


def _keep_read_buffers() -> None:
    """Let the allocator keep the memory that asyncio reads into, 256 KiB for each answer.

    glibc asks the system for each block of over 128 KiB, and returns it, until it has seen a
    larger one freed (mallopt(3), M_MMAP_THRESHOLD). That takes a tenth of a poll's CPU time.
    """
    bytes(1024 * 1024)


_NO_HEADERS: Final = CIMultiDictProxy(CIMultiDict[str]())


class PooledFetcher:
    """Fetches by the connector of a session; by ``fallback`` while a tool replaces its methods."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: URL,
        headers: CIMultiDict[str],
        fallback: Fetcher,
    ) -> None:
        self._requests = PooledRequests(session, endpoint, headers)
        self._before_id = f"{endpoint.raw_path}?taskId="
        self._fallback = fallback

    async def fetch(self, task_id: str) -> RawAnswer:
        if are_requests_replaced():
            return await self._fallback.fetch(task_id)
        # Percent-encoded, an id holds nothing that could end the line.
        target = f"{self._before_id}{quote(task_id, safe='')}"
        connection, head, content = await self._requests.get(target)
        try:
            body = await read_body(content)
        except BaseException:
            connection.close()
            raise
        connection.release()  # which closes one with more to read
        return RawAnswer(head.code, head.headers, body)
