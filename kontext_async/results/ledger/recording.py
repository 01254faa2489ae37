"""A batch's outcomes on their way through the ledger."""

from __future__ import annotations

import asyncio
import functools
import time
import warnings
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import Self, TypeAlias

from kontext_async.batch import OutcomeStream, TaskOutcome, _failure, _name
from kontext_async.errors import ConfigurationError, KontextError, WaitTimeoutError
from kontext_async.results.errors import LedgerError
from kontext_async.results.ledger.rows import (
    RECALLED,
    TaskState,
    error_text,
    recalled,
    record_text,
    state_of,
)
from kontext_async.results.ledger.store import Answer, Row, Store
from kontext_async.wire import check_task_id

__all__ = ["Begin", "RecordedOutcomes", "Recording"]

# So many ids are taken up before the event loop gets air.
_PIECE = 500

_BEGIN = """
    INSERT INTO tasks (task_id, state, attempts, created_at, updated_at)
    VALUES (?, 'waiting', 1, ?, ?) ON CONFLICT (task_id) DO UPDATE SET
    state = 'waiting', attempts = attempts + 1, error = NULL, updated_at = excluded.updated_at
"""
_END = """
    UPDATE tasks SET state = ?, record = coalesce(?, record), error = ?, updated_at = ?
    WHERE task_id = ?
"""
_RECALL = f"SELECT {RECALLED} FROM tasks WHERE task_id = ?"  # noqa: S608  # our own names


# `KontextClient.as_completed` with all else decided.
Begin: TypeAlias = Callable[[AsyncIterable[str]], OutcomeStream]


class Recording:
    """The work behind `RecordedOutcomes`.

    Knows nothing of that iterator, so that one that is dropped can be noticed. ``final``: the
    states that are not asked about again. Keeps two of the ledger's tables up to date: ``ended``,
    the tasks that are done or have failed, and ``images``, what it has of those recalled from it.
    """

    def __init__(
        self,
        task_ids: Iterable[str] | AsyncIterable[str],
        begin: Begin,
        store: Store,
        ended: dict[str, TaskState],
        images: dict[str, Row],
        *,
        final: set[TaskState],
        max_in_flight: int,
    ) -> None:
        self._source = task_ids if isinstance(task_ids, AsyncIterable) else iter(task_ids)
        self._store = store
        self._ended = ended
        self._images = images
        self._final = final
        self._max_in_flight = max_in_flight
        self._outcomes = begin(self._to_poll())
        self._read: set[str] = set()
        self._open = 0  # ids taken up whose outcomes have not been taken
        self._ready: deque[TaskOutcome] = deque()
        self._failure: BaseException | None = None  # ends the batch
        self._stopped = False
        self._changed = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether it was begun, and there is more to come."""
        if self._pump is None:
            return False
        return not self._pump.done() or bool(self._open or self._failure)

    def start(self) -> asyncio.Task[None]:
        if self._pump is None:
            self._pump = asyncio.get_running_loop().create_task(self._run())
            self._pump.add_done_callback(self._run_ended)
        return self._pump

    async def next(self) -> TaskOutcome | None:
        """The next outcome; None at the end. Raises what ended the batch before its time."""
        self.start()
        while not self._ready:
            failure = self._failure
            if failure is not None:
                await self.end()
                if failure is self._failure:  # else another consumer has raised it meanwhile
                    self._failure = None
                    raise failure
            elif not self.running:
                return None
            else:
                await self._change()
        self._open -= 1
        self._changed.set()
        return self._ready.popleft()

    async def end(self) -> None:
        """End every wait; what has ended is recorded, but no longer handed on."""
        if self._pump is not None:
            self._stop()
            await asyncio.wait([self._pump])
        self._open = 0
        self._ready.clear()
        self._changed.set()

    async def fail(self, failure: BaseException) -> None:
        """End every wait before its time: what remains is this."""
        if self.running:
            self._fail(failure)
            await asyncio.wait([self.start()])

    def abandon(self) -> None:
        """End every wait in the background, where it was begun; may be called from anywhere."""
        loop = self.start().get_loop()
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if not self._stopped:  # a source that is being closed must not be cancelled again
            self._stopped = True
            self.start().cancel()

    async def _run(self) -> None:
        began = asyncio.get_running_loop().time()
        async with self._outcomes as outcomes:
            async for outcome in outcomes:
                self._record(outcome)
        if isinstance(self._source, AsyncIterable):
            return
        # Where the batch's time is over: what an iterable still holds has its outcomes too.
        async with aclosing(self._to_poll()) as left:
            async for task_id in left:
                elapsed = asyncio.get_running_loop().time() - began
                self._record(TaskOutcome(task_id=_name(task_id), error=_late(task_id, elapsed)))

    def _run_ended(self, pump: asyncio.Task[None]) -> None:
        failure = _failure(pump)
        if failure is not None and not self._stopped:
            self._fail(failure)
        self._changed.set()

    async def _to_poll(self) -> AsyncGenerator[str, None]:
        """The ids that are to be asked about."""
        await self._room()
        async with aclosing(self._ids()) as task_ids:
            async for task_id in task_ids:
                if self._take_up(task_id):
                    yield task_id
                # With no id in hand: the end of the batch's time cuts this short.
                await self._room()

    async def _ids(self) -> AsyncGenerator[str, None]:
        if not isinstance(self._source, AsyncIterable):
            for count, task_id in enumerate(self._source, 1):
                yield task_id
                if count % _PIECE == 0:
                    await asyncio.sleep(0)
            return
        source = aiter(self._source)
        try:
            async for task_id in source:
                yield task_id
        finally:
            if isinstance(source, AsyncGenerator):
                await source.aclose()

    def _take_up(self, task_id: str) -> bool:
        """Put an id down; whether it is to be asked about."""
        name = _name(task_id)
        if name in self._read:
            return False
        self._read.add(name)
        self._open += 1
        if _refusal(task_id) is not None:
            return True  # that is its outcome
        if self._ended.get(task_id) in self._final:
            self._store.submit(_RECALL, (task_id,), self._recalled)
            return False
        self._ended.pop(task_id, None)
        now = time.time()
        self._store.submit(_BEGIN, (task_id, now, now), self._begun)
        return True

    def _begun(self, answer: Answer) -> None:
        if isinstance(answer, BaseException):
            self._fail(answer)

    def _recalled(self, answer: Answer) -> None:
        if isinstance(answer, BaseException):
            self._fail(answer)
            return
        try:
            image, outcome = recalled(*answer)
        except LedgerError as error:
            self._fail(error)
            return
        if image is not None:
            self._images[outcome.task_id] = image
        self._hand_on(outcome)

    def _record(self, outcome: TaskOutcome) -> None:
        if isinstance(outcome.error, ConfigurationError):
            self._hand_on(outcome)  # what is no id is not put down
            return
        state = state_of(outcome.error)
        values = (
            state,
            record_text(outcome),
            error_text(outcome.error),
            time.time(),
            outcome.task_id,
        )
        self._store.submit(_END, values, functools.partial(self._recorded, outcome, state))

    def _recorded(self, outcome: TaskOutcome, state: TaskState, answer: Answer) -> None:
        if isinstance(answer, BaseException):
            self._fail(answer)
            return
        if state in {"done", "failed"}:
            self._ended[outcome.task_id] = state
        self._hand_on(outcome)

    def _hand_on(self, outcome: TaskOutcome) -> None:
        if not self._stopped:
            self._ready.append(outcome)
            self._changed.set()

    def _fail(self, failure: BaseException) -> None:
        if not self._stopped:
            self._failure = failure
            self._stop()
            self._changed.set()

    async def _room(self) -> None:
        while self._open >= self._max_in_flight:
            await self._change()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def _refusal(task_id: object) -> ConfigurationError | None:
    """Why something is no id."""
    try:
        check_task_id(task_id)
    except ConfigurationError as error:
        return error
    return None


def _late(task_id: str, elapsed: float) -> KontextError:
    """The error of an id that was read when the batch's time was over."""
    return _refusal(task_id) or WaitTimeoutError(task_id=task_id, elapsed=elapsed, polls=0)


class RecordedOutcomes:
    """The outcomes of a batch, each recorded first: an async iterator and context manager.

    Exhausting it, leaving its ``async with`` or `aclose` ends every wait; one that is dropped
    unfinished ends them too, with a `ResourceWarning`.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TaskOutcome:
        if self._closed:
            raise StopAsyncIteration
        outcome = await self._recording.next()
        if outcome is None:
            self._closed = True
            raise StopAsyncIteration
        return outcome

    async def __aenter__(self) -> Self:
        if not self._closed:
            self._recording.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End every wait that is left; the ledger, once closed, has all that ended before."""
        self._closed = True
        await self._recording.end()

    def __del__(self) -> None:
        if not self._closed and self._recording.running:
            self._recording.abandon()
            warnings.warn(
                "an iterator of outcomes was dropped before its end: use `async with`",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
