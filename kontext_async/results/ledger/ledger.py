"""What became of each task, on disk, so that a restart goes on where the last run stopped."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
import weakref
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self, cast

from tenacity.wait import WaitBaseT

from kontext_async.batch import TaskOutcome, _check_source
from kontext_async.client import KontextClient
from kontext_async.errors import KontextError
from kontext_async.models import CompletedTask
from kontext_async.polling import PollEvent
from kontext_async.results.errors import DownloadError, LedgerError
from kontext_async.results.images.files import SavedImage, in_thread
from kontext_async.results.images.saver import ImageSaver, SaveStream
from kontext_async.results.ledger.recording import RecordedOutcomes, Recording
from kontext_async.results.ledger.rows import COLUMNS, LedgerEntry, TaskState, entry_of, error_text
from kontext_async.results.ledger.store import Answer, Row, Store, open_reader, translated
from kontext_async.wire import check_task_id

__all__ = ["Ledger", "LedgerEntry", "RecordedOutcomes"]

_ENDED = "SELECT task_id, state FROM tasks WHERE state IN ('done', 'failed')"
_ADD = """
    INSERT INTO tasks (task_id, state, attempts, created_at, updated_at)
    SELECT value, 'waiting', 0, ?, ? FROM json_each(?) WHERE true ON CONFLICT DO NOTHING
"""
_SAVED = """
    UPDATE tasks SET saved_path = ?, sha256 = ?, size = ?, kind = ?, error = NULL, updated_at = ?
    WHERE task_id = ? AND state <> 'failed'
"""
# Of a failed generation the error is what matters: it has no image.
_NOT_SAVED = "UPDATE tasks SET error = ?, updated_at = ? WHERE task_id = ? AND state <> 'failed'"
_ENTRIES = f"SELECT {COLUMNS} FROM tasks ORDER BY position"  # noqa: S608  # our own names


class Ledger:
    """What became of each task, in one SQLite file: an async context manager.

    A restart with the same ledger goes on where the last run stopped, however that ended. A
    ledger has one writer at a time and any number of readers (`Ledger.read`).

    ``path``: of the file, which is made where it is missing. The images belong beside it.

    Entering it raises `LedgerError` where the file is no ledger, is damaged, or has a writer; it
    is then left as it is.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._store = Store(self._path)
        self._ended: dict[str, TaskState] = {}
        self._images = _Images(self._path.parent, self._store)
        self._recordings: weakref.WeakSet[Recording] = weakref.WeakSet()

    async def __aenter__(self) -> Self:
        await self._store.open()
        self._ended.clear()
        try:
            self._ended.update(await self._store.run(_ENDED))
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Write what is still to be written, and close the file. Twice is once.

        Batches under way end with a `LedgerError`. Raises one where not all could be written.
        """
        closed = LedgerError(f"ledger {self._path}: it was closed")
        for recording in list(self._recordings):
            await recording.fail(closed)
        await self._store.aclose()
        self._images.raise_failure()

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Iterator[LedgerEntry]:
        """What a ledger holds, as of now, in the order in which the ids came to it.

        Anybody may read at any time, also where nothing can be written. Raises `LedgerError`
        where there is no ledger, or it cannot be read.
        """
        file = Path(path)
        with translated(file), closing(open_reader(file)) as connection:
            for row in connection.execute(_ENTRIES):
                yield entry_of(row)

    async def add(self, task_ids: Iterable[str]) -> None:
        """Put ids down as waiting; those that are known stay as they are.

        `as_completed` does so with each id as it comes to it. Raises `ConfigurationError` for
        what is no id.
        """
        _check_source(task_ids)
        now = time.time()
        ids = json.dumps([check_task_id(task_id) for task_id in task_ids])
        await self._store.run(_ADD, (now, now, ids))

    def as_completed(
        self,
        client: KontextClient,
        task_ids: Iterable[str] | AsyncIterable[str],
        *,
        retry_failed: bool = False,
        max_in_flight: int = 10_000,
        batch_timeout: float | None = None,
        timeout: float | None = 600.0,
        wait: WaitBaseT | None = None,
        error_grace: float | None = 120.0,
        not_found_grace: float | None = 10.0,
        on_event: Callable[[PollEvent], object] | None = None,
    ) -> RecordedOutcomes:
        """Wait for tasks as `KontextClient.as_completed` does; each outcome is on disk first.

        What is done or has failed by the ledger is not asked about again: its outcome comes from
        there. All else is waited for: what timed out or met an error, and what was being waited
        for when a run ended. ``retry_failed``: ask about failed generations too.

        What is no id has its outcome, but is not put down. Raises what `KontextClient.as_completed`
        raises, and `LedgerError` from the iteration where an outcome cannot be recorded.
        """
        begin = functools.partial(
            client.as_completed,
            max_in_flight=max_in_flight,
            batch_timeout=batch_timeout,
            timeout=timeout,
            wait=wait,
            error_grace=error_grace,
            not_found_grace=not_found_grace,
            on_event=on_event,
        )
        _check_source(task_ids)
        recording = Recording(
            task_ids,
            begin,
            self._store,
            self._ended,
            self._images.recalled,
            final={"done"} if retry_failed else {"done", "failed"},
            max_in_flight=max_in_flight,
        )
        self._recordings.add(recording)
        return RecordedOutcomes(recording)

    def save_outcomes(self, outcomes: AsyncIterable[TaskOutcome], saver: ImageSaver) -> SaveStream:
        """Save a batch's images as `kontext_async.results.save_outcomes` does, and record that.

        An image that is saved by the ledger, and whose file has its checksum still, is not fetched
        again; nor is one that a killed run had saved, but not recorded. What has changed is fetched
        again, which needs a saver with ``overwrite=True``.
        """
        return SaveStream(outcomes, cast("ImageSaver", _Keeper(self._images, saver)))

    async def record_saved(self, task_id: str, saved: SavedImage) -> None:
        """Put down where the image of a task is; `save_outcomes` does so by itself."""
        await self._store.run(*self._images.saved(task_id, saved))

    async def record_save_failed(self, task_id: str, error: KontextError) -> None:
        """Put down why the image of a task could not be saved; `save_outcomes` does so itself."""
        await self._store.run(*_not_saved(task_id, error))


def _not_saved(task_id: str, error: KontextError) -> tuple[str, Row]:
    return _NOT_SAVED, (error_text(error), time.time(), task_id)


class _Images:
    """What the ledger knows of images.

    ``recalled``: where they are, for outcomes that came from the ledger and are not yet used.
    """

    def __init__(self, folder: Path, store: Store) -> None:
        self._folder = folder
        self._store = store
        self._prefixes: dict[str, str] = {}  # of paths, by folder: finding one out is dear
        self._failure: BaseException | None = None  # of a write that nobody waits for
        self.recalled: dict[str, Row] = {}

    async def unchanged(self, image: Row) -> SavedImage | None:
        """The image of a row, where its file has its checksum still."""
        return await in_thread(_unchanged, self._folder, image)

    def saved(self, task_id: str, image: SavedImage) -> tuple[str, Row]:
        """The statement that puts down where an image is."""
        head, name = os.path.split(image.path)
        if head not in self._prefixes:
            self._prefixes[head] = _prefix(head, self._folder)
        path = self._prefixes[head] + name
        return _SAVED, (path, image.sha256, image.size, image.kind, time.time(), task_id)

    def note(self, sql: str, values: Row) -> None:
        """Put something down without waiting for it; raises the failure of one before."""
        self.raise_failure()
        self._store.submit(sql, values, self._noted)

    def raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _noted(self, answer: Answer) -> None:
        if isinstance(answer, BaseException):
            self._failure = answer


def _prefix(head: str, folder: Path) -> str:
    """How to come from the ledger's folder to another."""
    prefix = Path(os.path.relpath(head or os.curdir, folder)).as_posix()
    return "" if prefix == "." else f"{prefix}/"


def _unchanged(folder: Path, image: Row) -> SavedImage | None:
    saved_path, sha256, size, kind = image
    path = folder / saved_path
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
    saved = SavedImage(path=path, size=size, sha256=sha256, kind=kind)
    return saved if digest == sha256 else None


class _Keeper:
    """Saves as an `ImageSaver` does, but asks the ledger first, and tells it."""

    def __init__(self, images: _Images, saver: ImageSaver) -> None:
        self._images = images
        self._saver = saver
        self.max_concurrency = saver.max_concurrency

    async def save(self, task: CompletedTask) -> SavedImage:
        image = self._images.recalled.pop(task.task_id, None)
        if image is not None and (kept := await self._images.unchanged(image)):
            return kept
        try:
            saved = await self._fetched(task, known=image is not None)
        except DownloadError as error:
            self._images.note(*_not_saved(task.task_id, error))
            raise
        # Not waited for: were it lost in a crash, a restart would find the file.
        self._images.note(*self._images.saved(task.task_id, saved))
        return saved

    async def _fetched(self, task: CompletedTask, *, known: bool) -> SavedImage:
        # What the ledger does not know may be there since a run was killed; what it knows is lost.
        found = None if known else await self._saver.find(task.task_id)
        return found or await self._saver.save(task)
