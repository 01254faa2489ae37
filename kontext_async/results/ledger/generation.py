"""A batch from requests to outcomes: each request has its task in the ledger at most once."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from typing import Any, TypeAlias

import attrs

from kontext_async.client import KontextClient
from kontext_async.creation import SubmittedTask, new_token
from kontext_async.errors import (
    ApiError,
    GenerationFailedError,
    KontextError,
    ResponseFormatError,
    SubmissionUnknownError,
    TransportError,
    WaitTimeoutError,
)
from kontext_async.outcomes import ErrorOutcome, ResultOutcome, TaskOutcome
from kontext_async.results.ledger.journal import LedgerJournal
from kontext_async.results.ledger.submissions import (
    KeyedRequest,
    SubmissionEntry,
    Submissions,
    keyed_requests,
)
from kontext_async.wire import Action, ImageRequest, rule_of

__all__ = [
    "GenerationOptions",
    "Generator",
    "RequestErrorOutcome",
    "RequestOutcome",
    "RequestResultOutcome",
]

# Lost answers in a row, with no good one between, after which a batch creates no more: each may
# have been paid for. Of 15 % lost by chance, ten in a row are one in 170 million.
_MAX_LOST = 10
# Seconds for the answers of requests under way when a batch ends early.
_LAST_ANSWERS = 10.0

# Errors that are the outcome of one request. Others end the batch.
_OUTCOMES = (
    ApiError,
    GenerationFailedError,
    ResponseFormatError,
    SubmissionUnknownError,
    TransportError,
    WaitTimeoutError,
)


@attrs.frozen(kw_only=True)
class RequestResultOutcome(ResultOutcome):
    """The end of a request of `Ledger.generate` that became a completed task.

    ``key`` names the request in the ledger.
    """

    key: str
    request: ImageRequest


@attrs.frozen(kw_only=True)
class RequestErrorOutcome(ErrorOutcome):
    """The end of a request of `Ledger.generate` that has no result.

    ``task_id`` is empty where no task is known. ``key`` names the request in the ledger.
    """

    key: str
    request: ImageRequest


RequestOutcome: TypeAlias = RequestResultOutcome | RequestErrorOutcome


@attrs.frozen(kw_only=True)
class GenerationOptions:
    """The checked keywords of `Ledger.generate`, which explains them."""

    max_running: int
    max_new: int | None
    retry_failed: bool
    callback_grace: float
    on_submitted: Callable[[SubmittedTask], object] | None
    batch_timeout: float | None
    timeout: float | None
    wait: Mapping[str, Any]  # the other keywords of a wait


class Generator:
    """The producer of the stream of `Ledger.generate`.

    A request passes through the ledger's plan, the creation of its task, and a wait. It takes one
    of ``max_running`` places until its outcome is taken.
    """

    def __init__(
        self,
        client: KontextClient,
        requests: Iterable[KeyedRequest] | AsyncIterable[KeyedRequest],
        options: GenerationOptions,
        *,
        submissions: Submissions,
        journal: LedgerJournal,
        arrivals: dict[str, asyncio.Event],
    ) -> None:
        self._client = client
        self._submissions = submissions
        self._journal = journal
        self._arrivals = arrivals
        self._options = options
        self._created = 0
        self._lost_in_a_row = 0
        self._stopped_by: KontextError | None = None  # the error that ends all creation
        self._places = asyncio.Semaphore(options.max_running)
        self._ready: asyncio.Queue[RequestOutcome | None] = asyncio.Queue()
        self._failure: BaseException | None = None  # to be raised from `next`
        self._loop = asyncio.get_running_loop()
        timeout = options.batch_timeout
        self._deadline = math.inf if timeout is None else self._loop.time() + timeout
        self._runner = self._loop.create_task(self._run(requests))

    @property
    def finished(self) -> bool:
        return self._runner.done() and self._ready.qsize() <= 1 and self._failure is None

    async def next(self) -> RequestOutcome | None:
        outcome = await self._ready.get()
        if outcome is not None:
            self._places.release()
            return outcome
        self._ready.put_nowait(None)  # for another consumer
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return None

    async def end(self, error: BaseException | None = None) -> None:
        self._failure = self._failure or error
        self._runner.cancel()
        await asyncio.wait([self._runner])
        while not self._ready.empty():
            self._ready.get_nowait()
        self._ready.put_nowait(None)

    def abandon(self) -> None:
        self._loop.call_soon_threadsafe(self._runner.cancel)

    async def _run(self, requests: Iterable[KeyedRequest] | AsyncIterable[KeyedRequest]) -> None:
        try:
            async with (
                asyncio.TaskGroup() as group,
                contextlib.aclosing(keyed_requests(requests)) as keyed,
            ):
                async for key, request in keyed:
                    await self._places.acquire()
                    group.create_task(self._follow(key, request))
        except BaseExceptionGroup as failures:
            self._failure = self._failure or failures.exceptions[0]
        finally:
            self._ready.put_nowait(None)

    async def _follow(self, key: str, request: ImageRequest) -> None:
        entry = await self._submissions.plan(key, request, new_token())
        try:
            task_id = await self._task_of(entry)
        except _OUTCOMES as error:
            outcome: TaskOutcome = ErrorOutcome(task_id="", error=error)
        else:
            if task_id is None:  # planned, for another run
                self._places.release()
                return
            outcome = await self._wait(task_id)
        self._ready.put_nowait(_outcome_of(key, request, outcome))

    async def _task_of(self, entry: SubmissionEntry) -> str | None:
        """Return the request's task; None if it is left for another run.

        Raises the error that keeps it from having one.
        """
        if entry.task_id is not None:
            return entry.task_id
        if entry.state == "unknown":
            since = entry.updated_at.timestamp()
            return await self._called_back(entry, entry.error(), since)
        if entry.state == "abandoned" or (
            entry.state == "refused" and not self._options.retry_failed
        ):
            raise entry.error()
        return await self._create(entry)

    async def _create(self, entry: SubmissionEntry) -> str | None:
        if self._stopped_by is not None:
            raise self._stopped_by.for_task(None)
        if self._is_over():
            return None
        self._created += 1
        try:
            task = await self._submit(entry)
        except SubmissionUnknownError as error:
            await self._submissions.set(entry.key, "unknown", error)
            self._count_lost()
            return await self._called_back(entry, error, time.time())
        except (ApiError, TransportError) as error:
            self._created -= 1
            await self._on_refusal(entry, error)
            raise
        self._lost_in_a_row = 0
        await self._keep(entry, task)
        return task.task_id

    async def _keep(self, entry: SubmissionEntry, task: SubmittedTask) -> None:
        try:
            if self._options.on_submitted is not None:
                self._options.on_submitted(task)
        finally:
            await self._submissions.bind(entry.key, task.task_id)

    def _is_over(self) -> bool:
        """Return True if this run creates no more tasks, and the rest is for another one."""
        options = self._options
        is_late = self._loop.time() >= self._deadline
        return is_late or (options.max_new is not None and self._created >= options.max_new)

    async def _submit(self, entry: SubmissionEntry) -> SubmittedTask:
        """Create the task; if this is cancelled, let a request that was sent be answered."""
        was_sent = False

        async def note_sending() -> None:
            nonlocal was_sent
            await self._submissions.set(entry.key, "sending")
            was_sent = True

        work = self._loop.create_task(
            self._client.submit(entry.request, token=entry.token, before_sending=note_sending)
        )
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            try:
                await asyncio.wait([work], timeout=_LAST_ANSWERS if was_sent else 0)
            finally:
                work.cancel()
            await self._keep_last_answer(entry, work, was_sent=was_sent)
            raise

    async def _keep_last_answer(
        self, entry: SubmissionEntry, work: asyncio.Task[SubmittedTask], *, was_sent: bool
    ) -> None:
        """Record what became of a request whose batch has ended."""
        await asyncio.wait([work])
        error: BaseException | None
        if work.cancelled():
            error = SubmissionUnknownError("the run ended before the answer") if was_sent else None
        elif (error := work.exception()) is None:
            await self._keep(entry, work.result())
            return
        lost = error if isinstance(error, SubmissionUnknownError) else None
        await self._submissions.set(entry.key, "planned" if lost is None else "unknown", lost)

    async def _on_refusal(self, entry: SubmissionEntry, error: ApiError | TransportError) -> None:
        """Record that no task was created, and stop creating if the next request would fail too."""
        action = Action.RAISE_AND_STOP
        if isinstance(error, ApiError):
            action = rule_of(error.code, from_gateway=error.from_gateway).action
        if action is Action.RAISE_AND_STOP:
            self._stopped_by = self._stopped_by or error
        is_refused = action is Action.RAISE
        await self._submissions.set(entry.key, "refused" if is_refused else "planned", error)

    def _count_lost(self) -> None:
        self._lost_in_a_row += 1
        if self._lost_in_a_row == _MAX_LOST:
            self._stopped_by = self._stopped_by or TransportError(
                f"not sent: the answers to the last {_MAX_LOST} requests were lost"
            )

    async def _called_back(self, entry: SubmissionEntry, error: KontextError, since: float) -> str:
        """Return the task that a callback names after a lost answer; raise the error without one.

        ``since`` is the unix time of the loss: a callback may come until the grace after it.
        """
        arrived = self._arrivals.setdefault(entry.token, asyncio.Event())
        grace = self._options.callback_grace if self._client.expects_callbacks else 0.0
        until = self._loop.time() + since + grace - time.time()
        try:
            while (task_id := await self._found_task(entry)) is None:
                async with asyncio.timeout_at(until):
                    await arrived.wait()
                arrived.clear()
        except TimeoutError:
            raise error from None
        finally:
            del self._arrivals[entry.token]
        return task_id

    async def _found_task(self, entry: SubmissionEntry) -> str | None:
        """Return the task that a callback has named, if it is this request's."""
        for task_id in await self._submissions.candidates(entry.token):
            is_ours = await self._is_task_of(entry, task_id)
            if is_ours and await self._submissions.bind(entry.key, task_id):
                return task_id
        return None

    async def _is_task_of(self, entry: SubmissionEntry, task_id: str) -> bool:
        """Return True if the task's record has the request's prompt, and no other parameters."""
        try:
            params = (await self._client.record_info(task_id)).params
        except KontextError:
            return False  # perhaps later: the candidate stays
        if "prompt" not in params:
            return False
        sent, callback = entry.request.to_json(), params.get("callBackUrl")
        is_ours = all(sent[name] == params[name] for name in sent.keys() & params.keys())
        if not is_ours or (isinstance(callback, str) and entry.token not in callback):
            await self._submissions.drop_candidate(entry.token, task_id)
            return False
        return True

    async def _wait(self, task_id: str) -> TaskOutcome:
        known = await self._journal.begin(task_id)
        if known is not None:
            return known
        options = self._options
        timeout = math.inf if options.timeout is None else options.timeout
        timeout = min(timeout, max(self._deadline - self._loop.time(), 0.0))
        try:
            result = await self._client.wait_for_result(
                task_id, timeout=None if timeout == math.inf else timeout, **options.wait
            )
            outcome: TaskOutcome = ResultOutcome(task_id=task_id, result=result)
        except _OUTCOMES as error:
            outcome = ErrorOutcome(task_id=task_id, error=error)
        await self._journal.record(outcome)
        return outcome


def _outcome_of(key: str, request: ImageRequest, outcome: TaskOutcome) -> RequestOutcome:
    task_id = outcome.task_id
    if outcome.error is not None:
        return RequestErrorOutcome(task_id=task_id, error=outcome.error, key=key, request=request)
    return RequestResultOutcome(task_id=task_id, result=outcome.result, key=key, request=request)
