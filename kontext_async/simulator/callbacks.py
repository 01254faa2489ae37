"""The simulator's callbacks: it calls the ``callBackUrl`` of a task when the task has ended."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import aiohttp
import attrs
from yarl import URL

from kontext_async.simulator.clock import Clock
from kontext_async.simulator.store import KeyedRandom
from kontext_async.simulator.tasks import Task, record_of

__all__ = ["CALLBACKS", "CallbackSender", "SentCallback"]

CALLBACKS: Sequence[str] = ("sent", "late", "twice", "lost", "early")

_LATE = 5.0  # s
_ANSWER_WITHIN = 15.0  # s, as documented
_RETRIES = 3
_RETRY_DELAY = 1.0  # s


@attrs.frozen
class SentCallback:
    """A callback that was sent: its task, address, time, and the HTTP status of the answer.

    The status is 0 where there was no answer.
    """

    task_id: str
    url: str
    time: float
    status: int


class CallbackSender:
    """Sends the callbacks of one simulator, to this machine only."""

    def __init__(
        self,
        *,
        clock: Clock,
        key: str | None,
        script: Iterable[str],
        lost_rate: float,
        random: KeyedRandom,
    ) -> None:
        script = list(script)
        for kind in script:
            if kind not in CALLBACKS:
                raise ValueError(f"there is no callback {kind!r}: one of {', '.join(CALLBACKS)}")
        self.sent: list[SentCallback] = []
        self._clock = clock
        self._key = key
        self._script: Iterator[str] = iter(script)
        self._lost_rate = lost_rate
        self._random = random
        self._sending: set[asyncio.Task[None]] = set()

    async def begin(self, task: Task, base_url: str) -> None:
        """Plan the callback of a task that was just created; an early one is sent at once."""
        url = json.loads(task.param_json).get("callBackUrl")
        if not isinstance(url, str) or not _is_loopback(url):
            return
        kind = next(self._script, None)
        if kind is None:
            lost = self._random.seeded(f"{task.task_id}/callback").random() < self._lost_rate
            kind = "lost" if lost else "sent"
        if kind == "lost":
            return
        if kind == "early":
            await self._send(task, url, base_url)
            return
        work = asyncio.get_running_loop().create_task(self._follow(task, url, base_url, kind))
        self._sending.add(work)
        work.add_done_callback(self._sending.discard)

    async def aclose(self) -> None:
        sending = list(self._sending)
        for work in sending:
            work.cancel()
        if sending:
            await asyncio.wait(sending)

    async def _follow(self, task: Task, url: str, base_url: str, kind: str) -> None:
        while not task.has_ended(self._clock.now):
            if task.duration is None:  # it ends with a poll
                await asyncio.sleep(0.1)
            else:
                await asyncio.sleep(max(task.created + task.duration - self._clock.now, 0.001))
        await asyncio.sleep(_LATE if kind == "late" else 0)
        for _ in range(2 if kind == "twice" else 1):
            await self._send(task, url, base_url)

    async def _send(self, task: Task, url: str, base_url: str) -> None:
        body = json.dumps(self._body(task, base_url)).encode()
        for attempt in range(1 + _RETRIES):
            if attempt:
                await asyncio.sleep(_RETRY_DELAY)
            status = await self._post(url, body, self._headers(task.task_id))
            self.sent.append(SentCallback(task.task_id, url, self._clock.now, status))
            if status == 200:
                return

    async def _post(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        try:
            async with (
                asyncio.timeout(_ANSWER_WITHIN),
                aiohttp.ClientSession() as session,
                session.post(url, data=body, headers=headers, allow_redirects=False) as response,
            ):
                return response.status
        except (aiohttp.ClientError, OSError):
            return 0

    def _headers(self, task_id: str) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            timestamp = str(int(self._clock.unix(self._clock.now)))
            message = f"{task_id}.{timestamp}".encode()
            digest = hmac.new(self._key.encode(), message, hashlib.sha256).digest()
            headers["X-Webhook-Timestamp"] = timestamp
            headers["X-Webhook-Signature"] = base64.b64encode(digest).decode()
        return headers

    def _body(self, task: Task, base_url: str) -> dict[str, Any]:
        if task.failure is not None:
            code, message = task.failure.error_code, task.failure.message
            return {"code": code, "msg": message, "data": {"taskId": task.task_id, "info": {}}}
        info: Any = record_of(task, self._clock.now, self._clock, base_url)["response"] or {}
        return {"code": 200, "msg": "success", "data": {"taskId": task.task_id, "info": info}}


def _is_loopback(url: str) -> bool:
    host = URL(url).host or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
