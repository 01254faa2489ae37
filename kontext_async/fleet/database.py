"""Connections to a fleet's database, its tables, and the engine that keeps its queue."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, LiteralString, TypeAlias

import psycopg
from procrastinate import App, PsycopgConnector
from procrastinate.exceptions import ConnectorException
from procrastinate.schema import SchemaManager
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo
from psycopg_pool import AsyncConnectionPool

from kontext_async.errors import ClientStateError, ConfigurationError
from kontext_async.fleet.errors import FleetError

__all__ = [
    "AWAY",
    "CHANNEL",
    "LEFT",
    "QUEUE",
    "Connection",
    "Database",
    "Row",
    "reason",
    "translate_errors",
]

_log = logging.getLogger("kontext_async")

Row: TypeAlias = tuple[Any, ...]
Connection: TypeAlias = psycopg.AsyncConnection[Row]

QUEUE: Final = "kontext"
CHANNEL: Final = "kontext_outcomes"
LEFT: Final = "SELECT 1 FROM kontext_tasks WHERE state = 'waiting' LIMIT 1"
AWAY: Final = (psycopg.OperationalError, ConnectorException, TimeoutError)
"""Errors that may pass without anybody's help."""

_SCHEMA_LOCK = 0x4B6E7478  # "Kntx", of the locks of the whole database
_CONNECTIONS = 6  # of one process: chunks, heartbeats, the sweep and the leases take turns
_CONNECT_TIMEOUT = 10.0  # s

# The error of a failed connection has no SQLSTATE, only the server's words.
_REFUSED = re.compile(r"password|authentication|pg_hba|does not exist|permission|not permitted")
_BEFORE_REASON = re.compile(
    r"^(.* failed: |connection is bad: |failed to resolve host .*\] )?(FATAL:|fe_sendauth:)?"
)

_TABLES: Final = (
    """
    CREATE TABLE IF NOT EXISTS kontext_tasks (
        task_id text PRIMARY KEY,
        state text NOT NULL DEFAULT 'waiting',
        attempts integer NOT NULL DEFAULT 0,
        record text,
        error text,
        saved_path text,
        sha256 text,
        size bigint,
        kind text,
        position bigint,
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "CREATE SEQUENCE IF NOT EXISTS kontext_position",
    """
    CREATE UNIQUE INDEX IF NOT EXISTS kontext_tasks_position
    ON kontext_tasks (position) WHERE position IS NOT NULL
    """,
    """
    CREATE INDEX IF NOT EXISTS kontext_tasks_waiting
    ON kontext_tasks (task_id) WHERE state = 'waiting'
    """,
    """
    CREATE TABLE IF NOT EXISTS kontext_workers (
        name text PRIMARY KEY,
        waits integer NOT NULL,
        rate double precision NOT NULL,
        seen_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS kontext_durations (
        only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
        model text NOT NULL,
        updated_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS kontext_leases (
        name text NOT NULL,
        worker text NOT NULL,
        max_requests integer NOT NULL,
        period double precision NOT NULL,
        held integer NOT NULL,
        is_wanted boolean NOT NULL,
        renewed_at timestamptz NOT NULL,
        PRIMARY KEY (name, worker)
    )
    """,
)


@contextmanager
def translate_errors() -> Generator[None]:
    """Raise `FleetError` for what the database or the engine says."""
    try:
        yield
    except psycopg.errors.UndefinedTable as exc:
        raise FleetError(
            "the database has no tables of a fleet: run `kontext fleet init`", retryable=False
        ) from exc
    except (psycopg.Error, ConnectorException) as exc:
        is_away = isinstance(exc, AWAY)
        raise FleetError(f"the database failed: {reason(exc)}", retryable=is_away) from exc


def reason(error: BaseException) -> str:
    """Return the first line of an error, without the driver's words about the connection."""
    return _BEFORE_REASON.sub("", str(error).partition("\n")[0]).strip()


def _cannot_connect(address: str, error: BaseException) -> FleetError:
    """Return the error for a connection that failed."""
    problem = reason(error) or "no answer in time"
    is_refused = _REFUSED.search(problem) is not None
    advice = (
        "check the user, the password (PGPASSWORD or ~/.pgpass) and the database's name"
        if is_refused
        else "check the connection string, and that PostgreSQL runs there"
    )
    return FleetError(
        f"cannot reach the database at {address}: {problem}; {advice}",
        retryable=not is_refused,
    )


def _address(dsn: str) -> str:
    """Return the hosts and ports of a connection string, which may come from the environment."""
    parts = {
        option.keyword.decode(): option.val.decode()
        for option in Conninfo.get_defaults()
        if option.val
    } | {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    hosts = (parts.get("host") or parts.get("hostaddr") or "local socket").split(",")
    ports = parts["port"].split(",") * len(hosts)
    return ", ".join(f"{host}:{port}" for host, port in zip(hosts, ports, strict=False))


def _checked_dsn(dsn: object) -> str:
    """Return a connection string; raise `ConfigurationError`, which does not show it."""
    if not isinstance(dsn, str) or not dsn.strip():
        raise ConfigurationError("dsn must be a connection string, such as postgresql:///fleet")
    try:
        conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        # Without its cause, whose message has a part of the string, and perhaps the password.
        raise ConfigurationError(
            "dsn is not a connection string of PostgreSQL, such as postgresql://user@host/fleet"
        ) from None
    return dsn


async def _autocommit(connection: psycopg.AsyncConnection[Any]) -> None:
    await connection.set_autocommit(True)


class Database:
    """A pool of connections, and the engine on top of it."""

    def __init__(self, dsn: str) -> None:
        self._dsn = _checked_dsn(dsn)
        self.address: Final = _address(dsn)
        self._away_since: float | None = None  # s, by the loop's clock
        self._pool: AsyncConnectionPool[Connection] | None = None
        self.app = App(connector=PsycopgConnector())

    async def open(self) -> None:
        """Connect; raise `FleetError` if the database cannot be reached."""
        pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            self._dsn,
            min_size=1,
            max_size=_CONNECTIONS,
            open=False,
            configure=_autocommit,
            check=AsyncConnectionPool.check_connection,
            timeout=_CONNECT_TIMEOUT,
            name="kontext-fleet",
        )
        try:
            async with await self._connect():  # its error says more than the pool's
                pass
            await pool.open(wait=True, timeout=_CONNECT_TIMEOUT)
            await self.app.open_async(pool)
        except AWAY as exc:
            await pool.close()
            raise _cannot_connect(self.address, exc) from exc
        except BaseException:
            await pool.close()
            raise
        self._pool = pool

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()

    @property
    def is_open(self) -> bool:
        return self._pool is not None

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[Connection]:
        """Lend a connection, which commits each statement."""
        async with self._opened().connection() as connection:
            if self._away_since is not None:
                away = asyncio.get_running_loop().time() - self._away_since
                _log.info("the database is back after %.0f s", away)
                self._away_since = None
            yield connection

    def warn_away(self, error: BaseException) -> None:
        """Log that the database is away, once until it is back."""
        if self._away_since is None:
            self._away_since = asyncio.get_running_loop().time()
            why = reason(error.__cause__ or error) or type(error).__name__
            _log.warning("the database at %s is away, trying again: %s", self.address, why)

    async def connect(self) -> Connection:
        """Return a connection of the caller's own, such as for LISTEN."""
        self._opened()
        return await self._connect()

    def _opened(self) -> AsyncConnectionPool[Connection]:
        if self._pool is None:
            raise ClientStateError("this fleet is not open: use `async with`")
        return self._pool

    async def _connect(self) -> Connection:
        async with asyncio.timeout(_CONNECT_TIMEOUT):
            return await psycopg.AsyncConnection.connect(self._dsn, autocommit=True)

    async def fetch(self, sql: LiteralString, values: Any = None) -> list[Row]:
        """Run one statement, and return its rows."""
        async with self.connection() as connection:
            cursor = await connection.execute(sql, values)
            return await cursor.fetchall() if cursor.description else []

    async def create_tables(self) -> None:
        """Create the tables that are missing, the engine's included. Idempotent."""
        with translate_errors():
            async with self.connection() as connection, connection.transaction():
                await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_SCHEMA_LOCK,))
                found = await connection.execute("SELECT to_regclass('procrastinate_jobs')")
                if await found.fetchone() == (None,):
                    await connection.execute(SchemaManager.get_schema())
                for table in _TABLES:
                    await connection.execute(table)
