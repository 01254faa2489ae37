"""Downloads of images, each tried again until it is saved or another attempt has no point."""

from __future__ import annotations

import asyncio
import math
import random
from contextlib import suppress
from datetime import UTC, datetime

import aiohttp

from kontext_async.errors import ClientStateError
from kontext_async.models import CompletedTask
from kontext_async.results.errors import DownloadError, ResultExpiredError
from kontext_async.results.images.fetching import (
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
_ALREADY_EXPIRED = datetime.min.replace(tzinfo=UTC)

# Statuses of a file that may not be there yet.
_NOT_YET = (403, 404)

# A host in trouble is asked until the deadline; one that answers without a whole image, 3 times.
_MAX_BAD_RESPONSES = 3
_FIRST_PAUSE = 0.5  # s
_LONGEST_PAUSE = 15.0  # s

_SILENCE = 30.0  # s without a response or more of its body, after which an attempt ends


class _Body:
    """The body of a response as it arrives: the latest pieces in memory, the rest in a file."""

    def __init__(self, target: Target, finisher: Finisher, max_bytes: int) -> None:
        self.target = target
        self._finisher = finisher
        self._max_bytes = max_bytes
        self._size = 0
        self._taken = 0  # bytes that have left the memory
        self._pieces: list[bytes] = []
        self._image: PartialImage | None = None
        self._is_writing = False
        self._time = asyncio.get_running_loop().time
        self._heard_at = self._time()

    def silent_at(self) -> float:
        """Return the loop's time from which the host is silent."""
        return _SILENCE + (self._time() if self._is_writing else self._heard_at)

    async def receive(self, response: Response) -> None:
        self._heard_at = self._time()
        self._check_size(response.content_length)
        while piece := await response.content.readany():
            self._heard_at = self._time()
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
        self._is_writing = True
        try:
            await run_in_thread(image.write, block)
        except OSError as exc:
            raise self.target.error(exc) from exc
        finally:
            self._is_writing = False
            self._heard_at = self._time()

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
            self._image = PartialImage(self.target, kind)
        return self._image

    def _bad(self, problem: str) -> DownloadError:
        return DownloadError(problem, task_id=self.target.task_id, http_status=200)

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise DownloadError(
                f"it is larger than {self._max_bytes} bytes",
                task_id=self.target.task_id,
                retryable=False,
            )


class _Attempt:
    """A request for an image in the current task: a context manager, like `asyncio.timeout`.

    It raises `TimeoutError` at its deadline, when the host falls silent, and if it is ended. All
    attempts share one timer: of its own, each would need another with every piece of its body.
    """

    def __init__(self, under_way: Expiries[_Attempt], body: _Body, deadline: float) -> None:
        task = asyncio.current_task()
        assert task is not None, "this runs in a coroutine"
        self._under_way = under_way
        self._body = body
        self._deadline = deadline
        self._task = task
        self._cancelling = task.cancelling()
        self._is_ended = False

    def __enter__(self) -> None:
        self._under_way.add(self, self.ends_at())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._under_way.discard(self)
        if (
            self._is_ended
            and self._task.uncancel() <= self._cancelling
            and kind is asyncio.CancelledError
        ):
            raise TimeoutError

    def ends_at(self) -> float:
        return min(self._deadline, self._body.silent_at())

    def end(self) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._task.cancel()


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
        self._closed = asyncio.Event()
        self._under_way = 0
        self._none_under_way = asyncio.Event()
        self._none_under_way.set()
        self._attempts: Expiries[_Attempt] = Expiries(self._end)

    async def aclose(self) -> None:
        """End all downloads with `ClientStateError`, except of images that are being written."""
        self._closed.set()
        for attempt in self._attempts:
            attempt.end()
        try:
            await self._none_under_way.wait()
        finally:
            await self._fetcher.aclose()

    async def save(self, task: CompletedTask, target: Target) -> SavedImage:
        """Save the image of a task. Raises `DownloadError` and `ClientStateError`."""
        self._under_way += 1
        self._none_under_way.clear()
        try:
            async with self._permits:
                url, expires_at = task.result_image_url, task.expires_at
                try:
                    return await self._download(url, target, expires_at, _age(task))
                except DownloadError as error:
                    if not (self._use_origin and task.origin_image_url):
                        raise
                    first = error
                url, expires_at = task.origin_image_url, _ALREADY_EXPIRED
                try:
                    return await self._download(url, target, expires_at, _age(task))
                except DownloadError as error:
                    if first.http_status in _GONE:
                        raise error from first
                    raise first from error  # a retry may succeed, whatever the origin answered
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._none_under_way.set()

    async def _download(
        self, url: str, target: Target, expires_at: datetime | None, age: float
    ) -> SavedImage:
        """Retry until the image is saved, or a retry has no point or no time left.

        A missing image is waited for until it is as old as the whole timeout. ``age``: in seconds.
        """
        loop = asyncio.get_running_loop()
        deadline = math.inf if self._timeout is None else loop.time() + self._timeout
        appears_by = loop.time() + (self._timeout or DEFAULT_TIMEOUT) - age
        attempts = bad_responses = 0
        while True:
            attempts += 1
            try:
                return await self._try(url, target, expires_at, deadline)
            except DownloadError as error:
                is_awaited = error.http_status in _NOT_YET and loop.time() < appears_by
                bad_responses += _is_bad_response(error) and not is_awaited
                delay = _delay(error, attempts)
                is_final = not error.retryable or bad_responses >= _MAX_BAD_RESPONSES
                if is_final or loop.time() + delay >= deadline:
                    raise
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._closed.wait()

    async def _try(
        self, url: str, target: Target, expires_at: datetime | None, deadline: float
    ) -> SavedImage:
        if self._closed.is_set():
            raise ClientStateError(_WAS_CLOSED)
        body = _Body(target, self._finisher, self._max_bytes)
        try:
            with (
                _Attempt(self._attempts, body, deadline),
                await self._fetcher.get(url, target.task_id) as response,
            ):
                _check_status(response, target.task_id, expires_at)
                await body.receive(response)
            return await body.save()
        except (aiohttp.ClientError, OSError) as exc:
            if self._closed.is_set():
                raise ClientStateError(_WAS_CLOSED) from exc
            raise failure(exc, target.task_id) from exc
        finally:
            await body.discard()

    def _end(self, attempt: _Attempt) -> None:
        """End an attempt, unless its host was heard of meanwhile."""
        ends_at = attempt.ends_at()
        if asyncio.get_running_loop().time() < ends_at:
            self._attempts.add(attempt, ends_at)
        else:
            attempt.end()


_WAS_CLOSED = "this saver was closed before the image was saved"


def _check_status(response: Response, task_id: str, expires_at: datetime | None) -> None:
    if response.status == 200:
        return
    if response.status in _GONE and expires_at and expires_at <= datetime.now(UTC):
        raise ResultExpiredError(
            f"{response.host} has deleted it",
            task_id=task_id,
            http_status=response.status,
            retryable=False,
        )
    raise refusal(response, task_id)


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
