"""Requests by a session's connector alone: a third of the CPU time of ``session.get``.

The connector's pool, DNS, TLS and response parser are aiohttp's. The request's bytes are ours,
made once, except for the task id. aiohttp's public documentation does not cover all of this. So
`_NEEDED` names what is used of it, and `can_fetch` tells if this aiohttp has it: a connector's
``connect`` takes a `ClientRequest`, traces and a `ClientTimeout` and returns a connection, which
has ``transport``, ``protocol``, ``release`` and ``close``; its protocol is a `ResponseHandler`,
whose ``read`` gives a message's head and a `StreamReader`, after ``set_response_params``.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from typing import Final
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

__all__ = ["PooledFetcher", "can_fetch"]

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
        "max_line_size",
        "max_field_size",
    ),
    (ResponseHandler, "read"): (),
    (StreamReader, "readany"): (),
    (StreamReader, "at_eof"): (),
}

# Tools that see or answer the requests of every session replace one of these.
_SESSION_METHODS: Final = ("get", "_request")


def _session_methods() -> list[object]:
    return [vars(aiohttp.ClientSession).get(name) for name in _SESSION_METHODS]


_OWN_METHODS: Final = _session_methods()


def can_fetch(session: aiohttp.ClientSession) -> bool:
    """Return True if nothing but the session's connector takes part in its requests.

    False if this aiohttp lacks something that is needed, and where a tool traces every session.
    """
    has_all = all(_takes(getattr(owner, name, None), *p) for (owner, name), p in _NEEDED.items())
    return has_all and not session.trace_configs


def _takes(member: object, *parameters: str) -> bool:
    if not callable(member):
        return member is not None and not parameters
    return set(parameters) <= set(inspect.signature(member).parameters)


class PooledFetcher:
    """Fetches by the connector of a session; by ``fallback`` while a tool replaces its methods."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: URL,
        headers: CIMultiDict[str],
        fallback: Fetcher,
    ) -> None:
        assert session.connector is not None, "the session is open"
        self._connector = session.connector
        self._fallback = fallback
        self._url = endpoint
        # The connector reads the host and its options from it; it is never sent itself.
        self._request = aiohttp.ClientRequest(
            "GET", endpoint, headers=headers, loop=asyncio.get_running_loop(), session=session
        )
        self._before_id = f"GET {endpoint.raw_path}?taskId="
        self._after_id = " HTTP/1.1\r\n{}\r\n\r\n".format(
            "\r\n".join(f"{name}: {value}" for name, value in self._request.headers.items())
        )

    async def fetch(self, task_id: str) -> RawAnswer:
        if _session_methods() != _OWN_METHODS:
            return await self._fallback.fetch(task_id)
        try:
            connection, head, content = await self._ask(task_id)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            # The server may have closed an idle connection. A GET may be sent twice (RFC 9110,
            # 9.2.2), and ``session.get`` does so in the same cases.
            connection, head, content = await self._ask(task_id)
        try:
            body = await read_body(content)
        except BaseException:
            connection.close()
            raise
        connection.release()  # which closes one with more to read
        return RawAnswer(head.code, head.headers, body)

    async def _ask(self, task_id: str) -> tuple[Connection, RawResponseMessage, StreamReader]:
        """Send a request; return its connection, and the answer's head and unread body."""
        try:
            connection = await self._connector.connect(self._request, [], CONNECT_TIMEOUT)
        except TimeoutError as exc:
            raise aiohttp.ConnectionTimeoutError(f"no connection to {self._url.host}") from exc
        try:
            head, content = await self._exchange(connection, task_id)
        except BaseException:
            connection.close()
            raise
        return connection, head, content

    async def _exchange(
        self, connection: Connection, task_id: str
    ) -> tuple[RawResponseMessage, StreamReader]:
        transport, protocol = connection.transport, connection.protocol
        if transport is None or protocol is None or transport.is_closing():
            raise aiohttp.ServerDisconnectedError
        protocol.set_response_params(
            read_until_eof=True, max_line_size=MAX_HEADER, max_field_size=MAX_HEADER
        )
        # Percent-encoded, an id holds nothing that could end the line.
        transport.write(f"{self._before_id}{quote(task_id, safe='')}{self._after_id}".encode())
        try:
            head, content = await protocol.read()
            while 100 <= head.code <= 199 and head.code != 101:
                head, content = await protocol.read()
        except HttpProcessingError as exc:
            raise aiohttp.ClientResponseError(
                aiohttp.RequestInfo(self._url, "GET", _NO_HEADERS),
                (),
                status=exc.code,
                message=exc.message,
            ) from exc
        return head, content


_NO_HEADERS: Final = CIMultiDictProxy(CIMultiDict[str]())
