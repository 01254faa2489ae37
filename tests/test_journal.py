"""The ledger as a batch's journal: each outcome is on disk first, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections import Counter

import pytest
from client_world import error_of, make_client
from counted import Counted, CountedAsync, raising, raising_async
from ledger_world import (
    AT_ONCE,
    SOON,
    assert_nothing_left,
    busy_disk,
    collected,
    entries,
    errors,
    fill_disk,
    ours_running,
    run,
    states,
    until,
)

from kontext_async import (
    AuthenticationError,
    ClientStateError,
    ConfigurationError,
    GenerationFailedError,
    WaitTimeoutError,
)
from kontext_async.results import Ledger, LedgerError
from kontext_async.simulator import Simulator


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
async def client(simulator, path):
    """Yield a client that must be idle at the end of the test, while it is still open."""
    async with make_client(simulator) as client:
        yield client
        await assert_nothing_left(path.parent, client)


@pytest.fixture
async def ledger(path, client):
    async with Ledger(path) as ledger:
        yield ledger


def tasks(simulator, count, duration=0.0, *, name="task"):
    return [simulator.add_task(f"{name}{n}", duration=duration) for n in range(count)]


def polled(simulator):
    """Return the ids of all polls so far, in order."""
    return [request.task_id for request in simulator.requests]


class QuickAsync(CountedAsync):
    """One that cleans up quickly, because these tests run in real time."""

    cleanup = 0.02


BOTH = pytest.mark.parametrize("source", [Counted, QuickAsync])


# Each outcome is on disk first


async def test_an_outcome_that_is_handed_on_is_on_disk(ledger, client, simulator, path):
    """A reader of the ledger finds it, however the task ended."""
    simulator.add_task("bad", script=["failed"])
    simulator.add_task("endless", duration=math.inf)
    ids = [*tasks(simulator, 5, 0.03), "bad", "endless", "unknown"]
    keywords = {"timeout": 0.1, "not_found_grace": 0}
    states_of = {
        type(None): "done",
        GenerationFailedError: "failed",
        WaitTimeoutError: "unfinished",
    }
    async with ledger.as_completed(client, ids, wait=SOON, **keywords) as outcomes:
        async for outcome in outcomes:
            entry = entries(path)[outcome.task_id]
            assert entry.state == states_of.get(type(outcome.error), "error")
            assert (entry.record is None) == (outcome.task_id == "unknown")
            ids.remove(outcome.task_id)
    assert not ids


async def test_a_long_source_yields_to_the_loop(ledger, client, simulator):
    """Even if it has only ids that are known."""
    await collected(ledger, client, ids := tasks(simulator, 3))
    turn, read = 0, Counter()

    async def tick():
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    def source():
        for task_id in ids * 1000:
            read[turn] += 1
            yield task_id

    ticking = asyncio.create_task(tick())
    assert sorted(await collected(ledger, client, source())) == ids
    ticking.cancel()
    assert max(read.values()) <= 500


@pytest.mark.parametrize(
    ("source", "keywords"),
    [
        ("task12345", {}),
        (5, {}),
        ([], {"max_in_flight": 0}),
        ([], {"batch_timeout": -1}),
        ([], {"timeout": math.nan}),
        ([], {"on_event": asyncio.sleep}),
    ],
)
async def test_arguments_that_the_client_refuses_are_refused_at_once(
    ledger, client, source, keywords
):
    """Before anything is read or recorded."""
    with pytest.raises(ConfigurationError):
        ledger.as_completed(client, source, **keywords)


# Room


@BOTH
async def test_no_more_ids_are_read_than_there_is_room_for(ledger, client, simulator, source):
    """Waits count, and outcomes that are not taken, recalled or new."""
    old, new = tasks(simulator, 3), tasks(simulator, 9, name="new")
    await collected(ledger, client, old)
    ids = source(itertools.chain.from_iterable(zip(old, new, strict=False)))
    async with ledger.as_completed(client, ids, max_in_flight=2) as outcomes:
        for taken in range(1, 6):
            await asyncio.sleep(0.06)
            assert ids.read == taken + 1
            await anext(outcomes)


@pytest.mark.parametrize("room", [1, 2, 3])
async def test_a_batch_larger_than_its_room_has_every_outcome(client, simulator, path, room):
    """In any order of recalled, new and invalid ids."""
    old, new = tasks(simulator, 8), tasks(simulator, 12, 0.02, name="new")
    await run(path, client, old)
    ids = ["new0", "task0", "new1", "new2", " ", "task1", *new[3:7], *old[2:6], *new[7:], *old[6:]]
    async with asyncio.timeout(5):
        assert sorted(await run(path, client, ids, max_in_flight=room)) == sorted(ids)


# The batch's time


@BOTH
@pytest.mark.parametrize("limit", [0, 0.1])
async def test_at_the_batchs_deadline_the_ids_that_were_read_have_outcomes(
    client, simulator, path, source, limit
):
    """Earlier results remain; the other tasks are waited for in the next run."""
    ids = [*tasks(simulator, 2), *tasks(simulator, 6, math.inf, name="endless")]
    ids = source([*ids, " "])
    found = await run(path, client, ids, batch_timeout=limit, max_in_flight=5)
    late = set(found) - {"task0", "task1", " "}
    assert all(errors(found)[task_id] is WaitTimeoutError for task_id in late)
    assert all(states(path)[task_id] == "unfinished" for task_id in late)
    if source is Counted:
        assert len(found) == 9
        assert isinstance(found[" "].error, ConfigurationError)
        unasked = [found[name].error for name in late if not found[name].error.polls]
        assert all(limit <= error.elapsed < limit + 5 for error in unasked)
    assert len(states(path)) == len(set(found) - {" "})


async def test_known_ids_are_read_with_room_after_the_deadline(ledger, client, simulator):
    """All have their outcomes, but only as they are taken."""
    await collected(ledger, client, ids := tasks(simulator, 10))
    source = Counted(ids)
    async with ledger.as_completed(client, source, max_in_flight=2, batch_timeout=0) as outcomes:
        await asyncio.sleep(0.06)
        assert source.read == 2
        assert sorted([outcome.task_id async for outcome in outcomes]) == ids


# Each task on its own


@pytest.mark.parametrize("bad", ["", " ", "a\0b", "\ud800", "a\nb", None, 5, 10**400, ["task0"]])
async def test_an_invalid_id_has_an_outcome_and_is_not_recorded(client, simulator, path, bad):
    """It has a `ConfigurationError`; the others go on."""
    ids = tasks(simulator, 2)
    found = await run(path, client, [ids[0], bad, ids[1]])
    assert len(found) == 3
    assert [type(o.error) for name, o in found.items() if name not in ids] == [ConfigurationError]
    assert states(path) == dict.fromkeys(ids, "done")


async def test_a_refused_key_is_recorded_for_all_that_remain(path):
    """Earlier results remain; the others are errors, and are waited for in the next run."""
    async with Simulator() as simulator, make_client(simulator) as client:
        ids = tasks(simulator, 9, 0.05)
        await run(path, client, ids[:2])
        simulator._api_key = "another"
        found = await run(path, client, ids, max_in_flight=2)
        assert errors(found) == {
            **dict.fromkeys(ids[:2], type(None)),
            **dict.fromkeys(ids[2:], AuthenticationError),
        }
        assert states(path) == {
            **dict.fromkeys(ids[:2], "done"),
            **dict.fromkeys(ids[2:], "error"),
        }
        simulator._api_key = None
        assert set(errors(await run(path, client, ids)).values()) == {type(None)}


@contextlib.contextmanager
def busy_disk_from_the_first_poll(ledger):
    """Yield an ``on_event`` that blocks the disk, and a function that frees it."""
    with contextlib.ExitStack() as stack:
        yield lambda event: stack.enter_context(busy_disk(ledger._store)), stack.close


# What ends a batch


class CallersError(Exception):
    """An exception of the caller's own code."""


@pytest.mark.parametrize("source", [raising, raising_async])
@pytest.mark.parametrize("error", [CallersError(), asyncio.CancelledError()], ids=repr)
async def test_an_exception_of_the_source_ends_the_batch(
    ledger, client, simulator, path, source, error
):
    """The ids remain in the ledger as waiting."""
    ids = tasks(simulator, 3, math.inf)
    async with asyncio.timeout(5), ledger.as_completed(client, source(error, ids)) as outcomes:
        with pytest.raises(type(error)):
            await anext(outcomes)
        await error_of(anext(outcomes), StopAsyncIteration)
    await until(lambda: states(path) == dict.fromkeys(ids, "waiting"))
    assert not ours_running()


async def test_an_outcome_recorded_after_the_error_is_not_handed_on(
    ledger, client, simulator, path
):
    """The next run has it."""
    (task_id,) = tasks(simulator, 1)

    async def source():
        yield task_id
        await until(lambda: simulator.requests and not client.stats.waits)
        raise CallersError

    with busy_disk_from_the_first_poll(ledger) as (on_event, free):
        async with ledger.as_completed(client, source(), on_event=on_event) as outcomes:
            await error_of(anext(outcomes), CallersError)
            free()
            await until(lambda: states(path) == {task_id: "done"})
            await asyncio.sleep(0)
            await error_of(anext(outcomes), StopAsyncIteration)
            await error_of(anext(outcomes), StopAsyncIteration)


@BOTH
async def test_a_full_disk_ends_the_batch_and_the_ledger_stays_readable(path, source):
    """Outcomes that were handed on are there, and with space again a run continues."""
    async with Simulator() as simulator, make_client(simulator) as client:
        ids = [simulator.add_task(params={"prompt": "p" * 5000}, duration=0) for _ in range(40)]
        source = source(ids)
        taken = []

        async def fill_on_the_way():
            async with Ledger(path) as ledger:
                stream = ledger.as_completed(client, source, max_in_flight=4, **AT_ONCE)
                async with stream as outcomes:
                    async for outcome in outcomes:
                        taken.append(outcome.task_id)
                        if len(taken) == 5:
                            fill_disk(ledger._store)

        assert "the disk is full" in str(await error_of(fill_on_the_way(), LedgerError))
        assert getattr(source, "closed", True)
        await assert_nothing_left(path.parent, client)
        done = [name for name, state in states(path).items() if state == "done"]
        assert len(taken) < 40
        assert set(taken) <= set(done)
        before = len(simulator.requests)
        assert sorted(await run(path, client, ids)) == sorted(ids)
        assert not set(polled(simulator)[before:]) & set(done)


@pytest.mark.parametrize("known", [False, True])
async def test_a_full_disk_when_a_wait_begins_ends_the_batch(path, simulator, client, known):
    """Also for an id whose outcome would come from the ledger in the same transaction."""
    task_id = simulator.add_task("old", duration=0)
    await run(path, client, [task_id])
    ids = ["new" * 3000, *(["old"] if known else [])]
    with contextlib.suppress(LedgerError):
        async with Ledger(path) as ledger:
            fill_disk(ledger._store)
            assert "full" in str(await error_of(collected(ledger, client, ids), LedgerError))


# Ends before the end


async def exhaust(stream):
    async for _ in stream:
        pass


async def leave(stream, ledger, client):
    await stream.aclose()


async def close_ledger(stream, ledger, client):
    await ledger.aclose()
    await error_of(exhaust(stream), ClientStateError)


async def close_client(stream, ledger, client):
    await client.aclose()
    await error_of(exhaust(stream), ClientStateError)


async def cancel(stream, ledger, client):
    consumer = asyncio.create_task(exhaust(stream))
    await asyncio.sleep(0)
    consumer.cancel()
    await error_of(consumer, asyncio.CancelledError)
    await stream.aclose()


async def fail(stream, ledger, client):
    with contextlib.suppress(CallersError):
        async with stream:
            raise CallersError


@BOTH
@pytest.mark.parametrize("end", [leave, close_ledger, close_client, cancel, fail])
@pytest.mark.parametrize("pause", [0, 0.03])
async def test_a_batch_that_ends_early_leaves_nothing(client, simulator, path, source, end, pause):
    """The source is closed, the outcomes handed on are recorded, and no request comes later."""
    source = source([*tasks(simulator, 2), *tasks(simulator, 9, math.inf, name="endless")])
    async with Ledger(path) as ledger:
        stream = ledger.as_completed(client, source, wait=SOON, max_in_flight=5)
        async with stream as outcomes:
            taken = {(await anext(outcomes)).task_id}
            await asyncio.sleep(pause)
            await end(stream, ledger, client)
            await until(lambda: not ours_running())
            assert end is close_client or getattr(source, "closed", True)
        await error_of(anext(stream), StopAsyncIteration)
    await assert_nothing_left(path.parent, client)
    found = states(path)
    assert all(found[task_id] == "done" for task_id in taken)
    left = {found[name] for name in found if name.startswith("endless")}
    assert left <= {"waiting", "unfinished"}
    before = len(simulator.requests)
    await asyncio.sleep(0.05)
    assert len(simulator.requests) == before


async def test_closing_the_ledger_ends_an_iteration_that_waits(client, simulator, path):
    """At once, and not when a task ends."""
    async with Ledger(path) as ledger:
        ids = tasks(simulator, 2, math.inf)
        consumer = asyncio.create_task(collected(ledger, client, ids))
        await asyncio.sleep(0.03)
        await ledger.aclose()
        assert "it was closed" in str(await error_of(consumer, ClientStateError))


async def test_a_ledger_that_is_not_open_raises(client, simulator, path):
    """Before it is opened, and after it is closed."""
    ledger = Ledger(path)
    ids = tasks(simulator, 1)
    assert "it is closed" in str(await error_of(collected(ledger, client, ids), ClientStateError))
    async with ledger:
        pass
    assert "it is closed" in str(await error_of(collected(ledger, client, ids), ClientStateError))


async def test_closing_the_ledger_does_not_affect_a_batch_that_has_ended(client, simulator, path):
    """Nor one that has not begun."""
    async with Ledger(path) as ledger:
        never = ledger.as_completed(client, ["a"])
        over = ledger.as_completed(client, tasks(simulator, 1))
        assert [outcome.task_id async for outcome in over] == ["task0"]
    await error_of(anext(over), StopAsyncIteration)
    await never.aclose()
    async with never as outcomes:
        assert [outcome async for outcome in outcomes] == []


async def test_a_client_may_be_closed_when_every_outcome_is_taken(ledger, simulator):
    """Before the iteration has reached its end."""
    async with make_client(simulator) as client:
        stream = ledger.as_completed(client, tasks(simulator, 2), max_in_flight=1)
        async with stream as outcomes:
            for _ in range(2):
                await anext(outcomes)
            await client.aclose()
            await error_of(anext(outcomes), StopAsyncIteration)


async def test_closing_the_stream_ends_an_iteration_that_waits_for_the_disk(
    ledger, client, simulator
):
    """Though every task has ended."""
    with busy_disk_from_the_first_poll(ledger) as (on_event, _):
        stream = ledger.as_completed(client, tasks(simulator, 1), on_event=on_event)
        waiting = asyncio.create_task(exhaust(stream))
        await until(lambda: simulator.requests and not ours_running())
        assert not waiting.done()
        await stream.aclose()
        await asyncio.wait_for(waiting, 5)


async def test_two_batches_may_share_a_ledger(ledger, client, simulator, path):
    """Each has its own outcomes; a task of both is recorded for both."""
    ids = tasks(simulator, 6, 0.02)
    one, other = await asyncio.gather(
        collected(ledger, client, ids[:4]), collected(ledger, client, ids[2:])
    )
    assert (sorted(one), sorted(other)) == (ids[:4], ids[2:])
    assert states(path) == dict.fromkeys(ids, "done")
