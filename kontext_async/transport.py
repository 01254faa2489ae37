"""How a client asks: its aiohttp session, its event loop, its life from first use to closing."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from types import TracebackType

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from kontext_async import wire
from kontext_async._version import __version__
from kontext_async.errors import (
    ApiError,
    ClientStateError,
    ConfigurationError,
    GenerationFailedError,
    ResponseFormatError,
    TransportError,
)
from kontext_async.models import TaskRecord
from kontext_async.pacing import RequestBudget
from kontext_async.schedule import DurationModel

__all__ = ["Transport"]

_log = logging.getLogger("kontext_async")

# Between two polls a connection is kept for the next, up to this many seconds.
_KEEP_ALIVE = 60.0
_CONNECT_TIMEOUT = 10.0

# What a look can come to, but for a record.
_FAILURES = (ApiError, GenerationFailedError, ResponseFormatError, TransportError)

# How many waits are ended in one go, so that the event loop gets air in between.
_PIECE = 1000


class Transport:
    """Sends one client's requests, each in a turn of the client's budget.

    It belongs to the event loop it is first used in.
    """

    def __init__(
        self,
        *,
        api_key: str,
        base_url: str,
        session: aiohttp.ClientSession | None,
        request_timeout: float,
        budget: RequestBudget,
        durations: DurationModel,
    ) -> None:
        self.budget = budget
        self.durations = durations
        self.request_timeout = request_timeout
        self._queued: set[asyncio.Timeout] = set()  # the waits for a turn
        self._looking: set[_Cutoff] = set()  # the requests in flight
        self.readings: set[asyncio.Timeout] = set()  # of batches that wait for their source
        self._api_key = api_key
        self._endpoint = URL(base_url + wire.RECORD_INFO)
        self._borrowed = session
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._headers = CIMultiDict(
            {
                "Authorization": f"Bearer {api_key}",
                "User-Agent": f"kontext-async/{__version__}",
                "Accept": "application/json",
                "Accept-Encoding": "identity",
            }
        )
        # The whole of a request is timed here: aiohttp would round 5 s and more to whole seconds.
        self._timeout = aiohttp.ClientTimeout(sock_connect=_CONNECT_TIMEOUT)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def waits(self) -> int:
        """How many waits, and single looks, are under way."""
        return len(self._queued) + len(self._looking)

    @property
    def loop_time(self) -> float:
        """The time of the loop this belongs to; 0 before the first use."""
        return 0.0 if self._loop is None else self._loop.time()

    def check_open(self) -> None:
        """Raise `ClientStateError` if this is closed, or belongs to another event loop."""
        self._check_not_closed()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._session = self._borrowed or _new_session(self._headers)
        elif self._loop is not loop:
            raise ClientStateError(
                "this client belongs to another event loop: make one in each loop that needs one"
            )

    def _check_not_closed(self) -> None:
        if self._closed:
            raise ClientStateError("this client is closed: make a new one")

    async def acquire(self, at: float, *, seen: bool, until: float) -> float | None:
        """A turn at ``at`` or later, as the time when it came; None where that is ``until``.

        Raises `ClientStateError` once this is closed.
        """
        assert self._loop is not None, "check_open comes first"
        self._check_not_closed()
        now = self._loop.time()
        if at <= now and self.budget.try_acquire(now, seen=seen):
            return now
        scope = asyncio.timeout_at(None if until == math.inf else until)
        self._queued.add(scope)
        try:
            async with scope:
                return await self.budget.acquire(at, seen=seen, until=until)
        except TimeoutError:
            self._check_not_closed()
            return None
        finally:
            self._queued.discard(scope)

    async def poll(
        self, task_id: str, sent: float, *, until: float
    ) -> tuple[TaskRecord, float | None] | None:
        """Ask about a task, in the turn that came at ``sent``.

        Returns its record, and the age in seconds of one that runs, where the answer tells; None
        where ``until`` came before the answer. Raises `ApiError`, `GenerationFailedError`,
        `ResponseFormatError`, `TransportError`, or `ClientStateError` once this is closed.
        """
        try:
            answer = await self._get(task_id, sent, until)
            if answer is None:
                self.budget.release(sent, cancelled=True)
                return None
            status, headers, body = answer
            record = wire.decode(
                status, headers, body, task_id=task_id, api_key=self._api_key, now=time.time()
            )
        except _FAILURES as error:
            self.budget.release(sent, error)
            _log.debug("task %s: %s", task_id, type(error).__name__)
            raise
        except BaseException:
            self.budget.release(sent, cancelled=True)
            raise
        self.budget.release(sent)
        _log.debug("task %s: %s", task_id, record.status.name)
        is_running = record.status.phase == "generating"
        return record, wire.server_age(headers, record) if is_running else None

    async def _get(
        self, task_id: str, sent: float, until: float
    ) -> tuple[int, CIMultiDictProxy[str], bytes] | None:
        assert self._loop is not None, "check_open comes first"
        assert self._session is not None, "check_open comes first"
        self._check_not_closed()  # perhaps since the turn came
        if self._session.closed:
            raise ClientStateError("the session that was passed in is closed")
        cutoff = _Cutoff(self._loop, min(until, sent + self.request_timeout))
        self._looking.add(cutoff)
        try:
            with cutoff:
                response = await self._session.get(
                    self._endpoint.with_query({"taskId": task_id}),
                    headers=None if self._borrowed is None else self._headers,
                    timeout=self._timeout,
                    allow_redirects=False,
                    raise_for_status=False,
                    auto_decompress=True,
                )
                # Once its body is read to the end, the connection is free again by itself.
                try:
                    return response.status, response.headers, await _read(response)
                except BaseException:
                    response.close()
                    raise
        except (aiohttp.ClientError, OSError) as exc:  # TimeoutError is an OSError
            error = self._translated(exc, task_id)
            cause = _cause(exc)
            late = cutoff.came and until <= sent + self.request_timeout
        except ValueError as exc:
            if "AUTHORIZATION" not in str(exc):  # aiohttp's word for two of them
                raise
            raise ConfigurationError(
                "the session takes a login for this host from netrc, which collides with the API "
                "key: pass one without trust_env, or remove that login"
            ) from None
        finally:
            self._looking.discard(cutoff)
        self._check_not_closed()
        if late:
            return None
        raise error from cause

    def _translated(self, exc: Exception, task_id: str) -> TransportError:
        if isinstance(exc, TimeoutError) and not isinstance(exc, aiohttp.ClientError):
            return TransportError(
                f"no whole answer within {self.request_timeout:g} s", task_id=task_id
            )
        return TransportError(
            f"{type(exc).__name__}: {_said(exc)}".replace(self._api_key, "***"),
            task_id=task_id,
            retryable=not isinstance(exc, _UNTRUSTED),
        )

    async def aclose(self) -> None:
        """End all waits with `ClientStateError`, and close the session if it is our own."""
        if self._closed:
            return
        if self._loop is not None:
            self.check_open()
        self._closed = True
        try:
            await self._end_waits()
        finally:
            if self._session is not None and self._session is not self._borrowed:
                await self._session.close()

    async def _end_waits(self) -> None:
        for cutoff in self._looking:
            cutoff.come()
        await asyncio.sleep(0)
        scopes = [*self.readings, *self._queued]
        for start in range(0, len(scopes), _PIECE):
            for scope in scopes[start : start + _PIECE]:
                under_way = scope in self._queued or scope in self.readings
                if under_way and not scope.expired():  # else it is ending already
                    scope.reschedule(self.loop_time)
            await asyncio.sleep(0)


class _Cutoff:
    """Ends a block with TimeoutError at an instant: `asyncio.timeout_at` at half its cost.

    Every poll needs one, and it may be brought on before its time.
    """

    __slots__ = ("_cancelling", "_handle", "_task", "came")

    def __init__(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        self._handle = loop.call_at(when, self.come)
        self.came = False

    def come(self) -> None:
        if not self.came:
            self.came = True
            self._task.cancel()

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "coroutines run in tasks"
        self._task = task
        self._cancelling = task.cancelling()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._handle.cancel()
        # As asyncio's own does it: a cancellation by somebody else goes before ours.
        is_ours = self.came and self._task.uncancel() <= self._cancelling
        if is_ours and exc_type is asyncio.CancelledError:
            raise TimeoutError from exc


# Raised where the server is not who it should be.
_UNTRUSTED = (aiohttp.ClientConnectorCertificateError, aiohttp.ServerFingerprintMismatch)


def _said(exc: Exception) -> str:
    """What a failure says of itself, but not what it quotes of the answer: that may be the key."""
    if isinstance(exc, aiohttp.ClientResponseError):
        return f"{exc.status}, {exc.message.partition(':')[0]}"
    if isinstance(exc, aiohttp.ServerDisconnectedError):
        return "the connection was closed before the answer"
    return str(exc)


def _cause(exc: Exception) -> Exception | None:
    """What a `TransportError` is raised from: the operating system's errors alone.

    Others hold the request's headers, or headers of the answer that may echo them. Frames go,
    too: request headers are among their locals, which some error reporters collect.
    """
    is_safe = isinstance(exc, OSError) and not isinstance(exc, TimeoutError)
    return exc.with_traceback(None) if is_safe else None


def _new_session(headers: CIMultiDict[str]) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers=headers,
        # The budget's slots bound the connections.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body, or as much of it as shows that it is too long."""
    body = await response.content.readany()
    if response.content.at_eof():
        return body
    pieces, size = [body], len(body)
    while size <= wire.MAX_BODY and (piece := await response.content.readany()):
        pieces.append(piece)
        size += len(piece)
    if size > wire.MAX_BODY:
        response.close()
    return b"".join(pieces)
