"""Saving the images of finished tasks."""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import aiohttp
import attrs

from kontext_async.client import KontextClient, checked_session
from kontext_async.errors import ClientStateError, ConfigurationError
from kontext_async.models import CompletedTask
from kontext_async.polling import check_count, check_seconds
from kontext_async.results.errors import DownloadError, ResultExpiredError
from kontext_async.results.images.fetching import (
    Fetcher,
    Response,
    failure,
    is_host_trouble,
    refusal,
)
from kontext_async.results.images.files import (
    PartialImage,
    SavedImage,
    Target,
    file_stem,
    find_image,
    image_kind,
    open_folder,
    sweep_folder,
)
from kontext_async.results.images.finishing import Finisher
from kontext_async.results.threads import run_in_thread

__all__ = ["ImageSaver", "download"]

_MAX_BYTES = 50 * 1024 * 1024

# Bytes of an image in memory before they are written: most images are written in one go.
_BLOCK = 1024 * 1024

# Statuses of a file that is gone, or that the host denies to have.
_GONE = (403, 404, 410)
_ALREADY_EXPIRED = datetime.min.replace(tzinfo=UTC)

# Statuses of a file that may not be there yet.
_NOT_YET = (403, 404)

# A host in trouble is asked until the deadline; one that answers without a whole image, 3 times.
_MAX_BAD_RESPONSES = 3
_FIRST_PAUSE = 0.5  # s
_LONGEST_PAUSE = 15.0  # s

_TIMEOUT = 120.0  # s


class _Body:
    """The body of a response as it arrives: the latest pieces in memory, the rest in a file."""

    def __init__(self, target: Target, finisher: Finisher, max_bytes: int) -> None:
        self._target = target
        self._finisher = finisher
        self._max_bytes = max_bytes
        self._size = 0
        self._taken = 0  # bytes that have left the memory
        self._pieces: list[bytes] = []
        self._image: PartialImage | None = None

    async def receive(self, response: Response) -> None:
        self._check_size(response.content_length)
        while piece := await response.content.readany():
            self._size += len(piece)
            self._check_size(self._size)
            self._pieces.append(piece)
            if self._size - self._taken >= _BLOCK:
                block = self._take_block()
                await run_in_thread(self._begun(block).write, block)

    async def save(self) -> SavedImage:
        block = self._take_block()
        saved = await self._finisher.finish(self._begun(block), block)
        self._image = None
        return saved

    async def discard(self) -> None:
        """Remove what is not saved."""
        if self._image is not None:
            await run_in_thread(self._image.discard)

    def _take_block(self) -> bytes:
        block = b"".join(self._pieces)
        self._pieces.clear()
        self._taken = self._size
        return block

    def _begun(self, block: bytes) -> PartialImage:
        """Return the image, which begins with this block if it is the first."""
        if self._image is None:
            kind = image_kind(block)
            if kind is None:
                raise self._bad("the response is not an image" if block else "it is empty")
            self._image = PartialImage(self._target, kind)
        return self._image

    def _bad(self, problem: str) -> DownloadError:
        return DownloadError(problem, task_id=self._target.task_id, http_status=200)

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise DownloadError(
                f"it is larger than {self._max_bytes} bytes",
                task_id=self._target.task_id,
                retryable=False,
            )


@attrs.frozen
class _Download:
    """The download of one image, from any URL."""

    fetcher: Fetcher
    finisher: Finisher
    target: Target
    max_bytes: int
    timeout: float | None

    async def run(self, url: str, expires_at: datetime | None, age: float) -> SavedImage:
        """Retry until the image is saved, or a retry has no point or no time left.

        A missing image is waited for until it is as old as the whole timeout. ``age``: in seconds.
        """
        loop = asyncio.get_running_loop()
        deadline = math.inf if self.timeout is None else loop.time() + self.timeout
        appears_by = loop.time() + (self.timeout or _TIMEOUT) - age
        attempts = bad_responses = 0
        while True:
            attempts += 1
            try:
                return await self._try(url, expires_at, deadline)
            except DownloadError as error:
                is_awaited = error.http_status in _NOT_YET and loop.time() < appears_by
                bad_responses += _is_bad_response(error) and not is_awaited
                delay = _pause(error, attempts)
                is_final = not error.retryable or bad_responses >= _MAX_BAD_RESPONSES
                if is_final or loop.time() + delay >= deadline:
                    raise
            await asyncio.sleep(delay)

    async def _try(self, url: str, expires_at: datetime | None, deadline: float) -> SavedImage:
        body = _Body(self.target, self.finisher, self.max_bytes)
        task_id = self.target.task_id
        scope = asyncio.timeout_at(None if deadline == math.inf else deadline)
        try:
            async with scope:
                with await self.fetcher.get(url, task_id) as response:
                    self._check_status(response, expires_at)
                    await body.receive(response)
            return await body.save()
        except (aiohttp.ClientError, OSError) as exc:
            raise failure(exc, task_id) from exc
        finally:
            await body.discard()

    def _check_status(self, response: Response, expires_at: datetime | None) -> None:
        if response.status == 200:
            return
        if response.status in _GONE and expires_at and expires_at <= datetime.now(UTC):
            raise ResultExpiredError(
                f"{response.host} has deleted it",
                task_id=self.target.task_id,
                http_status=response.status,
                retryable=False,
            )
        raise refusal(response, self.target.task_id)


def _is_bad_response(error: DownloadError) -> bool:
    """Return True if the host answered about the image, and not about its own state."""
    return error.http_status is not None and not is_host_trouble(error.http_status)


def _pause(error: DownloadError, attempts: int) -> float:
    """Return the seconds before another attempt: backoff with jitter, or more if asked for."""
    backoff = min(math.ldexp(_FIRST_PAUSE, min(attempts - 1, 16)), _LONGEST_PAUSE)
    jitter = random.uniform(0.5, 1.0)  # noqa: S311  # not for secrets
    return max(backoff * jitter, error.retry_after or 0.0)


def _age(task: CompletedTask) -> float:
    """Return the seconds since a task's end; 0 if that is not known."""
    ended = task.complete_time
    return 0.0 if ended is None else (datetime.now(UTC) - ended).total_seconds()


def _check_path(name: str, value: str | os.PathLike[str]) -> None:
    try:
        usable = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise ConfigurationError(f"{name} cannot be the name of a file: {value!r}")


class ImageSaver:
    """Saves images into a folder, which is created if missing: an async context manager.

    A file is named after its task, with the ending of its kind. It appears under its name when it
    is complete, checked and on disk. With the extra ``images`` the check decodes the image.
    Requests carry neither the API key nor cookies. They use https and public addresses only,
    except at the API's own origin.

    - ``overwrite``: replace an existing file; if False, that is a `DownloadError`.
    - ``max_bytes``: of one image.
    - ``allow_private``: also allow hosts at private, link-local and loopback addresses.
    - ``use_origin``: if ``result_image_url`` fails, try ``origin_image_url``, which expires after
      10 minutes.
    - ``timeout``: seconds for a URL, all attempts included; None for no limit.
    - ``max_concurrency``: images saved at a time.
    - ``session``: your own is used with its proxy, certificates and resolver, and never closed;
      None makes one.

    Only the saver's own session checks the address it connects to. With yours, names that resolve
    to private addresses are not refused, and a proxy connects to any address.

    Raises `ConfigurationError` for an invalid argument.
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
        timeout: float | None = _TIMEOUT,
        max_concurrency: int = 8,
        session: aiohttp.ClientSession | None = None,
    ) -> None:
        _check_path("folder", folder)
        self._session = checked_session(session)
        check_count("max_bytes", max_bytes)
        check_count("max_concurrency", max_concurrency)
        check_seconds("timeout", timeout)
        if timeout == 0:
            raise ConfigurationError("timeout must be more than 0 seconds")
        self.client = client
        self._folder = os.fspath(folder)
        self._overwrite = overwrite
        self._max_bytes = max_bytes
        self._allow_private = allow_private
        self._use_origin = use_origin
        self._timeout = timeout
        self._permits = asyncio.Semaphore(max_concurrency)
        self._names: set[str] = set()  # files known to exist
        self._fetcher: Fetcher | None = None  # while this is open
        self._finisher = Finisher()
        self._saves: set[asyncio.Timeout] = set()
        self._no_saves = asyncio.Event()
        self._no_saves.set()
        self.max_concurrency = max_concurrency

    async def __aenter__(self) -> Self:
        """Create the folder; raises `DownloadError` if that fails."""
        if self._fetcher is not None:
            raise ClientStateError("this saver is open already")
        self._names = await run_in_thread(open_folder, self._folder)
        self._fetcher = Fetcher(
            self.client.base_url, session=self._session, allow_private=self._allow_private
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        fetcher, self._fetcher = self._fetcher, None
        assert fetcher is not None, "it was entered"
        for save in self._saves:
            save.reschedule(0.0)
        try:
            await self._no_saves.wait()
        finally:
            await fetcher.aclose()

    async def save(self, task: CompletedTask, *, name: str | None = None) -> SavedImage:
        """Save the image of a task. ``name``: of the file, its ending included.

        Raises `ResultExpiredError` if the service has deleted the image, `DownloadError` if it
        could not be saved, and `ClientStateError` if this saver is not open or is closed
        meanwhile.
        """
        if not isinstance(task, CompletedTask):
            raise ConfigurationError(f"task must be a CompletedTask, not {type(task).__name__}")
        if self._fetcher is None:
            raise ClientStateError("this saver is not open: save within its `async with`")
        target = self._target(task.task_id, name)
        if not self._overwrite and (there := self._names.intersection(target.names())):
            raise target.exists_error(there.pop())
        run = _Download(self._fetcher, self._finisher, target, self._max_bytes, self._timeout)
        with self._under_way() as scope:
            async with scope, self._permits:
                saved = await self._save(task, run)
        self._names.add(saved.path.name)
        return saved

    async def find(self, task_id: str) -> SavedImage | None:
        """Return a task's complete image if it was in the folder when this saver was opened.

        So a restart finds images that were saved just before a crash.
        """
        target = self._target(task_id, None)
        if self._names.isdisjoint(target.names()):
            return None
        return await run_in_thread(find_image, target)

    async def sweep(self) -> None:
        """Remove a killed process's temporary files. Call it while no other process saves here."""
        await run_in_thread(sweep_folder, self._folder)

    @contextmanager
    def _under_way(self) -> Generator[asyncio.Timeout]:
        """Enter a scope for a save, which ends when this saver is closed."""
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

    def _target(self, task_id: str, name: str | None) -> Target:
        if name is not None and (name in {"", ".", ".."} or Path(name).name != name):
            raise ConfigurationError(f"name must be a file name without a folder, not {name!r}")
        if name is not None:
            _check_path("name", name)
        return Target(
            task_id=task_id,
            folder=self._folder,
            name=name or file_stem(task_id),
            exact=name is not None,
            overwrite=self._overwrite,
        )

    async def _save(self, task: CompletedTask, run: _Download) -> SavedImage:
        try:
            return await run.run(task.result_image_url, task.expires_at, _age(task))
        except DownloadError as error:
            if not (self._use_origin and task.origin_image_url):
                raise
            first = error
        try:
            return await run.run(task.origin_image_url, _ALREADY_EXPIRED, _age(task))
        except DownloadError as error:
            if first.http_status in _GONE:
                raise error from first
            raise first from error  # a retry may succeed, whatever the origin answered


async def download(
    client: KontextClient,
    task: CompletedTask,
    path_or_folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_bytes: int = _MAX_BYTES,
    allow_private: bool = False,
    use_origin: bool = False,
    timeout: float | None = _TIMEOUT,
    session: aiohttp.ClientSession | None = None,
) -> Path:
    """Save the image of a task, and return its path.

    ``path_or_folder`` is the file to write if it has a suffix and is not a folder. Otherwise it
    is the folder, created if missing, and the file is named after the task. The keywords and
    errors are those of `ImageSaver`, which is the better choice for more than a few images.
    """
    path = Path(path_or_folder)
    is_file = bool(path.suffix) and not await run_in_thread(path.is_dir)
    saver = ImageSaver(
        client,
        path.parent if is_file else path,
        overwrite=overwrite,
        max_bytes=max_bytes,
        allow_private=allow_private,
        use_origin=use_origin,
        timeout=timeout,
        max_concurrency=1,
        session=session,
    )
    async with saver:
        return (await saver.save(task, name=path.name if is_file else None)).path
