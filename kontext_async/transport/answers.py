"""An answer as it came, and the protocol of what fetches it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import aiohttp
from multidict import CIMultiDictProxy

from kontext_async.wire import MAX_BODY

__all__ = ["Fetcher", "RawAnswer", "read_body"]


class RawAnswer(NamedTuple):
    """The status, headers and body of an answer; a body above `MAX_BODY` is cut behind it."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes


class Fetcher(Protocol):
    """Asks for a task's record, once; aiohttp's own exceptions are raised as they are."""

    async def fetch(self, task_id: str) -> RawAnswer: ...


async def read_body(content: aiohttp.StreamReader) -> bytes:
    """Read a body, or as much of it as shows that it is too large."""
    body = await content.readany()
    if content.at_eof():
        return body
    pieces, size = [body], len(body)
    while size <= MAX_BODY and (piece := await content.readany()):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)
