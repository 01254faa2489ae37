"""A batch through the ledger: each outcome is on disk first, and at its end nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import threading
from collections import Counter

import pytest
from counted import Counted
from ledger_world import (
    AT_ONCE,
    SOON,
    assert_nothing_left,
    busy_disk,
    collected,
    entries,
    error_of,
    errors,
    fill_disk,
    make_client,
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
    ServerError,
    WaitTimeoutError,
)
from kontext_async.results import Ledger, LedgerError
from kontext_async.simulator import Simulator


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
async def simulator():
    async with Simulator() as simulator:
        yield simulator


@pytest.fixture
async def client(simulator, path):
    """A client that at the end of the test, still open, must have nothing under way."""
    async with make_client(simulator) as client:
        yield client
        await assert_nothing_left(path.parent, client)


@pytest.fixture
async def ledger(path, client):
    async with Ledger(path) as ledger:
        yield ledger


def tasks(simulator, count, duration=0.0, *, name="task"):
    return [simulator.add_task(f"{name}{n}", duration=duration) for n in range(count)]


def asked(simulator):
    """The ids of all looks so far, in order."""
    return [request.task_id for request in simulator.requests]


class CountedAsync(Counted):
    """The same, as an asynchronous one; it takes its time to clean up."""

    closed = False

    async def __aiter__(self):
        try:
            for task_id in self.ids:
                self.read += 1
                yield task_id
        finally:
            await asyncio.sleep(0.02)
            self.closed = True


class Cursor:
    """An asynchronous iterator that is no generator."""

    def __init__(self, task_ids):
        self.ids = iter(task_ids)

    def __aiter__(self):
        return self

    async def __anext__(self):
        for task_id in self.ids:
            return task_id
        raise StopAsyncIteration


async def then_silent(task_ids):
    """Gives its ids, and then neither another nor an end."""
    for task_id in task_ids:
        yield task_id
    await asyncio.get_running_loop().create_future()


BOTH = pytest.mark.parametrize("source", [Counted, CountedAsync])


# Each outcome is on disk first


async def test_what_is_handed_on_is_on_disk(ledger, client, simulator, path):
    """Whoever reads the ledger then finds it, however the task ended."""
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


async def test_what_is_recalled_equals_what_was_handed_on(client, simulator, path):
    """Results with all their fields, failures with all of theirs."""
    ids = [*tasks(simulator, 2), simulator.add_task("bad", script=["failed_flagged"])]
    first = await run(path, client, ids)
    again = await run(path, client, ids)
    assert [first[name].result for name in ids] == [again[name].result for name in ids]
    bad, bad_again = first["bad"].error, again["bad"].error
    assert bad_again.__reduce__() == bad.__reduce__()
    assert asked(simulator).count("bad") == 1


async def test_outcomes_come_as_tasks_end(ledger, client, simulator):
    """Not in the order of the ids."""
    for name, duration in {"slow": 0.4, "fast": 0.0, "medium": 0.2}.items():
        simulator.add_task(name, duration=duration)
    found = await collected(ledger, client, ["slow", "fast", "medium"])
    assert list(found) == ["fast", "medium", "slow"]


@pytest.mark.parametrize("kind", [list, set, dict.fromkeys, iter, CountedAsync, Cursor])
async def test_ids_may_come_from_any_iterable(ledger, client, simulator, kind):
    """Asynchronous or not; an id that comes twice is asked about and handed on once."""
    ids = tasks(simulator, 3)
    assert sorted(await collected(ledger, client, kind(ids + ids))) == ids
    assert sorted(asked(simulator)) == ids


async def test_a_long_list_of_what_is_known_leaves_the_loop_air(ledger, client, simulator):
    """It is read in pieces."""
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


async def test_no_ids_give_no_outcomes(ledger, client, simulator):
    """Without a request."""
    assert await collected(ledger, client, []) == {}
    assert await collected(ledger, client, Cursor([])) == {}
    assert not simulator.requests


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
async def test_what_the_client_refuses_is_refused_at_once(ledger, client, source, keywords):
    """Before anything is read or put down."""
    with pytest.raises(ConfigurationError):
        ledger.as_completed(client, source, **keywords)


# Room


@BOTH
async def test_no_more_ids_are_read_than_there_is_room_for(ledger, client, simulator, source):
    """Waits count, and outcomes that are not taken, be they recalled or new."""
    old, new = tasks(simulator, 3), tasks(simulator, 9, name="new")
    await collected(ledger, client, old)
    ids = source(itertools.chain.from_iterable(zip(old, new, strict=False)))
    async with ledger.as_completed(client, ids, max_in_flight=2) as outcomes:
        for taken in range(1, 6):
            await asyncio.sleep(0.06)
            assert ids.read == taken + 1
            await anext(outcomes)


@pytest.mark.parametrize("room", [1, 2, 3])
async def test_a_batch_larger_than_its_room_is_answered_whole(client, simulator, path, room):
    """In whatever order what is recalled, what is new and what is no id come."""
    old, new = tasks(simulator, 8), tasks(simulator, 12, 0.02, name="new")
    await run(path, client, old)
    ids = ["new0", "task0", "new1", "new2", " ", "task1", *new[3:7], *old[2:6], *new[7:], *old[6:]]
    async with asyncio.timeout(5):
        assert sorted(await run(path, client, ids, max_in_flight=room)) == sorted(ids)


# The batch's time


@BOTH
@pytest.mark.parametrize("limit", [0, 0.1])
async def test_when_the_batchs_time_is_over_what_is_read_has_its_outcome(
    client, simulator, path, source, limit
):
    """What was won is kept; what was not may be tried again."""
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


async def test_a_source_that_falls_silent_does_not_outlast_the_batch(ledger, client, simulator):
    """It is read no longer."""
    ids = tasks(simulator, 2)
    found = await collected(ledger, client, then_silent(ids), batch_timeout=0.1)
    assert sorted(found) == ids


async def test_what_is_known_is_read_with_room_when_the_time_is_over(ledger, client, simulator):
    """All of it has its outcome, but only as it is taken."""
    await collected(ledger, client, ids := tasks(simulator, 10))
    source = Counted(ids)
    async with ledger.as_completed(client, source, max_in_flight=2, batch_timeout=0) as outcomes:
        await asyncio.sleep(0.06)
        assert source.read == 2
        assert sorted([outcome.task_id async for outcome in outcomes]) == ids


# One task harms no other


@pytest.mark.parametrize("bad", ["", " ", "a\0b", "\ud800", "a\nb", None, 5, 10**400, ["task0"]])
async def test_what_is_no_id_has_its_outcome_and_is_not_put_down(client, simulator, path, bad):
    """A `ConfigurationError` of its own; the others go on."""
    ids = tasks(simulator, 2)
    found = await run(path, client, [ids[0], bad, ids[1]])
    assert len(found) == 3
    assert [type(o.error) for name, o in found.items() if name not in ids] == [ConfigurationError]
    assert states(path) == dict.fromkeys(ids, "done")


async def test_a_refused_key_is_the_outcome_of_all_the_rest(path):
    """What was won before is kept; the rest is an error, to be tried again."""
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
    """An ``on_event`` that lets nothing get to the disk, and the function that ends this."""
    with contextlib.ExitStack() as stack:
        yield lambda event: stack.enter_context(busy_disk(ledger._store)), stack.close


# What ends a batch


class CallersError(Exception):
    """An exception of the caller's own code."""


def raising(error, task_ids):
    yield from task_ids
    raise error


async def raising_later(error, task_ids):
    for task_id in task_ids:
        yield task_id
    raise error


@pytest.mark.parametrize("source", [raising, raising_later])
@pytest.mark.parametrize("error", [CallersError(), asyncio.CancelledError()], ids=repr)
async def test_an_exception_of_the_source_ends_the_batch(
    ledger, client, simulator, path, source, error
):
    """It reaches the consumer; afterwards there is nothing more, and nothing left."""
    ids = tasks(simulator, 3, math.inf)
    async with asyncio.timeout(5), ledger.as_completed(client, source(error, ids)) as outcomes:
        with pytest.raises(type(error)):
            await anext(outcomes)
        await error_of(anext(outcomes), StopAsyncIteration)
    await until(lambda: states(path) == dict.fromkeys(ids, "waiting"))
    assert not ours_running()


async def test_what_is_recorded_after_the_error_is_not_handed_on(ledger, client, simulator, path):
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


async def test_an_exception_of_a_source_read_after_the_batchs_time_is_told_too(ledger, client):
    """Though nothing is waited for any more."""
    source = raising(CallersError(), ["a", "b"])
    await error_of(
        collected(ledger, client, source, batch_timeout=0, max_in_flight=1), CallersError
    )


async def test_an_exception_of_the_callback_ends_the_batch(ledger, client, simulator):
    """Unchanged."""

    def on_event(event):
        raise CallersError

    await error_of(collected(ledger, client, tasks(simulator, 3), on_event=on_event), CallersError)


@BOTH
async def test_a_full_disk_ends_the_batch_and_the_ledger_stays_readable(path, source):
    """With a clear error; what was handed on is there, and with room again a run goes on."""
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
        assert not set(asked(simulator)[before:]) & set(done)


@pytest.mark.parametrize("known", [False, True])
async def test_a_full_disk_when_an_id_is_taken_up_ends_the_batch(path, simulator, client, known):
    """Also where its outcome would come from the ledger, which is written to in the same go."""
    task_id = simulator.add_task("old", duration=0)
    await run(path, client, [task_id])
    ids = ["new" * 3000, *(["old"] if known else [])]
    with contextlib.suppress(LedgerError):
        async with Ledger(path) as ledger:
            fill_disk(ledger._store)
            assert "full" in str(await error_of(collected(ledger, client, ids), LedgerError))


# What leaves nothing behind


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
async def test_a_batch_that_ends_before_its_time_leaves_nothing(
    client, simulator, path, source, end, pause
):
    """The source is closed, and what had been handed on is recorded; no request comes later."""
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


async def test_a_consumer_that_waits_is_told_that_the_ledger_was_closed(client, simulator, path):
    """At once, and not when a task ends."""
    async with Ledger(path) as ledger:
        ids = tasks(simulator, 2, math.inf)
        consumer = asyncio.create_task(collected(ledger, client, ids))
        await asyncio.sleep(0.03)
        await ledger.aclose()
        assert "it was closed" in str(await error_of(consumer, ClientStateError))


async def test_a_closed_ledger_records_no_batch(client, simulator, path):
    """Nor does one that was not opened."""
    ledger = Ledger(path)
    ids = tasks(simulator, 1)
    assert "it is closed" in str(await error_of(collected(ledger, client, ids), ClientStateError))
    async with ledger:
        pass
    assert "it is closed" in str(await error_of(collected(ledger, client, ids), ClientStateError))


async def test_a_batch_that_ended_is_not_concerned_when_the_ledger_closes(client, simulator, path):
    """Nor one that was never begun."""
    async with Ledger(path) as ledger:
        never = ledger.as_completed(client, ["a"])
        over = ledger.as_completed(client, tasks(simulator, 1))
        assert [outcome.task_id async for outcome in over] == ["task0"]
    await error_of(anext(over), StopAsyncIteration)
    await never.aclose()
    async with never as outcomes:
        assert [outcome async for outcome in outcomes] == []


async def test_a_client_may_be_closed_when_all_is_taken(ledger, simulator):
    """Before the end has been seen."""
    async with make_client(simulator) as client:
        stream = ledger.as_completed(client, tasks(simulator, 2), max_in_flight=1)
        async with stream as outcomes:
            for _ in range(2):
                await anext(outcomes)
            await client.aclose()
            await error_of(anext(outcomes), StopAsyncIteration)


def drop_in_a_thread(holder):
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()


@pytest.mark.parametrize("drop", [list.clear, drop_in_a_thread])
async def test_one_that_is_dropped_unfinished_warns_and_ends(ledger, client, simulator, drop):
    """Wherever it is collected; one that is exhausted, closed or not begun does not."""
    ids = tasks(simulator, 2, math.inf)
    ledger.as_completed(client, ids)
    holder = [ledger.as_completed(client, ids)]
    await holder[0].__aenter__()
    await asyncio.sleep(0.02)
    with pytest.warns(ResourceWarning, match="dropped before its end"):
        drop(holder)
    await until(lambda: not ours_running())


def test_one_that_is_dropped_after_its_loop_only_warns(path):
    """There is nothing left to end."""

    async def begin():
        async with Simulator() as simulator, make_client(simulator) as client:
            ledger = Ledger(path)
            await ledger.__aenter__()
            stream = ledger.as_completed(client, tasks(simulator, 2, 0.0), **AT_ONCE)
            await anext(stream)
            await ledger.aclose()
            return stream

    holder = [asyncio.run(begin())]
    with pytest.warns(ResourceWarning, match="dropped before its end"):
        holder.clear()


async def test_two_may_take_from_one_batch(ledger, client, simulator):
    """Each outcome goes to one of them; an error goes to one, and ends it for both."""

    async def take(outcomes):
        return [outcome.task_id async for outcome in outcomes]

    ids = tasks(simulator, 9, 0.02)
    async with ledger.as_completed(client, ids, max_in_flight=4, wait=SOON) as outcomes:
        one, other = await asyncio.gather(take(outcomes), take(outcomes))
        assert sorted(one + other) == ids
    async with ledger.as_completed(client, raising(CallersError(), ["task0"])) as outcomes:
        ends = await asyncio.gather(
            anext(outcomes, None),
            anext(outcomes, None),
            anext(outcomes, None),
            return_exceptions=True,
        )
    assert sum(isinstance(end, CallersError) for end in ends) == 1


async def test_one_that_waits_is_told_when_another_closes(ledger, client, simulator):
    """Though all has been asked, and only the disk is waited for."""
    with busy_disk_from_the_first_poll(ledger) as (on_event, _):
        stream = ledger.as_completed(client, tasks(simulator, 1), on_event=on_event)
        waiting = asyncio.create_task(exhaust(stream))
        await until(lambda: simulator.requests and not ours_running())
        assert not waiting.done()
        await stream.aclose()
        await asyncio.wait_for(waiting, 5)


async def test_two_batches_may_share_a_ledger(ledger, client, simulator, path):
    """Each has its own outcomes; what both ask for is recorded for both."""
    ids = tasks(simulator, 6, 0.02)
    one, other = await asyncio.gather(
        collected(ledger, client, ids[:4]), collected(ledger, client, ids[2:])
    )
    assert (sorted(one), sorted(other)) == (ids[:4], ids[2:])
    assert states(path) == dict.fromkeys(ids, "done")


async def test_trouble_that_passes_is_tried_again(client, simulator, path):
    """By the next run, which keeps the record that is known."""
    simulator.add_task("shaky", duration=0, script=["http_500"])
    assert errors(await run(path, client, ["shaky"], **AT_ONCE)) == {"shaky": ServerError}
    assert states(path) == {"shaky": "unfinished"}
    assert errors(await run(path, client, ["shaky"], **AT_ONCE)) == {"shaky": type(None)}
    entry = entries(path)["shaky"]
    assert (entry.state, entry.attempts, entry.error_type) == ("done", 2, None)
