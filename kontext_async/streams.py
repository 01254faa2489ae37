"""The one async iterator of this package, over whatever produces values in the background."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from typing import Generic, Protocol, Self, TypeVar

from kontext_async.errors import ClientStateError

__all__ = ["Producer", "Stream"]

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)


class Producer(Protocol[_T_co]):
    """The background work behind a `Stream`.

    It holds no reference to the stream, so that a dropped stream can be noticed.
    """

    @property
    def finished(self) -> bool:
        """True if nothing runs, and nothing is left to hand on."""
        ...

    async def next(self) -> _T_co | None:
        """Return the next value, None at the end; raise what ended the work early."""
        ...

    async def end(self, error: BaseException | None = None) -> None:
        """End the work and drop its values; return when nothing is left running.

        `next` then raises ``error`` once, if there is one and the work had not ended before.
        """

    def abandon(self) -> None:
        """End the work in the background; may be called from any thread."""


class Stream(Generic[_T]):
    """Values of background work, each as it is ready: an async iterator and context manager.

    The work begins with the first iteration or on entering the context. Exhausting the stream,
    leaving its ``async with`` or `aclose` ends the work. A stream that is dropped unfinished
    ends it too, with a `ResourceWarning`.
    """

    def __init__(self, begin: Callable[[], Producer[_T]]) -> None:
        self._begin = begin
        self._producer: Producer[_T] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _T:
        if not self._closed:
            value = await self._started().next()
            if value is not None:
                return value
            self._closed = True
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        if not self._closed:
            self._started()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the work that is left; values not yet taken are dropped. Idempotent."""
        if self._producer is not None:
            self._check_loop()
        self._closed = True
        if self._producer is not None:
            await self._producer.end()

    async def abort(self, error: BaseException) -> None:
        """End the work that is left; the next iteration raises ``error``. No effect at the end."""
        if self._producer is not None and not self._closed and not self._producer.finished:
            await self._producer.end(error)

    def __del__(self) -> None:
        producer = self._producer
        if producer is not None and not self._closed and not producer.finished:
            producer.abandon()
            warnings.warn(
                "a stream was dropped before its end: use `async with`",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )

    def _started(self) -> Producer[_T]:
        if self._producer is None:
            self._producer = self._begin()
            self._loop = asyncio.get_running_loop()
        self._check_loop()
        return self._producer

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise ClientStateError("this stream belongs to another event loop")
