"""What an answer is, and the ways it can come over the wire, or fail to."""

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
from aiohttp import web

__all__ = [
    "Delivery",
    "Reply",
    "Wire",
    "chunked",
    "close",
    "close_after",
    "envelope",
    "filled",
    "garble",
    "gzipped",
    "http_reply",
    "overrun",
    "refusal",
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


class Wire:
    """The way back of one request."""

    def __init__(self, request: web.BaseRequest, date: str) -> None:
        self._request = request
        self._date = date

    def head(self, reply: Reply, framing: str = "") -> bytes:
        """The status line and headers; ``framing`` replaces the Content-Length."""
        lines = [f"HTTP/1.1 {reply.status} {_reason(reply.status)}", f"Date: {self._date}"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        lines.append(framing or f"Content-Length: {len(reply.body)}")
        return "\r\n".join([*lines, "\r\n"]).encode("latin-1")

    async def send(self, data: bytes) -> None:
        """Send, and wait while the client is slow to read."""
        await self._request.writer.write(data)

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        transport = self._request.transport
        if transport is not None:
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            transport.abort()


# Sends a reply its own way; True where the connection can serve another request.
Delivery: TypeAlias = Callable[[Wire, "Reply"], Awaitable[bool]]


async def whole(wire: Wire, reply: Reply) -> bool:
    """As it should be."""
    await wire.send(wire.head(reply) + reply.body)
    return True


@attrs.frozen
class Reply:
    """An answer: HTTP status, headers, body, and how it is sent.

    ``code`` is the envelope's code, for the request log; None where the body is no envelope.
    """

    status: int = 200
    headers: Mapping[str, str] = attrs.field(factory=dict[str, str])
    body: bytes = b""
    delivery: Delivery = attrs.field(default=whole, repr=False)
    code: int | None = None


_JSON = {"Content-Type": "application/json"}


def envelope(
    data: Any,
    *,
    code: int = 200,
    msg: str = "success",
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """The API's JSON envelope around ``data``."""
    body = json.dumps({"code": code, "msg": msg, "data": data}).encode()
    return Reply(status, {**_JSON, **headers} if headers else _JSON, body, code=code)


def refusal(
    code: int,
    msg: str = "",
    *,
    status: int = 200,
    retry_after: float | None = None,
    data: Any = None,
) -> Reply:
    """An envelope that says no with ``code``, in an HTTP answer of ``status``.

    ``retry_after`` (s) becomes a Retry-After header, rounded up to a whole second.
    """
    headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
    msg = msg or MESSAGES.get(code, "Error")
    return envelope(data, code=code, msg=msg, status=status, headers=headers)


def http_reply(
    status: int,
    body: str | None = None,
    *,
    content_type: str = "text/html; charset=utf-8",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """An answer that is no envelope, as a gateway gives it; ``body`` None: a page."""
    if body is None:
        body = f"<html><body><h1>{status} {_reason(status)}</h1></body></html>"
    return Reply(status, {"Content-Type": content_type, **(headers or {})}, body.encode())


# What the envelope says with a code.
MESSAGES: Mapping[int, str] = {
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


async def reset(wire: Wire, _reply: Reply) -> bool:
    """A TCP reset instead of an answer."""
    wire.reset()
    return False


async def reset_mid_body(wire: Wire, reply: Reply) -> bool:
    """A TCP reset after half of the body."""
    await wire.send(wire.head(reply) + reply.body[: len(reply.body) // 2])
    wire.reset()
    return False


async def close(_wire: Wire, _reply: Reply) -> bool:
    """The connection closed without an answer."""
    return False


async def close_after(wire: Wire, reply: Reply) -> bool:
    """A good answer, and then the connection closed, against what its headers say."""
    await wire.send(wire.head(reply) + reply.body)
    return False


async def stall(_wire: Wire, _reply: Reply) -> bool:
    """No answer until the client leaves or the simulator closes, each of which cancels this."""
    never: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    return await never


async def stall_mid_body(wire: Wire, reply: Reply) -> bool:
    """Half of the body, and then nothing more."""
    await wire.send(wire.head(reply) + reply.body[: len(reply.body) // 2])
    return await stall(wire, reply)


async def truncate(wire: Wire, reply: Reply) -> bool:
    """Half of the body, and then the connection closed."""
    await wire.send(wire.head(reply) + reply.body[: len(reply.body) // 2])
    return False


async def overrun(wire: Wire, reply: Reply) -> bool:
    """More bytes than the Content-Length says."""
    await wire.send(wire.head(reply) + reply.body + b"\0" * 4096)
    return False


async def garble(wire: Wire, _reply: Reply) -> bool:
    """Something that is not HTTP."""
    await wire.send(b"SSH-2.0-OpenSSH_9.9\r\n")
    return False


def slow(pause: float, pieces: int = 10) -> Delivery:
    """The body in ``pieces``, with ``pause`` seconds before each."""

    async def deliver(wire: Wire, reply: Reply) -> bool:
        await wire.send(wire.head(reply))
        for piece in _pieces(reply.body, -(-len(reply.body) // pieces) or 1):
            await asyncio.sleep(pause)
            await wire.send(piece)
        return True

    return deliver


def chunked(size: int = 0) -> Delivery:
    """The body in chunks of unannounced number, filled up with zeros to ``size`` bytes."""

    async def deliver(wire: Wire, reply: Reply) -> bool:
        await wire.send(wire.head(reply, "Transfer-Encoding: chunked"))
        for piece in _filled(reply.body, size):
            await wire.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        await wire.send(b"0\r\n\r\n")
        return True

    return deliver


def filled(size: int) -> Delivery:
    """The body filled up with zeros to ``size`` bytes, announced as such."""

    async def deliver(wire: Wire, reply: Reply) -> bool:
        await wire.send(wire.head(reply, f"Content-Length: {size}"))
        for piece in _filled(reply.body, size):
            await wire.send(piece)
        return True

    return deliver


def gzipped(reply: Reply) -> Reply:
    """The same reply with its body compressed."""
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
