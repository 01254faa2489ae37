"""The outcome of each task on disk, so that a restart continues where the last run stopped."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import time
import weakref
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Self

from kontext_async.batch import check_source
from kontext_async.client import KontextClient
from kontext_async.creation import SubmittedTask
from kontext_async.errors import ClientStateError, ConfigurationError, KontextError
from kontext_async.models import CompletedTask
from kontext_async.outcomes import ResultOutcome, TaskOutcome
from kontext_async.polling import (
    DEFAULT_ERROR_GRACE,
    DEFAULT_NOT_FOUND_GRACE,
    DEFAULT_TIMEOUT,
    PollEvent,
    check_count,
    check_plain_function,
    check_seconds,
)
from kontext_async.results.errors import DownloadError
from kontext_async.results.images.files import SavedImage
from kontext_async.results.images.saver import ImageSaver
from kontext_async.results.images.saves import SavedOutcome, save_outcomes
from kontext_async.results.ledger.generation import (
    GenerationOptions,
    Generator,
    RequestOutcome,
)
from kontext_async.results.ledger.journal import LedgerJournal
from kontext_async.results.ledger.rows import (
    COLUMNS,
    LedgerEntry,
    TaskState,
    entry_of,
    error_text,
    record_text,
)
from kontext_async.results.ledger.store import (
    Row,
    Store,
    has_submissions,
    open_reader,
    translate_errors,
)
from kontext_async.results.ledger.submissions import (
    ENTRIES,
    KeyedRequest,
    SubmissionEntry,
    Submissions,
    check_requests,
    submission_of,
    with_keys,
)
from kontext_async.results.threads import run_in_thread
from kontext_async.schedule import PollState
from kontext_async.streams import Stream
from kontext_async.wire import ImageRequest, check_task_id

__all__ = ["Ledger"]

_ENDED = "SELECT task_id, state FROM tasks WHERE state IN ('done', 'failed')"
_ADD = """
    INSERT INTO tasks (task_id, state, attempts, created_at, updated_at)
    SELECT value, 'waiting', 0, ?, ? FROM json_each(?) WHERE true ON CONFLICT DO NOTHING
"""
_NEW_RECORD = "UPDATE tasks SET record = ?, updated_at = ? WHERE task_id = ?"
_SAVED = """
    UPDATE tasks SET saved_path = ?, sha256 = ?, size = ?, kind = ?, error = NULL, updated_at = ?
    WHERE task_id = ? AND state <> 'failed'
"""
# A failed generation keeps its own error: it has no image.
_NOT_SAVED = "UPDATE tasks SET error = ?, updated_at = ? WHERE task_id = ? AND state <> 'failed'"
_ENTRIES = f"SELECT {COLUMNS} FROM tasks ORDER BY position"  # noqa: S608  # our own names

# Answers for a URL that has been replaced or has expired.
_STALE = (403, 404, 410)


class Ledger:
    """The outcome of each task, in one SQLite file: an async context manager.

    A restart with the same ledger continues where the last run stopped, however that ended. A
    ledger has one writer at a time and any number of readers (`Ledger.read`).

    ``path``: the file, which is made if missing. The images belong beside it.

    Entering raises `LedgerError` if the file is not a ledger, is damaged, or has a writer; the
    file is then left as it is.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._store = Store(self._path)
        self._ended: dict[str, TaskState] = {}
        self._images = _Images(self._path.parent)
        self._submissions = Submissions(self._store)
        self._arrivals: dict[str, asyncio.Event] = {}  # of callbacks, by token
        self._streams: weakref.WeakSet[Stream[Any]] = weakref.WeakSet()

    async def __aenter__(self) -> Self:
        await self._store.open()
        self._ended.clear()
        try:
            self._ended.update(await self._store.run(_ENDED))
            await self._submissions.recover()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Write what is still to be written, and close the file. Idempotent.

        Batches under way end with `ClientStateError`. Raises `LedgerError` if a write failed.
        """
        try:
            for stream in list(self._streams):
                await stream.abort(ClientStateError(f"ledger {self._path}: it was closed"))
        finally:  # also while cancelled: an open store keeps the file locked
            await self._store.aclose()

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Iterator[LedgerEntry]:
        """Iterate over the entries of a ledger, in the order in which the ids came to it.

        Works at any time, beside a writer and on read-only media. Raises `LedgerError` if the
        ledger does not exist or cannot be read.
        """
        file = Path(path)
        with translate_errors(file), closing(open_reader(file)) as connection:
            for row in connection.execute(_ENTRIES):
                yield entry_of(row)

    @staticmethod
    def read_submissions(path: str | os.PathLike[str]) -> Iterator[SubmissionEntry]:
        """Iterate over the requests of `generate`, in the order in which they came to the ledger.

        Works at any time, as `read` does, and raises the same.
        """
        file = Path(path)
        with translate_errors(file), closing(open_reader(file)) as connection:
            if has_submissions(connection):
                for row in connection.execute(ENTRIES):
                    yield submission_of(row)

    async def add(self, task_ids: Iterable[str]) -> None:
        """Add ids in the state ``"waiting"``; known ones stay as they are.

        `as_completed` does this for each id as it reads it. Raises `ConfigurationError` for an
        invalid id.
        """
        check_source(task_ids)
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
        timeout: float | None = DEFAULT_TIMEOUT,
        wait: Callable[[PollState], float] | None = None,
        error_grace: float | None = DEFAULT_ERROR_GRACE,
        not_found_grace: float | None = DEFAULT_NOT_FOUND_GRACE,
        on_event: Callable[[PollEvent], object] | None = None,
    ) -> Stream[TaskOutcome]:
        """Wait for tasks as `KontextClient.as_completed` does, with each outcome on disk first.

        Tasks that are done or have failed by the ledger are not polled again: their outcomes come
        from there. Everything else is waited for, such as what timed out, met an error, or was
        still waiting when a run ended. ``retry_failed``: poll failed generations again too.

        Invalid ids get an error outcome and are not recorded. Raises what
        `KontextClient.as_completed` raises, and `LedgerError` from the iteration if an outcome
        cannot be recorded.
        """
        stream = client.as_completed(
            task_ids,
            max_in_flight=max_in_flight,
            batch_timeout=batch_timeout,
            timeout=timeout,
            wait=wait,
            error_grace=error_grace,
            not_found_grace=not_found_grace,
            on_event=on_event,
            journal=self._journal(retry_failed=retry_failed),
        )
        self._streams.add(stream)
        return stream

    def generate(
        self,
        client: KontextClient,
        requests: Iterable[KeyedRequest] | AsyncIterable[KeyedRequest],
        *,
        max_running: int = 100,
        max_new: int | None = None,
        retry_failed: bool = False,
        callback_grace: float = 120.0,
        on_submitted: Callable[[SubmittedTask], object] | None = None,
        batch_timeout: float | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        wait: Callable[[PollState], float] | None = None,
        error_grace: float | None = DEFAULT_ERROR_GRACE,
        not_found_grace: float | None = DEFAULT_NOT_FOUND_GRACE,
        on_event: Callable[[PollEvent], object] | None = None,
    ) -> Stream[RequestOutcome]:
        """Create a task for each request, wait for it, and yield its outcome as it ends.

        A request whose task is in the ledger is not sent again, however the run before ended. So
        the same requests can be given again, moved or added to, and each is paid for once.

        - ``requests``: any iterable of `ImageRequest`, or of pairs of a key of your own and an
          `ImageRequest`. Without a key the parameters name it, with a number for equal ones.
        - ``max_running``: the most tasks under way plus outcomes not yet taken.
        - ``max_new``: the most tasks to create in this run; the other requests are kept for
          another run and have no outcome.
        - ``retry_failed``: send refused requests again, and poll failed tasks again.
        - ``callback_grace``: seconds for which a request whose answer was lost waits for its
          callback, if the client's ``callback_url`` has a ``{token}`` (see `add_candidate`).
        - ``on_submitted``: called with each `SubmittedTask`.
        - ``batch_timeout``: seconds after which no task is created, and what is left ends with
          `WaitTimeoutError`.

        The rest is as in `KontextClient.as_completed`.

        An uncertain request has a `SubmissionUnknownError` as its outcome in every run, until it
        is decided by hand (`resolve`). Three things end the creation of tasks: a refusal that would
        meet every request (a refused key, no credits), a dead network, and ten lost answers in a
        row. They are the outcome of the requests that are left; the batch goes on waiting.

        Raises `ConfigurationError` for a bad argument, from the iteration also for a key that has
        two requests, and `LedgerError` if something cannot be recorded.
        """
        check_count("max_running", max_running)
        if max_new is not None:
            check_count("max_new", max_new, at_least=0)
        check_seconds("callback_grace", callback_grace)
        check_plain_function("on_submitted", on_submitted)
        # It checks the keywords of a wait; nothing begins before the first iteration.
        client.as_completed(
            (),
            batch_timeout=batch_timeout,
            timeout=timeout,
            wait=wait,
            error_grace=error_grace,
            not_found_grace=not_found_grace,
            on_event=on_event,
        )
        check_requests(requests)
        options = GenerationOptions(
            max_running=max_running,
            max_new=max_new,
            retry_failed=retry_failed,
            callback_grace=callback_grace,
            on_submitted=on_submitted,
            batch_timeout=batch_timeout,
            timeout=timeout,
            wait={
                "wait": wait,
                "error_grace": error_grace,
                "not_found_grace": not_found_grace,
                "on_event": on_event,
            },
        )
        stream: Stream[RequestOutcome] = Stream(
            functools.partial(
                Generator,
                client,
                requests,
                options,
                submissions=self._submissions,
                journal=self._journal(retry_failed=retry_failed),
                arrivals=self._arrivals,
            )
        )
        self._streams.add(stream)
        return stream

    @staticmethod
    def keys_of(requests: Iterable[KeyedRequest]) -> list[tuple[str, ImageRequest]]:
        """Return each request that `generate` would make of these, with its key in the ledger.

        Raises `ConfigurationError` for what is not a request, and for a key that has two.
        """
        check_requests(requests)
        return with_keys(requests)

    async def add_candidate(self, token: str, task_id: str) -> bool:
        """Record the task that a callback names; on disk when this returns.

        ``token`` is the one in the callback's address. `generate` takes the task as the request's
        if the request is uncertain and the task's record has its parameters. Returns False if no
        request has the token. This is the ``on_token`` of a `CallbackReceiver`.
        """
        is_known = await self._submissions.add_candidate(token, check_task_id(task_id))
        if (arrived := self._arrivals.get(token)) is not None:
            arrived.set()
        return is_known

    async def resolve(self, key: str, task_id: str | None) -> SubmissionEntry:
        """Decide an uncertain request by hand, and return its entry.

        ``task_id``: the task that was found for it; None gives the request up, and it is not sent
        again. Raises `ConfigurationError` if the key is unknown, the request is not uncertain, or
        the task belongs to another request.
        """
        entry = await self._submissions.get(key)
        if entry is None:
            raise ConfigurationError(f"the ledger has no request with the key {key!r}")
        if entry.state not in {"unknown", "abandoned"}:
            raise ConfigurationError(f"the request {key!r} is not uncertain: it is {entry.state}")
        if task_id is None:
            await self._submissions.set(key, "abandoned")
        elif not await self._submissions.bind(key, check_task_id(task_id)):
            raise ConfigurationError(f"task {task_id!r} belongs to another request")
        decided = await self._submissions.get(key)
        assert decided is not None, "a request is never removed"
        return decided

    def save_outcomes(
        self, outcomes: AsyncIterable[TaskOutcome], saver: ImageSaver
    ) -> Stream[SavedOutcome]:
        """Save a batch's images as `kontext_async.results.save_outcomes` does, and record it.

        An image whose file still has the checksum in the ledger is not fetched again; nor is one
        that a killed run had saved without recording it. A changed one is fetched again, which
        needs a saver with ``overwrite=True``.
        """
        return save_outcomes(outcomes, _RecordingSaver(self._store, self._images, saver))

    async def record_saved(self, task_id: str, saved: SavedImage) -> None:
        """Record where the image of a task is; `save_outcomes` does this by itself."""
        await self._store.run(*self._images.saved(task_id, saved))

    async def record_save_failed(self, task_id: str, error: KontextError) -> None:
        """Record why a task's image could not be saved; `save_outcomes` does this by itself."""
        await self._store.run(*_not_saved(task_id, error))

    def _journal(self, *, retry_failed: bool) -> LedgerJournal:
        final: set[TaskState] = {"done"} if retry_failed else {"done", "failed"}
        return LedgerJournal(self._store, self._ended, self._images.recalled, final=final)


def _not_saved(task_id: str, error: KontextError) -> tuple[str, Row]:
    return _NOT_SAVED, (error_text(error), time.time(), task_id)


class _Images:
    """The ledger's knowledge of images.

    ``recalled``: the image columns of outcomes that came from the ledger and are not yet used;
    None for a task whose image is not saved.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prefixes: dict[str, str] = {}  # a cache: relative paths are expensive to compute
        self.recalled: dict[str, Row | None] = {}

    async def unchanged(self, image: Row) -> SavedImage | None:
        """Return the image of a row if its file still has the checksum."""
        return await run_in_thread(_unchanged, self._folder, image)

    def saved(self, task_id: str, image: SavedImage) -> tuple[str, Row]:
        """Return the statement that records where an image is."""
        head, name = os.path.split(image.path)
        if head not in self._prefixes:
            self._prefixes[head] = _prefix(head, self._folder)
        path = self._prefixes[head] + name
        return _SAVED, (_storable(path), image.sha256, image.size, image.kind, time.time(), task_id)


def _storable(path: str) -> str | bytes:
    """Return a path as SQLite stores it: the bytes of a name that is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return path


def _prefix(head: str, folder: Path) -> str:
    """Return the relative path from the ledger's folder to another."""
    prefix = Path(os.path.relpath(head or os.curdir, folder)).as_posix()
    return "" if prefix == "." else f"{prefix}/"


def _unchanged(folder: Path, image: Row) -> SavedImage | None:
    saved_path, sha256, size, kind = image
    path = folder / os.fsdecode(saved_path)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
    saved = SavedImage(path=path, size=size, sha256=sha256, kind=kind)
    return saved if digest == sha256 else None


class _RecordingSaver:
    """An `ImageSaver` that consults the ledger first, and records what it saved."""

    def __init__(self, store: Store, images: _Images, saver: ImageSaver) -> None:
        self._store = store
        self._images = images
        self._saver = saver
        self.max_concurrency = saver.max_concurrency

    async def save(self, task: CompletedTask) -> SavedImage:
        is_recalled = task.task_id in self._images.recalled
        image = self._images.recalled.pop(task.task_id, None)
        if image is not None and (unchanged := await self._images.unchanged(image)):
            return unchanged
        try:
            try:
                # A killed run may have saved what the ledger does not know; what it knows has
                # changed.
                found = None if image else await self._saver.find(task.task_id)
                saved = found or await self._saver.save(task)
            except DownloadError as error:
                if not is_recalled or error.http_status not in _STALE:
                    raise
                saved = await self._save_from_fresh_url(task, error)
        except DownloadError as error:
            self._store.post(*_not_saved(task.task_id, error))
            raise
        # Not waited for: if a crash loses the row, a restart finds the file.
        self._store.post(*self._images.saved(task.task_id, saved))
        return saved

    async def _save_from_fresh_url(self, task: CompletedTask, stale: DownloadError) -> SavedImage:
        """Ask once for a new record of a task whose recorded URL has stopped working."""
        try:
            fresh = CompletedTask.of(await self._saver.client.record_info(task.task_id))
        except (KontextError, ValueError) as exc:
            raise stale from exc
        if fresh.result_image_url == task.result_image_url:
            raise stale
        saved = await self._saver.save(fresh)
        record = record_text(ResultOutcome(task_id=task.task_id, result=fresh))
        self._store.post(_NEW_RECORD, (record, time.time(), task.task_id))
        return saved
