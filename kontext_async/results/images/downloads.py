"""Downloads of images, each tried again until it is saved or another attempt has no point."""

from __future__ import annotations

import asyncio
import math
import random
from datetime import UTC, datetime

import aiohttp

from kontext_async.errors import ClientStateError
from kontext_async.models import CompletedTask
from kontext_async.results.errors import DownloadError, ResultExpiredError
from kontext_async.results.images.fetching import (
    Attempt,
    Fetcher,
    Response,
    failure,
    is_host_trouble,
    refusal,
)
from kontext_async.results.images.files import PartialImage, SavedImage, Target, image_kind
from kontext_async.results.images.finishing import Finisher
from kontext_async.results.threads import run_in_thread
from kontext_async.transport import Expiries

__all__ = ["DEFAULT_TIMEOUT", "Downloads"]

DEFAULT_TIMEOUT = 120.0  # s

# Bytes of an image in memory before they are written: most images are written in one go.
_BLOCK = 1024 * 1024

# Statuses of a file that is gone, or that the host denies to have.
_GONE = (403, 404, 410)

# Statuses of a file that may not be there yet.
_NOT_YET = (403, 404)

# A host in trouble is asked until the deadline; one that answers without a whole image, 3 times.
_MAX_BAD_RESPONSES = 3
_FIRST_PAUSE = 0.5  # s
_LONGEST_PAUSE = 15.0  # s

_WAS_CLOSED = "this saver was closed before the image was saved"


class _Body:
    """The body of a response as it arrives: the latest pieces in memory, the rest in a file."""

    def __init__(
        self, target: Target, attempt: Attempt, finisher: Finisher, max_bytes: int
    ) -> None:
        self._target = target
        self._attempt = attempt
        self._finisher = finisher
        self._max_bytes = max_bytes
        self._size = 0
        self._taken = 0  # bytes that have left the memory
        self._pieces: list[bytes] = []
        self._image: PartialImage | None = None

    async def receive(self, response: Response) -> None:
        self._check_size(response.content_length)
        while piece := await response.content.readany():
            self._attempt.hear()
            self._size += len(piece)
            self._check_size(self._size)
            self._pieces.append(piece)
            if self._size - self._taken >= _BLOCK:
                block = self._take_block()
                await self._write(self._begun(block), block)

    async def save(self) -> SavedImage:
        block = self._take_block()
        saved = await self._finisher.finish(self._begun(block), block)
        self._image = None
        return saved

    async def discard(self) -> None:
        """Remove what is not saved."""
        self._pieces.clear()
        if self._image is not None:
            await run_in_thread(self._image.discard)

    async def _write(self, image: PartialImage, block: bytes) -> None:
        self._attempt.pause()
        try:
            with self._target.translate_errors():
                await run_in_thread(image.write, block)
        finally:
            self._attempt.hear()

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


class Downloads:
    """The downloads of a saver, until it is closed. Its arguments are the saver's."""

    def __init__(
        self,
        fetcher: Fetcher,
        *,
        use_origin: bool,
        max_bytes: int,
        max_concurrency: int,
        timeout: float | None,
    ) -> None:
        self._fetcher = fetcher
        self._finisher = Finisher()
        self._use_origin = use_origin
        self._max_bytes = max_bytes
        self._permits = asyncio.Semaphore(max_concurrency)
        self._timeout = timeout
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._under_way = 0
        self._none_under_way = asyncio.Event()
        self._none_under_way.set()
        self._attempts = Expiries(self._look_soon)

    async def aclose(self) -> None:
        """End all downloads with `ClientStateError`, but for images that are being finished."""
        self._closed.set_result(None)
        for attempt in self._attempts:
            attempt.expire()
        try:
            await self._none_under_way.wait()
        finally:
            self._finisher.close()
            await self._fetcher.aclose()

    async def save(self, task: CompletedTask, target: Target) -> SavedImage:
        """Save the image of a task. Raises `DownloadError` and `ClientStateError`."""
        self._under_way += 1
        self._none_under_way.clear()
        try:
            async with self._permits:
                return await self._save(task, target)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._none_under_way.set()

    async def _save(self, task: CompletedTask, target: Target) -> SavedImage:
        try:
            return await self._download(task.result_image_url, task, target)
        except DownloadError as error:
            if not (self._use_origin and task.origin_image_url):
                raise
            first = error
        try:
            return await self._download(task.origin_image_url, task, target)
        except DownloadError as error:
            if first.http_status in _GONE:
                raise error from first
            raise first from error  # a retry may succeed, whatever the origin answered

    async def _download(self, url: str, task: CompletedTask, target: Target) -> SavedImage:
        """Retry until the image is saved, or a retry has no point or no time left.

        A missing image is waited for until it is as old as the whole timeout.
        """
        loop = asyncio.get_running_loop()
        deadline = math.inf if self._timeout is None else loop.time() + self._timeout
        appears_by = loop.time() + (self._timeout or DEFAULT_TIMEOUT) - _age(task)
        attempts = bad_responses = 0
        while True:
            attempts += 1
            try:
                return await self._try(url, task, target, deadline)
            except DownloadError as error:
                is_awaited = error.http_status in _NOT_YET and loop.time() < appears_by
                bad_responses += _is_bad_response(error) and not is_awaited
                delay = _delay(error, attempts)
                is_final = not error.retryable or bad_responses >= _MAX_BAD_RESPONSES
                if is_final or loop.time() + delay >= deadline:
                    raise
            await asyncio.wait([self._closed], timeout=delay)

    async def _try(
        self, url: str, task: CompletedTask, target: Target, deadline: float
    ) -> SavedImage:
        if self._closed.done():
            raise ClientStateError(_WAS_CLOSED)
        attempt = Attempt(deadline)
        body = _Body(target, attempt, self._finisher, self._max_bytes)
        self._attempts.add(attempt, attempt.due)
        try:
            with (
                attempt,
                await self._fetcher.get(url, target.task_id, attempt) as response,
            ):
                if response.status != 200:
                    raise _error_of(response, url, task)
                await body.receive(response)
            return await body.save()
        except (aiohttp.ClientError, OSError) as exc:
            if self._closed.done():
                raise ClientStateError(_WAS_CLOSED) from exc
            raise failure(exc, target.task_id) from exc
        finally:
            self._attempts.discard(attempt)
            await body.discard()

    def _look_soon(self, attempt: Attempt) -> None:
        """Look at a request that is due after all that its loop has just received."""
        asyncio.get_running_loop().call_soon(self._look, attempt)

    def _look(self, attempt: Attempt) -> None:
        """End a request that is due, unless something was heard of its host meanwhile."""
        if attempt not in self._attempts:
            return
        ends_at = attempt.ends_at()
        if ends_at > attempt.due:
            attempt.due = ends_at
            self._attempts.add(attempt, ends_at)
        else:
            attempt.expire()


def _error_of(response: Response, url: str, task: CompletedTask) -> DownloadError:
    """Return the error of a response without an image to a request for a URL of the task."""
    if response.status in _GONE and _has_expired(url, task):
        return ResultExpiredError(
            f"{response.host} has deleted it",
            task_id=task.task_id,
            http_status=response.status,
            retryable=False,
        )
    return refusal(response, task.task_id)


def _has_expired(url: str, task: CompletedTask) -> bool:
    if url != task.result_image_url:  # an origin lasts 10 minutes
        return True
    return task.expires_at is not None and task.expires_at <= datetime.now(UTC)


def _is_bad_response(error: DownloadError) -> bool:
    """Return True if the host answered about the image, and not about its own state."""
    return error.http_status is not None and not is_host_trouble(error.http_status)


def _delay(error: DownloadError, attempts: int) -> float:
    """Return the seconds before another attempt: backoff with jitter, or more if asked for."""
    backoff = min(math.ldexp(_FIRST_PAUSE, min(attempts - 1, 16)), _LONGEST_PAUSE)
    jitter = random.uniform(0.5, 1.0)  # noqa: S311  # not for secrets
    return max(backoff * jitter, error.retry_after or 0.0)


def _age(task: CompletedTask) -> float:
    """Return the seconds since a task's end; 0 if that is not known."""
    ended = task.complete_time
    return 0.0 if ended is None else (datetime.now(UTC) - ended).total_seconds()
