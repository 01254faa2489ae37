"""Saving the images of finished tasks."""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections.abc import (
    Generator,
)
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import attrs

from kontext_async.client import KontextClient
from kontext_async.errors import ClientStateError, ConfigurationError
from kontext_async.models import CompletedTask
from kontext_async.polling import check_seconds
from kontext_async.results.errors import DownloadError, ResultExpiredError
from kontext_async.results.images.fetching import Fetcher, failure, is_busy, refusal
from kontext_async.results.images.files import (
    Draft,
    Place,
    SavedImage,
    Writer,
    file_stem,
    find_image,
    image_kind,
    in_thread,
    open_folder,
    remove_drafts,
)

__all__ = ["ImageSaver", "download"]

_MAX_BYTES = 50 * 1024 * 1024

# An image goes to disk in pieces of this many bytes: most in one go.
_BLOCK = 1024 * 1024

# What hosts answer where a file is gone, or where they deny that it ever was.
_GONE = (403, 404, 410)
_LONG_AGO = datetime.min.replace(tzinfo=UTC)

# A host in trouble is asked until the deadline; one that answers no, or not an image, so often.
_LOOKS = 3
_FIRST_PAUSE = 0.5  # s
_LONGEST_PAUSE = 15.0  # s

# What some hosts call the kinds we know.
_ALIASES = {"jpg": "jpeg", "pjpeg": "jpeg", "x-png": "png"}


def _announced_kind(response: aiohttp.ClientResponse) -> str | None:
    group, _, kind = response.content_type.partition("/")
    return _ALIASES.get(kind, kind) if group == "image" else None


class _Intake:
    """What has come of an image: the first block of it in memory, a longer one in a file."""

    def __init__(self, place: Place, max_bytes: int, writer: Writer) -> None:
        self.announced: str | None = None
        self._writer = writer
        self._place = place
        self._max_bytes = max_bytes
        self._size = 0
        self._pieces: list[bytes] = []
        self._held = 0
        self._draft: Draft | None = None

    def expect(self, response: aiohttp.ClientResponse) -> None:
        """Take an answer's word for what comes."""
        self.announced = _announced_kind(response)
        if (response.content_length or 0) > self._max_bytes:
            raise self._too_large()

    async def add(self, piece: bytes) -> None:
        """Take what has come next."""
        self._size += len(piece)
        if self._size > self._max_bytes:
            raise self._too_large()
        self._pieces.append(piece)
        self._held += len(piece)
        if self._held >= _BLOCK:
            data = self._taken()
            self._draft = self._draft or self._begun(data)
            await self._writer.write(self._draft, data)

    async def finish(self) -> SavedImage:
        """Take it for all, and save it."""
        data = self._taken()
        draft = self._draft or self._begun(data)
        self._draft = None  # it looks after itself from now on
        return await self._writer.finish(draft, data)

    async def discard(self) -> None:
        """Drop what is not finished."""
        if self._draft is not None:
            await in_thread(self._draft.discard)  # the writer's may be gone

    def _taken(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._held = 0
        return data

    def _begun(self, head: bytes) -> Draft:
        kind = image_kind(head)
        if kind is None:
            raise self._bad("what came is no image" if head else "nothing came")
        if self.announced not in (None, kind):
            raise self._bad(f"it was announced as {self.announced}, but is {kind}")
        return Draft(self._place, kind)

    def _bad(self, problem: str) -> DownloadError:
        return DownloadError(problem, task_id=self._place.task_id, http_status=200)

    def _too_large(self) -> DownloadError:
        return DownloadError(
            f"it is larger than {self._max_bytes} bytes",
            task_id=self._place.task_id,
            retryable=False,
        )


@attrs.frozen
class _Download:
    """The saving of one image, from whatever URL."""

    fetcher: Fetcher
    place: Place
    writer: Writer
    max_bytes: int
    timeout: float | None

    async def run(self, url: str, expires_at: datetime | None) -> SavedImage:
        """Try until it is saved, or there is no point or no time in trying again."""
        loop = asyncio.get_running_loop()
        deadline = math.inf if self.timeout is None else loop.time() + self.timeout
        attempts = answers = 0
        while True:
            attempts += 1
            try:
                return await self._try(url, expires_at, deadline)
            except DownloadError as error:
                answers += _is_answer(error)
                delay = _pause(error, attempts)
                is_final = not error.retryable or answers >= _LOOKS
                if is_final or loop.time() + delay >= deadline:
                    raise
            await asyncio.sleep(delay)

    async def _try(self, url: str, expires_at: datetime | None, deadline: float) -> SavedImage:
        intake = _Intake(self.place, self.max_bytes, self.writer)
        task_id = self.place.task_id
        scope = asyncio.timeout_at(None if deadline == math.inf else deadline)
        try:
            async with scope, await self.fetcher.get(url, task_id) as response:
                self._check_status(response, expires_at)
                intake.expect(response)
                while piece := await response.content.readany():
                    await intake.add(piece)
            return await intake.finish()
        except (aiohttp.ClientError, OSError) as exc:
            raise failure(exc, task_id) from exc
        finally:
            await intake.discard()

    def _check_status(self, response: aiohttp.ClientResponse, expires_at: datetime | None) -> None:
        if response.status == 200:
            return
        error = refusal(response, self.place.task_id)
        if response.status in _GONE and expires_at and expires_at <= datetime.now(UTC):
            raise ResultExpiredError(
                f"{response.host} keeps it no longer",
                task_id=error.task_id,
                http_status=error.http_status,
                retryable=False,
            )
        raise error


def _is_answer(error: DownloadError) -> bool:
    """Whether the host spoke of the image, and not of its own state."""
    return error.http_status is not None and not is_busy(error.http_status)


def _pause(error: DownloadError, attempts: int) -> float:
    """The seconds before another attempt."""
    backoff = min(math.ldexp(_FIRST_PAUSE, min(attempts - 1, 16)), _LONGEST_PAUSE)
    jitter = random.uniform(0.5, 1.0)  # noqa: S311  # not for secrets
    return max(backoff * jitter, error.retry_after or 0.0)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be an int of at least 1, not {value!r}")


def _check_path(name: str, value: str | os.PathLike[str]) -> None:
    try:
        usable = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise ConfigurationError(f"{name} cannot be the name of a file: {value!r}")


class ImageSaver:
    """Saves images into a folder, which is made where it is missing: an async context manager.

    A file is named after its task, with the ending of what it holds, and appears under its name
    when it is whole, checked and on disk. Requests carry neither the API key nor cookies; they
    go by https, to public addresses alone, but to the API's own origin wherever that is. With
    the extra ``images`` an image is decoded as a check.

    ``overwrite``: replace a file that is there; else that is a `DownloadError`.
    ``max_bytes``: of one image. ``allow_private``: also ask hosts at private, link-local and
    loopback addresses. ``use_origin``: where ``result_image_url`` fails try
    ``origin_image_url``, which lives for 10 minutes. ``timeout``: seconds for a URL, all
    attempts included; None for no limit. ``max_concurrency``: images saved at a time.

    Raises `ConfigurationError` where an argument cannot be used.
    """

    def __init__(
        self,
        client: KontextClient,
        folder: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        max_bytes: int = _MAX_BYTES,
        allow_private: bool = False,
        use_origin: bool = False,
        timeout: float | None = 120.0,
        max_concurrency: int = 8,
    ) -> None:
        _check_path("folder", folder)
        _check_count("max_bytes", max_bytes)
        _check_count("max_concurrency", max_concurrency)
        check_seconds("timeout", timeout)
        if timeout == 0:
            raise ConfigurationError("timeout must be more than 0 seconds")
        self._base_url = client.base_url
        self._folder = os.fspath(folder)
        self._overwrite = overwrite
        self._max_bytes = max_bytes
        self._allow_private = allow_private
        self._use_origin = use_origin
        self._timeout = timeout
        self._slots = asyncio.Semaphore(max_concurrency)
        self._names: set[str] = set()  # of the files known to be there
        self._writer: Writer  # these two while this is open
        self._fetcher: Fetcher | None = None
        self._saves: set[asyncio.Timeout] = set()
        self._no_saves = asyncio.Event()
        self._no_saves.set()
        self.max_concurrency = max_concurrency

    async def __aenter__(self) -> Self:
        """Make the folder; raises `DownloadError` where that cannot be done."""
        if self._fetcher is not None:
            raise ClientStateError("this saver is open already")
        self._names = await in_thread(open_folder, self._folder)
        self._writer = Writer()
        self._fetcher = Fetcher(self._base_url, allow_private=self._allow_private)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        fetcher, self._fetcher = self._fetcher, None
        assert fetcher is not None, "it was entered"
        for save in self._saves:
            save.reschedule(0.0)
        try:
            await self._no_saves.wait()
        finally:
            self._writer.close()
            await fetcher.aclose()

    async def save(self, task: CompletedTask, *, name: str | None = None) -> SavedImage:
        """Save the image of a task. ``name``: of the file, its ending included.

        Raises `ResultExpiredError` where the image is gone for good, `DownloadError` where it
        could not be saved, `ClientStateError` outside of this saver's ``async with``, also where
        that is left meanwhile.
        """
        if not isinstance(task, CompletedTask):
            raise ConfigurationError(f"task must be a CompletedTask, not {type(task).__name__}")
        if self._fetcher is None:
            raise ClientStateError("this saver is not open: save within its `async with`")
        place = self._place(task.task_id, name)
        if not self._overwrite and (there := self._names.intersection(place.names())):
            raise place.taken(there.pop())
        run = _Download(self._fetcher, place, self._writer, self._max_bytes, self._timeout)
        with self._under_way() as scope:
            async with scope, self._slots:
                saved = await self._save(task, run)
        self._names.add(saved.path.name)
        return saved

    async def find(self, task_id: str) -> SavedImage | None:
        """The image of a task, where the folder held it when it was entered, and holds it whole.

        So a restart finds what was saved just before a crash.
        """
        place = self._place(task_id, None)
        if self._names.isdisjoint(place.names()):
            return None
        return await in_thread(find_image, place)

    async def sweep(self) -> None:
        """Remove the unfinished files of a killed process: for when nobody else saves here."""
        await in_thread(remove_drafts, self._folder)

    @contextmanager
    def _under_way(self) -> Generator[asyncio.Timeout]:
        """A save's scope, which ends when this saver is closed."""
        scope = asyncio.timeout(None)
        self._saves.add(scope)
        self._no_saves.clear()
        try:
            yield scope
        except TimeoutError as exc:  # nothing else raises it here
            raise ClientStateError("this saver was closed before the image was saved") from exc
        finally:
            self._saves.discard(scope)
            if not self._saves:
                self._no_saves.set()

    def _place(self, task_id: str, name: str | None) -> Place:
        if name is not None and (name in {"", ".", ".."} or Path(name).name != name):
            raise ConfigurationError(f"name must be a file's name alone, not {name!r}")
        if name is not None:
            _check_path("name", name)
        return Place(
            task_id=task_id,
            folder=self._folder,
            name=name or file_stem(task_id),
            exact=name is not None,
            overwrite=self._overwrite,
        )

    async def _save(self, task: CompletedTask, run: _Download) -> SavedImage:
        try:
            return await run.run(task.result_image_url, task.expires_at)
        except DownloadError as error:
            if not (self._use_origin and task.origin_image_url):
                raise
            first = error
        try:
            return await run.run(task.origin_image_url, _LONG_AGO)
        except DownloadError as error:
            if first.http_status in _GONE:
                raise error from first
            raise first from error  # it may come back, whatever became of the origin


async def download(
    client: KontextClient,
    task: CompletedTask,
    path_or_folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_bytes: int = _MAX_BYTES,
    allow_private: bool = False,
    use_origin: bool = False,
    timeout: float | None = 120.0,
) -> Path:
    """Save the image of a task, and return its path.

    ``path_or_folder``: what is no folder yet and has a suffix is the file to write; else it is
    the folder, made where it is missing, and the file is named after the task. The keywords and
    errors are those of `ImageSaver`, which is the better choice for more than a few.
    """
    path = Path(path_or_folder)
    is_file = bool(path.suffix) and not await in_thread(path.is_dir)
    saver = ImageSaver(
        client,
        path.parent if is_file else path,
        overwrite=overwrite,
        max_bytes=max_bytes,
        allow_private=allow_private,
        use_origin=use_origin,
        timeout=timeout,
        max_concurrency=1,
    )
    async with saver:
        return (await saver.save(task, name=path.name if is_file else None)).path
