"""One SQLite file and the one thread that writes to it."""

from __future__ import annotations

import asyncio
import functools
import os
import sqlite3
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from kontext_async.errors import ClientStateError
from kontext_async.results.errors import LedgerError
from kontext_async.results.partial import PartialFile, remove_partial_files
from kontext_async.results.threads import uncancellable

__all__ = [
    "Row",
    "Store",
    "has_submissions",
    "open_reader",
    "open_writer",
    "translate_errors",
]

Row: TypeAlias = tuple[Any, ...]
_T = TypeVar("_T")


# A statement to run: its SQL, its parameters, and for its rows a reader and the future of what
# that returns; None where nobody waits.
_Reader: TypeAlias = tuple[Callable[[list[Row]], Any], asyncio.Future[Any]]
_Statement: TypeAlias = tuple[str, Sequence[Any], _Reader | None]

# SQLite's own field for the kind of file: "Kntx".
_APPLICATION_ID = 0x4B6E7478
# The n-th statement makes version n. Released ones never change; a new layout is one more.
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
    """
    CREATE TABLE submissions (
        position INTEGER PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,
        params TEXT NOT NULL,
        state TEXT NOT NULL,
        token TEXT NOT NULL UNIQUE,
        task_id TEXT UNIQUE,
        error TEXT,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL
    )
    """,
    """
    CREATE TABLE candidates (
        token TEXT NOT NULL,
        task_id TEXT NOT NULL,
        PRIMARY KEY (token, task_id)
    ) WITHOUT ROWID
    """,
)

# Statements within this many seconds share a transaction, and one sync of the disk
# (tests/benchmarks/ledger_cost.py).
_COMMIT_DELAY = 0.01

_ADVICE = {
    sqlite3.SQLITE_BUSY: "it is open in another batch, of this process or another: one at a time",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: check that its folder is writable",
    sqlite3.SQLITE_CORRUPT: "it is damaged; it has been left as it is",
    sqlite3.SQLITE_FULL: "the disk is full; what was recorded before is safe",
    sqlite3.SQLITE_IOERR: "the disk did not read or write it: check that it has room",
    sqlite3.SQLITE_NOTADB: "it is not a ledger; it has been left as it is",
    sqlite3.SQLITE_READONLY: "it cannot be written to",
}


@contextmanager
def translate_errors(path: Path) -> Generator[None]:
    """Raise errors of SQLite and the file system as `LedgerError`."""
    damaged = f"ledger {path}: {_ADVICE[sqlite3.SQLITE_CORRUPT]}"
    try:
        yield
    except sqlite3.Error as exc:
        if isinstance(exc, sqlite3.OperationalError) and not hasattr(exc, "sqlite_errorcode"):
            raise LedgerError(damaged) from exc  # text that is not UTF-8; the message quotes it
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF  # without the details
        advice = _ADVICE.get(code)
        raise LedgerError(f"ledger {path}: {f'{advice} ({exc})' if advice else exc}") from exc
    except UnicodeDecodeError as exc:  # SQLite's message quotes bytes of a damaged file
        raise LedgerError(damaged) from exc
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
    """Raise `LedgerError` if the file is not a ledger.

    Opened by SQLite, because closing a file that `open` opened drops the locks that the process
    has on it. Opened as immutable: SQLite takes no lock and writes nothing.
    """
    with closing(_connect(path, "mode=ro&immutable=1")) as connection:
        # Without this a growing file looks damaged: its first page is written before its last.
        connection.execute("PRAGMA writable_schema = ON")
        if _number(connection, "application_id") != _APPLICATION_ID:
            raise LedgerError(f"ledger {path}: it is not a ledger; it has been left as it is")


def has_submissions(connection: sqlite3.Connection) -> bool:
    """Return True for a ledger of a version that has requests: a reader upgrades nothing."""
    return _number(connection, "user_version") >= 2


def _refuse_newer(path: Path, version: int) -> None:
    if version > len(_MIGRATIONS):
        raise LedgerError(
            f"ledger {path}: it is of version {version}, made by a newer kontext-async; this one "
            f"knows {len(_MIGRATIONS)}"
        )


def _refuse_damaged(path: Path) -> None:
    """Raise `LedgerError` if the file is damaged; the caller holds the lock.

    Read-only, because closing a connection that may write moves the log into the damaged file.
    """
    options = "mode=ro" if _has_log(path) else "mode=ro&immutable=1"
    with closing(_connect(path, options)) as connection:
        _refuse_newer(path, _number(connection, "user_version"))
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise LedgerError(f"ledger {path}: it is damaged ({found}); it has been left as it is")


def _has_log(path: Path) -> bool:
    """Return True if a part of the ledger is in the write-ahead log beside it."""
    log = path.with_name(path.name + "-wal")
    return log.exists() and log.stat().st_size > 0


def _locked(path: Path) -> sqlite3.Connection:
    """Take the lock of the one writer; the system releases it however the process ends.

    It is SQLite's own lock on an empty file beside the ledger, which works on every system, and
    between two connections of one process.
    """
    lock = _connect(path.with_name(path.name + "-lock"), "mode=rwc", timeout=0.0)
    with _closed_on_error(lock):
        lock.execute("PRAGMA journal_mode = MEMORY")  # no third file
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
    """Make an empty ledger, atomically; the caller holds the lock."""
    remove_partial_files(path.parent, of=path.name)
    draft = PartialFile(os.fspath(path.parent), path.name)
    try:
        draft.write(b"")
        with closing(_connect(Path(draft.temporary), "mode=rw")) as connection:
            connection.execute("PRAGMA journal_mode = MEMORY")  # no second file
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            _migrate(connection)
        draft.sync()
        draft.rename()
    finally:
        draft.discard()


def _migrate(connection: sqlite3.Connection) -> None:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        version = _number(connection, "user_version")
        for number, statement in enumerate(_MIGRATIONS[version:], version + 1):
            connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")


def _writer(path: Path) -> sqlite3.Connection:
    """Connect for writing; the caller holds the lock."""
    if not path.exists():
        _create(path)
    _refuse_damaged(path)
    connection = _connect(path, "mode=rw")
    with _closed_on_error(connection):
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # commits survive a power cut
        _migrate(connection)
    return connection


def open_writer(path: Path) -> tuple[sqlite3.Connection, sqlite3.Connection]:
    """Connect for writing, and take the lock that goes with it."""
    with translate_errors(path):
        if path.exists():
            _refuse_foreign(path)
        lock = _locked(path)
        with _closed_on_error(lock):
            return _writer(path), lock


def open_reader(path: Path) -> sqlite3.Connection:
    """Connect for reading, beside a writer and on read-only media."""
    with translate_errors(path):
        if not path.exists():
            raise LedgerError(f"ledger {path}: it does not exist")
        _refuse_foreign(path)
        try:
            return _reader(path, "mode=ro")
        except sqlite3.OperationalError:
            # SQLite could not make the files beside it: a read-only folder, a full disk.
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

    Statements run in the order they are submitted. Those of a few milliseconds are one
    transaction.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connections: tuple[sqlite3.Connection, ...] = ()
        self._waiting: list[_Statement] = []
        self._timer: asyncio.TimerHandle | None = None
        self._is_writing = False
        self._is_open = False
        self._failure: BaseException | None = None  # of a write that nobody waits for

    async def open(self) -> None:
        """Open the file, which is made if missing; raises `LedgerError` if that fails."""
        if self._is_open:
            raise ClientStateError(f"ledger {self._path}: it is open already")
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kontext-ledger")
        try:
            await uncancellable(self._loop.run_in_executor(self._thread, self._open_file))
        except BaseException:
            await self._end()
            raise
        self._is_open = True

    async def aclose(self) -> None:
        """Write what is waiting, and close the file; raises the error of a write. Idempotent."""
        if self._is_open:
            self._is_open = False
            self._send()
            await self._end()
            self._raise_failure()

    async def run(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """Return the rows of a statement when its transaction is on disk."""
        return await self.submit(sql, parameters, list)

    def submit(
        self, sql: str, parameters: Sequence[Any], read: Callable[[list[Row]], _T]
    ) -> asyncio.Future[_T]:
        """Run a statement soon; the future has what ``read`` makes of its rows.

        It has the error of the statement's transaction otherwise, or the `LedgerError` that
        ``read`` raises.
        """
        self._check_open()
        answer: asyncio.Future[_T] = self._loop.create_future()
        self._add((sql, parameters, (read, answer)))
        return answer

    def post(self, sql: str, parameters: Sequence[Any]) -> None:
        """Run a statement soon, without waiting for it.

        If it fails, the next `post` raises its error, or `aclose` does.
        """
        self._raise_failure()
        self._check_open()
        self._add((sql, parameters, None))

    def _check_open(self) -> None:
        if not self._is_open:
            raise ClientStateError(f"ledger {self._path}: it is closed")

    def _add(self, statement: _Statement) -> None:
        self._waiting.append(statement)
        if self._timer is None and not self._is_writing:
            self._send_soon()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _open_file(self) -> None:
        self._connections = open_writer(self._path)

    async def _end(self) -> None:
        """Close the connections after everything the thread has been given."""
        closed = self._loop.run_in_executor(self._thread, self._close_file)
        self._thread.shutdown(wait=False)
        await uncancellable(closed)

    def _close_file(self) -> None:
        connections, self._connections = self._connections, ()
        for connection in connections:
            connection.close()

    def _send_soon(self) -> None:
        self._timer = self._loop.call_later(_COMMIT_DELAY, self._send)

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            group, self._waiting = self._waiting, []
            self._is_writing = True
            written = self._loop.run_in_executor(self._thread, self._write, group)
            written.add_done_callback(functools.partial(self._written, group))

    def _write(self, group: list[_Statement]) -> list[list[Row]]:
        connection = self._connections[0]
        with translate_errors(self._path), connection, closing(connection.cursor()) as cursor:
            cursor.execute("BEGIN")
            return [cursor.execute(sql, values).fetchall() for sql, values, _ in group]

    def _written(self, group: list[_Statement], written: asyncio.Future[list[list[Row]]]) -> None:
        self._is_writing = False
        error = written.exception()
        if error is None:
            for (_, _, reader), rows in zip(group, written.result(), strict=True):
                if reader is not None:
                    _answer(*reader, rows)
        else:
            for _, _, reader in group:
                if reader is None or not self._is_open:
                    self._failure = self._failure or error
                if reader is not None:
                    _fail(reader[1], error)
        if self._waiting:
            self._send_soon()


def _answer(read: Callable[[list[Row]], _T], answer: asyncio.Future[_T], rows: list[Row]) -> None:
    try:
        value = read(rows)
    except LedgerError as error:
        _fail(answer, error)
    else:
        if not answer.cancelled():
            answer.set_result(value)


def _fail(answer: asyncio.Future[Any], error: BaseException) -> None:
    if not answer.cancelled():
        answer.set_exception(error)
