"""One client's requests over aiohttp: the session, its event loop, opening and closing."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import ssl
import time
from collections import deque
from types import TracebackType

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from kontext_async import wire
from kontext_async._version import __version__
from kontext_async.errors import (
    ApiError,
    AuthenticationError,
    ClientStateError,
    ConfigurationError,
    GenerationFailedError,
    ResponseFormatError,
    TransportError,
)
from kontext_async.fairness import yield_to_loop
from kontext_async.models import TaskRecord
from kontext_async.notices import Noticeboard
from kontext_async.pacing import RequestBudget
from kontext_async.schedule import DurationModel

__all__ = [
    "UNTRUSTED_SERVER",
    "Transport",
    "check_for_second_login",
    "describe_failure",
    "request_headers",
    "safe_cause",
]

_log = logging.getLogger("kontext_async")

# Seconds for which an idle connection is kept: the longest delay of the learned schedule.
_KEEP_ALIVE = 60.0
_CONNECT_TIMEOUT = 10.0
_MAX_HEADER = 64 * 1024  # bytes of one header; aiohttp's default of 8 KiB is less than some send

# Polls in a row that must be refused with 401 before an accepted key counts as refused.
_KEY_REFUSALS = 3

# Errors a poll may raise.
_POLL_ERRORS = (ApiError, GenerationFailedError, ResponseFormatError, TransportError)


class Transport:
    """Sends one client's requests, each with a permit of the client's budget.

    It belongs to the event loop of its first use.
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
        self.notices = Noticeboard()
        self.request_timeout = request_timeout
        self._acquiring: set[asyncio.Timeout] = set()
        self._in_flight: set[_Deadline] = set()
        self.source_reads: set[asyncio.Timeout] = set()  # of batches; they end with the client
        self._api_key = api_key
        self._endpoint = URL(base_url + wire.RECORD_INFO)
        self._borrowed = session
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._has_good_answer = False
        self._key_refusals: deque[str] = deque(maxlen=_KEY_REFUSALS)  # tasks, since a good answer
        self._headers = request_headers(api_key)
        # `_Deadline` bounds the whole request: aiohttp rounds 5 s and more to whole seconds.
        self._timeout = aiohttp.ClientTimeout(sock_connect=_CONNECT_TIMEOUT)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def waits(self) -> int:
        """Waits and single polls under way."""
        return len(self._acquiring) + len(self._in_flight)

    @property
    def loop_time(self) -> float:
        """The time of this transport's event loop; 0 before the first use."""
        return 0.0 if self._loop is None else self._loop.time()

    def check_open(self) -> None:
        """Raise `ClientStateError` if closed, or if another event loop is running."""
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

    async def acquire(
        self, at: float, *, until: float, seen: bool, failing: bool = False, deadline: float
    ) -> float | None:
        """Acquire a permit at ``at`` or later, and return the time; None if ``until`` comes first.

        ``seen``: the task has been polled before; ``failing``: its last poll failed. The wait's
        ``deadline`` decides its priority. Raises `ClientStateError` once closed.
        """
        assert self._loop is not None, "check_open comes first"
        self._check_not_closed()
        now = self._loop.time()
        if at <= now and self.budget.try_acquire(now, seen=seen, failing=failing):
            return now
        scope = asyncio.timeout_at(None if until == math.inf else until)
        self._acquiring.add(scope)
        try:
            async with scope:
                return await self.budget.acquire(at, seen=seen, deadline=deadline, failing=failing)
        except TimeoutError:
            self._check_not_closed()
            return None
        finally:
            self._acquiring.discard(scope)

    async def poll(
        self,
        task_id: str,
        sent: float,
        *,
        until: float,
        first: bool = False,
        failing: bool = False,
    ) -> tuple[TaskRecord, float | None] | None:
        """Poll a task once, with the permit acquired at ``sent``.

        Returns the record, and the age in seconds of a task that runs if the answer tells it; None
        if ``until`` comes before the answer. ``first``: it is the task's first poll; ``failing``:
        the one before it failed. Raises `ApiError`, `GenerationFailedError`,
        `ResponseFormatError`, `TransportError`, or `ClientStateError` once closed.
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
        except _POLL_ERRORS as error:
            if isinstance(error, ApiError):
                self._reconsider(error, task_id)
            self.budget.release(sent, error, first=first, failing=failing)
            _log.debug("task %s: %s", task_id, type(error).__name__)
            raise
        except BaseException:
            self.budget.release(sent, cancelled=True)
            raise
        self.budget.release(sent)
        self._has_good_answer = True
        self._key_refusals.clear()
        _log.debug("task %s: %s", task_id, record.status.name)
        is_running = record.status.phase == "generating"
        return record, wire.server_age(headers, record) if is_running else None

    def _reconsider(self, error: ApiError, task_id: str) -> None:
        """Mark a refusal as transient if earlier good answers contradict it.

        A gateway may answer 401 or 404 for a moment, such as during a rollout.
        """
        if isinstance(error, AuthenticationError):
            self._key_refusals.append(task_id)
            tasks = min(_KEY_REFUSALS, self.waits + 1)  # this one has ended its request
            is_refused = (
                len(self._key_refusals) == _KEY_REFUSALS and len(set(self._key_refusals)) >= tasks
            )
            error.is_transient = self._has_good_answer and not is_refused
        elif error.from_gateway and error.code == 404:
            error.is_transient = self._has_good_answer

    async def _get(
        self, task_id: str, sent: float, until: float
    ) -> tuple[int, CIMultiDictProxy[str], bytes] | None:
        assert self._loop is not None, "check_open comes first"
        assert self._session is not None, "check_open comes first"
        self._check_not_closed()  # perhaps since the permit was acquired
        if self._session.closed:
            raise ClientStateError("the session that was passed in is closed")
        deadline = _Deadline(self._loop, min(until, sent + self.request_timeout))
        self._in_flight.add(deadline)
        try:
            with deadline:
                response = await self._session.get(
                    self._endpoint.with_query({"taskId": task_id}),
                    headers=None if self._borrowed is None else self._headers,
                    timeout=self._timeout,
                    allow_redirects=False,
                    raise_for_status=False,
                    auto_decompress=True,
                    max_line_size=_MAX_HEADER,
                    max_field_size=_MAX_HEADER,
                )
                # aiohttp releases the connection when the body is read to its end.
                try:
                    return response.status, response.headers, await _read(response)
                except BaseException:
                    response.close()
                    raise
        except (aiohttp.ClientError, OSError) as exc:  # TimeoutError is an OSError
            error = self._translate(exc, task_id)
            cause = safe_cause(exc)
            is_late = deadline.expired and until <= sent + self.request_timeout
        except Exception as exc:
            check_for_second_login(exc)
            # A borrowed session's connector or middlewares may raise anything.
            if self._borrowed is None:
                raise
            error, cause, is_late = self._translate(exc, task_id), None, False
        finally:
            self._in_flight.discard(deadline)
        self._check_not_closed()
        if is_late:
            return None
        raise error from cause

    def _translate(self, exc: Exception, task_id: str) -> TransportError:
        if isinstance(exc, TimeoutError) and not isinstance(exc, aiohttp.ClientError):
            return TransportError(
                f"no whole answer within {self.request_timeout:g} s", task_id=task_id
            )
        return TransportError(
            describe_failure(exc).replace(self._api_key, "***"),
            task_id=task_id,
            retryable=not isinstance(exc, UNTRUSTED_SERVER),
        )

    async def aclose(self) -> None:
        """End all waits with `ClientStateError`, and close the session unless it is borrowed."""
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
        for deadline in self._in_flight:
            deadline.expire()
        await asyncio.sleep(0)
        for count, scope in enumerate([*self.source_reads, *self._acquiring], 1):
            is_left = scope in self._acquiring or scope in self.source_reads
            if is_left and not scope.expired():
                scope.reschedule(self.loop_time)
            await yield_to_loop(count)


class _Deadline:
    """A cheaper `asyncio.timeout_at`: every poll needs one. `expire` ends it early."""

    __slots__ = ("_cancelling", "_handle", "_task", "expired")

    def __init__(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        self._handle = loop.call_at(when, self.expire)
        self.expired = False

    def expire(self) -> None:
        if not self.expired:
            self.expired = True
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
        # As in asyncio's own: a cancellation by somebody else takes precedence.
        is_ours = self.expired and self._task.uncancel() <= self._cancelling
        if is_ours and exc_type is asyncio.CancelledError:
            raise TimeoutError from exc


# The server is not the one it should be.
UNTRUSTED_SERVER = (aiohttp.ClientConnectorCertificateError, aiohttp.ServerFingerprintMismatch)


def describe_failure(exc: Exception) -> str:
    """Return what failed, and whether the proxy, the network or TLS said no.

    Without quotes from the answer, which may echo the key.
    """
    match exc:
        case aiohttp.ClientConnectorError():
            return _describe_connecting(exc)
        case aiohttp.ClientHttpProxyError():
            return f"the proxy refuses to forward: {exc.status} {exc.message.partition(':')[0]}"
        case aiohttp.ServerDisconnectedError():
            return "the connection was closed before the answer"
        case aiohttp.ClientResponseError():
            return f"{type(exc).__name__}: {exc.status}, {exc.message.partition(':')[0]}"
        case _:
            return f"{type(exc).__name__}: {exc}"


def _describe_connecting(exc: aiohttp.ClientConnectorError) -> str:
    match exc:
        case aiohttp.ClientProxyConnectionError():
            return f"the proxy {exc.host}:{exc.port} cannot be reached: {_system_error(exc)}"
        case aiohttp.ClientConnectorDNSError():
            return f"the name {exc.host} cannot be resolved: {_system_error(exc)}"
        case aiohttp.ClientConnectorCertificateError():
            return f"the certificate of {exc.host} does not verify: {exc.certificate_error}"
        case _:
            pass
    if isinstance(exc.os_error, ssl.SSLError):
        return f"no TLS connection to {exc.host}:{exc.port}: {exc.os_error}"
    return f"{exc.host}:{exc.port} cannot be reached: {_system_error(exc)}"


def _system_error(exc: aiohttp.ClientConnectorError) -> str:
    """Return the operating system's words; asyncio's own name the call instead."""
    number = exc.os_error.errno
    words = exc.os_error.strerror or str(exc.os_error)
    return os.strerror(number) if number and words.startswith("Connect call failed") else words


def safe_cause(exc: Exception) -> Exception | None:
    """Return the exception to chain: only the operating system's errors.

    Others hold the request's headers, or headers of the answer that may echo them. Frames are
    dropped too: some error reporters collect their locals, and request headers are among them.
    """
    is_safe = isinstance(exc, OSError) and not isinstance(exc, TimeoutError)
    return exc.with_traceback(None) if is_safe else None


def check_for_second_login(exc: Exception) -> None:
    """Raise `ConfigurationError` if the session added a login of its own to a request."""
    if isinstance(exc, ValueError) and "AUTHORIZATION" in str(exc):  # aiohttp found two
        raise ConfigurationError(
            "the session takes a login for this host from netrc, which collides with the "
            "API key: pass one without trust_env, or remove that login"
        ) from None


def request_headers(api_key: str) -> CIMultiDict[str]:
    """Return the headers of every request to the API."""
    return CIMultiDict(
        {
            "Authorization": f"Bearer {api_key}",
            "User-Agent": f"kontext-async/{__version__}",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Cache-Control": "no-cache",  # a kept answer would say that a task still runs
        }
    )


def _new_session(headers: CIMultiDict[str]) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers=headers,
        # The budget bounds the connections.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Read the body, or as much of it as shows that it is too large."""
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
