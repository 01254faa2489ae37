"""Many waits at once: one for each id, read with backpressure, each with its own outcome."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import warnings
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Coroutine, Iterable
from types import TracebackType
from typing import Any, Self

import attrs

from kontext_async.errors import (
    AuthenticationError,
    ClientStateError,
    ConfigurationError,
    KontextError,
    WaitTimeoutError,
)
from kontext_async.models import CompletedTask, TaskRecord
from kontext_async.polling import TaskWait, WaitPolicy, check_seconds
from kontext_async.transport import Transport
from kontext_async.wire import check_task_id

__all__ = ["OutcomeStream", "TaskOutcome", "outcomes_in_order"]

# How much is started, taken or ended in one go, so that the event loop gets air in between.
_PIECE = 500

_END = object()


@attrs.frozen(kw_only=True)
class TaskOutcome:
    """How one task of a batch ended: of ``result`` and ``error`` one is None."""

    task_id: str
    result: CompletedTask | None = None
    error: KontextError | None = None

    def unwrap(self) -> CompletedTask:
        """The result; raises the error where there is one."""
        if self.error is not None:
            raise self.error
        assert self.result is not None, "an outcome has a result or an error"
        return self.result


def _name(task_id: object) -> str:
    """What an outcome calls a task: its id, or how something that is no id looks.

    In brackets, so that the number 5 is not taken for the id "5".
    """
    return str.__str__(task_id) if isinstance(task_id, str) else f"<{repr(task_id)[:200]}>"


def _check_source(task_ids: object) -> None:
    if isinstance(task_ids, (str, bytes)):
        raise ConfigurationError("task_ids is a single string: put the id in a list")
    if not isinstance(task_ids, (Iterable, AsyncIterable)):
        raise ConfigurationError(
            f"task_ids must be an iterable of ids, not {type(task_ids).__name__}"
        )


def _failure(task: asyncio.Task[Any]) -> BaseException | None:
    """What ended a task that is done; its cancellation, too, is no good end."""
    return asyncio.CancelledError() if task.cancelled() else task.exception()


class _Gate:
    """A client's transport as one batch uses it: shut as soon as the batch is to end.

    Waits are cancelled piece by piece; those that get a turn meanwhile must not ask any more.
    """

    def __init__(self, transport: Transport) -> None:
        self.budget = transport.budget
        self.durations = transport.durations
        self.request_timeout = transport.request_timeout
        self.acquire = transport.acquire
        self.is_shut = False
        self.refusal: AuthenticationError | None = None  # the answer to all that remain
        self._transport = transport

    async def poll(
        self, task_id: str, sent: float, *, until: float
    ) -> tuple[TaskRecord, float | None] | None:
        if self.is_shut:
            self.budget.cancel(sent)
            raise asyncio.CancelledError
        try:
            return await self._transport.poll(task_id, sent, until=until)
        except AuthenticationError as error:
            if self.refusal is None:
                self.refusal, self.is_shut = error, True
            raise


class _Batch:
    """The waits of one batch, and the outcomes not yet taken.

    Knows nothing of the iterator before it, so that one that is dropped can be noticed.
    """

    def __init__(
        self,
        task_ids: Iterable[str] | AsyncIterable[str],
        policy: WaitPolicy,
        transport: Transport,
        *,
        max_in_flight: int,
        batch_timeout: float | None,
        order: list[str],
    ) -> None:
        self._source = task_ids
        self._policy = policy
        self._transport = transport
        self._gate = _Gate(transport)
        self._max_in_flight = max_in_flight
        self._order = order  # the names of all that is read are put down here
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._latest = math.inf if batch_timeout is None else self._began + batch_timeout
        self._read: set[str] = set()
        self._waits: dict[asyncio.Task[CompletedTask | KontextError], str] = {}
        self._ready: deque[TaskOutcome] = deque()
        self._taken = 0
        self._failure: BaseException | None = None  # ends the batch
        self._stopped = False
        self._changed = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._feeder = self._spawn(self._feed())

    @property
    def over(self) -> bool:
        """Whether all was read, has ended and was taken."""
        return not (self._background or self._waits or self._ready or self._failure)

    def check_loop(self) -> None:
        """Raise `ClientStateError` in another event loop than the one it began in."""
        if asyncio.get_running_loop() is not self._loop:
            raise ClientStateError("this iterator of outcomes belongs to another event loop")

    async def next(self) -> TaskOutcome | None:
        """The next outcome; None at the end. Raises what ended the batch before its time."""
        self._taken += 1
        if self._taken % _PIECE == 0:  # many may be there, and nothing to wait for
            await asyncio.sleep(0)
        while not self._ready:
            failure = self._failure
            if failure is not None:
                await self.end()
                if failure is self._failure:  # else another consumer has raised it meanwhile
                    self._failure = None
                    raise failure
            elif self.over:
                return None
            else:
                await self._change()
        outcome = self._ready.popleft()
        self._changed.set()
        return outcome

    async def end(self) -> None:
        """End every wait, and return when nothing is left running."""
        self._stop()
        while self._background or self._waits:
            await self._change()
        self._ready.clear()

    def abandon(self) -> None:
        """End every wait in the background; may be called from anywhere."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if not self._stopped:  # a source that is being closed must not be cancelled again
            self._stopped = self._gate.is_shut = True
            self._feeder.cancel()
            self._spawn(self._cancel_waits())

    async def _feed(self) -> None:
        async with contextlib.aclosing(self._ids()) as task_ids:
            async for task_id in task_ids:
                name = _name(task_id)
                self._order.append(name)
                if name not in self._read:
                    self._read.add(name)
                    self._start(task_id, name)
                if len(self._order) % _PIECE == 0:
                    await asyncio.sleep(0)
                while len(self._waits) + len(self._ready) >= self._max_in_flight:
                    await self._change()

    async def _ids(self) -> AsyncGenerator[object, None]:
        if not isinstance(self._source, AsyncIterable):
            for task_id in self._source:
                yield task_id
            return
        source = aiter(self._source)
        try:
            while (next_id := await self._next_id(source)) is not _END:
                yield next_id
        finally:
            if isinstance(source, AsyncGenerator):
                await source.aclose()

    async def _next_id(self, source: AsyncIterator[object]) -> object:
        """The next id; `_END` where there is none, or none in the batch's time."""
        scope = asyncio.timeout_at(None if self._latest == math.inf else self._latest)
        self._transport.readings.add(scope)
        try:
            async with scope:
                return await anext(source, _END)
        except TimeoutError:
            if not scope.expired():  # the source's own
                raise
            self._transport.check_open()
            return _END
        finally:
            self._transport.readings.discard(scope)

    def _start(self, task_id: object, name: str) -> None:
        error = self._known_error(task_id, name)
        if error is not None:
            self._put(TaskOutcome(task_id=name, error=error))
            return
        wait = TaskWait(name, self._policy, self._gate, from_first_look=True, latest=self._latest)
        task = self._loop.create_task(wait.outcome())
        self._waits[task] = name
        task.add_done_callback(self._wait_ended)

    def _known_error(self, task_id: object, name: str) -> KontextError | None:
        try:
            check_task_id(task_id)
        except ConfigurationError as error:
            return error
        if self._gate.refusal is not None:
            return self._gate.refusal.for_task(name)
        now = self._loop.time()
        if now < self._latest:
            return None
        return WaitTimeoutError(task_id=name, elapsed=now - self._began, polls=0)

    def _wait_ended(self, task: asyncio.Task[CompletedTask | KontextError]) -> None:
        name = self._waits.pop(task)
        failure = _failure(task)
        if failure is None:
            self._put_end(name, task.result())
        elif self._gate.refusal is not None and task.cancelled():
            error = self._gate.refusal.for_task(name)
            self._put(TaskOutcome(task_id=name, error=error))
        else:
            self._fail(failure)
        self._changed.set()

    def _put_end(self, name: str, end: CompletedTask | KontextError) -> None:
        if isinstance(end, CompletedTask):
            self._put(TaskOutcome(task_id=name, result=end))
            return
        self._put(TaskOutcome(task_id=name, error=end))
        if end is self._gate.refusal:
            self._spawn(self._cancel_waits())

    def _put(self, outcome: TaskOutcome) -> None:
        self._ready.append(outcome)
        self._changed.set()

    def _fail(self, failure: BaseException) -> None:
        if not self._stopped:
            self._failure = failure
            self._stop()

    async def _cancel_waits(self) -> None:
        for count, wait in enumerate(list(self._waits), 1):
            wait.cancel()
            if count % _PIECE == 0:
                await asyncio.sleep(0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._work_ended)
        return task

    def _work_ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if (failure := _failure(task)) is not None:
            self._fail(failure)
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class OutcomeStream:
    """The outcomes of a batch, each as its task ends: an async iterator and context manager.

    Exhausting it, leaving its ``async with`` or `aclose` ends every wait; one that is dropped
    unfinished ends them too, with a `ResourceWarning`.
    """

    def __init__(
        self,
        task_ids: Iterable[str] | AsyncIterable[str],
        policy: WaitPolicy,
        transport: Transport,
        *,
        max_in_flight: int,
        batch_timeout: float | None,
        order: list[str] | None = None,
    ) -> None:
        self._batch: _Batch | None = None
        self._closed = False
        _check_source(task_ids)
        if isinstance(max_in_flight, bool) or not isinstance(max_in_flight, int):
            raise ConfigurationError(f"max_in_flight must be an int, not {max_in_flight!r}")
        if max_in_flight < 1:
            raise ConfigurationError("max_in_flight must be at least 1")
        check_seconds("batch_timeout", batch_timeout)
        self._transport = transport
        self._begin = functools.partial(
            _Batch,
            task_ids,
            policy,
            transport,
            max_in_flight=max_in_flight,
            batch_timeout=batch_timeout,
            order=[] if order is None else order,
        )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TaskOutcome:
        if self._closed:
            raise StopAsyncIteration
        outcome = await self._started().next()
        if outcome is None:
            self._closed = True
            raise StopAsyncIteration
        return outcome

    async def __aenter__(self) -> Self:
        if not self._closed:
            self._started()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End every wait that is left; what has not been taken is dropped."""
        if self._batch is not None:
            self._batch.check_loop()
        self._closed = True
        if self._batch is not None:
            await self._batch.end()

    def __del__(self) -> None:
        batch = self._batch
        if batch is not None and not self._closed and not batch.over:
            batch.abandon()
            warnings.warn(
                "an iterator of outcomes was dropped before its end: use `async with`",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )

    def _started(self) -> _Batch:
        if self._batch is None:
            self._transport.check_open()
            self._batch = self._begin()
        self._batch.check_loop()
        return self._batch


async def outcomes_in_order(
    task_ids: Iterable[str] | AsyncIterable[str],
    policy: WaitPolicy,
    transport: Transport,
    *,
    max_in_flight: int,
    batch_timeout: float | None,
) -> list[TaskOutcome]:
    """An outcome for each id given, in that order."""
    order: list[str] = []
    by_name: dict[str, TaskOutcome] = {}
    stream = OutcomeStream(
        task_ids,
        policy,
        transport,
        max_in_flight=max_in_flight,
        batch_timeout=batch_timeout,
        order=order,
    )
    async with stream:
        async for outcome in stream:
            by_name[outcome.task_id] = outcome
    return [by_name[name] for name in order]
