"""Many waits at once: one for each id, read with backpressure, each with its own outcome."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import enum
import functools
import math
from collections import OrderedDict, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
)
from typing import Any, Protocol, TypeVar

from kontext_async.errors import (
    AuthenticationError,
    ConfigurationError,
    KontextError,
    WaitTimeoutError,
)
from kontext_async.fairness import yield_to_loop
from kontext_async.models import TaskRecord
from kontext_async.outcomes import ErrorOutcome, TaskOutcome
from kontext_async.polling import TaskWait, WaitPolicy, check_count, check_seconds
from kontext_async.streams import Stream
from kontext_async.transport import Transport
from kontext_async.wire import check_task_id

__all__ = ["Journal", "check_source", "each_of", "outcome_stream", "outcomes_in_order"]

_T = TypeVar("_T")

_END = object()

# Ended ids that a stream remembers as duplicates; more would fill the memory of a service.
_ENDED_IDS = 100_000


class Journal(Protocol):
    """A durable memory of outcomes that a batch works with, such as a ledger on disk.

    The futures belong to the journal: a batch that ends neither cancels nor awaits them. An
    exception of a call or a future ends the batch.
    """

    def begin(self, task_id: str) -> asyncio.Future[TaskOutcome | None]:
        """Return the outcome that is known already, or note that a wait begins: None."""
        ...

    def record(self, outcome: TaskOutcome) -> asyncio.Future[None]:
        """Make an outcome durable; the batch hands it on when the future is done."""
        ...


def check_source(task_ids: object) -> None:
    """Raise `ConfigurationError` unless this is an iterable of ids, and not a single string."""
    if isinstance(task_ids, (str, bytes)):
        raise ConfigurationError("task_ids is a single string: put the id in a list")
    if not isinstance(task_ids, (Iterable, AsyncIterable)):
        raise ConfigurationError(
            f"task_ids must be an iterable of ids, not {type(task_ids).__name__}"
        )


async def each_of(source: Iterable[_T] | AsyncIterable[_T]) -> AsyncGenerator[_T, None]:
    """Yield the items of an iterable of either kind; an async generator is closed at the end."""
    if not isinstance(source, AsyncIterable):
        for count, item in enumerate(source, 1):
            yield item
            await yield_to_loop(count)
        return
    iterator = aiter(source)
    try:
        async for item in iterator:
            yield item
    finally:
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()


def _name(task_id: object) -> str:
    """Return the name of a task in its outcome: its id, or the repr of an invalid one.

    The repr is in brackets, so that the number 5 differs from the id "5".
    """
    return str.__str__(task_id) if isinstance(task_id, str) else f"<{repr(task_id)[:200]}>"


def _exception(future: asyncio.Future[Any]) -> BaseException | None:
    """Return what a future ended with, if that is not a value."""
    return asyncio.CancelledError() if future.cancelled() else future.exception()


class _State(enum.Enum):
    """A batch's states; `_Batch` has the table of transitions."""

    READING = enum.auto()
    DRAINING = enum.auto()
    ENDING = enum.auto()
    ENDED = enum.auto()


class _BatchPoller:
    """A client's transport, for one batch: it sends nothing once it is shut.

    Waits are cancelled in portions; one that gets a permit meanwhile must not use it. The first
    `AuthenticationError` shuts it too: as ``refusal`` it is the outcome of all that remain.
    """

    def __init__(self, transport: Transport) -> None:
        self.budget = transport.budget
        self.durations = transport.durations
        self.notices = transport.notices
        self.request_timeout = transport.request_timeout
        self.acquire = transport.acquire
        self.refusal: AuthenticationError | None = None
        self._is_shut = False
        self._transport = transport

    def shut(self) -> None:
        self._is_shut = True

    async def poll(
        self, task_id: str, sent: float, *, until: float, first: bool, failing: bool
    ) -> tuple[TaskRecord, float | None] | None:
        if self._is_shut:
            self.budget.cancel(sent)
            raise asyncio.CancelledError
        try:
            return await self._transport.poll(
                task_id, sent, until=until, first=first, failing=failing
            )
        except AuthenticationError as error:
            if self.refusal is None and not error.retryable:
                self.refusal, self._is_shut = error, True
            raise


class _Batch:
    """The waits of one batch, and the outcomes not yet taken.

    An id passes through the journal's ``begin``, a wait, and the journal's ``record``; without a
    journal through the wait alone.

    =================  ==========================================  ========
    state              event                                       becomes
    =================  ==========================================  ========
    READING            the source is exhausted                     DRAINING
    READING, DRAINING  `end`, `abandon`, or an exception of the    ENDING
                       source, a callback or the journal
    DRAINING           the last outcome is ready                   ENDED
    ENDING             the source is closed, all waits cancelled   ENDED
    =================  ==========================================  ========

    Outcomes are handed on until it is ENDING; those not yet taken remain when it is ENDED.
    """

    def __init__(
        self,
        task_ids: Iterable[str] | AsyncIterable[str],
        policy: WaitPolicy,
        transport: Transport,
        *,
        max_in_flight: int,
        batch_timeout: float | None,
        journal: Journal | None,
        names_read: list[str] | None,
    ) -> None:
        transport.check_open()
        self._source = task_ids
        self._policy = policy
        self._transport = transport
        self._poller = _BatchPoller(transport)
        self._max_in_flight = max_in_flight
        self._journal = journal
        self._names_read = names_read
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()  # of callbacks: otherwise each has a copy
        self._began = self._loop.time()
        self._latest = math.inf if batch_timeout is None else self._began + batch_timeout
        self._open_names: set[str] = set()  # read, and their outcomes not yet handed on
        self._ended_names: OrderedDict[str, None] = OrderedDict()
        self._ended_limit = math.inf if names_read is not None else _ENDED_IDS
        self._waits: dict[asyncio.Task[TaskOutcome], str] = {}
        self._journaling: dict[asyncio.Future[Any], Callable[[Any], None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._ready: deque[TaskOutcome] = deque()
        self._taken = 0
        self._failure: BaseException | None = None  # to be raised from `next`
        self._changed = asyncio.Event()
        self._state = _State.READING
        self._source_read: asyncio.Timeout | None = None
        self._reader = self._spawn(self._read())

    @property
    def finished(self) -> bool:
        return self._state is _State.ENDED and not self._ready and self._failure is None

    async def next(self) -> TaskOutcome | None:
        self._taken += 1
        await yield_to_loop(self._taken)  # many outcomes may be ready, without any waiting
        while not self._ready:
            if self._failure is not None:
                await self._raise(self._failure)
            elif self.finished:
                return None
            else:
                await self._change()
        outcome = self._ready.popleft()
        self._changed.set()
        return outcome

    async def end(self, error: BaseException | None = None) -> None:
        self._failure = self._failure or error
        self._stop()
        while self._state is not _State.ENDED:
            await self._change()
        self._ready.clear()

    def _fail(self, error: BaseException) -> None:
        if self._is_active:
            self._failure = error
            self._stop()

    def abandon(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop)

    async def _raise(self, failure: BaseException) -> None:
        await self.end()
        if failure is not self._failure:  # another consumer has raised it meanwhile
            return
        self._failure = None
        if isinstance(failure, StopAsyncIteration):  # raised as it is, it would end the stream
            raise RuntimeError(  # noqa: TRY004  # what Python itself does in generators
                "a callback or the source raised StopAsyncIteration"
            ) from failure
        raise failure

    def _stop(self) -> None:
        if not self._is_active:  # a source that is being closed is cancelled once
            return
        self._state = _State.ENDING
        self._poller.shut()
        self._cancel_reader()
        self._spawn(self._cancel_waits())

    def _cancel_reader(self) -> None:
        """Cancel the reader once: the source may be cleaning up since its deadline or the close."""
        read = self._source_read
        if read is not None:
            if read.expired():
                return
            read.reschedule(None)
            self._transport.open_scopes.discard(read)
        self._reader.cancel()

    async def _read(self) -> None:
        async with contextlib.aclosing(self._ids()) as task_ids:
            count = 0
            async for task_id in task_ids:
                count += 1
                name = _name(task_id)
                if self._names_read is not None:
                    self._names_read.append(name)
                if name not in self._open_names and name not in self._ended_names:
                    self._open_names.add(name)
                    self._begin(task_id, name)
                await yield_to_loop(count)
                while self._in_flight >= self._max_in_flight:
                    await self._change()
        if self._state is _State.READING:
            self._state = _State.DRAINING

    @property
    def _is_active(self) -> bool:
        return self._state in (_State.READING, _State.DRAINING)

    @property
    def _in_flight(self) -> int:
        return len(self._waits) + len(self._journaling) + len(self._ready)

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
        """Return the next id, or `_END` if there is none before the batch's deadline."""
        scope = asyncio.timeout_at(None if self._latest == math.inf else self._latest)
        self._source_read = scope
        self._transport.open_scopes.add(scope)
        try:
            async with scope:
                next_id = await anext(source, _END)
        except TimeoutError:
            if not scope.expired():  # the source's own
                raise
            self._transport.check_open()
            return _END
        else:
            return next_id if self._is_active else _END  # it may ignore its cancellation
        finally:
            self._source_read = None
            self._transport.open_scopes.discard(scope)

    def _begin(self, task_id: object, name: str) -> None:
        try:
            check_task_id(task_id)
        except ConfigurationError as error:
            self._hand_on(ErrorOutcome(task_id=name, error=error))
            return
        if self._journal is None:
            self._wait(name)
        else:
            self._follow(self._journal.begin(name), functools.partial(self._begun, name))

    def _begun(self, name: str, known: TaskOutcome | None) -> None:
        if known is not None:
            self._hand_on(known)
        elif self._is_active:
            self._wait(name)

    def _wait(self, name: str) -> None:
        error = self._early_error(name)
        if error is not None:
            self._record(ErrorOutcome(task_id=name, error=error))
            return
        wait = TaskWait(
            name, self._policy, self._poller, timeout_from_first_poll=True, latest=self._latest
        )
        task = self._loop.create_task(wait.run(), name=name)
        self._waits[task] = name
        task.add_done_callback(self._waited, context=self._context)

    def _early_error(self, name: str) -> KontextError | None:
        if self._poller.refusal is not None:
            return self._poller.refusal.for_task(name)
        now = self._loop.time()
        if now < self._latest:
            return None
        return WaitTimeoutError(task_id=name, elapsed=now - self._began, polls=0)

    def _waited(self, task: asyncio.Task[TaskOutcome]) -> None:
        name = self._waits.pop(task)
        refusal = self._poller.refusal
        if refusal is not None and task.cancelled():
            self._record(ErrorOutcome(task_id=name, error=refusal.for_task(name)))
        elif (failure := _exception(task)) is not None:
            self._fail(failure)
        else:
            outcome = task.result()
            self._record(outcome)
            if refusal is not None and outcome.error is refusal:
                self._spawn(self._cancel_waits())
        self._step_ended()

    def _record(self, outcome: TaskOutcome) -> None:
        if self._journal is None:
            self._hand_on(outcome)
            return
        try:
            recorded = self._journal.record(outcome)
        except BaseException as error:  # noqa: BLE001  # `next` raises it
            self._fail(error)
        else:
            self._follow(recorded, lambda _: self._hand_on(outcome))

    def _hand_on(self, outcome: TaskOutcome) -> None:
        if not self._is_active:
            return
        self._open_names.discard(outcome.task_id)
        self._ended_names[outcome.task_id] = None
        if len(self._ended_names) > self._ended_limit:
            self._ended_names.popitem(last=False)
        self._ready.append(outcome)
        self._changed.set()

    def _follow(self, future: asyncio.Future[_T], then: Callable[[_T], None]) -> None:
        """Call ``then`` with the journal's answer; end the batch if that is an exception."""
        self._journaling[future] = then
        future.add_done_callback(self._followed)

    def _followed(self, future: asyncio.Future[Any]) -> None:
        then = self._journaling.pop(future)
        if (failure := _exception(future)) is not None:
            self._fail(failure)
        else:
            then(future.result())
        self._step_ended()

    async def _cancel_waits(self) -> None:
        for count, wait in enumerate(list(self._waits), 1):
            wait.cancel()
            await yield_to_loop(count)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._spawned_ended)
        return task

    def _spawned_ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if (failure := _exception(task)) is not None:
            self._fail(failure)
        self._step_ended()

    def _step_ended(self) -> None:
        is_idle = not (self._background or self._waits)
        is_drained = self._state is _State.DRAINING and not self._journaling
        if is_idle and (is_drained or self._state is _State.ENDING):
            self._state = _State.ENDED
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def outcome_stream(
    task_ids: Iterable[str] | AsyncIterable[str],
    policy: WaitPolicy,
    transport: Transport,
    *,
    max_in_flight: int,
    batch_timeout: float | None,
    journal: Journal | None = None,
    names_read: list[str] | None = None,
) -> Stream[TaskOutcome]:
    """Return the outcomes of a batch that begins with the stream.

    The name of each id read is appended to ``names_read``, duplicates included.
    """
    check_source(task_ids)
    check_count("max_in_flight", max_in_flight)
    check_seconds("batch_timeout", batch_timeout)
    return Stream(
        functools.partial(
            _Batch,
            task_ids,
            policy,
            transport,
            max_in_flight=max_in_flight,
            batch_timeout=batch_timeout,
            journal=journal,
            names_read=names_read,
        )
    )


async def outcomes_in_order(
    task_ids: Iterable[str] | AsyncIterable[str],
    policy: WaitPolicy,
    transport: Transport,
    *,
    max_in_flight: int,
    batch_timeout: float | None,
) -> list[TaskOutcome]:
    """Return an outcome for each id given, in that order."""
    names: list[str] = []
    outcomes: dict[str, TaskOutcome] = {}
    stream = outcome_stream(
        task_ids,
        policy,
        transport,
        max_in_flight=max_in_flight,
        batch_timeout=batch_timeout,
        names_read=names,
    )
    async with stream:
        async for outcome in stream:
            outcomes[outcome.task_id] = outcome
    return [outcomes[name] for name in names]
