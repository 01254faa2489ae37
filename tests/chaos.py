"""An API with every fault that waits have met, for a client's session on virtual time.

It replaces ``session.get`` alone, so that the client's own parsing, polling, pacing and batches
are at work, and a poll costs no socket.
"""

from __future__ import annotations

import asyncio
import bisect
import functools
import json
import math
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any

import aiohttp
import attrs
from client_world import KEY
from multidict import CIMultiDict

from kontext_async import (
    ApiError,
    ConfigurationError,
    GenerationFailedError,
    InvalidRequestError,
    KontextClient,
    KontextError,
    ResponseFormatError,
    ServerError,
    TaskNotFoundError,
    TransportError,
    WaitTimeoutError,
)
from kontext_async.simulator import FixedWindow, Limit, SlidingWindow, TokenBucket

__all__ = ["Chaos", "run_chaos"]

EPOCH = 1_700_000_000
REQUEST_TIMEOUT = 8.0
GRACE = 120.0
HTML = b"<html><head><title>Sorry</title></head><body><h1>A page</h1></body></html>"
NAN = '{"code": 200, "msg": "success", "data": {"taskId": "%s", "successFlag": NaN}}'
HUGE = '{"code": 200, "msg": "success", "data": {"taskId": "%s", "successFlag": 1%s}}'


@attrs.frozen
class Answer:
    """A reply as the client's session sees it; ``error`` is raised instead of a whole body."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = attrs.field(factory=dict[str, str])
    error: Exception | None = None
    before_body: bool = True  # when the error comes


class _Response:
    """The part of `aiohttp.ClientResponse` that a poll uses."""

    def __init__(self, answer: Answer, now: float) -> None:
        self.status = answer.status
        self.headers = CIMultiDict({"Date": http_date(now), **answer.headers})
        self.content = self
        self._answer = answer

    async def readany(self) -> bytes:
        if self._answer.error is not None:
            raise self._answer.error
        return self._answer.body

    def at_eof(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing to close."""


def http_date(second: float) -> str:
    return _http_date(int(second))


@functools.cache
def _http_date(second: int) -> str:
    return formatdate(EPOCH + second, usegmt=True)


@functools.cache
def iso(second: int) -> str:
    return datetime.fromtimestamp(EPOCH + second, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def envelope(data: Any, code: int = 200, msg: str = "success", status: int = 200) -> Answer:
    body = json.dumps({"code": code, "msg": msg, "data": data}).encode()
    return Answer(status, body, {"Content-Type": "application/json"})


def page(status: int, body: bytes = HTML, **headers: str) -> Answer:
    return Answer(status, body, {name.replace("_", "-"): text for name, text in headers.items()})


def broken_off() -> Answer:
    return Answer(error=aiohttp.ClientPayloadError("Response payload is not completed"))


def reset() -> Answer:
    return Answer(error=ConnectionResetError(104, "Connection reset by peer"), before_body=False)


def closed() -> Answer:
    return Answer(error=aiohttp.ServerDisconnectedError(), before_body=False)


Maker = Callable[["Task", float], Answer]

# Trouble of one poll, whatever the task.
TROUBLE: Sequence[Maker] = (
    *(lambda _t, _n, s=status: page(s) for status in (500, 502, 503, 504, 520, 524)),
    *(lambda _t, _n, s=status: page(s, b"") for status in (500, 503)),
    *(lambda _t, _n, s=status: page(s) for status in (400, 403, 408, 409, 421, 425)),
    *(lambda _t, _n, c=code: envelope(None, c, "Server error") for code in (408, 500, 502, 524)),
    lambda _t, _n: envelope(None, 500, "Server error", 500),
    lambda _t, _n: page(200),
    lambda _t, _n: page(200, b""),
    lambda _t, _n: page(200, b"[" * 5000),
    lambda _t, _n: page(200, b"[1, 2, 3]"),
    lambda _t, _n: page(200, b"\xff\xfe\x00" * 50),
    lambda _t, _n: envelope({"taskId": "another-task", "successFlag": 1}),
    lambda t, _n: envelope({"taskId": t.task_id, "successFlag": 7}),
    lambda t, _n: envelope({"taskId": t.task_id, "successFlag": True}),
    lambda t, _n: envelope({"taskId": t.task_id}),
    lambda _t, _n: envelope("pending"),
    lambda t, _n: page(200, (NAN % t.task_id).encode()),
    lambda t, _n: page(200, (HUGE % (t.task_id, "0" * 5000)).encode()),
    lambda _t, _n: broken_off(),
    lambda _t, _n: reset(),
    lambda _t, _n: closed(),
)
NOT_FOUND: Sequence[Maker] = (
    lambda _t, _n: envelope(None, 422, "The record does not exist"),
    lambda _t, _n: envelope(None, 422, "recordInfo is null"),
    lambda _t, _n: envelope(None, 404, "Not Found"),
    lambda _t, _n: envelope(None),
)
OUTAGES: Sequence[Maker] = (
    lambda _t, _n: page(503),
    lambda _t, _n: page(502),
    lambda _t, _n: envelope(None, 500, "Server error", 500),
    lambda _t, _n: reset(),
    lambda _t, _n: closed(),
)
REFUSALS: Sequence[Callable[[float], Answer]] = (
    lambda _wait: envelope(None, 429, "Too many requests", 429),
    lambda _wait: envelope(None, 429, "Too many requests"),
    lambda wait: page(429, Retry_After=str(math.ceil(wait))),
    lambda wait: page(503, Retry_After=str(math.ceil(wait))),
)
LIMITS: Sequence[Callable[[random.Random], Limit | None]] = (
    lambda _: None,
    lambda _: None,
    lambda draw: SlidingWindow(draw.choice((100, 200)), 1.0),
    lambda draw: FixedWindow(draw.choice((1000, 2000)), 10.0),
    lambda draw: TokenBucket(draw.choice((20, 100)), draw.choice((100.0, 200.0))),
)


@attrs.define
class Kind:
    """The tasks of a kind: their share, the end of their waits, and their last answer.

    ``final`` is None for the tasks that succeed.
    """

    share: float
    error: type[KontextError] | None
    final: Maker | None
    code: int | None = None
    at_once: bool = False  # the final answer comes from the first poll on
    shaky: bool = True  # other faults come before the end


def failed(flag: int = 3, code: Any = 501, envelope_code: int = 200) -> Maker:
    return lambda t, now: envelope(
        {**t.record(now), "successFlag": flag, "errorCode": code, "errorMessage": "sorry"},
        envelope_code,
    )


def flagged(*, names_task: bool) -> Maker:
    return lambda t, _n: envelope({"taskId": t.task_id} if names_task else None, 400, "flagged")


def final(share: float, error: type[KontextError], answer: Answer, code: int | None) -> Kind:
    return Kind(share, error, lambda _t, _n: answer, code, at_once=True, shaky=False)


def broken(share: float, error: type[KontextError], answer: Maker) -> Kind:
    return Kind(share, error, answer, at_once=True, shaky=False)


KINDS: dict[str, Kind] = {
    "healthy": Kind(0.0, None, None),
    "failed": Kind(0.03, GenerationFailedError, failed(), 501),
    "not_created": Kind(0.01, GenerationFailedError, failed(2, "500"), 500),
    "failed_in_500": Kind(0.01, GenerationFailedError, failed(3, 500, 500), 500),
    "failed_in_501": Kind(0.01, GenerationFailedError, failed(3, None, 501)),
    "flagged": Kind(0.01, GenerationFailedError, flagged(names_task=False), 400),
    "flagged_by_id": Kind(0.01, GenerationFailedError, flagged(names_task=True), 400),
    "forbidden": final(0.005, ApiError, envelope(None, 403, "Forbidden"), 403),
    "unpaid": final(0.005, ApiError, envelope(None, 402, "Insufficient credits"), 402),
    "disabled": final(0.005, ServerError, envelope(None, 505, "disabled"), 505),
    "invalid": final(0.005, InvalidRequestError, envelope(None, 422, "taskId is bad"), 422),
    "redirected": final(0.005, TransportError, page(302, Location="https://login.example/"), None),
    "unknown": broken(0.01, TaskNotFoundError, NOT_FOUND[0]),
    "broken_500": broken(0.02, ServerError, lambda _t, _n: envelope(None, 500, "oops", 500)),
    "broken_502": broken(0.01, ServerError, lambda _t, _n: page(502)),
    "broken_page": broken(0.01, ResponseFormatError, lambda _t, _n: page(200)),
    "broken_flag": broken(0.01, ResponseFormatError, TROUBLE[-7]),
    "always_another": broken(
        0.01, ResponseFormatError, lambda _t, _n: envelope({"taskId": "x", "successFlag": 1})
    ),
    "always_reset": broken(0.01, TransportError, lambda _t, _n: reset()),
    "endless": Kind(0.005, WaitTimeoutError, None),
    "blank": Kind(0.005, ConfigurationError, None),
}


# Side fields that must not matter.
_ODD: dict[str, Sequence[Any]] = {
    "paramJson": ({}, None, "null", "{", 7, math.nan),
    "errorCode": ("null", "a word", 400, {}, 10**300, math.inf, -1, True),
    "errorMessage": ({}, [], "null", "x" * 2000, None, 1e308),
    "completeTime": ("yesterday", "", 10**30, -1, math.nan, {}, "9" * 400),
    "createTime": (iso(0), iso(0).replace("T", " ").removesuffix("Z"), None),
    "progress": ("1.00", math.nan, {"deep": [[[]]]}),
}
_ODD_NAMES = sorted(_ODD)


@attrs.define(eq=False)
class Task:
    task_id: str
    kind: str
    duration: float
    draw: random.Random
    missing: bool = False  # said to be, since the last good answer
    stalled: bool = False
    withheld: float = 0.0  # seconds for which its polls had no answer

    @property
    def url(self) -> str:
        return f"https://images.example/{self.task_id}.png"

    def record(self, now: float) -> dict[str, Any]:
        return {
            "taskId": self.task_id,
            "paramJson": '{"prompt": "a boat"}',
            "createTime": iso(0),
            "completeTime": iso(int(self.duration)) if now >= self.duration else None,
            "response": None,
            "successFlag": 0,
            "errorCode": None,
            "errorMessage": None,
        }

    def generating(self, now: float) -> Answer:
        return envelope({**self.record(0.0), **self._odd()} if now else self.record(0.0))

    def succeeded(self, now: float) -> Answer:
        record = {**self.record(now), "successFlag": self.draw.choice((1, 1, "1"))}
        urls = {"resultImageUrl": self.url, "originImageUrl": self.draw.choice((None, "null", 5))}
        match self.draw.randrange(6):
            case 0:
                record["response"] = self.url
            case 1:
                record["response"] = {"resultUrls": [self.url]}
            case 2:
                record["resultImageUrl"] = self.url
            case 3:
                record["response"] = json.dumps(urls)
            case _:
                record["response"] = urls
        return envelope({**record, **self._odd()})

    def _odd(self) -> dict[str, Any]:
        """Return side fields that must not matter."""
        names = self.draw.sample(_ODD_NAMES, self.draw.randrange(4))
        fields = {name: self.draw.choice(_ODD[name]) for name in names}
        if self.task_id.isdigit() and self.draw.random() < 0.5:
            fields["taskId"] = int(self.task_id)
        return fields


class Chaos:
    """The API's side: the tasks and the rate limit of a ``world``, and the faults of a seed.

    Without a seed it is calm: all tasks that can end are healthy, and no fault disturbs them.
    """

    def __init__(self, world: int, seed: int | None, tasks: int) -> None:
        draw = random.Random(world)
        self._calm = seed is None
        self._limit = draw.choice(LIMITS)(draw)
        self._refusal = draw.choice(REFUSALS)
        sigma = draw.choice((0.2, 0.4))
        names = list(KINDS)
        shares = [kind.share for kind in KINDS.values()]
        shares[0] = 1 - sum(shares)
        self.tasks: dict[str, Task] = {}
        for n, name in enumerate(draw.choices(names, shares, k=tasks)):
            task_id = draw.choice((f"{name}-{n}", str(10**6 + n)))
            if name == "blank":
                task_id = " " * (n + 1)
            duration = math.inf if name == "endless" else 12 * draw.lognormvariate(0.0, sigma)
            if self._calm:
                if name in {"blank", "endless"}:
                    continue
                name = "healthy"  # noqa: PLW2901
            self.tasks[task_id] = Task(task_id, name, duration, random.Random(f"{seed}/{n}"))
        draw.seed(f"faults {seed}")
        self._fault_rate = draw.choice((0.02, 0.08, 0.2))
        self._outages = [
            (at, at + draw.uniform(1.0, 8.0), draw.choice(OUTAGES))
            for at in (draw.uniform(2.0, 60.0) for _ in range(draw.randrange(3)))
        ]
        self._bursts = [
            (at, at + 2.0) for at in (draw.uniform(1.0, 60.0) for _ in range(draw.randrange(4)))
        ]
        self._draw = draw
        self._has_answered = False
        self._has_refused_key = False  # since the last good answer
        self.polls = 0
        self._spoiled: list[float] = []  # when a fault was the answer

    @property
    def outage_seconds(self) -> float:
        return sum(end - start for start, end, _ in self._outages)

    def spoiled_seconds(self, until: float) -> float:
        """Return the seconds of the rate limit that faults used up."""
        match self._limit:
            case None:
                return 0.0
            case TokenBucket(per_second=rate):
                pass
            case limit:
                rate = limit.max_requests / limit.period
        return bisect.bisect(self._spoiled, until) / rate

    async def get(self, url: Any, **_options: object) -> _Response:
        """Replace ``session.get``."""
        self.polls += 1
        loop = asyncio.get_running_loop()
        task = self.tasks[url.query["taskId"]]
        refused_for = self._limit.admit(loop.time()) if self._limit else 0.0
        await asyncio.sleep(self._latency(task))
        answer = self._refusal(refused_for) if refused_for else self._answer(task, loop.time())
        if answer.error is not None and not answer.before_body:
            raise answer.error
        return _Response(answer, loop.time())

    def _latency(self, task: Task) -> float:
        latency = self._draw.uniform(0.02, 0.1)
        chance = self._draw.random()
        if self._calm or not KINDS[task.kind].shaky or chance >= 0.01:
            return latency
        if chance < 0.001 and not task.stalled:
            task.stalled = True
            latency = 2 * REQUEST_TIMEOUT
        else:
            latency = self._draw.uniform(0.5, 4.0)
        task.withheld += min(latency, REQUEST_TIMEOUT)
        return latency

    def _answer(self, task: Task, now: float) -> Answer:
        if not self._calm:
            for start, end, outage in self._outages:
                if start <= now < end:
                    return outage(task, now)
            fault = self._fault(task, now)
            if fault is not None:
                self._spoiled.append(now)
                return fault
        answer = self._own_answer(task, now)
        kind = KINDS[task.kind]
        if kind.final is None or not (kind.at_once or now >= task.duration):
            self._has_answered = True
            self._has_refused_key = task.missing = False
        return answer

    def _own_answer(self, task: Task, now: float) -> Answer:
        kind = KINDS[task.kind]
        if kind.final is not None and (kind.at_once or now >= task.duration):
            return kind.final(task, now)
        return task.succeeded(now) if now >= task.duration else task.generating(now)

    def _fault(self, task: Task, now: float) -> Answer | None:
        is_burst = any(start <= now < end for start, end in self._bursts)
        draw = self._draw
        if not KINDS[task.kind].shaky or draw.random() >= (0.5 if is_burst else self._fault_rate):
            return None
        match draw.randrange(12):
            case 0 if self._has_answered and not self._has_refused_key:
                self._has_refused_key = True
                return draw.choice((page(401), envelope(None, 401, "no access")))
            case 1 if self._has_answered:
                return page(404)
            case 2 if not task.missing:
                task.missing = True
                return draw.choice(NOT_FOUND)(task, now)
            case 3 if now < task.duration + 4.0:
                stale = task.generating(0.0)  # from a cache
                return attrs.evolve(stale, headers={"Age": "5", "Date": http_date(now - 5)})
            case _:
                return draw.choice(TROUBLE)(task, now)


@attrs.define
class Ended:
    """When each task's outcome came, and all outcomes in order."""

    times: dict[str, float]
    outcomes: list[Any]


async def run_chaos(chaos: Chaos) -> Ended:
    """Wait for all tasks, every tenth id given twice."""
    random.seed(len(chaos.tasks))  # of the schedule's jitter: a seed is the same again
    ids = [task_id for n, task_id in enumerate(chaos.tasks) for _ in range(2 if n % 10 == 0 else 1)]
    loop = asyncio.get_running_loop()
    ended = Ended({}, [])
    async with aiohttp.ClientSession() as session:
        session.get = chaos.get
        async with (
            KontextClient(KEY, session=session, request_timeout=REQUEST_TIMEOUT) as client,
            client.as_completed(ids, error_grace=GRACE) as outcomes,
        ):
            async for outcome in outcomes:
                ended.times[outcome.task_id] = loop.time()
                ended.outcomes.append(outcome)
    return ended
