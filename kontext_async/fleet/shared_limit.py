"""One known rate limit for many processes, in leases.

Each process holds some of the limit's permits and keeps them in a sliding window of its own. A
permit belongs to one process at a time, so all windows together never have more than the limit.
No request needs the database.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from kontext_async.errors import ConfigurationError
from kontext_async.fleet.database import AWAY, Database, translate_errors
from kontext_async.fleet.names import new_name
from kontext_async.pacing import RateLimit, SlidingWindow

__all__ = ["Lease", "Share", "SharedLimit", "check_limit", "lease", "next_share"]

_log = logging.getLogger("kontext_async")

_RENEW_AFTER = 1.0  # s
_RENEW_WITHIN = 3.0  # s, else the database counts as away
_RECHECK = 0.1  # s, while this process has no permit
# A process that neither renewed nor failed to for so long was stopped, and its lease may be over.
_FROZEN_AFTER = 10.0  # s
_LEASE = 15.0  # s, and a period, in which the service still counts its requests

_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('kontext_leases ' || %s, 0))"
# Nobody can renew while the server is down, so that time does not count.
_EXPIRE = """
    DELETE FROM kontext_leases WHERE name = %s
    AND greatest(renewed_at, pg_postmaster_start_time())
        < clock_timestamp() - make_interval(secs => period + %s)
"""
_OTHERS = """
    SELECT worker, held, is_wanted, max_requests, period
    FROM kontext_leases WHERE name = %s AND worker <> %s
"""
_RENEW = """
    INSERT INTO kontext_leases (name, worker, max_requests, period, held, is_wanted, renewed_at)
    VALUES (%s, %s, %s, %s, %s, %s, clock_timestamp())
    ON CONFLICT (name, worker) DO UPDATE SET held = excluded.held,
    is_wanted = excluded.is_wanted, renewed_at = excluded.renewed_at
"""


class Lease(NamedTuple):
    """The permits that a process holds."""

    worker: str
    held: int
    is_wanted: bool


class Share(NamedTuple):
    """A process's part: the most permits it may use, and those that others may not."""

    max_requests: int
    held: int


def next_share(limit: int, own: Lease, others: Sequence[Lease]) -> Share:
    """Return the next share of a process that holds ``own`` at most until it hears of it.

    Those that want permits have equal parts. What another still holds is not given away.
    """
    if not own.is_wanted:
        return Share(0, own.held)
    wanting = sorted([own.worker, *(other.worker for other in others if other.is_wanted)])
    part, rest = divmod(limit, len(wanting))
    fair = part + (wanting.index(own.worker) < rest)
    free = limit - sum(other.held for other in others)
    mine = max(0, min(fair, free))
    return Share(mine, max(mine, own.held))


def check_limit(limit: object) -> None:
    """Raise `ConfigurationError` unless this is a `RateLimit`."""
    if not isinstance(limit, RateLimit):
        raise ConfigurationError(f"limit must be a RateLimit, not {limit!r}")


class SharedLimit(SlidingWindow):
    """The share that a process has of a rate limit, for one `KontextClient`."""

    def __init__(self, limit: RateLimit) -> None:
        super().__init__(limit)
        self.max_requests = 0
        self.is_wanted = False
        self.wanted = asyncio.Event()
        self.heard_at = asyncio.get_running_loop().time()  # of the database, or of its absence

    def opens_at(self, now: float) -> float:
        if not self.is_wanted:
            self.is_wanted = True
            self.wanted.set()
        if now > self.heard_at + _FROZEN_AFTER:
            return now + _RECHECK
        return min(super().opens_at(now), now + _RECHECK)

    def forgotten(self) -> SharedLimit:
        self._spacing = None
        return self

    def rate(self) -> float:
        return max(self.max_requests, 1) / self._limit.period


class _Leasing:
    """Renews one process's lease."""

    def __init__(self, database: Database, limit: RateLimit, name: str) -> None:
        self.shared = SharedLimit(limit)
        self._database = database
        self._limit = limit
        self._name = name
        self._worker = new_name()
        self._is_away = False

    async def renew(self) -> None:
        """Ask the database for the next share."""
        shared, loop = self.shared, asyncio.get_running_loop()
        is_wanted = shared.is_wanted or shared.used(loop.time()) > 0
        shared.is_wanted = False
        shared.wanted.clear()
        # The most it may have used when the answer comes.
        held = max(shared.max_requests, shared.used(loop.time()))
        share = await self._exchange(Lease(self._worker, held, is_wanted))
        shared.max_requests = share.max_requests

    async def leave(self) -> None:
        """Give the share up. The lease ends later, when the service has forgotten the requests."""
        now = asyncio.get_running_loop().time()
        held = self.shared.used(now)
        self.shared.max_requests = 0
        with suppress(*AWAY):
            async with asyncio.timeout(_RENEW_WITHIN):
                await self._exchange(Lease(self._worker, held, is_wanted=False))

    async def run(self) -> None:
        """Renew the lease, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_RENEW_AFTER):
                    await self.shared.wanted.wait()
                    await asyncio.sleep(_RENEW_AFTER if self._is_away else 0)
            try:
                async with asyncio.timeout(_RENEW_WITHIN):
                    await self.renew()
                self._is_away = False
            except AWAY as exc:
                self._database.warn_away(exc)
                if not self._is_away:
                    part = f"{self.shared.max_requests} of {self._limit.max_requests}"
                    _log.info("this process keeps %s requests of the shared limit", part)
                self._is_away = True
            self.shared.heard_at = loop.time()

    async def _exchange(self, own: Lease) -> Share:
        limit = self._limit
        async with self._database.connection() as connection, connection.transaction():
            await connection.execute(_LOCK, (self._name,))
            await connection.execute(_EXPIRE, (self._name, _LEASE))
            found = await connection.execute(_OTHERS, (self._name, self._worker))
            rows = await found.fetchall()
            for *_, max_requests, period in rows:
                if (max_requests, period) != (limit.max_requests, limit.period):
                    raise ConfigurationError(
                        f"another process shares {max_requests} requests in {period:g} s as "
                        f"{self._name!r}: give all the same limit"
                    )
            others = [Lease(worker, held, wanted) for worker, held, wanted, *_ in rows]
            share = next_share(limit.max_requests, own, others)
            await connection.execute(
                _RENEW,
                (
                    self._name,
                    self._worker,
                    limit.max_requests,
                    limit.period,
                    share.held,
                    own.is_wanted,
                ),
            )
        return share


@asynccontextmanager
async def lease(database: Database, limit: RateLimit, name: str) -> AsyncGenerator[SharedLimit]:
    """Hold a share of a limit while the block runs."""
    leasing = _Leasing(database, limit, name)
    with translate_errors():
        await leasing.renew()
    _log.info("a limit of %d requests in %g s is shared", limit.max_requests, limit.period)
    renewing = asyncio.create_task(leasing.run())
    try:
        yield leasing.shared
    finally:
        renewing.cancel()
        await asyncio.wait({renewing})
        with translate_errors():
            await leasing.leave()
