"""Replies, and the ways to send them, complete or broken."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, TypeAlias

import attrs
from aiohttp import HttpVersion11, web

__all__ = [
    "Connection",
    "Delivery",
    "Reply",
    "chunked",
    "close",
    "close_after",
    "envelope",
    "filled",
    "garble",
    "gzipped",
    "head_only",
    "http",
    "overrun",
    "refused",
    "reset",
    "reset_mid_body",
    "slow",
    "stall",
    "stall_mid_body",
    "truncate",
    "whole",
]

# SO_LINGER on, with no time to linger: closing sends RST instead of FIN.
_NO_LINGER = struct.pack("ii", 1, 0)


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


class Connection:
    """The connection that a request came on, to send its reply."""

    def __init__(self, request: web.BaseRequest, date: str) -> None:
        self._request = request
        self._date = date

    def head(self, reply: Reply, framing: str = "") -> bytes:
        """Return the status line and headers; ``framing`` replaces the Content-Length."""
        lines = [f"HTTP/1.1 {reply.status} {_reason(reply.status)}", f"Date: {self._date}"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        lines.append(framing or f"Content-Length: {len(reply.body)}")
        if not self._request.keep_alive:
            lines.append("Connection: close")
        elif self._request.version < HttpVersion11:
            lines.append("Connection: keep-alive")
        return "\r\n".join([*lines, "\r\n"]).encode("latin-1")

    async def send(self, data: bytes) -> None:
        """Send, and wait while the client is slow to read."""
        await self._request.writer.write(data)

    async def invite_body(self) -> None:
        """Send 100 Continue if the client waits for it before it sends the body."""
        is_waiting = self._request.headers.get("Expect", "").lower() == "100-continue"
        if is_waiting and self._request.version >= HttpVersion11:
            await self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        transport = self._request.transport
        if transport is not None:
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            transport.abort()


# Sends a reply; returns True if the connection can serve another request.
Delivery: TypeAlias = Callable[[Connection, "Reply"], Awaitable[bool]]


async def whole(connection: Connection, reply: Reply) -> bool:
    """Send the complete reply."""
    await connection.send(connection.head(reply) + reply.body)
    return True


async def head_only(connection: Connection, reply: Reply) -> bool:
    """Send the status and the headers, as the reply to a HEAD request."""
    await connection.send(connection.head(reply))
    return True


@attrs.frozen
class Reply:
    """An HTTP status, headers, a body, and how they are sent. As a step, it always gives itself.

    ``code`` is the envelope's code, for the request log; None where the body has no envelope.
    """

    status: int = 200
    headers: Mapping[str, str] = attrs.field(factory=dict[str, str])
    body: bytes = b""
    delivery: Delivery = attrs.field(default=whole, repr=False)
    code: int | None = None

    def __call__(self, _request: object) -> Reply:
        return self


_JSON = {"Content-Type": "application/json"}


def envelope(
    data: Any,
    *,
    code: int = 200,
    msg: str = "success",
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Wrap ``data`` in the API's JSON envelope."""
    body = json.dumps({"code": code, "msg": msg, "data": data}).encode()
    return Reply(status, {**_JSON, **headers} if headers else _JSON, body, code=code)


def refused(
    code: int,
    msg: str = "",
    *,
    status: int = 200,
    retry_after: float | None = None,
    data: Any = None,
) -> Reply:
    """Return an envelope with the error ``code``, sent with the HTTP status ``status``.

    An empty ``msg`` stands for the usual one. ``retry_after`` (s) becomes a Retry-After header,
    rounded up to a whole second.
    """
    headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
    msg = msg or _MESSAGES.get(code, "Error")
    return envelope(data, code=code, msg=msg, status=status, headers=headers)


def http(
    status: int,
    body: str | None = None,
    *,
    content_type: str = "text/html; charset=utf-8",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Return a reply without an envelope, as a gateway sends it; ``body`` None is an HTML page."""
    if body is None:
        body = f"<html><body><h1>{status} {_reason(status)}</h1></body></html>"
    return Reply(status, {"Content-Type": content_type, **(headers or {})}, body.encode())


_MESSAGES: Mapping[int, str] = {
    401: "You do not have access permissions",
    402: "Insufficient credits",
    403: "Forbidden",
    404: "Not Found",
    408: "Upstream timed out",
    422: "The request parameters failed validation",
    429: "Too many requests, please try again later",
    451: "Failed to fetch the image",
    455: "The system is under maintenance",
    500: "Server error",
    501: "Image generation failed",
    502: "Bad gateway",
    503: "Service unavailable",
    504: "Gateway timeout",
    505: "This feature is disabled",
    524: "The request timed out",
}


async def reset(connection: Connection, _reply: Reply) -> bool:
    """Reset the connection instead of replying."""
    connection.reset()
    return False


async def reset_mid_body(connection: Connection, reply: Reply) -> bool:
    """Reset the connection after half of the body."""
    await truncate(connection, reply)
    return await reset(connection, reply)


async def close(_connection: Connection, _reply: Reply) -> bool:
    """Close the connection without a reply."""
    return False


async def close_after(connection: Connection, reply: Reply) -> bool:
    """Send the complete reply, then close the connection without announcing it."""
    await whole(connection, reply)
    return False


async def stall(_connection: Connection, _reply: Reply) -> bool:
    """Send nothing until the client leaves or the simulator closes; either cancels this."""
    never: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    return await never


async def stall_mid_body(connection: Connection, reply: Reply) -> bool:
    """Send half of the body, then stall."""
    await truncate(connection, reply)
    return await stall(connection, reply)


async def truncate(connection: Connection, reply: Reply) -> bool:
    """Send half of the body, then close the connection."""
    await connection.send(connection.head(reply) + reply.body[: len(reply.body) // 2])
    return False


async def overrun(connection: Connection, reply: Reply) -> bool:
    """Send more bytes than the Content-Length announces."""
    await connection.send(connection.head(reply) + reply.body + b"\0" * 4096)
    return False


async def garble(connection: Connection, _reply: Reply) -> bool:
    """Send bytes that are not HTTP."""
    await connection.send(b"SSH-2.0-OpenSSH_9.9\r\n")
    return False


def slow(pause: float, pieces: int = 10) -> Delivery:
    """Send the body in ``pieces``, with ``pause`` seconds before each."""

    async def deliver(connection: Connection, reply: Reply) -> bool:
        await connection.send(connection.head(reply))
        for piece in _pieces(reply.body, -(-len(reply.body) // pieces) or 1):
            await asyncio.sleep(pause)
            await connection.send(piece)
        return True

    return deliver


def chunked(size: int = 0) -> Delivery:
    """Send the body in HTTP chunks, filled up with zeros to ``size`` bytes."""

    async def deliver(connection: Connection, reply: Reply) -> bool:
        await connection.send(connection.head(reply, "Transfer-Encoding: chunked"))
        for piece in _filled(reply.body, size):
            await connection.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        await connection.send(b"0\r\n\r\n")
        return True

    return deliver


def filled(size: int) -> Delivery:
    """Send the body filled up with zeros to ``size`` bytes, with that Content-Length."""

    async def deliver(connection: Connection, reply: Reply) -> bool:
        await connection.send(connection.head(reply, f"Content-Length: {size}"))
        for piece in _filled(reply.body, size):
            await connection.send(piece)
        return True

    return deliver


def gzipped(reply: Reply) -> Reply:
    """Return the reply with its body compressed."""
    return attrs.evolve(
        reply,
        headers={**reply.headers, "Content-Encoding": "gzip"},
        body=gzip.compress(reply.body, mtime=0),
    )


def _pieces(body: bytes, size: int) -> Iterator[bytes]:
    return (body[start : start + size] for start in range(0, len(body), size))


def _filled(body: bytes, size: int) -> Iterator[bytes]:
    yield from _pieces(body, 65536)
    left = size - len(body)
    while left > 0:
        yield bytes(min(left, 65536))
        left -= 65536
