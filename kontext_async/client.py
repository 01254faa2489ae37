"""The client: its arguments checked, and the calls users make."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import os
import random
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from typing import Final, Self

import aiohttp
import attrs
from yarl import URL

from kontext_async import wire
from kontext_async.batch import Journal, outcome_stream, outcomes_in_order
from kontext_async.creation import Creator, SubmittedTask, check_callback_url
from kontext_async.errors import ConfigurationError, RateLimitedError
from kontext_async.models import CompletedTask, TaskRecord
from kontext_async.outcomes import TaskOutcome
from kontext_async.pacing import ClientStats, RateLimit, RequestBudget, SlidingWindow
from kontext_async.polling import (
    DEFAULT_ERROR_GRACE,
    DEFAULT_NOT_FOUND_GRACE,
    DEFAULT_TIMEOUT,
    PollEvent,
    TaskWait,
    WaitPolicy,
    check_count,
    check_plain_function,
    check_seconds,
)
from kontext_async.schedule import DurationModel, PollState, wait_learned
from kontext_async.streams import Stream
from kontext_async.transport import Transport
from kontext_async.wire import ImageRequest

__all__ = [
    "DEFAULT_BASE_URL",
    "DEFAULT_CREATION_LIMIT",
    "DEFAULT_SUBMIT_GRACE",
    "KontextClient",
    "checked_session",
    "is_loopback",
]

DEFAULT_BASE_URL: Final = "https://api.apikley.ru"

DEFAULT_SUBMIT_GRACE: Final = 120.0

# New tasks of an account (the upstream's documentation); what exceeds it is refused, not queued.
DEFAULT_CREATION_LIMIT: Final = RateLimit(20, 10.0)

_KEY_VARIABLE = "APIKLEY_API_KEY"

_DEFAULTS = (DEFAULT_TIMEOUT, DEFAULT_ERROR_GRACE, DEFAULT_NOT_FOUND_GRACE)


def _read_key(api_key: object) -> wire.ApiKey | str:
    """Return the key in an argument or the environment, or why it cannot be used."""
    source = "api_key"
    if api_key is None:
        source = _KEY_VARIABLE
        api_key = os.environ.get(_KEY_VARIABLE, "")
    if not isinstance(api_key, str):
        return f"api_key must be a str, not {type(api_key).__name__}"
    key = api_key.strip()
    if not key:
        return f"no API key: pass api_key, or set {_KEY_VARIABLE}"
    if not all("!" <= c <= "~" for c in key):
        return (
            f"{source} cannot be sent as a header: it must be printable ASCII without spaces "
            "(the key alone, without 'Bearer')"
        )
    return wire.ApiKey(key)


def _checked_url(base_url: str, *, allow_http: bool) -> str:
    try:
        url = URL(base_url)
    except (TypeError, ValueError) as exc:
        raise ConfigurationError(f"base_url is not a URL: {exc}") from exc
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigurationError(
            f"base_url must be an http(s) URL with a host, such as {DEFAULT_BASE_URL}, "
            f"not {base_url!r}"
        )
    _check_host(url.host)
    if url.user is not None or url.password is not None or url.query_string or url.fragment:
        raise ConfigurationError("base_url must have no user, query or fragment")
    if url.scheme == "http" and not (allow_http or is_loopback(url.host)):
        raise ConfigurationError(
            f"base_url is plain http to {url.host}: the API key would travel unencrypted; "
            "use https, or pass allow_http=True"
        )
    return str(url).rstrip("/")


def _check_host(host: str) -> None:
    try:
        host.encode("idna")  # as the resolver does
    except UnicodeError as exc:
        raise ConfigurationError(f"base_url has a host that cannot be a name: {host!r}") from exc


def is_loopback(host: str) -> bool:
    """Return True for localhost and for a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def checked_session(session: aiohttp.ClientSession | None) -> aiohttp.ClientSession | None:
    """Return a session of the user's own; raise `ConfigurationError` if it cannot be used."""
    if session is None:
        return None
    if not isinstance(session, aiohttp.ClientSession):
        raise ConfigurationError(
            f"session must be an aiohttp.ClientSession, not {type(session).__name__}"
        )
    if session.auth is not None:
        raise ConfigurationError(
            "the session has its own auth, which would collide with the API key: pass one without"
        )
    return session


def _check_limit(name: str, limit: RateLimit | SlidingWindow | None) -> None:
    if limit is not None and not isinstance(limit, (RateLimit, SlidingWindow)):
        raise ConfigurationError(f"{name} must be a RateLimit or None, not {limit!r}")


class KontextClient:
    """A client of the Flux Kontext API: it creates image-generation tasks and waits for them.

    - ``api_key``: None reads the environment variable ``APIKLEY_API_KEY``; surrounding white space
      is stripped.
    - ``base_url``: https; http only to a loopback host, or with ``allow_http``.
    - ``session``: your own is used with its connector, proxy, tracing and middlewares, and never
      closed; None makes one.
    - ``request_timeout``: seconds for one request, its body included.
    - ``max_concurrency``: the most requests in flight.
    - ``rate_limit``: None discovers it; that of `kontext_async.fleet.Fleet.shared_limit` is shared
      with other processes.
    - ``durations``: the model of task durations to use and feed; None starts from a general guess.
    - ``callback_url``: the address that the service calls when a task ends; ``{token}`` in it is
      replaced by a random text for each task. A wait for a new task then begins to poll when the
      task calls back, or is likely to have ended.
    - ``creation_limit``: the rate limit of new tasks; None discovers it.

    A client belongs to the event loop of its first use. Closing it, with ``async with`` or
    `aclose`, ends its pending waits with `ClientStateError`.

    Raises `ConfigurationError` if an argument cannot be used.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        base_url: str = DEFAULT_BASE_URL,
        session: aiohttp.ClientSession | None = None,
        request_timeout: float = 30.0,
        max_concurrency: int = 64,
        rate_limit: RateLimit | SlidingWindow | None = None,
        durations: DurationModel | None = None,
        allow_http: bool = False,
        callback_url: str | None = None,
        creation_limit: RateLimit | None = DEFAULT_CREATION_LIMIT,
    ) -> None:
        key = _read_key(api_key)
        del api_key  # error reporters show the variables of a frame
        if isinstance(key, str):
            raise ConfigurationError(key)
        self._base_url = _checked_url(base_url, allow_http=allow_http)
        check_seconds("request_timeout", request_timeout)
        if not request_timeout:
            raise ConfigurationError("request_timeout must be more than 0 seconds")
        check_count("max_concurrency", max_concurrency)
        _check_limit("rate_limit", rate_limit)
        _check_limit("creation_limit", creation_limit)
        durations = DurationModel() if durations is None else durations
        if not isinstance(durations, DurationModel):
            raise ConfigurationError(f"durations must be a DurationModel, not {durations!r}")
        session = checked_session(session)
        self._transport = Transport(
            api_key=key,
            base_url=self._base_url,
            session=session,
            request_timeout=request_timeout,
            budget=RequestBudget(max_concurrency=max_concurrency, rate_limit=rate_limit),
            durations=durations,
        )
        self._creator = Creator(
            api_key=key,
            base_url=self._base_url,
            session=session,
            request_timeout=request_timeout,
            callback_url=check_callback_url(callback_url),
            budget=RequestBudget(max_concurrency=max_concurrency, rate_limit=creation_limit),
            transport=self._transport,
        )
        self._default_policy = WaitPolicy(
            timeout=DEFAULT_TIMEOUT,
            wait=wait_learned(durations),
            error_grace=DEFAULT_ERROR_GRACE,
            not_found_grace=DEFAULT_NOT_FOUND_GRACE,
            on_event=None,
        )

    def __repr__(self) -> str:
        state = " closed" if self._transport.closed else ""
        return f"<KontextClient {self._base_url}{state}>"

    async def __aenter__(self) -> Self:
        self._transport.check_open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the client; its pending waits end with `ClientStateError`. Idempotent."""
        await self._transport.aclose()
        await self._creator.aclose()

    @property
    def base_url(self) -> str:
        """The API's address, without a trailing slash."""
        return self._base_url

    @property
    def callback_url(self) -> str | None:
        """The address that the service calls when a task ends; None without one."""
        return self._creator.callback_url

    @property
    def expects_callbacks(self) -> bool:
        """True if each task has a callback address of its own: ``{token}`` is in the address."""
        return self._creator.expects_token

    def is_callback_token(self, token: str) -> bool:
        """Return True if this client made a callback's address with this token."""
        return self._creator.is_token(token)

    @property
    def durations(self) -> DurationModel:
        """The model of task durations that this client uses and feeds."""
        return self._transport.durations

    @property
    def stats(self) -> ClientStats:
        """Counts of requests and errors so far, and the present limits."""
        transport = self._transport
        return transport.budget.stats(waits=transport.waits, now=transport.loop_time)

    async def submit(
        self,
        request: ImageRequest,
        *,
        submit_grace: float | None = DEFAULT_SUBMIT_GRACE,
        token: str | None = None,
        before_sending: Callable[[], Awaitable[object]] | None = None,
    ) -> SubmittedTask:
        """Create a task, and pay for it at most once.

        A request that was not sent, or was refused with 429 or 455, is sent again for at most
        ``submit_grace`` seconds (None is no limit, 0 raises at once). Everything else is raised,
        and never sent again. The page *Never paying twice* has each case.

        - ``token``: replaces ``{token}`` in the client's ``callback_url``; None makes one.
        - ``before_sending``: awaited when the connection stands, just before the first byte. If it
          raises, nothing is sent, and the caller gets the exception.

        It raises:

        - `SubmissionUnknownError` if the task may have been created,
        - `TransportError` if nothing was sent,
        - `ApiError` if the service refused it,
        - `ConfigurationError` for a bad argument,
        - `ClientStateError` once the client is closed.
        """
        if not isinstance(request, ImageRequest):
            raise ConfigurationError(
                f"request must be an ImageRequest, not {type(request).__name__}"
            )
        check_seconds("submit_grace", submit_grace)
        return await self._creator.submit(
            request, submit_grace=submit_grace, token=token, before_sending=before_sending
        )

    async def run(
        self,
        request: ImageRequest,
        *,
        on_submitted: Callable[[SubmittedTask], object] | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        wait: Callable[[PollState], float] | None = None,
        error_grace: float | None = DEFAULT_ERROR_GRACE,
        not_found_grace: float | None = DEFAULT_NOT_FOUND_GRACE,
        on_event: Callable[[PollEvent], object] | None = None,
    ) -> CompletedTask:
        """Create a task, and wait until it succeeds: `submit` and `wait_for_result` in one call.

        ``on_submitted``: called with the `SubmittedTask` before the wait begins; its exceptions
        reach the caller. Every error that comes later has the ``task_id``: wait for that id, and
        do not create the task again. The other arguments are those of `wait_for_result`;
        ``timeout`` counts from the creation.
        """
        check_plain_function("on_submitted", on_submitted)
        self._policy(timeout, wait, error_grace, not_found_grace, on_event)  # before it is paid
        task = await self.submit(request)
        if on_submitted is not None:
            on_submitted(task)
        return await self.wait_for_result(
            task.task_id,
            timeout=timeout,
            wait=wait,
            error_grace=error_grace,
            not_found_grace=not_found_grace,
            on_event=on_event,
        )

    def notice(self, task_id: str) -> bool:
        """Poll a task soon, because it is said to have ended, such as by a callback.

        Returns True if somebody waits for it. Otherwise the notice is remembered for 15 minutes,
        for a wait that begins later. A wait polls once for any number of notices, when it gets a
        permit; if the task still generates, twice more after 1 and 3 seconds. Then its schedule
        goes on.
        """
        task_id = wire.check_task_id(task_id)
        self._transport.check_open()
        return self._transport.notices.notice(task_id, self._transport.loop_time)

    async def credits(self) -> float:
        """Return the account's balance of credits, with one request.

        Raises `ApiError`, `TransportError`, `ResponseFormatError`, and `ClientStateError` once the
        client is closed.
        """
        return await self._creator.credits()

    async def record_info(self, task_id: str) -> TaskRecord:
        """Poll a task once, and return its record, whatever its status.

        Raises `ApiError`, `TransportError`, `ResponseFormatError`, or `GenerationFailedError` if
        the API reports a failure without a record. If a pause or the rate limit holds the client
        back for longer than ``request_timeout``, raises `RateLimitedError` and sends nothing.
        """
        task_id = wire.check_task_id(task_id)
        transport, budget = self._transport, self._transport.budget
        transport.check_open()
        now = transport.loop_time
        latest = now + transport.request_timeout
        if budget.opens_in(now) <= transport.request_timeout:
            sent = await transport.acquire(now, until=latest, seen=True, deadline=latest)
            if sent is not None:
                answer = await transport.poll(task_id, sent, until=math.inf)
                assert answer is not None, "only until cuts a poll short"
                return answer[0]
        raise RateLimitedError(
            "not sent: the service asked this client to pause, or its own limits are reached",
            code=429,
            retry_after=budget.opens_in(transport.loop_time) or None,  # 0 is no advice
            task_id=task_id,
        )

    async def wait_for_result(
        self,
        task_id: str,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        wait: Callable[[PollState], float] | None = None,
        error_grace: float | None = DEFAULT_ERROR_GRACE,
        not_found_grace: float | None = DEFAULT_NOT_FOUND_GRACE,
        on_event: Callable[[PollEvent], object] | None = None,
    ) -> CompletedTask:
        """Wait until a task succeeds.

        - ``timeout``: seconds from the call to the hard deadline; None is no limit, 0 polls once.
        - ``wait``: any tenacity wait strategy; None is the learned schedule (`wait_learned`).
        - ``error_grace``: seconds for which this wait's polls may keep failing (server errors,
          network, unreadable answers) before the last error is raised. Pauses that the service
          asks for do not count, those of an outage do. None is until the deadline, 0 raises at
          once.
        - ``not_found_grace``: the same for a task that the API does not know (yet).
        - ``on_event``: called with a `PollEvent` after each poll; its exceptions end the wait.

        It raises:

        - `GenerationFailedError` if the task failed,
        - `WaitTimeoutError` at the deadline: not a failure, wait again,
        - `AuthenticationError`, or another `ApiError` that is not retryable, at once,
        - `TaskNotFoundError` after ``not_found_grace``,
        - `ServerError`, `TransportError` or `ResponseFormatError` after ``error_grace``,
        - `ConfigurationError` for a bad argument,
        - `ClientStateError` once the client is closed.
        """
        task_id = wire.check_task_id(task_id)
        policy = self._policy(timeout, wait, error_grace, not_found_grace, on_event)
        self._transport.check_open()
        if timeout != 0 and self._creator.is_new(task_id):
            slept = await self._sleep_until_called_back(task_id, timeout)
            left = None if timeout is None else max(timeout - slept, 0.0)
            policy = attrs.evolve(policy, timeout=left)
        return (await TaskWait(task_id, policy, self._transport).run()).unwrap()

    def as_completed(
        self,
        task_ids: Iterable[str] | AsyncIterable[str],
        *,
        max_in_flight: int = 10_000,
        batch_timeout: float | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        wait: Callable[[PollState], float] | None = None,
        error_grace: float | None = DEFAULT_ERROR_GRACE,
        not_found_grace: float | None = DEFAULT_NOT_FOUND_GRACE,
        on_event: Callable[[PollEvent], object] | None = None,
        journal: Journal | None = None,
    ) -> Stream[TaskOutcome]:
        """Wait for many tasks, and iterate over a `TaskOutcome` for each as it ends.

        Each distinct id is polled by one wait and has one outcome. Use the stream as an async
        context manager, so that leaving early ends the waits that are left.

        - ``task_ids``: any iterable or async iterable of ids, read only as fast as there is room.
        - ``max_in_flight``: the most tasks waited for plus outcomes not yet taken.
        - ``batch_timeout``: seconds for the whole batch; what is left then ends with
          `WaitTimeoutError`.
        - ``timeout``: as in `wait_for_result`, but from a task's own first poll.
        - ``journal``: a durable memory of outcomes, see `Journal`.

        The rest is as in `wait_for_result`.

        A task's error is its own outcome; an `AuthenticationError` is that of all that remain,
        without further requests. Exceptions of the source, of ``on_event``, of ``wait`` and of
        the journal end the batch and are raised from the iteration. Raises `ConfigurationError`
        for a bad argument.
        """
        policy = self._policy(timeout, wait, error_grace, not_found_grace, on_event)
        return outcome_stream(
            task_ids,
            policy,
            self._transport,
            max_in_flight=max_in_flight,
            batch_timeout=batch_timeout,
            journal=journal,
        )

    async def wait_for_results(
        self,
        task_ids: Iterable[str] | AsyncIterable[str],
        *,
        max_in_flight: int = 10_000,
        batch_timeout: float | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        wait: Callable[[PollState], float] | None = None,
        error_grace: float | None = DEFAULT_ERROR_GRACE,
        not_found_grace: float | None = DEFAULT_NOT_FOUND_GRACE,
        on_event: Callable[[PollEvent], object] | None = None,
    ) -> list[TaskOutcome]:
        """Wait for many tasks, and return a `TaskOutcome` for each id, in the order given.

        An id given twice is polled by one wait and is in the list twice. Arguments and errors
        are those of `as_completed`.
        """
        policy = self._policy(timeout, wait, error_grace, not_found_grace, on_event)
        return await outcomes_in_order(
            task_ids,
            policy,
            self._transport,
            max_in_flight=max_in_flight,
            batch_timeout=batch_timeout,
        )

    async def _sleep_until_called_back(self, task_id: str, timeout: float | None) -> float:
        """Sleep until a new task calls back, or is likely to have ended; return the seconds."""
        transport, began = self._transport, self._transport.loop_time
        came = asyncio.Event()
        # More than a step of the schedule: with one there are more polls than without callbacks
        # (tests/test_callbacks.py). Tasks begun together spread.
        step = random.uniform(1.3, 1.6)  # noqa: S311
        age = transport.durations.next_age(0.0, step)
        scope = asyncio.timeout(age if timeout is None else min(age, timeout))
        transport.notices.watch(task_id, came.set, began)
        transport.open_scopes.add(scope)
        try:
            async with scope:
                await came.wait()
        except TimeoutError:
            transport.check_open()
        finally:
            transport.open_scopes.discard(scope)
            transport.notices.unwatch(task_id, came.set)
        if came.is_set():
            transport.notices.notice(task_id, transport.loop_time)  # for the wait that begins now
        return transport.loop_time - began

    def _policy(
        self,
        timeout: float | None,
        wait: Callable[[PollState], float] | None,
        error_grace: float | None,
        not_found_grace: float | None,
        on_event: Callable[[PollEvent], object] | None,
    ) -> WaitPolicy:
        # Nearly every wait has the defaults: no need to check them again.
        has_defaults = (timeout, error_grace, not_found_grace) == _DEFAULTS
        if has_defaults and wait is None and on_event is None:
            return self._default_policy
        return WaitPolicy(
            timeout=timeout,
            wait=self._default_policy.wait if wait is None else wait,
            error_grace=error_grace,
            not_found_grace=not_found_grace,
            on_event=on_event,
        )
