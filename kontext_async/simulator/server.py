"""The simulator: the API on a loopback port."""

from __future__ import annotations

import asyncio
import copy
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self
from urllib.parse import unquote

from aiohttp import web

from kontext_async.simulator.callbacks import CallbackSender
from kontext_async.simulator.clock import Clock
from kontext_async.simulator.creations import CREATION_STEPS, LOST_ANSWERS
from kontext_async.simulator.generation import problem_with
from kontext_async.simulator.images import IMAGE_STEPS, make_image
from kontext_async.simulator.limits import Limit
from kontext_async.simulator.log import LoggedRequest
from kontext_async.simulator.replies import Connection, Reply, envelope, head_only, http, refused
from kontext_async.simulator.steps import FAULTS, StepLike, as_script, as_step
from kontext_async.simulator.store import KeyedRandom, Outcome, TaskStore
from kontext_async.simulator.tasks import (
    Durations,
    Step,
    StepRequest,
    Task,
    lognormal,
    record_of,
)

__all__ = ["Simulator"]

_API = "/api/v1/flux/kontext"
_ENDLESS = 1_000_000  # the balance of an account without an end
# Seconds for which the images of a completed task are served, as the provider documents.
_LIFETIMES = {"/images": 14 * 24 * 3600.0, "/origins": 600.0}


class _Sent(web.StreamResponse):
    """A reply that is sent already. It only tells aiohttp whether to keep the connection."""

    def __init__(self, *, reusable: bool) -> None:
        super().__init__()
        self._reusable = reusable

    @property
    def keep_alive(self) -> bool:
        return self._reusable

    async def prepare(self, request: web.BaseRequest) -> None:
        """Send nothing."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Send nothing."""


class Simulator:
    """The Flux Kontext task API on a port of 127.0.0.1, for tests and demonstrations.

    ``async with Simulator() as simulator:`` serves until the block ends. Time is the running
    loop's clock: on a loop with virtual time, tasks take no real time.

    - ``port``: 0 takes a free one.
    - ``durations``: seconds that tasks take: a number, or a function that draws one.
    - ``failure_rate``: fraction of tasks that fail, 0 to 1.
    - ``fault_rate``: fraction of polls and image downloads that meet one of ``faults``, 0 to 1.
      For images, only those in `IMAGE_STEPS` count. Scripted requests meet none.
    - ``rate_limit``: requests to the API above it are refused. None: no limit.
    - ``refusal_status``: 429 refuses as the API does; 503 as a gateway does, without an envelope.
    - ``retry_after``: True adds a Retry-After header to such a refusal.
    - ``api_key``: the only key accepted. None: any key.
    - ``latency``: seconds before each reply.
    - ``auto_create``: True creates a task at the first poll of an unknown id.
    - ``generate_script``: steps for the first requests to generate, one each, by the names in
      `CREATION_STEPS`.
    - ``lost_answer_rate``: fraction of the requests to generate, 0 to 1, that create a task
      although the answer is lost. Scripted requests are not.
    - ``creation_limit``: requests to generate above it are refused with 429. None: no limit.
    - ``credits``: the balance; a task costs 1, and at 0 requests to generate are refused with
      402. None: no end.
    - ``callback_key``: signs the callbacks of tasks that have a ``callBackUrl`` on this machine;
      others are never called. None: callbacks are not signed.
    - ``callback_script``: ``"sent"``, ``"late"``, ``"twice"``, ``"lost"`` or ``"early"`` (before
      the answer), one for each of the first callbacks.
    - ``lost_callback_rate``: fraction of the others that are lost, 0 to 1.
    - ``image_bytes``: minimum size of an image.
    - ``log_limit``: number of requests that ``requests`` keeps, the latest. None: all.
    - ``seed``: the same seed gives the same id the same duration, outcome and faults.

    ``requests`` is the log, ``created`` the ids of the tasks that requests created, and
    ``callbacks`` what was sent, in order. ``answered`` and ``refused`` count the requests to the
    API that the rate limit admitted and refused. ``max_in_flight`` is the most requests served at
    once.

    Raises ValueError for a rate outside 0 to 1, and for an unknown step.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        durations: Durations = lognormal(12.0, 0.3),  # noqa: B008  # keeps no state
        failure_rate: float = 0.0,
        fault_rate: float = 0.0,
        faults: Sequence[str] = FAULTS,
        rate_limit: Limit | None = None,
        refusal_status: Literal[429, 503] = 429,
        retry_after: bool = False,
        api_key: str | None = None,
        latency: float = 0.0,
        auto_create: bool = False,
        generate_script: Iterable[StepLike] = (),
        lost_answer_rate: float = 0.0,
        creation_limit: Limit | None = None,
        credits: int | None = None,  # noqa: A002  # the API's word
        callback_key: str | None = None,
        callback_script: Iterable[str] = (),
        lost_callback_rate: float = 0.0,
        image_bytes: int = 0,
        log_limit: int | None = 10_000,
        seed: int = 0,
    ) -> None:
        rates = (failure_rate, fault_rate, lost_answer_rate, lost_callback_rate)
        if not all(0 <= rate <= 1 for rate in rates):
            raise ValueError("failure_rate, fault_rate and the lost rates must be from 0 to 1")
        self._port = port
        self._store = TaskStore(durations=durations, failure_rate=failure_rate, seed=seed)
        self._random = KeyedRandom(seed)
        self._fault_rate = fault_rate
        self._faults = [as_step(name) for name in faults]
        self._image_faults = [IMAGE_STEPS[name] for name in faults if name in IMAGE_STEPS]
        self._limit = copy.deepcopy(rate_limit)  # its state is not shared
        self._refusal_status = refusal_status
        self._retry_after = retry_after
        self._api_key = api_key
        self._latency = latency
        self._auto_create = auto_create
        self._generate_script = as_script(generate_script, CREATION_STEPS)
        self._lost_answer_rate = lost_answer_rate
        self._lost_answers = [CREATION_STEPS[name] for name in LOST_ANSWERS]
        self._creation_limit = copy.deepcopy(creation_limit)
        self._credits = credits
        self._creations = 0
        self._image_bytes = image_bytes
        self._clock = Clock()
        self._callbacks = CallbackSender(
            clock=self._clock,
            key=callback_key,
            script=callback_script,
            lost_rate=lost_callback_rate,
            random=self._random,
        )
        self._runner: web.ServerRunner | None = None
        self._base_url: str | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._sent, self._sent_last = _Sent(reusable=True), _Sent(reusable=False)
        self.requests: deque[LoggedRequest] = deque(maxlen=log_limit)
        self.created: list[str] = []
        self.callbacks = self._callbacks.sent
        self.answered = 0
        self.refused = 0
        self.max_in_flight = 0

    @property
    def base_url(self) -> str:
        """The server's address, ``http://127.0.0.1:PORT``."""
        if self._base_url is None:
            raise RuntimeError("the simulator is not running: enter it with 'async with'")
        return self._base_url

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self._clock.now

    def add_task(
        self,
        task_id: str | None = None,
        *,
        duration: float | None = None,
        outcome: Outcome = None,
        params: Mapping[str, Any] | None = None,
        script: Iterable[StepLike] = (),
        image_script: Iterable[StepLike] = (),
        age: float = 0.0,
    ) -> str:
        """Add a task and return its id; ``task_id`` None gives it a new one.

        - ``duration``: seconds from its creation to its end; ``math.inf`` for never. None: drawn;
          with a script, the task ends with the first poll after the script.
        - ``outcome``: ``"success"``, ``"failure"`` with a drawn reason, or a `Failure`. None:
          drawn.
        - ``params``: the request that made it, for ``paramJson`` and the image. None: a default.
        - ``script``: steps for its first polls, one each. After them it behaves by itself.
        - ``image_script``: steps for the first downloads of its images.
        - ``age``: seconds since its creation. Images expire 14 days after the task's end, the
          original after 10 minutes.

        Raises ValueError for an id in use, and for an unknown step.
        """
        task = self._store.make(
            self._store.new_id() if task_id is None else task_id,
            self._clock.now - age,
            duration=duration,
            outcome=outcome,
            params=params,
            script=script,
            image_script=image_script,
        )
        return self._store.add(task).task_id

    def polls(self, task_id: str) -> int:
        """Return the number of a task's polls that the rate limit admitted; KeyError if unknown."""
        return self._store[task_id].polls

    async def __aenter__(self) -> Self:
        if self._runner is not None:
            raise RuntimeError("a simulator serves only once: make a new one")
        self._clock.start()
        server = web.Server(self._serve, handler_cancellation=True, access_log=None)
        self._runner = web.ServerRunner(server)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, backlog=4096)
        await site.start()
        self._base_url = f"http://127.0.0.1:{site.port}"
        return self

    async def __aexit__(self, *_exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop serving, and end the requests in flight."""
        await self._callbacks.aclose()
        for task in self._running:
            task.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        self._running.add(request.task)
        self.max_in_flight = max(self.max_in_flight, len(self._running))
        try:
            logged = self._log(request)
            reply = await self._reply(request, logged)
            logged.status, logged.code = reply.status, reply.code
            deliver = head_only if request.method == "HEAD" and reply.status else reply.delivery
            reusable = await deliver(self._connection(request), reply)
        except ConnectionResetError:  # the client has hung up
            reusable = False
        finally:
            self._running.discard(request.task)
        return self._sent if reusable and request.keep_alive else self._sent_last

    def _connection(self, request: web.BaseRequest) -> Connection:
        return Connection(request, self._clock.http_date(self._clock.now))

    def _log(self, request: web.BaseRequest) -> LoggedRequest:
        authorization = request.headers.get("Authorization", "")
        logged = LoggedRequest(
            self._clock.now,
            request.method,
            request.raw_path.partition("?")[0],
            request.headers.get("User-Agent", ""),
            bool(authorization),
            self._accepts(authorization),
        )
        self.requests.append(logged)
        return logged

    def _accepts(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        return scheme.lower() == "bearer" and bool(key) and self._api_key in (None, key)

    async def _reply(self, request: web.BaseRequest, logged: LoggedRequest) -> Reply:
        folder, _, name = logged.path.rpartition("/")
        # Before the latency: the service counts a request when it arrives.
        refusal = self._refusal(logged) if folder == _API else None
        if self._latency:
            await asyncio.sleep(self._latency)
        if refusal:
            return refusal
        match request.method, folder, name:
            case "GET", "/api/v1/flux/kontext", "record-info":
                return self._record_info(request, logged)
            case "POST", "/api/v1/flux/kontext", "generate":
                await self._connection(request).invite_body()
                created = len(self.created)
                reply = self._generate(request, logged, await request.read())
                for task_id in self.created[created:]:
                    await self._callbacks.begin(self._store[task_id], self.base_url)
                return reply
            case "GET", "/api/v1/chat", "credit":
                return self._balance(logged)
            case "GET" | "HEAD", "/images" | "/origins", _:
                return self._image(request, logged, unquote(name), _LIFETIMES[folder])
            case _:
                return http(404)

    def _refusal(self, logged: LoggedRequest) -> Reply | None:
        """Refuse a wrong key, or a request above the rate limit; None admits the request."""
        if not logged.key_accepted:
            return refused(401)
        wait = self._limit.admit(self._clock.now) if self._limit else 0.0
        if wait:
            self.refused += 1
            return self._limit_exceeded(wait)
        self.answered += 1
        return None

    def _limit_exceeded(self, wait: float) -> Reply:
        if self._refusal_status == 429:
            return refused(429, status=429, retry_after=wait if self._retry_after else None)
        headers = {"Retry-After": str(math.ceil(wait))} if self._retry_after else {}
        return http(503, "<h1>503 Service Temporarily Unavailable</h1>", headers=headers)

    def _record_info(self, request: web.BaseRequest, logged: LoggedRequest) -> Reply:
        task_id = logged.task_id = request.query.get("taskId")
        if not task_id:
            return refused(422, "taskId is required")
        task = self._store.get(task_id)
        if task is None:
            if not self._auto_create:
                return refused(422, "The record does not exist")
            task = self._store.add(self._store.make(task_id, self._clock.now))
        task.polls += 1
        step = next(task.script, None) or self._random.step(
            f"{task_id}/{task.polls}", self._fault_rate, self._faults
        )
        return self._step_reply(step, request, task, lambda: self._record_reply(task))

    def _record_reply(self, task: Task) -> Reply:
        now = self._clock.now
        if task.duration is None:
            task.end(now, task.failure)
        return envelope(record_of(task, now, self._clock, self.base_url))

    def _generate(self, request: web.BaseRequest, logged: LoggedRequest, body: bytes) -> Reply:
        try:
            params = json.loads(body)
        except ValueError:
            return refused(422, "the body must be JSON")
        refusal = problem_with(params)
        if refusal is not None:
            return refused(*refusal)
        if self._credits == 0:
            return refused(402)
        wait = self._creation_limit.admit(self._clock.now) if self._creation_limit else 0.0
        if wait:
            return refused(429, status=429, retry_after=wait if self._retry_after else None)
        task = self._store.make(self._store.new_id(), self._clock.now, params=params)
        self._creations += 1
        step = next(self._generate_script, None) or self._random.step(
            f"generate/{self._creations}", self._lost_answer_rate, self._lost_answers
        )
        return self._step_reply(step, request, task, lambda: self._created_reply(task, logged))

    def _created_reply(self, task: Task, logged: LoggedRequest) -> Reply:
        logged.task_id = self._store.add(task).task_id
        self.created.append(task.task_id)
        if self._credits is not None:
            self._credits -= 1
        return envelope({"taskId": task.task_id})

    def _balance(self, logged: LoggedRequest) -> Reply:
        if not logged.key_accepted:
            return refused(401)
        return envelope(_ENDLESS if self._credits is None else self._credits)

    def _image(
        self, request: web.BaseRequest, logged: LoggedRequest, name: str, lifetime: float
    ) -> Reply:
        task_id = logged.task_id = name.rpartition(".")[0]
        task = self._store.get(task_id)
        if task is None:
            return http(404)
        task.downloads += 1
        step = next(task.image_script, None) or self._random.step(
            f"{task_id}/image/{task.downloads}", self._fault_rate, self._image_faults
        )
        return self._step_reply(step, request, task, lambda: self._image_reply(task, lifetime))

    def _image_reply(self, task: Task, lifetime: float) -> Reply:
        done = task.succeeded_at(self._clock.now)
        if done is None or self._clock.now >= done + lifetime:
            return http(404)
        image = make_image(task.param_json, task.image_type, self._image_bytes)
        return Reply(200, {"Content-Type": f"image/{task.image_type}"}, image)

    def _step_reply(
        self,
        step: Step | None,
        request: web.BaseRequest,
        task: Task,
        default_reply: Callable[[], Reply],
    ) -> Reply:
        if step is None:
            return default_reply()
        url = self.base_url + request.raw_path
        return step(
            StepRequest(task, self._clock.now, self._clock, self.base_url, url, default_reply)
        )
