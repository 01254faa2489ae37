"""Callbacks: the service's notices that a task has ended, checked, and passed on to a client.

A callback's signature does not cover its body. So a callback is a hint to poll, never a result.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import attrs
from aiohttp import web

from kontext_async.errors import ConfigurationError, KontextError
from kontext_async.wire import foreign_task_id
from kontext_async.wire.json_values import is_object, parse

__all__ = [
    "CallbackClient",
    "CallbackError",
    "CallbackNotice",
    "CallbackReceiver",
    "verify_callback",
]

_MAX_BODY = 64 * 1024  # bytes; a callback of the service has less than one KB
_TIMESTAMP = "x-webhook-timestamp"
_SIGNATURE = "x-webhook-signature"


class CallbackError(KontextError):
    """Raised when a request is not a callback of the service.

    ``http_status`` is the status to answer with: 400 for what cannot be read, 401 for a signature
    that is missing, wrong, or too old.
    """

    title = "Not a callback"

    def __init__(self, problem: str, *, http_status: int) -> None:
        super().__init__(problem)
        self.http_status = http_status

    def __str__(self) -> str:
        return self._one_line(self.args[0])


@attrs.frozen(kw_only=True)
class CallbackNotice:
    """A callback's notice that a task has ended: a reason to poll it.

    ``code`` is 200 where the service says that it succeeded; None where it says nothing.
    ``sent_at`` is the signed time (aware, in UTC), None without a signature.
    """

    task_id: str
    code: int | None = None
    message: str = attrs.field(default="", repr=False)
    sent_at: datetime | None = None


class CallbackClient(Protocol):
    """The part of `KontextClient` that a receiver uses."""

    def notice(self, task_id: str) -> bool: ...
    def is_callback_token(self, token: str) -> bool: ...


def verify_callback(
    headers: Mapping[str, str],
    body: bytes,
    key: str | Sequence[str],
    *,
    tolerance: float = 300.0,
    now: float | None = None,
) -> CallbackNotice:
    """Return the notice in a signed callback.

    ``key``: the one in the provider's settings, or several while it is being replaced.
    ``tolerance``: seconds by which the signed time may differ from ``now``, a unix time; None is
    the present. Raises `CallbackError` for anything else, and `ConfigurationError` without a key.
    """
    keys = _checked_keys(key)
    given = {name.lower(): value for name, value in headers.items()}
    timestamp, signature = given.get(_TIMESTAMP, ""), given.get(_SIGNATURE, "")
    if not timestamp or not signature:
        raise CallbackError("the callback is not signed", http_status=401)
    notice = _read(body)
    message = f"{notice.task_id}.{timestamp}".encode("utf-8", "replace")
    expected = [_signature(message, known) for known in keys]
    # All are compared, in a time that does not depend on them.
    if not sum(hmac.compare_digest(signature.encode("utf-8", "replace"), e) for e in expected):
        raise CallbackError("the callback's signature is wrong", http_status=401)
    is_number = timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= 12
    sent = int(timestamp) if is_number else 0
    if not abs(sent - (time.time() if now is None else now)) <= tolerance:
        raise CallbackError("the callback's signature is too old", http_status=401)
    return attrs.evolve(notice, sent_at=datetime.fromtimestamp(sent, UTC))


def _checked_keys(key: str | Sequence[str]) -> list[bytes]:
    keys: list[Any] = [key] if isinstance(key, str) else list(key)
    if not keys or not all(isinstance(one, str) and one.strip() for one in keys):
        raise ConfigurationError("key must be the callback key of the provider's settings")
    return [one.strip().encode() for one in keys]


def _signature(message: bytes, key: bytes) -> bytes:
    return base64.b64encode(hmac.new(key, message, hashlib.sha256).digest())


def _read(body: bytes) -> CallbackNotice:
    """Return the notice in a body, which may put the id in one of several places."""
    if len(body) > _MAX_BODY:
        raise CallbackError("the callback is too large", http_status=400)
    try:
        value: Any = parse(body.removeprefix(codecs.BOM_UTF8).decode())
    except ValueError:
        raise CallbackError("the callback is not JSON", http_status=400) from None
    fields = value if is_object(value) else {}
    data = fields.get("data")
    inner = data if is_object(data) else {}
    places = (inner.get("taskId"), inner.get("task_id"), fields.get("taskId"))
    found = next((place for place in places if isinstance(place, str)), None)
    task_id = foreign_task_id(found)
    if task_id is None:
        raise CallbackError("the callback does not name a task", http_status=400)
    code, message = fields.get("code"), fields.get("msg")
    return CallbackNotice(
        task_id=task_id,
        code=code if type(code) is int else None,
        message=message if isinstance(message, str) else "",
    )


class CallbackReceiver:
    """Receives callbacks in a web service, and has a client poll the tasks that they name.

    ``key``: the callback key of the provider's settings, or several; None where callbacks are not
    signed. ``on_token``: awaited with the token in a callback's address and the task's id, before
    the callback is answered; it returns True if it knows the token. `Ledger.add_candidate` is one.

    A callback is answered before its task is polled, also a repeated one and one for a task that
    nobody waits for (yet). Only the first one for a wait causes polls: see `KontextClient.notice`.
    """

    def __init__(
        self,
        client: CallbackClient,
        *,
        key: str | Sequence[str] | None = None,
        on_token: Callable[[str, str], Awaitable[bool]] | None = None,
    ) -> None:
        self._client = client
        self._key = key
        self._on_token = on_token
        if key is not None:
            _checked_keys(key)

    async def receive(
        self, headers: Mapping[str, str], body: bytes, *, token: str | None = None
    ) -> int:
        """Pass a callback on, and return the HTTP status to answer with.

        ``token``: the text in the place of ``{token}`` in the address; None where it has none.

        200 is a callback; 400 is something else; 401 has no good signature; 404 has a token that
        was never given out. The last three cause no request.
        """
        try:
            notice = _read(body) if self._key is None else verify_callback(headers, body, self._key)
        except CallbackError as error:
            return error.http_status
        if token is not None and not await self._knows(token, notice.task_id):
            return 404
        self._client.notice(notice.task_id)
        return 200

    async def handle(self, request: web.Request) -> web.Response:
        """Receive a callback in an aiohttp.web application: a handler for a POST route.

        The token is the route's ``{token}``, or else the query's ``token``.
        """
        token = request.match_info.get("token", request.query.get("token"))
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return web.Response(status=400)
        return web.Response(status=await self.receive(request.headers, body, token=token))

    async def _knows(self, token: str, task_id: str) -> bool:
        if self._on_token is not None and await self._on_token(token, task_id):
            return True
        return self._client.is_callback_token(token)
