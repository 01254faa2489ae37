"""A service that creates tasks and fails at any stage of it, and the verdicts of a client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct

from client_world import KEY

from kontext_async import (
    ApiError,
    ImageRequest,
    KontextClient,
    KontextError,
    SubmissionUnknownError,
    TransportError,
)
from kontext_async.wire import Verdict

PROMPT = "a lighthouse that nobody else has ever asked for"
REQUEST = ImageRequest(prompt=PROMPT)


class Connection:
    """One connection to the service, as the script of a stage sees it."""

    def __init__(self, service, reader, writer):
        self.service = service
        self._reader = reader
        self._writer = writer
        self._left = 0

    async def head(self):
        """Read the request's head."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        self._left = int(re.search(r"(?i)content-length: (\d+)", head)[1])
        self.service.heads.append(head)

    async def get(self):
        """Read a request without a body."""
        await self._reader.readuntil(b"\r\n\r\n")

    async def half(self):
        """Read the head and half of the body."""
        await self.head()
        half = self._left // 2
        await self._reader.readexactly(half)
        self._left -= half

    async def whole(self):
        """Read the whole request, or what is left of it."""
        if not self._left:
            await self.head()
        await self._reader.readexactly(self._left)
        self.service.whole += 1

    async def make(self):
        """Read the whole request, and create the task."""
        await self.whole()
        task_id = f"task-{len(self.service.made) + 1}"
        self.service.made.append(task_id)
        return task_id

    async def send(self, data):
        self._writer.write(data)
        await self._writer.drain()
        await asyncio.sleep(0.01)  # it arrives before what comes next

    async def close(self):
        self._writer.close()

    async def reset(self):
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def stall(self):
        await asyncio.sleep(10_000)


class Service:
    """``whole`` counts the complete requests; ``made`` are the tasks they created."""

    def __init__(self, script):
        self._script = script
        self._running = set()
        self.heads = []
        self.whole = 0
        self.made = []

    async def serve(self, reader, writer):
        self._running.add(asyncio.current_task())
        try:
            await self._script(Connection(self, reader, writer))
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            self._running.discard(asyncio.current_task())
            writer.close()

    async def end(self):
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@contextlib.asynccontextmanager
async def service(script, **options):
    """Serve a stage's script on a loopback port, one run of it for each connection."""
    service = Service(script)
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0, **options)
    service.port = server.sockets[0].getsockname()[1]
    service.base_url = f"http{'s' if 'ssl' in options else ''}://localhost:{service.port}"
    try:
        yield service
    finally:
        server.close()
        await service.end()


def answer(body=b"", *headers, status=200, length=None):
    body = json.dumps(body).encode() if not isinstance(body, bytes) else body
    length = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status} Status", *headers, f"Content-Length: {length}", "", ""]
    return "\r\n".join(lines).encode() + body


def envelope(code=200, data=None, msg="message", status=200):
    return answer({"code": code, "msg": msg, "data": data}, status=status)


async def verdict_of(submission):
    """Return the verdict on a submission, with the task or the error."""
    try:
        return Verdict.ACCEPTED, await submission
    except SubmissionUnknownError as error:
        return Verdict.UNKNOWN, error
    except TransportError as error:
        return Verdict.NOT_SENT, error
    except ApiError as error:
        return Verdict.REFUSED, error


def check_law(verdict, found, service):
    """Nothing is denied that was made, and at most one whole request was sent."""
    if verdict in {Verdict.NOT_SENT, Verdict.REFUSED}:
        assert service.made == []
    if verdict is Verdict.NOT_SENT:
        assert service.whole == 0
    if verdict is Verdict.ACCEPTED:
        assert [found.task_id] == service.made
    assert len(service.made) <= 1
    if isinstance(found, KontextError):
        text = f"{found!r} {found}"
        assert PROMPT not in text
        assert KEY not in text


def make_client(base_url, **options):
    return KontextClient(KEY, base_url=base_url, allow_http=True, **options)
