"""A server that sends the bytes that a test gives it, and keeps the requests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator


class RawServer:
    """``heads`` are the requests, unparsed. ``hung_up`` is set once a client has disconnected."""

    def __init__(self, answer):
        self._answers = answer if isinstance(answer, Iterator) else itertools.repeat(answer)
        self.heads = []
        self.connections = 0
        self.sent = 0
        self.hung_up = asyncio.Event()

    async def serve(self, reader, writer):
        self.connections += 1
        try:
            while True:
                self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
                await self._send(reader, writer)
        except (OSError, EOFError):
            self.hung_up.set()
        finally:
            writer.close()

    async def _send(self, reader, writer):
        answer = next(self._answers)
        for piece in [answer] if isinstance(answer, bytes) else answer:
            if piece is None:
                raise EOFError
            if isinstance(piece, float):
                await self._pause(reader, piece)
                continue
            writer.write(piece)
            self.sent += len(piece)
            await writer.drain()

    async def _pause(self, reader, seconds):
        with contextlib.suppress(TimeoutError):
            assert await asyncio.wait_for(reader.read(1), seconds) == b"", "an unexpected request"
            raise EOFError


@contextlib.asynccontextmanager
async def raw_server(answer, **options):
    """Serve on a free loopback port.

    ``answer`` is the reply to every request: bytes, or a sequence of bytes, pauses in seconds
    (float), and None to close the connection. An iterator gives a reply to each request.
    """
    raw = RawServer(answer)
    handlers = set()

    def begin(reader, writer):
        task = asyncio.get_running_loop().create_task(raw.serve(reader, writer))
        handlers.add(task)
        task.add_done_callback(handlers.discard)

    server = await asyncio.start_server(begin, "127.0.0.1", 0, **options)
    scheme = "https" if "ssl" in options else "http"
    raw.base_url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield raw
    finally:
        server.close()
        for task in handlers:
            task.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)


def http(body=b"", *headers, status=200):
    """Return a complete HTTP reply."""
    lines = [f"HTTP/1.1 {status} Status", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body
