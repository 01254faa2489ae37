"""One client's polls: permits, deadlines, errors, opening and closing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

import aiohttp
from yarl import URL

from kontext_async import wire
from kontext_async.errors import (
    ApiError,
    AuthenticationError,
    ClientStateError,
    GenerationFailedError,
    ResponseFormatError,
    TransportError,
)
from kontext_async.fairness import yield_to_loop
from kontext_async.models import TaskRecord
from kontext_async.notices import Noticeboard
from kontext_async.pacing import PlannedPoll, RequestBudget
from kontext_async.schedule import DurationModel
from kontext_async.transport.answers import Fetcher, RawAnswer
from kontext_async.transport.expiries import Deadline, Expiries, time_out
from kontext_async.transport.failures import (
    UNTRUSTED_SERVER,
    check_for_second_login,
    describe_failure,
    safe_cause,
)
from kontext_async.transport.pooled import PooledFetcher, can_fetch
from kontext_async.transport.session import SessionFetcher, new_session, request_headers

__all__ = ["Transport"]

_log = logging.getLogger("kontext_async")

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
        api_key: wire.ApiKey,
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
        self._acquiring = Expiries(time_out)
        self._in_flight = Expiries(Deadline.expire)
        self.open_scopes: set[asyncio.Timeout] = set()  # they end with the client
        self._api_key = api_key
        self._endpoint = URL(base_url + wire.RECORD_INFO)
        self._borrowed = session
        self._session: aiohttp.ClientSession | None = None
        self._fetcher: Fetcher
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._has_good_answer = False
        self._key_refusals: deque[str] = deque(maxlen=_KEY_REFUSALS)  # tasks, since a good answer

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
            self._open()
        elif self._loop is not loop:
            raise ClientStateError(
                "this client belongs to another event loop: make one in each loop that needs one"
            )

    def _open(self) -> None:
        session = self._session = self._borrowed or new_session()
        headers = request_headers(self._api_key)
        self._fetcher = SessionFetcher(session, self._endpoint, headers)
        if self._borrowed is None and can_fetch(session):
            self._fetcher = PooledFetcher(session, self._endpoint, headers, self._fetcher)

    def _check_not_closed(self) -> None:
        if self._closed:
            raise ClientStateError("this client is closed: make a new one")

    async def acquire(
        self,
        at: float,
        *,
        until: float,
        seen: bool,
        failing: int = 0,
        deadline: float,
        plan: PlannedPoll | None = None,
    ) -> float | None:
        """Acquire a permit at ``at`` or later, and return the time; None if ``until`` comes first.

        ``seen``: the task has been polled before; ``failing``: as of
        `RequestBudget.acquire`. The wait's ``deadline`` decides its priority. ``plan`` may move
        ``at`` meanwhile. Raises `ClientStateError` once closed.
        """
        assert self._loop is not None, "check_open comes first"
        self._check_not_closed()
        now = self._loop.time()
        if at <= now and self.budget.try_acquire(now, seen=seen, failing=failing):
            return now
        permit = self.budget.enqueue(at, seen=seen, deadline=deadline, failing=failing, plan=plan)
        self._acquiring.add(permit, until)
        try:
            sent = await permit
            if sent < until:
                return sent
            self.budget.cancel(sent)  # it came in the moment in which the wait ends
        except TimeoutError:
            self.budget.leave(permit)
        except asyncio.CancelledError:
            self.budget.leave(permit)
            raise
        finally:
            self._acquiring.discard(permit)
        self._check_not_closed()
        return None

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
        except _POLL_ERRORS as error:
            if isinstance(error, ApiError):
                self._reconsider(error, task_id)
            self.budget.release(sent, error, first=first, failing=failing)
            _log.debug("task %s: %s", task_id, type(error).__name__)
            # The variables of the frames below hold the answer, which may echo the key.
            raise error.with_traceback(None)  # noqa: B904  # it is the same error
        except BaseException:
            self.budget.release(sent, cancelled=True)
            raise
        self.budget.release(sent)
        self._has_good_answer = True
        self._key_refusals.clear()
        if _log.isEnabledFor(logging.DEBUG):  # a member's name is slow to look up
            _log.debug("task %s: %s", task_id, answer[0].status.name)
        return answer

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

    def _read(self, task_id: str, answer: RawAnswer) -> tuple[TaskRecord, float | None]:
        status, headers, body = answer
        record = wire.decode(
            status, headers, body, task_id=task_id, api_key=self._api_key, now=time.time()
        )
        is_running = record.status.phase == "generating"
        return record, wire.server_age(headers, record) if is_running else None

    async def _get(
        self, task_id: str, sent: float, until: float
    ) -> tuple[TaskRecord, float | None] | None:
        assert self._loop is not None, "check_open comes first"
        assert self._session is not None, "check_open comes first"
        self._check_not_closed()  # perhaps since the permit was acquired
        if self._session.closed:
            raise ClientStateError("the session that was passed in is closed")
        deadline = Deadline()
        self._in_flight.add(deadline, min(until, sent + self.request_timeout))
        try:
            with deadline:
                answer = await self._fetcher.fetch(task_id)
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
        else:
            return self._read(task_id, answer)
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
            self._api_key.redact(describe_failure(exc)),
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
        for scope in self.open_scopes:
            if not scope.expired():
                scope.reschedule(self.loop_time)
        for count, permit in enumerate(list(self._acquiring), 1):
            time_out(permit)
            await yield_to_loop(count)
