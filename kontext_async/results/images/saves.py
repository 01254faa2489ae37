"""The images of a batch, saved while other tasks of it still generate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Coroutine
from typing import Any, Protocol, TypeAlias, cast

from kontext_async.errors import KontextError
from kontext_async.models import CompletedTask
from kontext_async.outcomes import TaskOutcome
from kontext_async.results.errors import DownloadError
from kontext_async.results.images.files import SavedImage
from kontext_async.streams import Stream

__all__ = ["SavedOutcome", "Saver", "save_outcomes"]

# An outcome, with its image, or the error of saving it, or None if it has no result.
SavedOutcome: TypeAlias = tuple[TaskOutcome, SavedImage | KontextError | None]


class Saver(Protocol):
    """Saves images, such as an `ImageSaver`."""

    max_concurrency: int

    async def save(self, task: CompletedTask) -> SavedImage: ...


async def _next(source: AsyncIterator[TaskOutcome]) -> TaskOutcome | None:
    return await anext(source, None)


async def _save(outcome: TaskOutcome, task: CompletedTask, saver: Saver) -> SavedOutcome:
    try:
        return outcome, await saver.save(task)
    except DownloadError as error:
        return outcome, error


class _Saves:
    """The saves under way, and at most one read of the outcomes."""

    def __init__(self, outcomes: AsyncIterator[TaskOutcome], saver: Saver) -> None:
        self._outcomes = outcomes
        self._saver = saver
        self._loop = asyncio.get_running_loop()
        self._reading: asyncio.Task[Any] | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._ended: asyncio.Queue[asyncio.Task[Any]] = asyncio.Queue()
        self._is_exhausted = False
        self._failure: BaseException | None = None  # to be raised from `next`

    @property
    def finished(self) -> bool:
        return not self._running and self._failure is None

    async def next(self) -> SavedOutcome | None:
        self._read_on()
        while self._running:
            task = await self._ended.get()
            if task not in self._running:  # `end` has cancelled it
                break
            self._running.discard(task)
            try:
                saved = self._saved(task)
            except BaseException:
                await self.end()
                raise
            if saved is not None:
                return saved
            self._read_on()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return None

    async def end(self, error: BaseException | None = None) -> None:
        self._failure = self._failure or error
        self._is_exhausted = True
        running = set(self._running)
        self._running.clear()
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    def abandon(self) -> None:
        for task in self._running:
            if not task.done():
                self._loop.call_soon_threadsafe(task.cancel)

    def _read_on(self) -> None:
        """Read another outcome, if there are more and there is room to save it."""
        has_room = len(self._running) <= self._saver.max_concurrency
        if self._reading is None and has_room and not self._is_exhausted:
            self._reading = self._start(_next(self._outcomes))

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended.put_nowait)
        return task

    def _saved(self, task: asyncio.Task[Any]) -> SavedOutcome | None:
        """Return what to hand on now that a task has ended; raise what it raised."""
        if task is not self._reading:
            return cast("SavedOutcome", task.result())
        self._reading = None
        outcome: TaskOutcome | None = task.result()
        if outcome is None:
            self._is_exhausted = True
        elif outcome.result is None:
            return outcome, None
        else:
            self._start(_save(outcome, outcome.result, self._saver))
        return None


def save_outcomes(outcomes: AsyncIterable[TaskOutcome], saver: Saver) -> Stream[SavedOutcome]:
    """Save the images of a batch while other tasks of it still generate.

    ``outcomes``: the stream of `KontextClient.as_completed`, or any async iterable of outcomes;
    it is read no faster than images are saved, and remains the caller's to close.

    Yields ``(outcome, saved)`` as each ends: ``saved`` is a `SavedImage`, the error that kept the
    image from being saved, or None if the outcome has no result.
    """
    source = aiter(outcomes)
    return Stream(lambda: _Saves(source, saver))
