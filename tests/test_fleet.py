"""Many workers on one database: nothing is lost, and each task has one outcome."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from bisect import bisect_left

import psycopg
import pytest
from procrastinate import App
from procrastinate.exceptions import ConnectorException
from psycopg.conninfo import make_conninfo

from kontext_async import (
    AuthenticationError,
    ClientStateError,
    ConfigurationError,
    DurationModel,
    ErrorOutcome,
    KontextClient,
    KontextError,
)
from kontext_async.fleet import Fleet, FleetError
from kontext_async.fleet.database import Database
from kontext_async.fleet.durations import SharedDurations
from kontext_async.fleet.journal import OutcomeWriter
from kontext_async.fleet.worker import _SWEEP_LOCK, Worker
from kontext_async.results import ImageSaver
from kontext_async.schedule import _EDGES
from kontext_async.simulator import Failure, Simulator

BEAT = {"heartbeat": 0.3}


@pytest.fixture
async def fleet(dsn):
    async with Fleet(dsn) as opened:
        await opened.init()
        yield opened


@pytest.fixture
async def simulator():
    async with Simulator(durations=0.2, auto_create=True) as running:
        yield running


@pytest.fixture
async def client(simulator):
    eager = DurationModel(cost_per_request=0.001)
    async with KontextClient("secret-key", base_url=simulator.base_url, durations=eager) as opened:
        yield opened


async def collected(fleet):
    return [entry async for entry in fleet.outcomes()]


async def test_each_task_that_is_submitted_has_one_outcome(fleet, simulator, client):
    """A worker works through the chunks, and returns when no task is waiting."""
    simulator.add_task("fails", outcome=Failure(400, "flagged"))
    assert await fleet.submit(["fails", *(f"t{n}" for n in range(20))], chunk=8) == 21
    await fleet.work(client, until_done=True, **BEAT)
    entries = {entry.task_id: entry for entry in await collected(fleet)}
    assert len(entries) == 21
    assert entries["t3"].state == "done"
    assert entries["t3"].record.result_image_url
    assert (entries["fails"].state, entries["fails"].error_code) == ("failed", 400)
    status = await fleet.status()
    assert status.tasks == {"waiting": 0, "done": 20, "failed": 1, "unfinished": 0, "error": 0}
    assert (status.queued_chunks, status.running_chunks, status.workers) == (0, 0, ())


async def test_known_ids_are_dropped_and_unfinished_ones_wait_again(fleet, simulator, client):
    """An id is waited for once; one whose wait met an error may be submitted again."""
    simulator.add_task("refused", script=["code_402"])
    assert await fleet.submit(["refused", "refused", "good"]) == 2
    await fleet.work(client, until_done=True, **BEAT)
    states = {entry.task_id: entry.state for entry in await collected(fleet)}
    assert states == {"refused": "error", "good": "done"}
    assert await fleet.submit(["good"]) == 0
    assert await fleet.submit(["refused", "good"]) == 1
    await fleet.work(client, until_done=True, **BEAT)
    assert [entry.state for entry in await collected(fleet)] == ["done", "done"]


async def test_submitting_takes_many_ids_from_any_source(fleet):
    """Ids come from an async iterable too, and become chunks of the size asked for."""

    async def source():
        for n in range(10_001):
            yield f"t{n}"

    assert await fleet.submit(source(), chunk=500) == 10_001
    status = await fleet.status()
    assert (status.tasks["waiting"], status.queued_chunks) == (10_001, 21)


async def test_an_invalid_id_closes_the_source(fleet):
    """A generator may hold a file open."""
    closed = []

    async def source():
        try:
            yield "good"
            yield ""
        finally:
            closed.append(True)

    with pytest.raises(ConfigurationError, match="blank"):
        await fleet.submit(source())
    assert closed


async def test_outcomes_come_while_workers_work(fleet, simulator, client):
    """The stream has an outcome long before the last task has ended."""
    simulator.add_task("slow", duration=1.5)
    await fleet.submit(["quick", "slow"])
    working = asyncio.create_task(fleet.work(client, until_done=True, **BEAT))
    async with contextlib.aclosing(fleet.outcomes()) as outcomes:
        first = await anext(outcomes)
        assert first.task_id == "quick"
        (worker,) = (await fleet.status()).workers
        assert worker.seconds_ago < 5
        assert [entry.task_id async for entry in outcomes] == ["slow"]
    await working


async def test_a_refused_key_ends_the_worker_and_not_the_tasks(fleet, simulator):
    """The worker raises; its chunk is back in the queue, for a worker with a better key."""
    await fleet.submit(["a", "b"])
    async with (
        Simulator(api_key="another", auto_create=True) as locked,
        KontextClient("secret-key", base_url=locked.base_url) as refused,
    ):
        with pytest.raises(AuthenticationError):
            await fleet.work(refused, **BEAT)
    status = await fleet.status()
    assert (status.tasks["waiting"], status.queued_chunks, status.running_chunks) == (2, 1, 0)


async def test_a_cancelled_worker_puts_its_chunks_back(fleet, simulator, client, monkeypatch):
    """Within seconds the chunk is free, the worker gone, and nothing runs."""
    monkeypatch.setattr("kontext_async.fleet.worker._GRACE", 0.2)
    simulator.add_task("slow", duration=600.0)
    await fleet.submit(["slow", "quick"])
    working = asyncio.create_task(fleet.work(client, **BEAT))
    async with contextlib.aclosing(fleet.outcomes()) as outcomes:
        assert (await anext(outcomes)).task_id == "quick"
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(working, 5)
    status = await fleet.status()
    assert (status.queued_chunks, status.running_chunks, status.workers) == (1, 0, ())
    assert status.tasks["waiting"] == 1


async def test_a_worker_saves_images_and_another_saves_what_it_left(
    fleet, simulator, client, tmp_path
):
    """A chunk whose tasks have ended without their images is worked on for the images alone."""
    await fleet.submit(["a", "b"])
    await fleet.work(client, until_done=True, **BEAT)  # as one that dies before it saves
    queue = fleet._database.app.configure_task("kontext_chunk", queue="kontext")
    await queue.defer_async(task_ids=["a", "b"])
    simulator.add_task("fails", outcome=Failure(400, "flagged"))
    await fleet.submit(["c", "fails"])
    polls = len([r for r in simulator.requests if r.task_id == "a"])
    async with ImageSaver(client, tmp_path / "images") as saver:
        await fleet.work(client, saver=saver, until_done=True, **BEAT)
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        entry.saved_path for entry in await collected(fleet) if entry.state == "done"
    }
    records = [r for r in simulator.requests if r.task_id == "a" and "record" in r.path]
    assert len(records) == polls


async def test_an_image_that_cannot_be_saved_has_its_error(fleet, simulator, client, tmp_path):
    """The task is done, and its entry says why there is no image."""
    await fleet.submit(["a"])
    async with ImageSaver(client, tmp_path, max_bytes=1) as saver:
        await fleet.work(client, saver=saver, until_done=True, **BEAT)
    (entry,) = await collected(fleet)
    assert (entry.state, entry.saved_path, entry.error_type) == ("done", None, "DownloadError")


async def test_the_first_outcome_of_a_task_stays(fleet, simulator, client):
    """A chunk that is worked on twice leaves the outcomes as they were."""
    await fleet.submit(["a"])
    await fleet.work(client, until_done=True, **BEAT)
    (before,) = await collected(fleet)
    queue = fleet._database.app.configure_task("kontext_chunk", queue="kontext")
    await queue.defer_async(task_ids=["a"])
    await fleet.work(client, until_done=True, **BEAT)
    assert await collected(fleet) == [before]


async def test_the_key_is_nowhere_in_the_database(postgres, dsn, simulator, client):
    """Ids, records and outcomes are there; the key and the password are not."""
    async with Fleet(dsn) as fleet:
        await fleet.init()
        await fleet.init()  # idempotent
        await fleet.submit(["a"])
        await fleet.work(client, until_done=True, **BEAT)
        tables = await fleet._database.fetch(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
        )
        assert len(tables) > 5
        for (table,) in tables:
            query = "SELECT query_to_xml('SELECT * FROM ' || %s, true, false, '')::text"
            ((text,),) = await fleet._database.fetch(query, (table,))
            assert "secret-key" not in text


async def test_a_database_without_tables_is_named(dsn, client):
    """Each call says which command makes the tables."""
    async with Fleet(dsn) as fleet:
        for call in (fleet.submit(["a"]), fleet.status(), fleet.work(client), collected(fleet)):
            with pytest.raises(FleetError, match="kontext fleet init") as caught:
                await call
            assert not caught.value.retryable


async def test_a_database_that_is_not_there_is_an_error(tmp_path):
    """Entering fails soon, and what it says holds no password."""
    fleet = Fleet(f"postgresql://user:hunter2@/fleet?host={tmp_path}")
    with pytest.raises(FleetError) as caught:
        await fleet.__aenter__()
    assert caught.value.retryable
    assert "hunter2" not in f"{caught.value} {fleet!r}"
    assert str(caught.value) == (
        f"cannot reach the database at {tmp_path}:5432: No such file or directory; "
        "check the connection string, and that PostgreSQL runs there"
    )


async def test_each_host_of_a_database_that_is_not_there_is_named():
    """The reasons of several are those of the last, once."""
    with pytest.raises(FleetError) as caught:
        await Fleet("postgresql://127.0.0.1:1,127.0.0.1:2/x").__aenter__()
    assert str(caught.value).startswith(
        "cannot reach the database at 127.0.0.1:1, 127.0.0.1:2: Connection refused; check"
    )


async def test_a_server_that_does_not_answer_is_an_error(monkeypatch):
    """The wait for it is bounded."""
    monkeypatch.setattr("kontext_async.fleet.database._CONNECT_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(FleetError, match=f":{port}: no answer in time; ") as caught:
            await Fleet(f"postgresql://127.0.0.1:{port}/x").__aenter__()
    assert caught.value.retryable


async def test_a_connection_that_is_being_made_can_be_cancelled():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        entering = Fleet(f"postgresql://127.0.0.1:{silent.getsockname()[1]}/x").__aenter__()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(entering, 0.1)


async def test_a_statement_that_the_database_refuses_is_an_error(fleet):
    """Its first line is enough, and trying again cannot help."""
    await fleet._database.fetch("ALTER TABLE kontext_tasks RENAME state TO stage")
    with pytest.raises(FleetError) as caught:
        await fleet.status()
    assert str(caught.value) == 'the database failed: column "state" does not exist'
    assert not caught.value.retryable


async def test_a_login_that_is_refused_is_not_tried_again(dsn):
    """The advice names what may be wrong: the user, the password, the database."""
    with pytest.raises(FleetError, match=r': database "nowhere" does not exist; .*~/\.pgpass') as e:
        await Fleet(make_conninfo(dsn, dbname="nowhere")).__aenter__()
    assert not e.value.retryable


@pytest.mark.parametrize("dsn", ["", "postgresql://user:hunter2@[host/x", "hunter2", 5])
def test_what_is_not_an_address_is_refused_without_being_shown(dsn):
    with pytest.raises(ConfigurationError) as caught:
        Fleet(dsn)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_arguments_are_checked(fleet, client):
    with pytest.raises(ConfigurationError, match="chunk"):
        await fleet.submit(["a"], chunk=0)
    with pytest.raises(ConfigurationError, match="max_chunks"):
        await fleet.work(client, max_chunks=True)
    with pytest.raises(ConfigurationError, match="heartbeat"):
        await fleet.work(client, heartbeat=0)
    with pytest.raises(ConfigurationError, match="single string"):
        await fleet.submit("abc")
    with pytest.raises(ConfigurationError):
        await fleet.submit([" "])
    closed = Fleet("dbname=x")
    await closed.aclose()
    for call in (closed.init(), closed.submit(["a"]), closed.work(client), collected(closed)):
        with pytest.raises(ClientStateError):
            await call


async def test_outcomes_that_the_table_refuses_end_the_chunk(fleet, simulator, client, caplog):
    """The chunk goes back to the queue, to be tried again a little later, with a warning."""
    await fleet.submit(["a"])
    await fleet._database.fetch("ALTER TABLE kontext_tasks ADD CHECK (state = 'waiting')")
    working = asyncio.create_task(fleet.work(client, **BEAT))
    tried = []
    while not tried:  # only the database knows
        await asyncio.sleep(0.05)
        tried = await fleet._database.fetch(
            "SELECT scheduled_at > now() FROM procrastinate_jobs WHERE attempts > 0"
        )
    assert tried == [(True,)]
    assert "failed, again in 10 s: FleetError: outcomes cannot be written: new row" in caplog.text
    assert "DETAIL" not in caplog.text  # it has the row
    working.cancel()
    await asyncio.wait({working})
    assert (await fleet.status()).tasks["waiting"] == 1


def fail_once(monkeypatch, owner, name, error):
    """Let a method raise at its first call, as where the database is away for a moment."""
    real, failed = getattr(owner, name), []

    async def method(*arguments, **keywords):
        if not failed:
            failed.append(True)
            raise error
        return await real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (App, "run_worker_async", ConnectorException()),
        (OutcomeWriter, "_insert", psycopg.OperationalError()),
        (Worker, "_sweep", TimeoutError()),
        (Database, "connect", psycopg.OperationalError()),
    ],
)
async def test_what_a_moment_without_the_database_interrupts_goes_on(
    fleet, client, monkeypatch, caplog, owner, name, error
):
    """The engine, the journal, the heartbeat and the reader each try again, and say so."""
    caplog.set_level("INFO", "kontext_async")
    await fleet.submit(["a"])
    fail_once(monkeypatch, owner, name, error)
    working = asyncio.create_task(fleet.work(client, until_done=True, **BEAT))
    assert [entry.task_id for entry in await collected(fleet)] == ["a"]
    await working
    assert "is away, trying again: " in caplog.text
    assert "the database is back after" in caplog.text


async def test_the_chunks_of_the_dead_are_put_back_by_one_worker_at_a_time(fleet, client):
    """While another sweeps, a worker leaves it alone."""
    await fleet.submit(["a"])
    await fleet._database.fetch("UPDATE procrastinate_jobs SET status = 'doing'")  # by nobody
    async with fleet._database.connection() as other:
        async with other.transaction():
            await other.execute("SELECT pg_advisory_xact_lock(%s)", (_SWEEP_LOCK,))
            working = asyncio.create_task(fleet.work(client, until_done=True, **BEAT))
            await asyncio.sleep(0.7)
            assert (await fleet.status()).running_chunks == 1
        await working
    assert [entry.state for entry in await collected(fleet)] == ["done"]


async def test_a_worker_that_cannot_show_that_it_lives_ends(fleet, client):
    """It would be taken for dead; the error says what to do."""
    await fleet._database.fetch("DROP TABLE kontext_workers")
    with pytest.raises(FleetError, match="kontext fleet init"):
        await fleet.work(client, **BEAT)


async def test_a_writer_that_ends_gives_up_what_is_not_written(fleet):
    """Nobody waits for it for ever; the tasks are waited for again later."""
    writer = OutcomeWriter(fleet._database)
    first = writer.write(ErrorOutcome(task_id="a", error=KontextError("x")))
    writing = asyncio.create_task(writer.run())
    await writer.flush()
    assert first.result() is None
    second = writer.write(ErrorOutcome(task_id="b", error=KontextError("x")))
    writing.cancel()
    await asyncio.wait({writing})
    assert second.cancelled()


async def test_a_second_outcome_of_a_task_changes_nothing(fleet):
    """Two workers may wait for the same task at once, where one was taken for dead."""
    await fleet.submit(["a"])
    writer = OutcomeWriter(fleet._database)
    writing = asyncio.create_task(writer.run())
    for message in ("first", "second"):
        await writer.write(ErrorOutcome(task_id="a", error=KontextError(message)))
    writing.cancel()
    await asyncio.wait({writing})
    (entry,) = await collected(fleet)
    assert (entry.error_message, entry.attempts) == ("first", 1)


async def test_a_second_worker_begins_with_what_the_first_has_learned(fleet, simulator):
    """It polls its tasks less often than one that knows nothing."""

    async def polls(prefix):
        for n in range(10):
            simulator.add_task(f"{prefix}{n}", duration=3.0)
        often = DurationModel(cost_per_request=0.02)
        async with KontextClient("key", base_url=simulator.base_url, durations=often) as client:
            if prefix == "alone":
                await client.wait_for_results([f"alone{n}" for n in range(10)])
            else:
                await fleet.submit([f"second{n}" for n in range(10)])
                await fleet.work(client, until_done=True, **BEAT)
            return client.stats.requests

    for n in range(200):
        simulator.add_task(f"first{n}", duration=3.0, age=60.0)
    await fleet.submit([f"first{n}" for n in range(200)])
    async with KontextClient("key", base_url=simulator.base_url) as client:
        await fleet.work(client, until_done=True, **BEAT)
    alone, second = await asyncio.gather(polls("alone"), polls("second"))
    assert second < 0.75 * alone


@pytest.mark.parametrize("text", ["", "{}", '{"version": 99}', "[" * 2000])
async def test_durations_that_cannot_be_read_are_ignored_and_replaced(fleet, client, text):
    """Payloads that another release or program has written stop no worker."""
    write = "INSERT INTO kontext_durations (model) VALUES (%s)"
    await fleet._database.fetch(write, (text,))
    await fleet.submit(["a"])
    await fleet.work(client, until_done=True, **BEAT)
    ((stored,),) = await fleet._database.fetch("SELECT model FROM kontext_durations")
    assert stored == client.durations.to_json()


async def test_workers_merge_their_durations_into_one_row(fleet):
    """At the same time too: none is lost, and the row stays one of one model's size."""
    models = [DurationModel() for _ in range(4)]
    for n, model in enumerate(models):
        for k in range(20):
            model.observe(f"t{k}", 10.0 * (n + 1), 10.0 * (n + 1))
    await asyncio.gather(*(SharedDurations(fleet._database, model).save() for model in models))
    ((stored,),) = await fleet._database.fetch("SELECT model FROM kontext_durations")
    known = DurationModel()
    await SharedDurations(fleet._database, known).load()
    assert known.to_json() == stored
    ended = json.loads(stored)["ended"]
    assert [n for n in range(4) if ended[bisect_left(_EDGES, 10.0 * (n + 1)) - 1]] == [0, 1, 2, 3]


async def test_a_worker_that_has_learned_nothing_writes_nothing(fleet, client):
    """A model that is as it was loaded or saved is not written again."""
    shared = SharedDurations(fleet._database, client.durations)
    client.durations.observe("a", 5.0, 5.0)
    await shared.save()
    stamp = await fleet._database.fetch("SELECT updated_at FROM kontext_durations")
    await shared.save()
    again = SharedDurations(fleet._database, DurationModel())
    await again.load()
    await again.save()
    assert await fleet._database.fetch("SELECT updated_at FROM kontext_durations") == stamp


async def made_old(fleet, days, where):
    await fleet._database.fetch(
        f"UPDATE kontext_tasks SET updated_at = now() - interval '{days} days' WHERE {where}"
    )


async def test_old_outcomes_are_deleted_and_their_ids_are_new_again(fleet, client, monkeypatch):
    """Page by page; young outcomes and tasks without one stay."""
    monkeypatch.setattr("kontext_async.fleet.fleet._PAGE", 3)
    await fleet.submit([f"t{n}" for n in range(12)])
    await fleet.work(client, until_done=True, **BEAT)
    await fleet.submit(["waiting"])
    await made_old(fleet, 31, "position <= 8 OR state = 'waiting'")
    await made_old(fleet, 29, "position = 3")
    assert await fleet.prune(older_than=30 * 86400.0) == 7
    assert await fleet.prune(older_than=30 * 86400.0) == 0
    status = await fleet.status()
    assert (status.tasks["done"], status.tasks["waiting"]) == (5, 1)
    assert await fleet.submit([f"t{n}" for n in range(12)]) == 7


async def test_deleting_waits_for_nobody(fleet, client):
    """An outcome that another transaction is changing stays until the next time."""
    await fleet.submit(["a", "b"])
    await fleet.work(client, until_done=True, **BEAT)
    async with fleet._database.connection() as other, other.transaction():
        await other.execute("SELECT 1 FROM kontext_tasks WHERE task_id = 'a' FOR UPDATE")
        assert await asyncio.wait_for(fleet.prune(older_than=0), 5) == 1
    assert await fleet.prune(older_than=0) == 1


@pytest.mark.parametrize("older_than", [-1, "7d"])
async def test_deleting_needs_an_age(fleet, older_than):
    with pytest.raises(ConfigurationError, match="older_than"):
        await fleet.prune(older_than=older_than)


async def test_nothing_of_ended_chunks_stays_in_the_queue(fleet, simulator, client):
    """The engine's tables do not grow with the tasks; only outcomes have to be deleted."""
    simulator.add_task("fails", outcome=Failure(400, "flagged"))
    await fleet.submit(["fails", *(f"t{n}" for n in range(20))], chunk=3)
    await fleet.work(client, until_done=True, **BEAT)
    for table in ("jobs", "events", "workers"):
        assert await fleet._database.fetch(f"SELECT 1 FROM procrastinate_{table}") == []
