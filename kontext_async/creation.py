"""Paid requests: each creates a task at most once, and says so where that is not certain."""

from __future__ import annotations

import asyncio
import enum
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import NoReturn

import aiohttp
import attrs
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict
from yarl import URL

from kontext_async import wire
from kontext_async.errors import (
    ApiError,
    ClientStateError,
    ConfigurationError,
    KontextError,
    SubmissionUnknownError,
    TransportError,
)
from kontext_async.pacing import RequestBudget
from kontext_async.transport import (
    UNTRUSTED_SERVER,
    Transport,
    check_for_second_login,
    describe_failure,
    request_headers,
    safe_cause,
)
from kontext_async.wire import Action, Creation, ImageRequest, Verdict

__all__ = ["Creator", "SubmittedTask", "check_callback_url", "new_token"]

_log = logging.getLogger("kontext_async")

# Seconds for the answer to a paid request: to give up earlier would only lose the task's id.
_ANSWER_TIMEOUT = 120.0
# Seconds between two requests that were not sent, doubling from the first to the longest.
_FIRST_DELAY = 0.5
_MAX_DELAY = 15.0

_MAX_TOKENS = 100_000  # the latest, which are remembered
_TOKEN = "{token}"  # noqa: S105  # a placeholder


def _remember(texts: OrderedDict[str, bool], text: str) -> None:
    texts[text] = True
    if len(texts) > _MAX_TOKENS:
        texts.popitem(last=False)


def new_token() -> str:
    """Return a random token for a callback's address."""
    return secrets.token_urlsafe(16)


@attrs.frozen(kw_only=True)
class SubmittedTask:
    """A task that was created: its id, the request for it, and when (aware, in UTC)."""

    task_id: str
    request: ImageRequest
    submitted_at: datetime


class _BodyState(enum.Enum):
    """The states of a `_OneShotBody`, in their order; REVOKED may follow each of the first two."""

    FRESH = enum.auto()
    TAKEN = enum.auto()  # the connection stands
    HANDED_OVER = enum.auto()  # the next byte may reach the service
    REVOKED = enum.auto()  # it can no longer be handed over


class _OneShotBody(aiohttp.Payload):
    """The body of a paid request, which aiohttp can write once.

    aiohttp writes the head together with the body. So what has not been handed over has not been
    sent, whatever exception comes; and a middleware that sends a request again sends half of one.
    ``scope`` ends the request; the hand-over gives the answer time of its own.
    """

    def __init__(
        self,
        data: bytes,
        *,
        before_sending: Callable[[], Awaitable[object]] | None,
        scope: asyncio.Timeout,
    ) -> None:
        super().__init__(data, content_type="application/json")
        self._size = len(data)
        self._before_sending = before_sending
        self.scope = scope
        self.state = _BodyState.FRESH
        self.failure: Exception | None = None  # of ``before_sending``

    def revoke(self) -> bool:
        """Rule out that the body is handed over from now on; False if it has been."""
        if self.state is not _BodyState.HANDED_OVER:
            self.state = _BodyState.REVOKED
        return self.state is _BodyState.REVOKED

    async def write_with_length(
        self, writer: AbstractStreamWriter, content_length: int | None
    ) -> None:
        if self.state is not _BodyState.FRESH:
            raise RuntimeError("a paid request is sent once")
        self.state = _BodyState.TAKEN
        await self._prepare()
        if self.state is not _BodyState.TAKEN:
            raise RuntimeError("the request was given up before it was sent")
        self.scope.reschedule(asyncio.get_running_loop().time() + _ANSWER_TIMEOUT)
        self.state = _BodyState.HANDED_OVER
        await writer.write(self._value)

    async def write(self, writer: AbstractStreamWriter) -> None:
        await self.write_with_length(writer, None)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return bytes(self._value).decode(encoding, errors)

    async def _prepare(self) -> None:
        if self._before_sending is not None:
            try:
                await self._before_sending()
            except Exception as error:
                self.failure = error
                raise


@attrs.define
class _Answer:
    """As much of an answer as has arrived."""

    status: int | None = None
    headers: CIMultiDict[str] = attrs.field(factory=CIMultiDict[str])
    body: bytes = b""

    async def read(self, response: aiohttp.ClientResponse) -> None:
        self.status, self.headers = response.status, CIMultiDict(response.headers)
        try:
            while len(self.body) <= wire.MAX_BODY:
                piece = await response.content.readany()
                if not piece:
                    return
                self.body += piece
        except BaseException:
            # aiohttp drops what arrived just before the connection was lost. It may be the id.
            response.content.set_exception(None)  # type: ignore[arg-type]
            self.body += response.content.read_nowait()
            raise
        finally:
            response.close()


class Creator:
    """Creates the tasks of one client, over connections of their own.

    A kept-alive connection that the service is closing would lose the answer, so each request has
    a new one. A borrowed session keeps its connector.
    """

    def __init__(
        self,
        *,
        api_key: wire.ApiKey,
        base_url: str,
        session: aiohttp.ClientSession | None,
        request_timeout: float,
        callback_url: str | None,
        budget: RequestBudget,
        transport: Transport,
    ) -> None:
        self.callback_url = callback_url
        self._api_key = api_key
        self._endpoint = URL(base_url + wire.GENERATE)
        self._balance = URL(base_url + wire.CREDITS)
        self._borrowed = session
        self._session: aiohttp.ClientSession | None = None
        self.request_timeout = request_timeout
        self._budget = budget
        self._transport = transport
        self._scopes: dict[asyncio.Timeout, asyncio.Future[None]] = {}
        self._tokens: OrderedDict[str, bool] = OrderedDict()
        self._new: OrderedDict[str, bool] = OrderedDict()  # tasks that will call back

    async def submit(
        self,
        request: ImageRequest,
        *,
        submit_grace: float | None,
        token: str | None,
        before_sending: Callable[[], Awaitable[object]] | None,
    ) -> SubmittedTask:
        """Create a task: at most one whole request is sent."""
        self._transport.check_open()
        token = token or (new_token() if self.expects_token else None)
        if token is not None:
            _remember(self._tokens, token)
        submission = _Submission(self, request, token, before_sending, submit_grace)
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        scope = asyncio.timeout(None)
        self._scopes[scope] = ended
        try:
            async with scope:
                task = await submission.run()
        except TimeoutError:
            if not scope.expired():  # the caller's own
                raise
            submission.raise_closed()
        finally:
            del self._scopes[scope]
            ended.set_result(None)
        if self.callback_url is not None:
            _remember(self._new, task.task_id)
        return task

    def is_new(self, task_id: str) -> bool:
        """Return True once for a task that was just created and will call back."""
        return self._new.pop(task_id, False)

    def is_token(self, token: str) -> bool:
        """Return True if a callback's address was made with this token."""
        return token in self._tokens

    @property
    def expects_token(self) -> bool:
        """True if each task has a callback address of its own."""
        return self.callback_url is not None and _TOKEN in self.callback_url

    def body_of(self, request: ImageRequest, token: str | None) -> bytes:
        fields = request.to_json()
        if self.callback_url is not None:
            fields["callBackUrl"] = self.callback_url.replace(_TOKEN, token or "")
        return json.dumps(fields).encode()

    async def acquire(self, *, again: bool) -> float:
        """Wait for the client's pause and for a permit; return when it was acquired."""
        while (pause := self._transport.budget.pause_remaining(self._transport.loop_time)) > 0:  # noqa: ASYNC110
            await asyncio.sleep(pause)
        return await self._budget.acquire(self._transport.loop_time, seen=again)

    def release(self, sent: float, creation: Creation) -> None:
        """Release the permit of a request that has ended; pause where the service asks for it."""
        if creation.rule.verdict is Verdict.UNKNOWN:
            self._budget.release(sent, cancelled=True)
        else:
            self._budget.release(sent, creation.error)
        if creation.rule.action is Action.PAUSE_CLIENT:
            assert creation.error is not None, "it was refused"
            self._transport.budget.pause_for(creation.error)

    def cancel(self, sent: float) -> None:
        """Release the permit of a request that was given up."""
        self._budget.release(sent, cancelled=True)

    def pause_remaining(self) -> float:
        now = self._transport.loop_time
        return max(self._budget.pause_remaining(now), self._transport.budget.pause_remaining(now))

    async def attempt(self, request: ImageRequest, body: _OneShotBody) -> Creation:
        """Send one request, and judge what comes of it.

        Raises what the body's ``before_sending`` raises, and `ClientStateError`.
        """
        session = self._open_session()
        answer = _Answer()
        failure: Exception | None = None
        try:
            async with body.scope:
                await self._exchange(session, body, answer)
        except Exception as exc:
            if not self._is_failure(exc) and body.failure is None:
                raise
            failure = exc
        finally:
            body.revoke()
        if failure is not None:
            return self._broken_off(failure, request, body, answer)
        assert answer.status is not None, "the answer is whole"
        return self._judge(answer, answer.status, request, broken_off=None)

    async def credits(self) -> float:
        """Return the account's balance, with one request."""
        self._transport.check_open()
        try:
            return await self._ask_for_balance()
        except KontextError as error:
            # The variables of the frames below hold the answer, which may echo the key.
            raise error.with_traceback(None)  # noqa: B904  # it is the same error

    async def _ask_for_balance(self) -> float:
        answer = _Answer()
        failure: Exception | None = None
        try:
            async with asyncio.timeout(self.request_timeout):
                response = await self._open_session().get(
                    self._balance,
                    headers=request_headers(self._api_key),
                    allow_redirects=False,
                    raise_for_status=False,
                    auto_decompress=True,
                )
                await answer.read(response)
        except Exception as exc:
            if not self._is_failure(exc):
                raise
            failure = exc
        if failure is not None:  # raised here, the error does not refer to the request's headers
            seconds = self.request_timeout
            problem = self._problem(failure, missing="whole answer", seconds=seconds)
            raise TransportError(problem) from safe_cause(failure)
        assert answer.status is not None, "the answer is whole"
        return wire.read_credits(
            answer.status, answer.headers, answer.body, api_key=self._api_key, now=time.time()
        )

    async def _exchange(
        self, session: aiohttp.ClientSession, body: _OneShotBody, answer: _Answer
    ) -> None:
        response = await session.post(
            self._endpoint,
            data=body,
            headers=request_headers(self._api_key),
            timeout=aiohttp.ClientTimeout(sock_connect=self.request_timeout),
            allow_redirects=False,
            raise_for_status=False,
            auto_decompress=True,
        )
        await answer.read(response)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = self._borrowed or aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        if self._session.closed:
            raise ClientStateError("the session that was passed in is closed")
        return self._session

    def _is_failure(self, exc: Exception) -> bool:
        """Return True if an exception is a request's failure, and not a defect.

        Raises `ConfigurationError` if the session added a login of its own.
        """
        if isinstance(exc, (aiohttp.ClientError, OSError)):  # TimeoutError is an OSError
            return True
        check_for_second_login(exc)
        # A borrowed session's connector or middlewares may raise anything.
        return self._borrowed is not None

    def _broken_off(
        self, exc: Exception, request: ImageRequest, body: _OneShotBody, answer: _Answer
    ) -> Creation:
        """Judge a request that ended with an exception."""
        if body.failure is not None:
            raise body.failure
        if body.revoke():
            problem = self._problem(exc, missing="connection", seconds=self.request_timeout)
            is_untrusted = isinstance(exc, UNTRUSTED_SERVER)
            error = TransportError(f"not sent: {problem}", retryable=not is_untrusted)
            error.__cause__ = safe_cause(exc)
            return Creation(wire.UNTRUSTED if is_untrusted else wire.NOT_SENT, error=error)
        problem = self._problem(exc, missing="whole answer", seconds=_ANSWER_TIMEOUT)
        if answer.status is None:
            unknown = SubmissionUnknownError(problem)
            unknown.__cause__ = safe_cause(exc)
            return Creation(wire.LOST, error=unknown)
        return self._judge(answer, answer.status, request, broken_off=problem)

    def _problem(self, exc: Exception, *, missing: str, seconds: float) -> str:
        if isinstance(exc, TimeoutError) and not isinstance(exc, aiohttp.ClientError):
            return f"no {missing} within {seconds:g} s"
        return self._api_key.redact(describe_failure(exc))

    def _judge(
        self, answer: _Answer, status: int, request: ImageRequest, *, broken_off: str | None
    ) -> Creation:
        return wire.read_creation(
            status,
            answer.headers,
            answer.body,
            broken_off=broken_off,
            request=request,
            api_key=self._api_key,
            now=time.time(),
        )

    async def aclose(self) -> None:
        """End the submissions under way, and close the session unless it is borrowed."""
        ended = list(self._scopes.values())
        for scope in self._scopes:
            if not scope.expired():
                scope.reschedule(self._transport.loop_time)
        if ended:
            await asyncio.wait(ended)
        if self._session is not None and self._session is not self._borrowed:
            await self._session.close()


class _Submission:
    """One call of `Creator.submit`: requests until one may have reached the service."""

    def __init__(
        self,
        creator: Creator,
        request: ImageRequest,
        token: str | None,
        before_sending: Callable[[], Awaitable[object]] | None,
        grace: float | None,
    ) -> None:
        self._creator = creator
        self._request = request
        self._token = token
        self._data = creator.body_of(request, token)
        self._before_sending = before_sending
        self._grace = grace
        self._loop = asyncio.get_running_loop()
        self._failing_since: float | None = None
        self._failures = 0
        self._body: _OneShotBody | None = None  # of the last request

    async def run(self) -> SubmittedTask:
        creation = await self._attempt()
        while creation.task_id is None:
            error = creation.error
            assert error is not None, "what is not accepted has an error"
            _log.debug("creation: %s, %s", creation.rule.verdict.value, type(error).__name__)
            await self._wait_or_raise(creation.rule.action, error)
            creation = await self._attempt()
        _log.debug("task %s: created", creation.task_id)
        return SubmittedTask(
            task_id=creation.task_id, request=self._request, submitted_at=datetime.now(UTC)
        )

    async def _attempt(self) -> Creation:
        sent = await self._creator.acquire(again=self._failures > 0)
        self._body = _OneShotBody(
            self._data,
            before_sending=self._before_sending,
            scope=asyncio.timeout(self._creator.request_timeout),
        )
        try:
            creation = await self._creator.attempt(self._request, self._body)
        except BaseException:
            self._creator.cancel(sent)
            raise
        self._body = None
        self._creator.release(sent, creation)
        return creation

    async def _wait_or_raise(self, action: Action, error: KontextError) -> None:
        """Wait until the request may be sent again, or raise the error if it must not be."""
        if isinstance(error, SubmissionUnknownError):
            error.token = self._token
            raise error
        if action not in _SENT_AGAIN:
            raise error
        now = self._loop.time()
        self._failing_since = now if self._failing_since is None else self._failing_since
        self._failures += 1
        pause = self._creator.pause_remaining()
        delay = pause or min(_FIRST_DELAY * 2.0 ** (self._failures - 1), _MAX_DELAY)
        if self._grace is not None and now + delay > self._failing_since + self._grace:
            if isinstance(error, ApiError) and error.retry_after is None:
                error.retry_after = pause or None
            raise error
        if not pause:  # the permit waits for the end of a pause
            await asyncio.sleep(delay)

    def raise_closed(self) -> NoReturn:
        """Raise the error of a submission that ends because the client was closed."""
        if self._body is not None and self._body.state is _BodyState.HANDED_OVER:
            raise SubmissionUnknownError(
                "the client was closed before the answer", token=self._token
            ) from None
        raise ClientStateError("this client is closed: make a new one") from None


_SENT_AGAIN = {Action.RETRY, Action.PAUSE_CREATIONS, Action.PAUSE_CLIENT}


def check_callback_url(url: str | None) -> str | None:
    """Return the callback's address; raise `ConfigurationError` if it is not an http(s) URL."""
    if url is None:
        return None
    problem = "callback_url must be an http(s) URL, which may hold {token}"
    if not isinstance(url, str):
        raise ConfigurationError(f"{problem}, not {type(url).__name__}")
    try:
        parsed = URL(url.replace(_TOKEN, "token"))
    except ValueError as exc:
        raise ConfigurationError(f"{problem}: {exc}") from exc
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigurationError(problem)
    return url
