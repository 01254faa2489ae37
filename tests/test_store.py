"""A ledger's file: its writer and readers, files that are refused, and transactions."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, suppress

import pytest
from client_world import error_of
from ledger_world import (
    assert_nothing_left,
    busy_disk,
    fill_disk,
    free_disk,
    open_files,
    read_only_folder,
    until,
)

from kontext_async import ClientStateError
from kontext_async.results import LedgerError
from kontext_async.results.ledger import store as store_module
from kontext_async.results.ledger.store import Store, open_reader, open_writer, translate_errors

ADD = "INSERT INTO tasks (task_id, state, attempts, created_at, updated_at) VALUES (?, '', 0, 0, 0)"
ALL = "SELECT task_id FROM tasks ORDER BY position"
LARGE = "x" * 100_000


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
async def store(path):
    store = Store(path)
    await store.open()
    yield store
    with suppress(LedgerError):
        await store.aclose()
    await assert_nothing_left(path.parent)


async def make(path, *task_ids):
    """Make a ledger with these ids, and close it."""
    store = Store(path)
    await store.open()
    for task_id in task_ids:
        await store.run(ADD, (task_id,))
    await store.aclose()
    await assert_nothing_left(path.parent)


def read(path):
    with closing(open_reader(path)) as connection:
        return [task_id for (task_id,) in connection.execute(ALL)]


def log_of(path):
    return path.with_name(path.name + "-wal")


def bytes_of(path):
    """Return the content of a file and of the log beside it; a missing log is empty."""
    return [file.read_bytes() if file.exists() else b"" for file in (path, log_of(path))]


async def leave_log(path, *task_ids):
    """Make a ledger as a killed process leaves it: everything is in the log."""
    await make(path)
    store = Store(path)
    await store.open()
    for task_id in task_ids:
        await store.run(ADD, (task_id,))
    copies = [shutil.copy(file, f"{file}.copy") for file in (path, log_of(path))]
    await store.aclose()
    for copy in copies:
        shutil.move(copy, copy.removesuffix(".copy"))
    assert log_of(path).stat().st_size


def transactions(store):
    """Return a list of the transactions that an open store begins from now on."""
    begun = []
    store._connections[0].set_trace_callback(lambda sql: sql == "BEGIN" and begun.append(sql))
    return begun


# A file


async def test_a_new_ledger_survives_a_power_cut_and_is_distinct_from_other_files(store):
    """A write-ahead log that is synced, and an id and a version of its own."""
    connection = store._connections[0]
    found = {
        name: connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "application_id", "user_version")
    }
    assert found == {
        "journal_mode": "wal",
        "synchronous": 2,
        "application_id": 0x4B6E7478,
        "user_version": len(store_module._MIGRATIONS),
    }


async def test_closing_leaves_one_file_and_the_empty_one_for_the_lock(path):
    """The log is in the file by then."""
    await make(path, "a")
    assert {file.name: bool(file.stat().st_size) for file in path.parent.iterdir()} == {
        path.name: True,
        f"{path.name}-lock": False,
    }


@pytest.mark.parametrize("name", ["a?mode=ro#b%20c", "ü 🦊", "-", "x" * 200])
async def test_a_file_may_have_any_name(tmp_path, name):
    """Characters with a meaning in a URI are taken literally."""
    await make(tmp_path / name, "a")
    assert (tmp_path / name).exists()
    assert read(tmp_path / name) == ["a"]


async def test_a_relative_path_is_one_from_the_working_folder(tmp_path, monkeypatch):
    """As everywhere."""
    monkeypatch.chdir(tmp_path)
    await make(tmp_path.relative_to(tmp_path) / "here", "a")
    assert read(tmp_path / "here") == ["a"]


async def test_a_new_ledger_that_cannot_be_completed_leaves_nothing(path, monkeypatch):
    """A ledger is complete or not there."""
    monkeypatch.setattr(store_module, "_MIGRATIONS", ("no statement",))
    await error_of(Store(path).open(), LedgerError)
    assert [file.name for file in path.parent.iterdir()] == [f"{path.name}-lock"]


async def test_what_a_killed_creation_left_is_removed(path):
    """The temporary files of others are not."""
    mine = path.with_name(f".{path.name}.{'0' * 12}.part")
    others = [
        path.with_name(f".{name}.{'0' * 12}.part") for name in ("image.png", "a." + path.name)
    ]
    for file in (mine, *others):
        file.touch()
    await make(path, "a")
    assert read(path) == ["a"]
    assert [file.exists() for file in (mine, *others)] == [False, True, True]


async def test_the_log_of_a_killed_process_is_read(path):
    """By readers, and by the next writer."""
    await leave_log(path, "a", "b")
    assert read(path) == ["a", "b"]
    await make(path, "c")
    assert read(path) == ["a", "b", "c"]


# Statements


async def test_statements_submitted_together_are_one_transaction(store):
    """One sync of the disk for all; each has its own rows, in order."""
    begun = transactions(store)
    answers = await asyncio.gather(*(store.run("SELECT ?", (n,)) for n in range(100)))
    assert answers == [[(n,)] for n in range(100)]
    assert len(begun) == 1


async def test_statements_submitted_while_the_disk_is_busy_are_the_next_transaction(store):
    """However many there are."""
    begun = transactions(store)
    with busy_disk(store):
        asking = [asyncio.create_task(store.run("SELECT 0"))]
        await until(lambda: store._is_writing)
        for _ in range(5):
            asking.append(asyncio.create_task(store.run("SELECT 1")))
            await asyncio.sleep(0.005)
    assert await asyncio.gather(*asking) == [[(0,)], *[[(1,)]] * 5]
    assert len(begun) == 2


async def test_a_statement_that_has_run_is_on_disk(store, path):
    """Another connection sees it."""
    await store.run(ADD, ("a",))
    assert read(path) == ["a"]


async def test_a_cancelled_statement_does_not_affect_the_others(store, path):
    """It runs all the same, whether its transaction succeeds or fails."""
    for names, error in (("ab", type(None)), ("ca", LedgerError)):  # the second "a" fails
        waiting = [asyncio.create_task(store.run(ADD, (name,))) for name in names]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.wait(waiting)
        assert waiting[0].cancelled()
        assert type(waiting[1].exception()) is error
    assert read(path) == ["a", "b"]


async def test_a_transaction_that_fails_is_undone_and_fails_for_all_its_statements(store, path):
    """Later statements are not affected."""
    await store.run(ADD, ("a",))
    answers = await asyncio.gather(
        store.run(ADD, ("b",)), store.run(ADD, ("a",)), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [LedgerError, LedgerError]
    assert "UNIQUE constraint failed" in str(answers[0])
    await store.run(ADD, ("c",))
    assert read(path) == ["a", "c"]


async def test_a_full_disk_is_a_clear_error_and_harms_nothing(store, path):
    """Earlier entries are readable in the meantime; with space again, writing continues."""
    await store.run(ADD, ("a",))
    fill_disk(store)
    error = await error_of(store.run(ADD, (LARGE,)), LedgerError)
    assert "the disk is full; what was recorded before is safe" in str(error)
    assert read(path) == ["a"]
    free_disk(store)
    await store.run(ADD, ("b",))
    assert read(path) == ["a", "b"]


# Opening and closing


async def test_closing_writes_what_is_waiting(path):
    """Its future is done then; closing is idempotent."""
    store = Store(path)
    await store.open()
    answer = store.submit(ADD, ("a",), list)
    await store.aclose()
    await store.aclose()
    assert answer.result() == []
    assert read(path) == ["a"]


async def test_closing_waits_for_what_is_being_written(path):
    """Two transactions may be left."""
    store = Store(path)
    await store.open()
    with busy_disk(store):
        writing = asyncio.create_task(store.run(ADD, ("a",)))
        await until(lambda: store._is_writing)
        store.submit(ADD, ("b",), list)
        closing_it = asyncio.create_task(store.aclose())
        await asyncio.sleep(0.02)
        assert not closing_it.done()
    await closing_it
    assert await writing == []
    assert read(path) == ["a", "b"]


async def test_closing_raises_the_error_of_a_write(path):
    """Even if no caller waits for the write; then the store is closed all the same."""
    store = Store(path)
    await store.open()
    fill_disk(store)
    answer = store.submit(ADD, (LARGE,), list)
    assert "the disk is full" in str(await error_of(store.aclose(), LedgerError))
    assert isinstance(answer.exception(), LedgerError)
    await store.aclose()
    await assert_nothing_left(path.parent)


async def test_a_store_that_is_not_open_raises(path):
    """Before it is opened, and after it is closed."""
    store = Store(path)
    assert "it is closed" in str(await error_of(store.run("SELECT 1"), ClientStateError))
    await store.aclose()
    await store.open()
    await store.aclose()
    assert "it is closed" in str(await error_of(store.run("SELECT 1"), ClientStateError))


async def test_a_store_may_be_opened_again_but_not_twice(store):
    """The second opening does not affect the first."""
    assert "it is open already" in str(await error_of(store.open(), ClientStateError))
    await store.run(ADD, ("a",))
    await store.aclose()
    await store.open()
    assert await store.run(ALL) == [("a",)]


async def test_opening_may_be_cancelled(path, monkeypatch):
    """Then nothing is left open, and the ledger has no writer."""
    cancelled = threading.Event()

    def open_once_cancelled(path):
        cancelled.wait(10)
        return open_writer(path)

    monkeypatch.setattr(store_module, "open_writer", open_once_cancelled)
    for _ in range(5):
        cancelled.clear()
        opening = asyncio.create_task(Store(path).open())
        await asyncio.sleep(0)
        opening.cancel()
        cancelled.set()
        await error_of(opening, asyncio.CancelledError)
        assert open_files(path.parent) == []
    await make(path)


async def test_closing_may_be_cancelled(path):
    """The file is closed by then."""
    store = Store(path)
    await store.open()
    store.submit(ADD, ("a",), list)
    cancelled = threading.Event()
    store._thread.submit(cancelled.wait, 10)
    closing_it = asyncio.create_task(store.aclose())
    await asyncio.sleep(0)
    closing_it.cancel()
    cancelled.set()
    await error_of(closing_it, asyncio.CancelledError)
    assert open_files(path.parent) == []
    assert read(path) == ["a"]


# Writers and readers


async def test_a_second_writer_is_refused_and_a_reader_is_not(store, path):
    """In the same process; the second may write when the first has closed."""
    await store.run(ADD, ("a",))
    error = await error_of(Store(path).open(), LedgerError)
    assert "it is open in another batch, of this process or another" in str(error)
    assert read(path) == ["a"]
    await store.run(ADD, ("b",))
    await store.aclose()
    await make(path)


HOLD = """
import asyncio, pathlib, sys
from kontext_async.results.ledger.store import Store

async def main():
    store = Store(pathlib.Path(sys.argv[1]))
    await store.open()
    await store.run(sys.argv[2], ("theirs",))
    print("open", flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


async def test_another_process_is_a_second_writer_too(path):
    """The system releases its lock, however it ends; what it wrote stays."""
    command = [sys.executable, "-c", HOLD, str(path), ADD]
    with subprocess.Popen(  # noqa: ASYNC220  # waited for on purpose
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"open\n"
        assert "open in another batch" in str(await error_of(Store(path).open(), LedgerError))
        assert read(path) == ["theirs"]
        other.kill()
    await make(path, "ours")
    assert read(path) == ["theirs", "ours"]


async def test_a_reader_sees_a_snapshot(store, path):
    """No matter what is written while it reads."""
    await asyncio.gather(*(store.run(ADD, (f"{n}",)) for n in range(10)))
    with closing(open_reader(path)) as connection:
        rows = connection.execute(ALL)
        seen = [rows.fetchone()]
        await store.run("DELETE FROM tasks")
        seen += rows
    assert len(seen) == 10
    assert read(path) == []


async def test_a_reader_may_open_the_file_during_a_checkpoint(path):
    """The first page of a growing file is written before its last: that is not damage."""
    await make(path)
    store = Store(path)
    await store.open()
    store._connections[0].execute("PRAGMA wal_autocheckpoint = 0")
    await store.run(ADD, (LARGE,))
    before, log = bytes_of(path)
    await store.aclose()
    with path.open("rb") as file:
        first = file.read(4096)
    path.write_bytes(first + before[4096:])
    log_of(path).write_bytes(log)
    assert read(path) == [LARGE]


async def test_a_ledger_in_a_read_only_folder_is_readable(path):
    """Without a log, SQLite's files beside it are not needed."""
    await make(path, "a")
    with read_only_folder(lambda folder: shutil.copy(path, folder)) as folder:
        assert read(folder / path.name) == ["a"]
        error = await error_of(Store(folder / path.name).open(), LedgerError)
        assert "check that its folder is writable" in str(error)
        await error_of(Store(folder / "new").open(), LedgerError)
        assert [file.name for file in folder.iterdir()] == [path.name]


async def test_a_read_only_folder_with_a_log_is_refused(path):
    """Without the log the ledger would be an old one."""
    await leave_log(path, "a")

    def fill(folder):
        for file in (path, log_of(path)):
            shutil.copy(file, folder)

    with (
        read_only_folder(fill) as folder,
        pytest.raises(LedgerError, match="folder is writable"),
    ):
        read(folder / path.name)


# Files that are refused


def database(path, *, log=False):
    with closing(sqlite3.connect(path)) as connection:
        if log:
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE tasks (task_id TEXT)")
        connection.execute("INSERT INTO tasks VALUES ('theirs')")
        connection.commit()
        if log:
            for file in (path, log_of(path)):
                shutil.copy(file, f"{file}.copy")
    if log:
        for file in (path, log_of(path)):
            shutil.move(f"{file}.copy", file)


FOREIGN = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("id\n" * 1000),
    "header": lambda path: path.write_bytes(b"SQLite format 3\0"),
    "another_database": database,
    "another_database_with_a_log": lambda path: database(path, log=True),
}


@pytest.mark.parametrize("kind", FOREIGN)
async def test_a_foreign_file_is_refused_and_not_changed(path, kind):
    """By writers and readers; no file is made beside it."""
    FOREIGN[kind](path)
    before = bytes_of(path), sorted(path.parent.iterdir())
    for refused in (open_writer, open_reader):
        with pytest.raises(LedgerError, match="it is not a ledger; it has been left as it is"):
            refused(path)
    await error_of(Store(path).open(), LedgerError)
    await assert_nothing_left(path.parent)
    assert (bytes_of(path), sorted(path.parent.iterdir())) == before


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 8192 * 4096])


def overwrite(path):
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, overwrite])
@pytest.mark.parametrize("with_log", [False, True])
async def test_a_damaged_ledger_is_refused_and_not_changed(path, damage, with_log):
    """With the log beside it, if there is one."""
    await make(path, *(f"{n}" * 3000 for n in range(5)))
    if with_log:
        await leave_log(path, "a")
    damage(path)
    before = bytes_of(path)
    error = await error_of(Store(path).open(), LedgerError)
    assert "it is damaged" in str(error)
    assert "left as it is" in str(error)
    await assert_nothing_left(path.parent)
    assert bytes_of(path) == before


async def test_a_reader_reports_damage(path):
    """When it reaches the damaged page."""
    await make(path, "a" * 10_000)
    overwrite(path)
    with (
        closing(open_reader(path)) as connection,
        pytest.raises(LedgerError, match="it is damaged"),
        store_module.translate_errors(path),
    ):
        connection.execute(ALL).fetchall()


async def test_text_that_is_not_utf_8_is_damage_and_not_quoted(store, path):
    """It may be a prompt."""
    await store.run(ADD.replace("''", "CAST(x'ff' || 'prompt' AS TEXT)"), ("a",))
    error = await error_of(store.run("SELECT state FROM tasks"), LedgerError)
    assert str(error) == f"ledger {path}: it is damaged; it has been left as it is"


def test_an_error_of_the_disk_says_what_to_check(path):
    """A full disk is one, where SQLite has no room for its shared memory."""
    failure = sqlite3.OperationalError("disk I/O error")
    failure.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
    refused = pytest.raises(LedgerError, match=r"check that it has room \(disk I/O error\)")
    with refused, translate_errors(path):
        raise failure


async def test_reading_a_ledger_that_does_not_exist_is_an_error(path):
    """And makes no file."""
    with pytest.raises(LedgerError, match="it does not exist"):
        open_reader(path)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("name", [".", "missing/ledger", "x" * 300])
async def test_a_path_that_cannot_be_a_ledger_is_refused(tmp_path, name):
    """A folder, a path in a folder that is missing, a name too long: the error names the path."""
    error = await error_of(Store(tmp_path / name).open(), LedgerError)
    assert str(error).startswith(f"ledger {tmp_path / name}: ")
    assert not list(tmp_path.iterdir())


async def test_what_the_file_system_refuses_is_an_error_of_the_ledger(path, monkeypatch):
    """Here a folder gets the ledger's name while it is being made."""
    migrate = store_module._migrate

    def interfere(connection):
        migrate(connection)
        path.mkdir()

    monkeypatch.setattr(store_module, "_migrate", interfere)
    error = await error_of(Store(path).open(), LedgerError)
    assert str(error) == f"ledger {path}: Is a directory"
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}-lock"]


async def test_a_foreign_file_at_the_locks_path_is_not_changed(path):
    """Then the ledger cannot be opened."""
    lock = path.with_name(path.name + "-lock")
    lock.write_text("not a lock\n" * 100)
    await error_of(Store(path).open(), LedgerError)
    assert lock.read_text() == "not a lock\n" * 100
    assert not path.exists()


# Versions


STEPS = ("ALTER TABLE tasks ADD COLUMN colour TEXT", "UPDATE tasks SET colour = 'red'")
COLOURS = "SELECT task_id, colour FROM tasks"


@pytest.mark.parametrize("prepare", [make, leave_log])
async def test_a_ledger_of_an_older_release_is_migrated(path, monkeypatch, prepare):
    """Step by step, each once; also one whose process was killed."""
    await prepare(path, "a")
    known = store_module._MIGRATIONS
    for count in (1, 2, 2):
        monkeypatch.setattr(store_module, "_MIGRATIONS", (*known, *STEPS[:count]))
        await make(path)
    with closing(open_reader(path)) as connection:
        assert connection.execute(COLOURS).fetchall() == [("a", "red")]
        assert connection.execute("PRAGMA user_version").fetchone() == (len(known) + 2,)


async def test_a_step_that_fails_undoes_those_before_it(path, monkeypatch):
    """The ledger is not changed."""
    await make(path, "a")
    known = store_module._MIGRATIONS
    monkeypatch.setattr(
        store_module, "_MIGRATIONS", (*known, STEPS[0], "UPDATE missing SET colour = 1")
    )
    assert "no such table: missing" in str(await error_of(Store(path).open(), LedgerError))
    await error_of(Store(path.with_name("new")).open(), LedgerError)
    assert not path.with_name("new").exists()
    monkeypatch.setattr(store_module, "_MIGRATIONS", known)
    await make(path, "b")
    assert read(path) == ["a", "b"]


@pytest.mark.parametrize("prepare", [make, leave_log])
async def test_a_ledger_of_a_newer_release_is_refused_and_not_changed(path, monkeypatch, prepare):
    """By writers and readers; the error has the version that this release knows."""
    known = store_module._MIGRATIONS
    monkeypatch.setattr(store_module, "_MIGRATIONS", (*known, STEPS[0]))
    await prepare(path, "a")
    monkeypatch.setattr(store_module, "_MIGRATIONS", known)
    before = bytes_of(path)
    for refused in (open_writer, open_reader):
        with pytest.raises(LedgerError, match=r"version 4, made by a newer .* knows 3"):
            refused(path)
    assert bytes_of(path) == before
