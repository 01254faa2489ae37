"""One SQLite file and the one thread that writes to it."""

from __future__ import annotations

import asyncio
import functools
import itertools
import sqlite3
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from kontext_async.results.errors import LedgerError
from kontext_async.results.images.files import done

__all__ = ["Answer", "Row", "Store", "open_reader", "open_writer", "translated"]

Row: TypeAlias = tuple[Any, ...]
# The rows of a statement, or the error of its transaction.
Answer: TypeAlias = list[Row] | BaseException
_Request: TypeAlias = tuple[str, Sequence[Any], Callable[[Answer], None]]

# By this SQLite files are told apart ("Kntx"), and each migration by its number: the first is 1.
# What has been released stays as it is; a change of the layout is one more statement at the end.
_APPLICATION_ID = 0x4B6E7478
_MIGRATIONS = (
    """
    CREATE TABLE tasks (
        position INTEGER PRIMARY KEY,
        task_id TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        record TEXT,
        error TEXT,
        saved_path TEXT,
        sha256 TEXT,
        size INTEGER,
        kind TEXT,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL
    )
    """,
)

# What is asked within so many seconds becomes one transaction: one sync of the disk for all.
_GATHER = 0.01

_ADVICE = {
    sqlite3.SQLITE_BUSY: "another process is writing to it: one batch at a time",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: may its folder be written to?",
    sqlite3.SQLITE_CORRUPT: "it is damaged; it has been left as it is",
    sqlite3.SQLITE_FULL: "the disk is full; what was recorded before is safe",
    sqlite3.SQLITE_NOTADB: "it is not a ledger; it has been left as it is",
    sqlite3.SQLITE_READONLY: "it cannot be written to",
}


@contextmanager
def translated(path: Path) -> Generator[None]:
    """Turn what SQLite and the file system say of a ledger into a `LedgerError`."""
    try:
        yield
    except sqlite3.Error as exc:
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF  # without the details
        advice = _ADVICE.get(code)
        raise LedgerError(f"ledger {path}: {f'{advice} ({exc})' if advice else exc}") from exc
    except OSError as exc:
        raise LedgerError(f"ledger {path}: {exc.strerror or exc}") from exc


def _connect(path: Path, options: str, *, timeout: float = 5.0) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?{options}",
        uri=True,
        timeout=timeout,
        isolation_level=None,  # transactions are begun by hand
        check_same_thread=False,
    )


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    (number,) = connection.execute(f"PRAGMA {pragma}").fetchone()
    return int(number)


def _refuse_foreign(path: Path) -> None:
    """Raise where the file is none of ours. Immutable: SQLite takes no lock and writes nothing.

    By SQLite and not by `open`: closing a file drops the locks that the process has on it.
    """
    with closing(_connect(path, "mode=ro&immutable=1")) as connection:
        # Else a file that grows just now looks damaged: its first page is written before its last.
        connection.execute("PRAGMA writable_schema = ON")
        if _number(connection, "application_id") != _APPLICATION_ID:
            raise LedgerError(f"ledger {path}: it is not a ledger; it has been left as it is")


def _refuse_newer(path: Path, version: int) -> None:
    if version > len(_MIGRATIONS):
        raise LedgerError(
            f"ledger {path}: it is of version {version}, made by a newer kontext-async; this one "
            f"knows {len(_MIGRATIONS)}"
        )


def _refuse_damaged(path: Path) -> None:
    """Raise where the file is not whole; for the one who holds the lock.

    Read-only, as closing a connection that may write moves the log into a damaged file.
    """
    options = "mode=ro" if _has_log(path) else "mode=ro&immutable=1"
    with closing(_connect(path, options)) as connection:
        _refuse_newer(path, _number(connection, "user_version"))
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise LedgerError(f"ledger {path}: it is damaged ({found}); it has been left as it is")


def _has_log(path: Path) -> bool:
    """Whether a part of the ledger is in the write-ahead log beside it."""
    log = path.with_name(path.name + "-wal")
    return log.exists() and log.stat().st_size > 0


def _locked(path: Path) -> sqlite3.Connection:
    """The lock of the one writer; the system releases it however the process ends.

    SQLite's own locks, on an empty file beside the ledger: they work on every system, and between
    two connections of one process too.
    """
    lock = _connect(path.with_name(path.name + "-lock"), "mode=rwc", timeout=0.0)
    with _closed_on_error(lock):
        lock.execute("PRAGMA journal_mode = MEMORY")  # else another empty file
        lock.execute("BEGIN EXCLUSIVE")
    return lock


@contextmanager
def _closed_on_error(connection: sqlite3.Connection) -> Generator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _create(path: Path) -> None:
    """Make an empty ledger: it is there whole or not at all."""
    draft = path.with_name(path.name + "-new")
    draft.unlink(missing_ok=True)
    try:
        with closing(_connect(draft, "mode=rwc")) as connection:
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            _migrate(connection)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _migrate(connection: sqlite3.Connection) -> None:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        version = _number(connection, "user_version")
        for number, statement in enumerate(_MIGRATIONS[version:], version + 1):
            connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")


def _writer(path: Path) -> sqlite3.Connection:
    """A connection for writing; for the one who holds the lock."""
    if not path.exists():
        _create(path)
    _refuse_damaged(path)
    connection = _connect(path, "mode=rw")
    with _closed_on_error(connection):
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # what is committed outlives a power cut
        _migrate(connection)
    return connection


def open_writer(path: Path) -> tuple[sqlite3.Connection, sqlite3.Connection]:
    """A connection for writing, and the lock that goes with it."""
    with translated(path):
        if path.exists():
            _refuse_foreign(path)
        lock = _locked(path)
        with _closed_on_error(lock):
            return _writer(path), lock


def open_reader(path: Path) -> sqlite3.Connection:
    """A connection for reading, whoever writes meanwhile, and where nothing can be written."""
    with translated(path):
        if not path.exists():
            raise LedgerError(f"ledger {path}: there is none")
        _refuse_foreign(path)
        try:
            return _reader(path, "mode=ro")
        except sqlite3.OperationalError:
            # The files beside it are missing and cannot be made: a read-only folder, a full disk.
            if _has_log(path):
                raise
            return _reader(path, "mode=ro&immutable=1")


def _reader(path: Path, options: str) -> sqlite3.Connection:
    connection = _connect(path, options)
    with _closed_on_error(connection):
        _refuse_newer(path, _number(connection, "user_version"))
    return connection


class Store:
    """A ledger's file, open for writing: one connection in one thread.

    Statements run in the order they are submitted, those of a few milliseconds as one transaction.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connections: tuple[sqlite3.Connection, ...] = ()
        self._waiting: list[_Request] = []
        self._timer: asyncio.TimerHandle | None = None
        self._busy = False
        self._open = False
        self._failure: BaseException | None = None  # of what was still to be written at the end

    async def open(self) -> None:
        """Open the file, made where it is missing; raises `LedgerError` where that cannot be."""
        if self._open:
            raise LedgerError(f"ledger {self._path}: it is open already")
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kontext-ledger")
        try:
            await done(self._loop.run_in_executor(self._thread, self._open_file))
        except BaseException:
            await self._end()
            raise
        self._open = True

    async def aclose(self) -> None:
        """Write what is waiting, and close the file; raises what keeps it from being written.

        Twice is once.
        """
        if self._open:
            self._open = False
            self._send()
            await self._end()
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure

    async def run(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """The rows of a statement, once its transaction is on disk."""
        answer: asyncio.Future[list[Row]] = asyncio.get_running_loop().create_future()
        self.submit(sql, parameters, functools.partial(_settle, answer))
        return await answer

    def submit(self, sql: str, parameters: Sequence[Any], take: Callable[[Answer], None]) -> None:
        """Run a statement soon; ``take`` gets its rows, or the error of its transaction."""
        if not self._open:
            raise LedgerError(f"ledger {self._path}: it is closed")
        self._waiting.append((sql, parameters, take))
        if self._timer is None and not self._busy:
            self._gather()

    def _open_file(self) -> None:
        self._connections = open_writer(self._path)

    async def _end(self) -> None:
        """Close what is open, after all that the thread has to do."""
        closed = self._loop.run_in_executor(self._thread, self._close_file)
        self._thread.shutdown(wait=False)
        await done(closed)

    def _close_file(self) -> None:
        connections, self._connections = self._connections, ()
        for connection in connections:
            connection.close()

    def _gather(self) -> None:
        self._timer = self._loop.call_later(_GATHER, self._send)

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            group, self._waiting = self._waiting, []
            self._busy = True
            written = self._loop.run_in_executor(self._thread, self._write, group)
            written.add_done_callback(functools.partial(self._written, group))

    def _write(self, group: list[_Request]) -> list[list[Row]]:
        connection = self._connections[0]
        with translated(self._path), connection:
            connection.execute("BEGIN")
            return [connection.execute(sql, values).fetchall() for sql, values, _ in group]

    def _written(self, group: list[_Request], written: asyncio.Future[list[list[Row]]]) -> None:
        self._busy = False
        error = written.exception()
        if not self._open:
            self._failure = self._failure or error
        answers: Iterable[Answer] = itertools.repeat(error) if error else written.result()
        for (_, _, take), answer in zip(group, answers, strict=False):
            take(answer)
        if self._waiting:
            self._gather()


def _settle(answer: asyncio.Future[list[Row]], given: Answer) -> None:
    if answer.cancelled():
        return
    if isinstance(given, BaseException):
        answer.set_exception(given)
    else:
        answer.set_result(given)
