"""Requests for tasks as a ledger's rows: what was paid for, what was not, and what is uncertain."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

import attrs

from kontext_async.batch import each_of
from kontext_async.errors import (
    ApiError,
    ConfigurationError,
    KontextError,
    SubmissionUnknownError,
)
from kontext_async.results.ledger.rows import error_text, readable
from kontext_async.results.ledger.store import Row, Store
from kontext_async.wire import ImageRequest

__all__ = [
    "ENTRIES",
    "KeyedRequest",
    "SubmissionEntry",
    "SubmissionState",
    "Submissions",
    "check_key",
    "check_requests",
    "keyed_requests",
    "params_text",
    "submission_of",
    "with_keys",
]

SubmissionState: TypeAlias = Literal[
    "planned", "sending", "submitted", "refused", "unknown", "abandoned"
]

# A request, and the key that the caller gave to it; None for a key by its parameters.
KeyedRequest: TypeAlias = "ImageRequest | tuple[str, ImageRequest]"

_MAX_KEY = 200  # characters
_MAX_CANDIDATES = 5  # of one submission

COLUMNS = "key, params, state, token, task_id, error, created_at, updated_at"
ENTRIES = f"SELECT {COLUMNS} FROM submissions ORDER BY position"  # noqa: S608  # our own names
ENTRY = f"SELECT {COLUMNS} FROM submissions WHERE key = ?"  # noqa: S608  # as above

_PLAN = """
    INSERT INTO submissions (key, params, state, token, created_at, updated_at)
    VALUES (?, ?, 'planned', ?, ?, ?) ON CONFLICT DO NOTHING
"""
_SET = """
    UPDATE submissions SET state = ?, error = ?, updated_at = ?
    WHERE key = ? AND state NOT IN ('submitted', 'abandoned')
"""
# A task belongs to one request: an id that another one has changes nothing.
_BIND = """
    UPDATE OR IGNORE submissions SET state = 'submitted', task_id = ?, error = NULL, updated_at = ?
    WHERE key = ? AND state <> 'submitted'
"""
_ADD_TASK = """
    INSERT INTO tasks (task_id, state, attempts, created_at, updated_at)
    SELECT task_id, 'waiting', 0, ?, ? FROM submissions WHERE key = ? AND task_id = ?
    ON CONFLICT DO NOTHING
"""
_INTERRUPTED = """
    UPDATE submissions SET state = 'unknown', error = ? WHERE state = 'sending'
"""
_CANDIDATE = """
    INSERT OR IGNORE INTO candidates SELECT token, ? FROM submissions
    WHERE token = ? AND state IN ('sending', 'unknown')
    AND (SELECT count(*) FROM candidates AS other WHERE other.token = submissions.token) < ?
"""
_KNOWN = "SELECT 1 FROM submissions WHERE token = ?"
_CANDIDATES = "SELECT task_id FROM candidates WHERE token = ?"
_DROP = "DELETE FROM candidates WHERE token = ? AND task_id = ?"


@attrs.frozen(kw_only=True)
class SubmissionEntry:
    """A ledger's knowledge of one request for a task.

    ``state``: ``"planned"`` was not sent yet, and nothing is paid for; ``"sending"`` is under way;
    ``"submitted"`` has a task; ``"refused"`` was refused by the API, and nothing is paid for;
    ``"unknown"`` may have a task, because the answer was lost; ``"abandoned"`` was given up by
    hand. ``key`` names the request in its file, ``token`` in its callback. The ``error_…`` fields
    are the last error. Times are aware, in UTC.
    """

    key: str
    request: ImageRequest = attrs.field(repr=False)
    state: SubmissionState
    token: str = attrs.field(repr=False)
    task_id: str | None = None
    error_type: str | None = None
    error_code: int | None = None
    error_message: str = ""
    created_at: datetime
    updated_at: datetime

    def error(self) -> KontextError:
        """Return the error that keeps the request from having a task."""
        if self.state == "refused" and self.error_code is not None:
            return ApiError(self.error_message, code=self.error_code, http_status=None)
        if self.state == "abandoned":
            return SubmissionUnknownError("it was given up by hand", token=self.token)
        return SubmissionUnknownError(self.error_message, code=self.error_code, token=self.token)


def submission_of(row: Row) -> SubmissionEntry:
    """Return the entry in a row of `COLUMNS`."""
    key, params, state, token, task_id, error, created, updated = row
    with readable(key, "request"):
        fields: Mapping[str, Any] = json.loads(error) if error else {}
        return SubmissionEntry(
            key=key,
            request=ImageRequest.from_json(json.loads(params)),
            state=state,
            token=token,
            task_id=task_id,
            error_type=fields.get("type"),
            error_code=fields.get("code"),
            error_message=fields.get("message", ""),
            created_at=datetime.fromtimestamp(created, UTC),
            updated_at=datetime.fromtimestamp(updated, UTC),
        )


def params_text(request: ImageRequest) -> str:
    """Return a request's parameters as JSON, equal for equal requests."""
    return json.dumps(request.to_json(), sort_keys=True)


class _Keys:
    """The keys of the requests of one run."""

    def __init__(self) -> None:
        self._equal: Counter[str] = Counter()  # requests without a given key, by their digest
        self._digests: dict[str, str] = {}  # of the parameters, by key

    def key_of(self, item: Any) -> tuple[str, ImageRequest, bool]:
        """Return a request with its key, and False if the key was there before."""
        given, request = _pair(item)
        if not isinstance(request, ImageRequest):
            raise ConfigurationError(
                "requests must hold ImageRequest, or pairs of a key and an ImageRequest, "
                f"not {type(request).__name__}"
            )
        digest = hashlib.sha256(params_text(request).encode()).hexdigest()[:16]
        if given is None:
            self._equal[digest] += 1
            key = f"{digest}#{self._equal[digest]}"
        else:
            is_own = isinstance(given, str) and given.startswith(f"{digest}#")  # of `with_keys`
            key = given if is_own else check_key(given)
        is_new = key not in self._digests
        if self._digests.setdefault(key, digest) != digest:
            raise _two_requests(key)
        return key, request, is_new


def _pair(item: Any) -> tuple[Any, Any]:
    """Return the key and the request in an item; the key is None where there is none."""
    if isinstance(item, ImageRequest):
        return None, item
    try:
        key, request = item
    except (TypeError, ValueError):
        return None, item
    return key, request


def _two_requests(key: str) -> ConfigurationError:
    return ConfigurationError(
        f"key {key!r} has another request already: give the changed request a key of its own"
    )


def check_key(key: object) -> str:
    """Return a key that a caller gives; raise `ConfigurationError` if it cannot be one."""
    if not isinstance(key, str) or not key.strip() or not key.isprintable():
        raise ConfigurationError("a key must be printable text that is not blank")
    if len(key) > _MAX_KEY:
        raise ConfigurationError(f"a key must have at most {_MAX_KEY} characters")
    if "#" in key:
        raise ConfigurationError("a key must not hold '#', which is in those made by the ledger")
    return key


def check_requests(requests: object) -> None:
    """Raise `ConfigurationError` unless this is an iterable of requests."""
    if isinstance(requests, (ImageRequest, Mapping, str, bytes)):
        raise ConfigurationError("requests is a single request: put it in a list")
    if not isinstance(requests, (Iterable, AsyncIterable)):
        raise ConfigurationError(
            f"requests must be an iterable of requests, not {type(requests).__name__}"
        )


def with_keys(requests: Iterable[KeyedRequest]) -> list[tuple[str, ImageRequest]]:
    """Return each request once, with its key."""
    keys = _Keys()
    found = (keys.key_of(item) for item in requests)
    return [(key, request) for key, request, is_new in found if is_new]


async def keyed_requests(
    requests: Iterable[KeyedRequest] | AsyncIterable[KeyedRequest],
) -> AsyncGenerator[tuple[str, ImageRequest], None]:
    """Yield each request once, with its key.

    A key by the parameters counts equal requests, so moving the lines of a file changes nothing.
    Raises `ConfigurationError` for a key that is not one, or that has two requests.
    """
    keys = _Keys()
    async with contextlib.aclosing(each_of(requests)) as items:
        async for item in items:
            key, request, is_new = keys.key_of(item)
            if is_new:
                yield key, request


class Submissions:
    """The submissions of an open ledger."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def recover(self) -> None:
        """Mark what a killed run was sending as unknown."""
        interrupted = SubmissionUnknownError("the run ended before the answer")
        await self._store.run(_INTERRUPTED, (error_text(interrupted),))

    async def plan(self, key: str, request: ImageRequest, token: str) -> SubmissionEntry:
        """Record a request unless it is known; return its entry.

        Raises `ConfigurationError` if the key has other parameters.
        """
        now = time.time()
        params = params_text(request)
        planned = self._store.submit(_PLAN, (key, params, token, now, now), list)
        rows = await self._store.run(ENTRY, (key,))
        await planned
        with readable(key, "request"):
            [row] = rows  # none, if the file's index is damaged
        entry = submission_of(row)
        if params_text(entry.request) != params:
            raise _two_requests(key)
        return entry

    async def get(self, key: str) -> SubmissionEntry | None:
        rows = await self._store.run(ENTRY, (key,))
        return submission_of(*rows) if rows else None

    async def set(
        self, key: str, state: SubmissionState, error: KontextError | None = None
    ) -> None:
        """Record a state, on disk when this returns; one that is final stays."""
        await self._store.run(_SET, (state, error_text(error), time.time(), key))

    async def bind(self, key: str, task_id: str) -> bool:
        """Record the task of a request; False if it belongs to another request."""
        # Both without waiting in between: even a cancelled caller has them written.
        now = time.time()
        bound = self._store.submit(_BIND, (task_id, now, key), list)
        added = self._store.submit(_ADD_TASK, (now, now, key, task_id), list)
        await bound
        await added
        entry = await self.get(key)
        return entry is not None and entry.task_id == task_id

    async def candidates(self, token: str) -> list[str]:
        return [task_id for (task_id,) in await self._store.run(_CANDIDATES, (token,))]

    async def drop_candidate(self, token: str, task_id: str) -> None:
        await self._store.run(_DROP, (token, task_id))

    async def add_candidate(self, token: str, task_id: str) -> bool:
        """Record the task that a callback names, if its token is that of an uncertain request.

        Returns False if no request has the token.
        """
        if not token.isprintable():  # SQLite takes no lone surrogates
            return False
        added = self._store.submit(_CANDIDATE, (task_id, token, _MAX_CANDIDATES), list)
        rows = await self._store.run(_KNOWN, (token,))
        await added
        return bool(rows)
