"""A server with minimal overhead, in its own process.

It answers record-info and the peers' status requests with records of a task that took 15 s.
An id that begins with ``done`` is complete at every poll, and one with ``third`` at every third.
An id with ``never`` is never complete, and was created at its first poll.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any

_AGE = 20  # s since a finished task was created
_TOOK = 15  # s


def _time(unix: float) -> str:
    return datetime.fromtimestamp(int(unix), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _record(task_id: str, created: float, *, done: bool) -> dict[str, Any]:
    prompt = "A serene mountain landscape at sunrise, mist in the valleys, a lake, wide angle"
    name = "9b1f0c62d6f84cf3a34d3f5a7f0c2b1e.png"
    urls = {
        "originImageUrl": f"https://images.example.com/origin/2026/11/{name}",
        "resultImageUrl": f"https://images.example.com/result/2026/11/{name}",
    }
    data = {
        "taskId": task_id,
        "paramJson": json.dumps({"prompt": prompt, "aspectRatio": "16:9", "outputFormat": "png"}),
        "completeTime": _time(created + _TOOK) if done else None,
        "response": urls if done else None,
        "successFlag": int(done),
        "errorCode": None,
        "errorMessage": "" if done else None,
        "createTime": _time(created),
    }
    return {"code": 200, "msg": "success", "data": data}


def _video(task_id: str, created: float, *, done: bool) -> dict[str, Any]:
    return {
        "id": task_id,
        "object": "video",
        "model": "sora-2",
        "status": "completed" if done else "in_progress",
        "progress": 100 if done else 40,
        "created_at": int(created),
        "completed_at": int(created) + _TOOK if done else None,
        "prompt": "A serene mountain landscape at sunrise, mist in the valleys, a lake, wide angle",
        "seconds": "4",
        "size": "1280x720",
    }


def _queue_status(task_id: str, created: float, *, done: bool) -> dict[str, Any]:
    return {
        "status": "COMPLETED" if done else "IN_PROGRESS",
        "request_id": task_id,
        "logs": None,
        "metrics": {"inference_time": _TOOK} if done else {},
    }


def _queue_result(task_id: str, created: float, *, done: bool) -> dict[str, Any]:
    url = "https://images.example.com/result/2026/11/9b1f0c62d6f84cf3a34d3f5a7f0c2b1e.png"
    return {
        "images": [{"url": url, "width": 1280, "height": 720}],
        "seed": 42,
        "request_id": task_id,
    }


class _FastServer(asyncio.Protocol):
    """One connection. Each request is expected in one piece, as it comes on loopback."""

    polls: dict[bytes, int] = {}  # noqa: RUF012  # of all connections
    created: dict[bytes, float] = {}  # noqa: RUF012
    canned: dict[tuple[Any, ...], bytes] = {}  # noqa: RUF012  # this second's replies
    second = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        target = data[: data.index(b" HTTP/")].partition(b" ")[2]
        path, _, query = target.partition(b"?")
        if path.endswith(b"/record-info"):
            reply = self._poll(_record, query.removeprefix(b"taskId="))
        elif path.startswith(b"/v1/videos/"):
            reply = self._poll(_video, path.rpartition(b"/")[2])
        elif path.endswith(b"/status"):
            reply = self._poll(_queue_status, path.split(b"/")[-2])
        else:
            reply = self._reply(_queue_result, path.rpartition(b"/")[2], time.time(), done=True)
        self._transport.write(reply)

    def _poll(self, make: Any, task_id: bytes) -> bytes:
        now = time.time()
        if task_id.startswith(b"never"):
            return self._reply(make, task_id, self.created.setdefault(task_id, now), done=False)
        if task_id.startswith(b"third"):
            self.polls[task_id] = self.polls.get(task_id, 0) + 1
        done = self.polls.get(task_id, 3) % 3 == 0
        return self._reply(make, task_id, now - _AGE, done=done)

    def _reply(self, make: Any, task_id: bytes, created: float, *, done: bool) -> bytes:
        if int(time.time()) != _FastServer.second:
            _FastServer.second = int(time.time())
            self.canned.clear()
        key = (make, done, int(created))
        canned = self.canned.get(key)
        if canned is None:
            body = json.dumps(make("TASK-ID", created, done=done)).encode()
            head = f"Date: {formatdate(usegmt=True)}\r\nContent-Type: application/json\r\n"
            self.canned[key] = canned = head.encode() + b"Content-Length: %d\r\n\r\n" + body
        head, _, body = canned.partition(b"%d")
        body = body.replace(b"TASK-ID", task_id)
        return b"HTTP/1.1 200 OK\r\n" + head + str(len(body) - 4).encode() + body


async def _serve(base_url: Any) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_FastServer, "127.0.0.1", 0, backlog=4096)
    base_url.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await server.serve_forever()


def _main(base_url: Any) -> None:
    asyncio.run(_serve(base_url))


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Serve while the block runs; yields the base URL."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_main, args=(there,), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join()
