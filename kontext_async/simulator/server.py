"""The simulator: the API on a loopback port."""

from __future__ import annotations

import asyncio
import copy
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

from aiohttp import web

from kontext_async.simulator.clock import Clock, http_date
from kontext_async.simulator.generation import problem_with
from kontext_async.simulator.images import IMAGE_STEPS, make_image
from kontext_async.simulator.limits import Limit
from kontext_async.simulator.log import LoggedRequest
from kontext_async.simulator.replies import Reply, Wire, envelope, http_reply, refusal
from kontext_async.simulator.steps import FAULTS, StepLike, as_script, as_step
from kontext_async.simulator.store import Chance, Outcome, TaskStore
from kontext_async.simulator.tasks import Durations, Look, Step, Task, lognormal, record_of

__all__ = ["Simulator"]

_ROUTES = {
    "/api/v1/flux/kontext/record-info": "record-info",
    "/api/v1/flux/kontext/generate": "generate",
}

# How long the images of a finished task are served, by the provider's documentation.
_LIFETIMES = {"images": 14 * 24 * 3600.0, "origins": 600.0}


class _Sent(web.StreamResponse):
    """Tells aiohttp that an answer is on its way already, and whether to keep the connection."""

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

    ``async with Simulator() as simulator:`` serves until the block is left. It keeps time by
    the running loop's clock, so on a loop with virtual time it takes none.

    Raises ValueError where a rate is no share, or a step is unknown.

    - ``port``: 0 takes a free one.
    - ``durations``: how long tasks take, in seconds: a number, or a function that draws one.
    - ``failure_rate``: the share of tasks that fail, from 0 to 1.
    - ``fault_rate``: the share of looks and image downloads that meet one of ``faults``, from
      0 to 1. Images meet those that `IMAGE_STEPS` has too. What a script answers meets none.
    - ``rate_limit``: over it, requests to the API are refused with 429, with a Retry-After
      header where ``retry_after`` says so. None: no limit.
    - ``api_key``: the one key accepted. None: any.
    - ``latency``: seconds before each answer.
    - ``auto_create``: create a task with the first look at an unknown id.
    - ``generate_script``: steps for the first requests to generate, one each.
    - ``image_bytes``: the least size of an image.
    - ``log_limit``: how many of the last requests ``requests`` keeps. None: all.
    - ``seed``: the same seed gives the same id the same duration, outcome and faults.

    ``requests`` is the log; ``answered`` and ``refused`` count the requests to the API that the
    rate limit let pass and turned away; ``max_in_flight`` is the most requests served at once.
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
        retry_after: bool = False,
        api_key: str | None = None,
        latency: float = 0.0,
        auto_create: bool = False,
        generate_script: Iterable[StepLike] = (),
        image_bytes: int = 0,
        log_limit: int | None = 10_000,
        seed: int = 0,
    ) -> None:
        if not (0 <= failure_rate <= 1 and 0 <= fault_rate <= 1):
            raise ValueError("failure_rate and fault_rate are shares, from 0 to 1")
        self._port = port
        self._store = TaskStore(durations=durations, failure_rate=failure_rate, seed=seed)
        self._chance = Chance(seed)
        self._fault_rate = fault_rate
        self._faults = [as_step(name) for name in faults]
        self._image_faults = [IMAGE_STEPS[name] for name in faults if name in IMAGE_STEPS]
        self._limit = copy.deepcopy(rate_limit)  # its own, from its own start
        self._retry_after = retry_after
        self._api_key = api_key
        self._latency = latency
        self._auto_create = auto_create
        self._generate_script = as_script(generate_script)
        self._image_bytes = image_bytes
        self._clock = Clock()
        self._runner: web.ServerRunner | None = None
        self._base_url: str | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._sent, self._sent_last = _Sent(reusable=True), _Sent(reusable=False)
        self.requests: deque[LoggedRequest] = deque(maxlen=log_limit)
        self.answered = 0
        self.refused = 0
        self.max_in_flight = 0

    @property
    def base_url(self) -> str:
        """Where it serves, ``http://127.0.0.1:PORT``."""
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
        """Add a task and return its id, a new one unless ``task_id`` gives it.

        - ``duration``: seconds from its creation to its end; ``math.inf`` for never. None: drawn,
          but with a script the task ends with the first look after it.
        - ``outcome``: ``"success"``, ``"failure"`` with a drawn reason, or a `Failure`. None:
          drawn.
        - ``params``: the request that made it, for ``paramJson`` and the image. None: a usual one.
        - ``script``: steps for the first looks at it, one each; after them it is its plain self.
        - ``image_script``: the same for downloads of its images.
        - ``age``: seconds since it was created. Images go 14 days after the task's end,
          the origin's after 10 minutes.

        Raises ValueError where the id is taken, or a step is unknown.
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
        return self._store.keep(task).task_id

    def polls(self, task_id: str) -> int:
        """How many looks at a task the rate limit let pass; KeyError for an unknown one."""
        return self._store[task_id].polls

    async def __aenter__(self) -> Self:
        if self._runner is not None:
            raise RuntimeError("a simulator serves once: make a new one")
        self._clock.start()
        server = web.Server(self._serve, handler_cancellation=True, access_log=None)
        self._runner = web.ServerRunner(server)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, backlog=4096)
        await site.start()
        self._base_url = f"http://127.0.0.1:{site.port}"
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop serving, and end the requests that are still open."""
        for task in self._running:
            task.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        self._running.add(request.task)
        self.max_in_flight = max(self.max_in_flight, len(self._running))
        try:
            logged = self._note(request)
            reply = await self._reply(request, logged)
            logged.status, logged.code = reply.status, reply.code
            wire = Wire(request, http_date(self._clock.unix(self._clock.now)))
            reusable = await reply.delivery(wire, reply)
        finally:
            self._running.discard(request.task)
        return self._sent if reusable and request.keep_alive else self._sent_last

    def _note(self, request: web.BaseRequest) -> LoggedRequest:
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
        route = _ROUTES.get(logged.path) or logged.path.lstrip("/").partition("/")[0]
        # The service counts a request as it comes in, however long it takes to answer.
        refused = self._refused(logged) if logged.path in _ROUTES else None
        if self._latency:
            await asyncio.sleep(self._latency)
        if refused:
            return refused
        match request.method, route:
            case "GET", "record-info":
                return self._record_info(request, logged)
            case "POST", "generate":
                return self._generate(request, logged, await request.read())
            case "GET", "images" | "origins":
                return self._image(request, logged, _LIFETIMES[route])
            case _:
                return http_reply(404)

    def _refused(self, logged: LoggedRequest) -> Reply | None:
        """The answer to a request that gets no further: a wrong key, or too many requests."""
        if not logged.key_accepted:
            return refusal(401)
        wait = self._limit.admit(self._clock.now) if self._limit else 0.0
        if wait:
            self.refused += 1
            return refusal(429, status=429, retry_after=wait if self._retry_after else None)
        self.answered += 1
        return None

    def _record_info(self, request: web.BaseRequest, logged: LoggedRequest) -> Reply:
        task_id = logged.task_id = request.query.get("taskId")
        if not task_id:
            return refusal(422, "taskId is required")
        task = self._store.get(task_id)
        if task is None:
            if not self._auto_create:
                return refusal(422, "The record does not exist")
            task = self._store.keep(self._store.make(task_id, self._clock.now))
        task.polls += 1
        step = next(task.script, None) or self._chance.step(
            f"{task_id}/{task.polls}", self._fault_rate, self._faults
        )
        return self._by(step, request, task, lambda: self._record(task))

    def _record(self, task: Task) -> Reply:
        now = self._clock.now
        if task.duration is None:
            task.end(now, task.failure)
        return envelope(record_of(task, now, self._clock, self.base_url))

    def _generate(self, request: web.BaseRequest, logged: LoggedRequest, body: bytes) -> Reply:
        try:
            params = json.loads(body)
        except ValueError:
            return refusal(422, "the body must be JSON")
        problem = problem_with(params)
        if problem:
            return refusal(422, problem)
        task = self._store.make(self._store.new_id(), self._clock.now, params=params)
        step = next(self._generate_script, None)
        return self._by(step, request, task, lambda: self._created(task, logged))

    def _created(self, task: Task, logged: LoggedRequest) -> Reply:
        logged.task_id = self._store.keep(task).task_id
        return envelope({"taskId": task.task_id})

    def _image(self, request: web.BaseRequest, logged: LoggedRequest, lifetime: float) -> Reply:
        name = unquote(logged.path.rpartition("/")[2])
        task_id = logged.task_id = name.rpartition(".")[0]
        task = self._store.get(task_id)
        if task is None:
            return http_reply(404)
        task.downloads += 1
        step = next(task.image_script, None) or self._chance.step(
            f"{task_id}/image/{task.downloads}", self._fault_rate, self._image_faults
        )
        return self._by(step, request, task, lambda: self._picture(task, lifetime))

    def _picture(self, task: Task, lifetime: float) -> Reply:
        done = task.succeeded_at(self._clock.now)
        if done is None or self._clock.now >= done + lifetime:
            return http_reply(404)
        image = make_image(task.param_json, task.image_type, self._image_bytes)
        return Reply(200, {"Content-Type": f"image/{task.image_type}"}, image)

    def _by(
        self, step: Step | None, request: web.BaseRequest, task: Task, plain: Callable[[], Reply]
    ) -> Reply:
        """What a step answers; None: what is to be answered without one."""
        if step is None:
            return plain()
        url = self.base_url + request.raw_path
        return step(Look(task, self._clock.now, self._clock, self.base_url, url, plain))
