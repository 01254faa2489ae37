"""Many waits at once, against the simulator on virtual time: every time is exact."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import math
import pickle
import socket
import threading
import time
import warnings
from collections import Counter, deque

import aiohttp
import attrs
import pytest
from aiohttp.client_proto import ResponseHandler
from client_world import (
    EVERY_SECOND,
    error_of,
    make_client,
    run_on_virtual_time,
    seconds,
    turns,
)
from counted import Counted, CountedAsync, Silent, never, raising, raising_async
from tenacity import wait_fixed
from virtual_time import VirtualTimeLoop

from kontext_async import (
    ApiError,
    AuthenticationError,
    ClientStateError,
    CompletedTask,
    ConfigurationError,
    ErrorOutcome,
    GenerationFailedError,
    KontextClient,
    KontextError,
    RateLimit,
    ServerError,
    TaskNotFoundError,
    TransportError,
    WaitTimeoutError,
)
from kontext_async.simulator import Simulator
from kontext_async.simulator.replies import refused

pytestmark = pytest.mark.virtual_time

FOR_EVER = math.inf


def now():
    return asyncio.get_running_loop().time()


@pytest.fixture
async def client(simulator):
    """Yield a client that must be idle at the end of the test, while it is still open."""
    async with make_client(simulator) as client:
        yield client
        await assert_idle(client)


def our_tasks():
    """Return the tasks that run code of the library, except the simulator's."""
    found = {}
    for task in asyncio.all_tasks():
        file = task.get_coro().cr_code.co_filename
        if "kontext_async" in file and "simulator" not in file:
            found[task] = file
    return found


def our_timers():
    """Return the timers of the library, and those of `asyncio.timeout`."""
    timers = [t for t in asyncio.get_running_loop()._scheduled if not t.cancelled()]
    ours = {timer: repr(timer._callback) for timer in timers}
    return [
        timer
        for timer, callback in ours.items()
        if "Timeout" in callback or ("kontext_async" in callback and "simulator" not in callback)
    ]


def left_running(client):
    """Return everything that a client has under way; empty if it is idle."""
    stats, session = client.stats, client._transport._session
    connections = session.connector._acquired if session and session.connector else {}
    return [
        *our_tasks(),
        *our_timers(),
        *connections,
        *(["a wait"] * stats.waits),
        *(["a request"] * stats.in_flight),
    ]


async def assert_idle(client):
    """Assert that nothing runs and no timer is set."""
    await turns()
    assert left_running(client) == []


def stream_of(client, task_ids, **keywords):
    return client.as_completed(task_ids, **{"wait": EVERY_SECOND, **keywords})


async def collected(client, task_ids, **keywords):
    async with stream_of(client, task_ids, **keywords) as outcomes:
        return [outcome async for outcome in outcomes]


async def ordered(client, task_ids, **keywords):
    return await client.wait_for_results(task_ids, **{"wait": EVERY_SECOND, **keywords})


BOTH = pytest.mark.parametrize("gather", [collected, ordered], ids=["as_completed", "in_order"])


def names(outcomes):
    return [outcome.task_id for outcome in outcomes]


def errors(outcomes):
    return {outcome.task_id: type(outcome.error) for outcome in outcomes}


def tasks(simulator, count, duration=0.0, **options):
    return [simulator.add_task(f"task{n}", duration=duration, **options) for n in range(count)]


@attrs.define
class Cursor:
    """An asynchronous iterator that is not a generator."""

    ids: list
    pause: float = 0.0

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.ids:
            raise StopAsyncIteration
        await asyncio.sleep(self.pause)
        return self.ids.pop(0)


class ClosableCursor(Cursor):
    """One that the caller closes."""

    async def aclose(self):
        raise AssertionError("not ours to close")


async def aiter_of(task_ids):
    for task_id in task_ids:
        yield task_id


async def then_silent(task_ids):
    """Yield the ids, and then neither another nor an end."""
    for task_id in task_ids:
        yield task_id
    await never()


# --- an outcome --------------------------------------------------------------------------------


async def test_an_outcome_is_a_frozen_value_that_unwraps_to_its_result_or_error(client, simulator):
    """One of the two is there, the other is None."""
    done, failed = await ordered(
        client,
        [simulator.add_task("good", duration=0.0), simulator.add_task("bad", script=["failed"])],
    )
    assert done.unwrap() is done.result
    assert (done.result.task_id, done.error) == ("good", None)
    assert (failed.task_id, failed.result) == ("bad", None)
    with pytest.raises(GenerationFailedError) as caught:
        failed.unwrap()
    assert caught.value is failed.error
    # They can be passed to another process.
    good, bad = pickle.loads(pickle.dumps((done, failed)))
    assert good == done
    assert str(bad.error) == str(failed.error)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        good.task_id = "other"


# --- sources of ids ----------------------------------------------------------------------------

SOURCES = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "dict": dict.fromkeys,
    "dict_keys": lambda ids: dict.fromkeys(ids).keys(),
    "generator": lambda ids: (task_id for task_id in ids),
    "map": lambda ids: map(str, ids),
    "async_generator": aiter_of,
    "async_iterable": CountedAsync,
    "async_iterator": lambda ids: Cursor(list(ids)),
    "slow_async_iterator": lambda ids: Cursor(list(ids), pause=1.5),
    "closable_async_iterator": lambda ids: ClosableCursor(list(ids)),
}


@pytest.mark.parametrize("kind", SOURCES)
@BOTH
async def test_ids_may_come_from_any_iterable(client, simulator, gather, kind):
    """Each source, asynchronous or not, has an outcome for every id."""
    ids = tasks(simulator, 3, duration=1.0)
    outcomes = await gather(client, SOURCES[kind](ids))
    assert sorted(names(outcomes)) == ids
    assert all(outcome.unwrap().result_image_url for outcome in outcomes)


@pytest.mark.parametrize("source", ["task12345", "", b"task12345", None, 5, object(), ...])
async def test_a_value_that_is_not_a_collection_of_ids_is_refused_at_once(
    client, simulator, source
):
    """Above all a single str, whose letters are not ids; nothing is sent."""
    with pytest.raises(ConfigurationError, match="task_ids"):
        client.as_completed(source)
    assert "task_ids" in str(await error_of(client.wait_for_results(source), ConfigurationError))
    assert not simulator.requests


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "5", None, math.inf])
async def test_max_in_flight_is_a_positive_int(client, value):
    """Another value is refused before anything is read."""
    source = Counted(["task"])
    with pytest.raises(ConfigurationError, match="max_in_flight"):
        client.as_completed(source, max_in_flight=value)
    await error_of(client.wait_for_results(source, max_in_flight=value), ConfigurationError)
    assert source.read == 0


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, True, "5"])
async def test_batch_timeout_is_a_number_of_seconds(client, value):
    """Or None for no limit."""
    with pytest.raises(ConfigurationError, match="batch_timeout"):
        client.as_completed(["task"], batch_timeout=value)


@pytest.mark.parametrize("source", [[], (), {}, aiter_of([]), Cursor([])])
@BOTH
async def test_no_ids_give_no_outcomes(client, simulator, gather, source):
    """An empty source sends no request."""
    assert await gather(client, source) == []
    assert not simulator.requests


# --- each id once ------------------------------------------------------------------------------


async def test_outcomes_come_as_tasks_end(client, simulator):
    """Not in the order of the ids."""
    for name, duration in {"slow": 3.0, "fast": 1.0, "medium": 2.0}.items():
        simulator.add_task(name, duration=duration)
    async with stream_of(client, ["slow", "fast", "medium"]) as outcomes:
        ends = [(outcome.task_id, now()) async for outcome in outcomes]
    assert ends == [("fast", seconds(1)), ("medium", seconds(2)), ("slow", seconds(3))]


async def test_the_asyncio_task_of_a_wait_has_the_name_of_its_id(client, simulator):
    one, two = tasks(simulator, 2)
    async with client.as_completed([one, two]):
        await turns(5)
        assert {one, two} <= {task.get_name() for task in our_tasks()}


async def test_an_id_given_twice_is_polled_and_answered_once(client, simulator):
    """Even if it comes again after its task has ended."""
    one, two = tasks(simulator, 2)

    async def source():
        for task_id in [one, one, two, one]:
            yield task_id
        await asyncio.sleep(5)
        yield two

    assert sorted(names(await collected(client, source()))) == [one, two]
    assert simulator.polls(one) == simulator.polls(two) == 1


async def test_results_are_in_the_order_given_and_an_id_given_twice_is_in_them_twice(
    client, simulator
):
    """In any order of their ends; each id is polled by one wait."""
    for name, duration in {"a": 2.0, "b": 1.0, "c": 0.0}.items():
        simulator.add_task(name, duration=duration)
    outcomes = await ordered(client, ["a", "b", "a", "c", "b", "a"])
    assert names(outcomes) == ["a", "b", "a", "c", "b", "a"]
    assert outcomes[0] is outcomes[2] is outcomes[5]
    assert [simulator.polls(name) for name in "abc"] == [3, 2, 1]


# --- room --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [Counted, CountedAsync])
@pytest.mark.parametrize("room", [1, 3])
async def test_no_more_ids_are_read_than_there_is_room_for(client, simulator, source, room):
    """Waits count: while none ends, nothing more is read."""
    ids = source(tasks(simulator, 9, duration=FOR_EVER))
    async with stream_of(client, ids, max_in_flight=room, timeout=100):
        await asyncio.sleep(50)
        assert ids.read == client.stats.waits == room


@pytest.mark.parametrize("source", [Counted, CountedAsync])
async def test_outcomes_that_are_not_taken_take_up_room(client, simulator, source):
    """A consumer that stops taking stops the reading, and each one taken makes room for one."""
    ids = source(tasks(simulator, 9))
    async with stream_of(client, ids, max_in_flight=3) as outcomes:
        for taken in range(1, 4):
            await asyncio.sleep(50)
            assert ids.read == taken + 2
            await anext(outcomes)
        await asyncio.sleep(50)
        assert ids.read == 6


async def test_invalid_ids_take_up_room_until_they_are_taken(client, simulator):
    """They have outcomes like others, though there is no wait for them."""
    endless = Counted(f"{n}\n" for n in itertools.count())
    async with stream_of(client, endless, max_in_flight=4) as outcomes:
        await asyncio.sleep(1)
        assert endless.read == 4
        await anext(outcomes)
        await asyncio.sleep(1)
        assert endless.read == 5


@BOTH
async def test_a_batch_larger_than_its_room_has_every_outcome(client, simulator, gather):
    """Taking an outcome makes room for the next id."""
    ids = tasks(simulator, 30, duration=1.0)
    assert sorted(names(await gather(client, ids, max_in_flight=4))) == sorted(ids)
    assert simulator.max_in_flight <= 4


# --- each task on its own ----------------------------------------------------------------------

INVALID = ["", "  ", "a\nb", "a\0", None, 5, 2.5, ["task0"], b"task0", {"id": 1}, ("a", "b")]


@pytest.mark.parametrize("bad", INVALID, ids=repr)
@BOTH
async def test_an_invalid_id_is_its_own_outcome_and_affects_no_other(
    client, simulator, gather, bad
):
    """It has a `ConfigurationError`, without a request."""
    ids = tasks(simulator, 2)
    outcomes = await gather(client, [ids[0], bad, ids[1]])
    (refused,) = (outcome for outcome in outcomes if outcome.error)
    assert type(refused.error) is ConfigurationError
    assert isinstance(refused.task_id, str)
    assert sorted(names(o for o in outcomes if o.result)) == ids
    assert len(simulator.requests) == 2


@pytest.mark.parametrize("bad", [12345, None, ["a"]])
@pytest.mark.parametrize("bad_first", [True, False])
@BOTH
async def test_an_invalid_id_is_not_mistaken_for_a_valid_one_that_prints_the_same(
    client, simulator, gather, bad, bad_first
):
    """A source with 12345 and "12345" names one valid task."""
    good = simulator.add_task(str(bad), duration=0.0)
    given = [bad, good] if bad_first else [good, bad]
    outcomes = await gather(client, given)
    by_class = {type(outcome.error): outcome for outcome in outcomes}
    assert by_class.keys() == {ConfigurationError, type(None)}
    assert by_class[type(None)].unwrap().task_id == good
    if gather is ordered:
        assert [outcome.error is None for outcome in outcomes] == [not bad_first, bad_first]


async def test_the_name_of_a_huge_invalid_id_is_cut(client):
    """An outcome can be printed."""
    (outcome,) = await ordered(client, [["x" * 1_000_000]])
    assert len(outcome.task_id) < 300


@BOTH
async def test_each_tasks_error_is_its_own_outcome(client, simulator, gather):
    """Failures, refusals, unknown tasks, dead connections and timeouts beside a success."""
    scripts = {
        "flagged": ["failed_flagged"],
        "no_record": ["code_501"],
        "malformed": ["code_422"],
        "unpaid": ["code_402"],
        "unknown": ["not_found"] * 99,
        "broken": ["http_500"] * 99,
        "reset": ["reset"] * 99,
        "endless": ["generating"] * 99,
        "moved": ["redirect"],
    }
    for name, script in scripts.items():
        simulator.add_task(name, script=script)
    simulator.add_task("good", duration=5.0)
    outcomes = await gather(
        client, [*scripts, "good"], timeout=20, error_grace=4, not_found_grace=4
    )
    found = errors(outcomes)
    assert len(outcomes) == 10
    assert found.pop("good") is type(None)
    assert {name: kind.__name__ for name, kind in found.items()} == {
        "flagged": "GenerationFailedError",
        "no_record": "GenerationFailedError",
        "malformed": "InvalidRequestError",
        "unpaid": "ApiError",
        "unknown": "TaskNotFoundError",
        "broken": "ServerError",
        "reset": "TransportError",
        "endless": "WaitTimeoutError",
        "moved": "TransportError",
    }
    assert all(o.error.task_id == o.task_id for o in outcomes if o.error)


async def test_the_keywords_apply_to_each_tasks_wait(client, simulator):
    """wait, timeout, both graces and on_event."""
    events = []
    simulator.add_task("unknown", script=["not_found"] * 9)
    simulator.add_task("broken", script=["http_500"] * 9)
    simulator.add_task("endless", duration=FOR_EVER)
    outcomes = await ordered(
        client,
        ["unknown", "broken", "endless"],
        wait=wait_fixed(2),
        timeout=9,
        error_grace=0,
        not_found_grace=3,
        on_event=events.append,
    )
    assert [type(o.error) for o in outcomes] == [TaskNotFoundError, ServerError, WaitTimeoutError]
    polls = {name: [e.elapsed for e in events if e.task_id == name] for name in errors(outcomes)}
    assert polls == {
        "unknown": seconds([0, 2, 3]),
        "broken": [0],
        "endless": seconds([0, 2, 4, 6, 8, 8.95]),
    }


# --- time --------------------------------------------------------------------------------------


async def test_the_timeout_counts_from_a_tasks_own_first_poll(simulator):
    """Not from the start of the batch: a task in the queue loses none of its time."""
    ids = tasks(simulator, 3, duration=FOR_EVER)
    ended = []
    async with (
        make_client(simulator, rate_limit=RateLimit(1, 10.0)) as client,
        stream_of(client, ids, timeout=5) as outcomes,
    ):
        async for outcome in outcomes:
            ended.append(now())
            assert type(outcome.error) is WaitTimeoutError
            assert (outcome.error.elapsed, outcome.error.polls) == (seconds(5), 1)
    assert ended == seconds([5, 15, 25])


async def test_a_timeout_of_0_polls_each_task_once(client, simulator):
    """A finished task has a result, another one a timeout."""
    simulator.add_task("done", duration=0.0)
    simulator.add_task("not", duration=9.0)
    assert errors(await ordered(client, ["done", "not"], timeout=0)) == {
        "done": type(None),
        "not": WaitTimeoutError,
    }
    assert len(simulator.requests) == 2


@BOTH
async def test_without_a_timeout_a_batch_waits_as_long_as_a_task_takes(client, simulator, gather):
    """Longer than the default of 600 s."""
    simulator.add_task("slow", duration=1000.0)
    keywords = {"timeout": None, "wait": wait_fixed(250)}
    (outcome,) = await gather(client, ["slow"], **keywords)
    assert outcome.unwrap().duration.total_seconds() == 1000
    assert now() == seconds(1000)


@pytest.mark.parametrize("batch_timeout", [2.5, 2, 0.0004])
@BOTH
async def test_tasks_left_at_the_batchs_deadline_end_as_timeouts(
    client, simulator, gather, batch_timeout
):
    """In flight or not yet read; earlier results remain."""
    done = simulator.add_task("done", duration=0.0)
    simulator.add_task("late", duration=50.0)
    ids = ["done", "late", *tasks(simulator, 9, duration=FOR_EVER)]
    outcomes = await gather(client, ids, batch_timeout=batch_timeout, max_in_flight=4)
    assert now() == seconds(batch_timeout)
    assert sorted(names(outcomes)) == sorted(ids)
    assert [o.task_id for o in outcomes if o.result] == [done]
    for outcome in outcomes:
        if outcome.error:
            assert type(outcome.error) is WaitTimeoutError
            assert outcome.error.task_id == outcome.task_id
            assert outcome.error.elapsed == seconds(batch_timeout)
            assert bool(outcome.error.polls) == (simulator.polls(outcome.task_id) > 0)


@BOTH
async def test_a_batch_timeout_of_0_sends_no_request(client, simulator, gather):
    """Every id is a timeout; invalid ids are still invalid."""
    ids = tasks(simulator, 3)
    outcomes = await gather(client, [*ids, ""], batch_timeout=0)
    assert errors(outcomes) == {**dict.fromkeys(ids, WaitTimeoutError), "": ConfigurationError}
    assert not simulator.requests


async def test_a_wait_ends_at_the_earlier_of_its_own_deadline_and_the_batchs(client, simulator):
    """A later deadline does not extend an earlier one."""
    simulator.add_task("early", duration=FOR_EVER)
    simulator.add_task("late", duration=FOR_EVER)

    async def source():
        yield "early"
        await asyncio.sleep(4)
        yield "late"

    ended = {}
    async with stream_of(client, source(), timeout=3, batch_timeout=5) as outcomes:
        async for outcome in outcomes:
            ended[outcome.task_id] = (now(), outcome.error.elapsed)
    assert ended == {"early": (seconds(3), seconds(3)), "late": (seconds(5), seconds(1))}


async def test_tasks_get_a_last_poll_before_the_batchs_deadline(client, simulator):
    """A task that is done by then is not a timeout."""
    simulator.add_task("just", duration=9.5)
    (outcome,) = await ordered(client, ["just"], wait=wait_fixed(60), batch_timeout=10)
    assert outcome.result is not None


@BOTH
async def test_a_source_that_stalls_is_closed_at_the_batchs_deadline(client, simulator, gather):
    """The ids that it gave have outcomes."""
    ids = tasks(simulator, 2, duration=1.0)
    source = then_silent([*ids, simulator.add_task("slow", duration=FOR_EVER)])
    outcomes = await gather(client, source, batch_timeout=7)
    assert errors(outcomes) == {**dict.fromkeys(ids, type(None)), "slow": WaitTimeoutError}
    assert now() == seconds(7)
    assert source.ag_frame is None


@BOTH
async def test_a_stalled_source_without_time_has_no_outcomes(client, simulator, gather):
    """batch_timeout=0 does not wait for the first id either."""
    assert await gather(client, then_silent([]), batch_timeout=0) == []
    assert now() == 0


async def test_ids_that_are_ready_at_the_batchs_deadline_have_outcomes(client, simulator):
    """An asynchronous source that need not wait is read to its end, as a list is."""
    ids = tasks(simulator, 30, duration=FOR_EVER)
    outcomes = await ordered(client, aiter_of(ids), batch_timeout=3, max_in_flight=10)
    assert errors(outcomes) == dict.fromkeys(ids, WaitTimeoutError)
    assert now() == seconds(3)


async def test_a_sources_own_timeout_is_not_mistaken_for_the_batchs_deadline(client):
    """Its TimeoutError reaches the caller, though the batch has a limit too."""

    async def source():
        async with asyncio.timeout(1):
            await never()
        yield "task"

    error = await error_of(collected(client, source(), batch_timeout=5), TimeoutError)
    assert not isinstance(error, KontextError)
    assert now() == seconds(1)


async def test_a_late_consumer_loses_no_outcome(client, simulator):
    """Outcomes can be taken after the batch's deadline."""
    ids = tasks(simulator, 3, duration=1.0)
    simulator.add_task("slow", duration=FOR_EVER)
    async with stream_of(client, [*ids, "slow"], batch_timeout=5) as outcomes:
        await asyncio.sleep(100)
        found = [outcome async for outcome in outcomes]
    assert names(found) == [*ids, "slow"]
    assert [type(o.error) for o in found] == [type(None)] * 3 + [WaitTimeoutError]


# --- a key that is refused ---------------------------------------------------------------------


@pytest.mark.parametrize("source", [list, aiter_of])
@BOTH
async def test_a_refused_key_is_the_outcome_of_all(simulator, gather, source):
    """Read or not, without a request after the refusal; each error names its own task."""
    ids = tasks(simulator, 50)
    simulator._api_key, simulator._latency = "another", 0.5
    async with make_client(simulator, max_concurrency=4) as client:
        outcomes = await gather(client, source(ids), max_in_flight=10)
        await asyncio.sleep(30)
        await assert_idle(client)
    assert sorted(names(outcomes)) == sorted(ids)
    assert {(type(o.error), o.error.code, o.error.task_id == o.task_id) for o in outcomes} == {
        (AuthenticationError, 401, True)
    }
    assert len(simulator.requests) == 4  # those that were under way


async def test_no_request_follows_a_refused_key_however_many_wait(simulator):
    """Thousands wait for the one permit that the refused request releases."""
    ids = [f"task{n}" for n in range(3000)]
    simulator._api_key = "another"
    async with make_client(simulator, max_concurrency=1) as client:
        outcomes = await ordered(client, ids)
        assert client.stats.errors == {"AuthenticationError": 1}
        await assert_idle(client)
    assert errors(outcomes) == dict.fromkeys(ids, AuthenticationError)
    assert len(simulator.requests) == 1


async def test_a_key_revoked_on_the_way_affects_no_earlier_result(client, simulator):
    """Taken or not, results from before remain; the other tasks are refused at the next poll."""
    done = tasks(simulator, 3, duration=1.0)
    late = [simulator.add_task(f"late{n}", duration=9.0) for n in range(3)]
    async with stream_of(client, [*done, *late, ""]) as outcomes:
        found = [await anext(outcomes), await anext(outcomes)]
        await asyncio.sleep(1.5)
        simulator._api_key = "another"
        before = len(simulator.requests)
        await asyncio.sleep(60)
        found += [outcome async for outcome in outcomes]
    assert errors(found) == {
        "": ConfigurationError,
        **dict.fromkeys(done, type(None)),
        **dict.fromkeys(late, AuthenticationError),
    }
    assert len(simulator.requests) - before <= 3


async def test_ids_that_come_after_a_refused_key_get_its_error(client, simulator):
    """Even if late; invalid ids are still invalid."""
    simulator._api_key = "another"

    async def source():
        yield "early"
        await asyncio.sleep(100)
        yield "late"
        yield "  "

    outcomes = await collected(client, source())
    assert errors(outcomes) == {
        "early": AuthenticationError,
        "late": AuthenticationError,
        "  ": ConfigurationError,
    }
    assert now() == seconds(100)
    assert len(simulator.requests) == 1


async def test_a_refused_key_does_not_lift_the_limit_of_the_room(client, simulator):
    """The remaining ids are still read only as fast as outcomes are taken."""
    simulator._api_key = "another"
    ids = Counted(f"task{n}" for n in itertools.count())
    async with stream_of(client, ids, max_in_flight=5) as outcomes:
        await asyncio.sleep(10)
        assert ids.read == 5
        assert type((await anext(outcomes)).error) is AuthenticationError
        await asyncio.sleep(10)
        assert ids.read == 6


async def test_waits_in_a_pause_are_refused_without_waiting_for_its_end(client, simulator):
    """A key refused while the client pauses ends all waits at once."""
    simulator.add_task("held", script=[refused(429, status=429, retry_after=100)])
    simulator.add_task("refused", script=[refused(401)])
    slow = simulator.add_task("slow", duration=FOR_EVER)
    simulator._latency = 0.25
    outcomes = await ordered(client, ["held", "refused", slow], wait=wait_fixed(50))
    assert errors(outcomes) == dict.fromkeys(["held", "refused", "slow"], AuthenticationError)
    assert now() == seconds(0.25)


@pytest.mark.parametrize("code", [402, 403, 422, 451, 505])
async def test_other_refusals_are_the_outcome_of_their_task_only(client, simulator, code):
    """Exhausted credits, for one, say nothing about tasks that were paid for."""
    simulator.add_task("unpaid", script=[refused(code)])
    simulator.add_task("paid", duration=3.0)
    unpaid, paid = await ordered(client, ["unpaid", "paid"])
    assert isinstance(unpaid.error, ApiError)
    assert not isinstance(unpaid.error, AuthenticationError)
    assert isinstance(paid.result, CompletedTask)


# --- exceptions of the caller ------------------------------------------------------------------


class CallersError(Exception):
    pass


class CallersKontextError(KontextError):
    pass


def callback_raising(error, *, when=lambda event: True):
    def on_event(event):
        if when(event):
            raise error

    return on_event


@pytest.mark.parametrize(
    "error",
    [
        CallersError("mine"),
        CallersKontextError("mine"),
        TimeoutError("mine"),
        ServerError("mine", code=500),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize(
    ("name", "when"),
    [("on_event", lambda event: event.attempt == 2), ("wait", lambda state: True)],
    ids=["on_event", "wait"],
)
@BOTH
async def test_what_a_callback_raises_reaches_the_caller_unchanged(
    client, simulator, gather, error, name, when
):
    """Even an error of this library is not an outcome if a callback raises it."""
    tasks(simulator, 5, duration=FOR_EVER)
    ids = Silent(f"task{n}" for n in range(5))
    keywords = {name: callback_raising(error, when=when)}
    assert await error_of(gather(client, ids, **keywords), Exception) is error
    await assert_idle(client)
    assert ids.closed == 1


@pytest.mark.parametrize("delay", [math.nan, math.inf, -1, None, "1"])
@BOTH
async def test_a_strategy_that_returns_an_invalid_delay_ends_the_batch(
    client, simulator, gather, delay
):
    """The `ConfigurationError` names the wait strategy."""
    ids = tasks(simulator, 5, duration=9.0)
    error = await error_of(gather(client, ids, wait=lambda state: delay), ConfigurationError)
    assert "wait strategy" in str(error)


@pytest.mark.parametrize("make", [raising, raising_async])
@pytest.mark.parametrize("given", [0, 3])
@pytest.mark.parametrize("limit", [None, 0])
@BOTH
async def test_what_the_source_raises_reaches_the_caller_unchanged(
    client, simulator, gather, make, given, limit
):
    """At its first step, midway, or after the batch's time; the waits under way end."""
    error = CallersError("mine")
    source = make(error, tasks(simulator, given, duration=FOR_EVER))
    assert await error_of(gather(client, source, batch_timeout=limit), CallersError) is error
    await assert_idle(client)


async def test_an_iterable_that_cannot_be_iterated_says_why(client):
    """Its __iter__, or __aiter__, is part of the source."""

    class Broken:
        def __iter__(self):
            raise CallersError("mine")

    class BrokenAsync:
        def __aiter__(self):
            raise CallersError("mine")

    await error_of(collected(client, Broken()), CallersError)
    await error_of(collected(client, BrokenAsync()), CallersError)


@pytest.mark.parametrize("make", [raising, raising_async])
@BOTH
async def test_a_cancelled_source_is_not_mistaken_for_an_exhausted_one(
    client, simulator, gather, make
):
    """It waited for something that was cancelled: ids are missing, so the batch has no result."""
    source = make(asyncio.CancelledError(), tasks(simulator, 3, duration=1.0))
    await error_of(gather(client, source), asyncio.CancelledError)
    await assert_idle(client)


async def test_a_wait_cancelled_from_outside_ends_the_batch(client, simulator):
    """As by code that cancels every task of the loop: the batch ends, cancelled."""
    ids = tasks(simulator, 3, duration=9.0)
    async with stream_of(client, ids) as outcomes:
        await turns()
        victim = next(t for t, file in our_tasks().items() if file.endswith("polling.py"))
        victim.cancel()
        await error_of(anext(outcomes), asyncio.CancelledError)
        assert [outcome async for outcome in outcomes] == []


async def test_outcomes_that_are_ready_come_before_the_exception(client, simulator):
    """Even if they are taken late."""
    done = tasks(simulator, 3, duration=1.0)
    simulator.add_task("slow", duration=FOR_EVER)
    oops = callback_raising(CallersError(), when=lambda event: event.attempt == 3)
    async with stream_of(client, [*done, "slow"], on_event=oops) as outcomes:
        await asyncio.sleep(10)
        assert names([await anext(outcomes) for _ in done]) == done
        await error_of(anext(outcomes), CallersError)
        assert [outcome async for outcome in outcomes] == []


async def test_an_exception_ends_the_requests_even_before_it_is_taken(client, simulator):
    """No request is sent while the consumer is busy with other work."""
    ids = Silent(tasks(simulator, 5, duration=FOR_EVER))
    async with stream_of(client, ids, on_event=callback_raising(CallersError())) as outcomes:
        await asyncio.sleep(10)
        assert left_running(client) == []
        assert ids.closed == 1
        before = len(simulator.requests)
        await asyncio.sleep(10)
        assert len(simulator.requests) == before
        await error_of(anext(outcomes), CallersError)


async def test_of_several_exceptions_the_first_is_raised(client, simulator):
    """None of the others is logged as never retrieved."""
    ids = tasks(simulator, 5)
    raised = []

    def on_event(event):
        raised.append(CallersError(event.task_id))
        raise raised[-1]

    assert await error_of(collected(client, ids, on_event=on_event), CallersError) is raised[0]


async def test_an_exception_lets_the_source_finish_its_cleanup(client, simulator):
    """It is cancelled once; ending the batch does not cut its own ``finally`` short."""
    ids = tasks(simulator, 1, duration=1.0)
    steps = []

    async def source():
        try:
            yield ids[0]
            await never()
        finally:
            steps.append("begun")
            await asyncio.sleep(5)
            steps.append("ended")

    oops = callback_raising(CallersError(), when=lambda event: event.attempt == 2)
    await error_of(collected(client, source(), on_event=oops), CallersError)
    assert steps == ["begun", "ended"]
    assert now() == seconds(6)


async def test_closing_the_client_lets_the_source_finish_its_cleanup(client, simulator):
    """It is cancelled once, though the waits of the batch end with errors meanwhile."""
    ids = tasks(simulator, 3, duration=100.0)
    steps = []

    async def source():
        try:
            for task_id in ids:
                yield task_id
            await never()
        finally:
            steps.append("begun")
            await asyncio.sleep(5)
            steps.append("ended")

    batch = asyncio.create_task(error_of(collected(client, source()), ClientStateError))
    await asyncio.sleep(3)
    await client.aclose()
    await batch
    assert steps == ["begun", "ended"]


@pytest.mark.parametrize("script", [["generating"] * 99, ["stall"]])
@pytest.mark.parametrize("turns_before", range(4))
@pytest.mark.parametrize("ended_by", ["client", "deadline", "waits"])
async def test_a_source_is_cancelled_once(simulator, script, turns_before, ended_by):
    """Its clean-up takes as long as it takes, whoever ends the batch meanwhile, or twice."""
    cancelled, steps = [], []

    async def source():
        yield simulator.add_task(script=script)
        try:
            await never()
        finally:
            for step in ("begun", "ended"):
                steps.append(step)
                try:
                    await asyncio.sleep(5)
                except asyncio.CancelledError:
                    cancelled.append(step)
                    raise

    def fail(event):
        if ended_by == "waits":
            raise CallersError

    async with make_client(simulator) as client:
        limit = 3.0 if ended_by == "deadline" else 5.0
        waiting = collected(client, source(), batch_timeout=limit, on_event=fail)
        batch = asyncio.create_task(waiting)
        await asyncio.sleep(3)
        await turns(turns_before)
        await client.aclose()
        with contextlib.suppress(ClientStateError, CallersError):
            await batch
    assert (cancelled, steps) == ([], ["begun", "ended"])


async def test_a_port_that_nobody_listens_on_ends_a_batch_by_the_default_grace(unused_port):
    """Each outcome names the cause."""
    async with KontextClient("marker-key", base_url=f"http://127.0.0.1:{unused_port}") as client:
        outcomes = await client.wait_for_results([f"task{n}" for n in range(50)])
    assert {type(outcome.error) for outcome in outcomes} == {TransportError}
    assert all("Connection refused" in str(outcome.error) for outcome in outcomes)
    assert 300 <= now() <= 375  # the grace, and the longest pause of an outage


@pytest.fixture
def unused_port():
    with socket.socket() as held:  # bound, so that nobody else gets it
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


async def test_a_source_that_ignores_its_cancellation_is_read_no_further(client, simulator):
    ids = tasks(simulator, 2, duration=FOR_EVER)

    async def source():
        yield ids[0]
        with contextlib.suppress(asyncio.CancelledError):
            await never()
        yield ids[1]

    batch = asyncio.create_task(error_of(collected(client, source()), ClientStateError))
    await asyncio.sleep(3)
    await client.aclose()
    await batch
    assert simulator.polls(ids[1]) == 0


async def test_what_a_source_raises_on_closing_is_raised_after_the_outcomes(client):
    """For a source that fails in its own ``finally``, at the end of the ids."""

    async def source():
        try:
            yield ""
        finally:
            raise CallersError

    async with stream_of(client, source()) as outcomes:
        assert (await anext(outcomes)).task_id == ""
        await error_of(anext(outcomes), CallersError)


# --- leaving -----------------------------------------------------------------------------------


@pytest.fixture
def busy(client, simulator):
    """Return a source that never ends, with three short tasks and many that never end."""
    done = tasks(simulator, 3, duration=1.0)
    endless = [simulator.add_task(f"endless{n}", duration=FOR_EVER) for n in range(30)]
    stalled = [simulator.add_task(f"stalled{n}", script=["stall"]) for n in range(30)]
    source = Silent([*done, *endless, *stalled])
    source.all = done + endless + stalled
    return source


async def test_leaving_by_break_ends_every_wait(client, busy):
    """Requests in flight end too, and the source finishes its cleanup."""
    async with stream_of(client, busy) as outcomes:
        async for outcome in outcomes:
            assert outcome.result
            break
        await asyncio.sleep(0.5)
        assert {type(item) for item in left_running(client)} == {
            asyncio.Task,
            asyncio.TimerHandle,
            ResponseHandler,
            str,
        }
    assert left_running(client) == []
    assert busy.closed == 1
    assert [outcome async for outcome in outcomes] == []


@pytest.mark.parametrize("raises", [True, False])
async def test_leaving_by_an_exception_or_return_ends_every_wait(client, busy, raises):
    """The consumer's own exception is raised."""

    async def consume():
        async with stream_of(client, busy) as outcomes:
            async for outcome in outcomes:
                if raises:
                    raise CallersError
                return outcome
        raise AssertionError("no outcome")

    if raises:
        await error_of(consume(), CallersError)
    else:
        assert (await consume()).result
    assert left_running(client) == []
    assert busy.closed == 1


@pytest.mark.parametrize("how", ["leave", "fail", "cancel"])
async def test_no_request_is_sent_while_thousands_of_waits_are_ended(simulator, how):
    """Those that wait for the permits of the ones that have ended do not use them."""
    simulator._latency = 60.0

    async def source():
        for n in range(3000):
            yield f"task{n}"
        await asyncio.sleep(10)
        if how == "fail":
            raise CallersError
        await never()

    async with make_client(simulator, max_concurrency=4) as client:

        async def consume():
            async with stream_of(client, source()) as outcomes:
                if how == "leave":
                    await asyncio.sleep(10)
                else:
                    await anext(outcomes)

        consumer = asyncio.create_task(consume())
        await asyncio.sleep(11)
        if how == "cancel":
            consumer.cancel()
        (end,) = await asyncio.gather(consumer, return_exceptions=True)
        expected = {"leave": type(None), "fail": CallersError, "cancel": asyncio.CancelledError}
        assert type(end) is expected[how]
        await assert_idle(client)
        assert len(simulator.requests) == client.stats.requests == 4


async def test_no_permit_is_used_while_waits_are_ended_out_of_order(simulator):
    """The oldest are ended first, and the youngest are the next in the queue."""
    ids = tasks(simulator, 1200, duration=FOR_EVER)
    delays = {task_id: 1.0 if n < 4 else 100 - n / 100 for n, task_id in enumerate(ids)}

    def strategy(state):
        return delays[state.record.task_id]

    async with make_client(simulator, max_concurrency=4, request_timeout=90.0) as client:
        async with stream_of(client, ids, wait=strategy, timeout=None):
            await asyncio.sleep(0.5)
            simulator._latency = 60.0
            await asyncio.sleep(110)
            before = client.stats.requests
            assert client.stats.in_flight == 4
        assert client.stats.requests == before
        await assert_idle(client)


async def test_leaving_before_anything_was_taken_ends_every_wait(client, busy):
    """Iterating is optional."""
    async with stream_of(client, busy):
        await asyncio.sleep(3)
    assert left_running(client) == []
    async with stream_of(client, busy.all):
        pass
    assert left_running(client) == []


async def test_an_outcome_that_is_ready_as_the_consumer_leaves_is_dropped(client, simulator):
    """Its task is over, but nobody can take it any more."""
    ended = asyncio.get_running_loop().create_future()
    ids = tasks(simulator, 1)
    async with stream_of(client, ids, on_event=ended.set_result) as outcomes:
        await ended
    assert await _all_of(outcomes) == []


@pytest.mark.parametrize("after", [0.0, 0.5, 1.0, 7.25])
@BOTH
async def test_cancelling_the_consumer_ends_every_wait(client, busy, gather, after):
    """At any time; the cancellation is not swallowed."""
    consumer = asyncio.create_task(gather(client, busy, timeout=None))
    await asyncio.sleep(after)
    consumer.cancel()
    await error_of(consumer, asyncio.CancelledError)
    assert left_running(client) == []
    assert busy.closed == (busy.read > 0)


async def test_cancelling_again_while_it_is_leaving_still_ends_every_wait(client, busy):
    """The consumer stops waiting, and the waits end all the same."""
    consumer = asyncio.create_task(collected(client, busy))
    await asyncio.sleep(3)
    consumer.cancel()
    await asyncio.sleep(0.25)  # the source takes 0.5 s to close
    assert not consumer.done()
    consumer.cancel()
    await error_of(consumer, asyncio.CancelledError)
    await asyncio.sleep(0.5)
    await assert_idle(client)
    assert busy.closed == 1


async def test_cancelling_again_among_thousands_still_ends_every_wait(client, simulator):
    """Also those that were not cancelled yet."""
    consumer = asyncio.create_task(collected(client, [f"task{n}" for n in range(3000)]))
    simulator._latency = 60.0
    await turns()
    consumer.cancel()
    await turns(3)
    assert not consumer.done()
    consumer.cancel()
    await error_of(consumer, asyncio.CancelledError)
    await assert_idle(client)


async def test_a_timeout_around_the_whole_ends_every_wait(client, busy):
    """asyncio.timeout works as around any other code."""
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(5):
            await collected(client, busy)
    assert not isinstance(caught.value, KontextError)
    assert now() == seconds(5.5)
    assert left_running(client) == []


async def test_a_failing_sibling_in_a_task_group_ends_every_wait(client, busy):
    """Structured concurrency works as with any other code."""

    async def fail():
        await asyncio.sleep(2)
        raise CallersError

    async def all_of_it():
        async with asyncio.TaskGroup() as group:
            group.create_task(collected(client, busy))
            group.create_task(ordered(client, busy.all))
            group.create_task(fail())

    group = await error_of(all_of_it(), ExceptionGroup)
    assert [type(error) for error in group.exceptions] == [CallersError]
    assert left_running(client) == []


async def test_a_timeout_around_one_step_loses_no_outcome(client, simulator):
    """The batch continues, and outcomes from the meantime can be taken."""
    ids = tasks(simulator, 20)
    for n, task_id in enumerate(ids):
        simulator._store[task_id].duration = n * 0.7
    found, gave_up = [], 0
    async with stream_of(client, ids, wait=wait_fixed(0.25)) as outcomes:
        while True:
            try:
                async with asyncio.timeout(0.25):
                    found.append((await anext(outcomes)).unwrap().task_id)
            except TimeoutError:
                gave_up += 1
            except StopAsyncIteration:
                break
    assert found == ids
    assert gave_up > 5


async def test_closing_is_idempotent(client, busy):
    """A closed stream has no more outcomes."""
    stream = stream_of(client, busy)
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    assert left_running(client) == []
    assert [outcome async for outcome in stream] == []
    async with stream:
        assert [outcome async for outcome in stream] == []


async def test_closing_from_two_tasks_at_once_waits_for_the_end_in_both(client, busy):
    """The source's ``finally`` runs to its end."""
    stream = stream_of(client, busy)
    await anext(stream)
    await asyncio.gather(stream.aclose(), stream.aclose())
    assert busy.closed == 1
    assert left_running(client) == []


async def test_a_stream_closed_before_its_start_never_starts(client, simulator):
    """Nothing is read or sent."""
    ids = Counted(tasks(simulator, 3))
    stream = stream_of(client, ids)
    await stream.aclose()
    assert [outcome async for outcome in stream] == []
    async with stream:
        await turns()
    assert ids.read == 0
    assert not simulator.requests


async def test_a_stream_that_is_never_used_costs_nothing(client, simulator):
    """It sends no request and does not warn."""
    ids = Counted(tasks(simulator, 3))
    stream = stream_of(client, ids)
    del stream
    gc.collect()
    await turns()
    assert ids.read == 0
    assert not simulator.requests


async def test_closing_while_another_task_waits_for_an_outcome_ends_its_iteration(client, busy):
    """The other task does not hang."""
    stream = stream_of(client, busy)
    consumer = asyncio.create_task(_all_of(stream))
    await asyncio.sleep(3)
    await stream.aclose()
    assert len(await consumer) == 3
    assert left_running(client) == []


async def _all_of(stream):
    return [outcome async for outcome in stream]


async def test_a_stream_may_be_exhausted_without_a_context_manager(client, simulator):
    """Iterating again after the end has nothing more."""
    ids = tasks(simulator, 5, duration=1.0)
    stream = stream_of(client, ids)
    assert sorted(names(await _all_of(stream))) == ids
    assert left_running(client) == []
    assert await _all_of(stream) == []
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    del stream
    gc.collect()


async def test_two_consumers_share_the_outcomes(client, simulator):
    """Each outcome goes to one of them, and both reach the end."""
    ids = tasks(simulator, 9)
    for n, task_id in enumerate(ids):
        simulator._store[task_id].duration = float(n // 2)
    async with stream_of(client, ids) as stream:
        shares = await asyncio.gather(_all_of(stream), _all_of(stream))
    assert sorted(names(itertools.chain(*shares))) == ids


async def test_of_two_consumers_one_gets_the_exception_and_the_other_the_end(client, simulator):
    """It is raised once."""
    ids = Silent(tasks(simulator, 5, duration=FOR_EVER))
    oops = callback_raising(CallersError(), when=lambda event: event.attempt == 2)
    async with stream_of(client, ids, on_event=oops) as stream:
        ends = await asyncio.gather(_all_of(stream), _all_of(stream), return_exceptions=True)
    assert Counter(type(end) for end in ends) == {CallersError: 1, list: 1}


async def test_an_exception_is_not_lost_if_its_consumer_was_cancelled(client, simulator):
    """The next step raises it."""
    ids = Silent(tasks(simulator, 5, duration=FOR_EVER))
    async with stream_of(client, ids, on_event=callback_raising(CallersError())) as stream:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.25):  # the source takes 0.5 s to close
                await anext(stream)
        await error_of(anext(stream), CallersError)
        assert await _all_of(stream) == []


async def test_two_batches_on_one_client_are_independent(client, simulator):
    """Leaving one does not affect the other, even if they wait for the same task."""
    ids = tasks(simulator, 20, duration=5.0)
    other = asyncio.create_task(ordered(client, ids))
    async with stream_of(client, ids) as outcomes:
        await asyncio.sleep(2)
    assert outcomes is not None
    assert all(outcome.result for outcome in await other)
    assert now() == seconds(5)


# --- a stream that is dropped ------------------------------------------------------------------


def clear_in_a_thread(holder):
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()


def leave_in_a_cycle(holder):
    cycle = {"stream": holder.pop()}
    cycle["self"] = cycle
    del cycle
    gc.collect()


@pytest.mark.parametrize("drop", [list.clear, clear_in_a_thread, leave_in_a_cycle])
async def test_a_stream_that_is_dropped_warns_once_and_ends_its_waits(client, busy, drop):
    """A `ResourceWarning`, as for a file that was not closed; by any thread or the collector."""
    holder = [stream_of(client, busy)]
    await anext(holder[0])
    with pytest.warns(ResourceWarning, match="async with") as warned:
        drop(holder)
    await asyncio.sleep(1)
    assert len(warned) == 1
    assert left_running(client) == []
    assert busy.closed == 1


async def test_a_loop_that_is_left_early_warns_too(client, busy):
    """Without ``async with``, break drops the stream."""

    async def first():
        async for _ in stream_of(client, busy):
            break

    with pytest.warns(ResourceWarning, match="async with"):
        await first()
    await asyncio.sleep(1)
    assert left_running(client) == []


async def test_if_the_warning_is_an_error_the_waits_end_all_the_same(client, busy):
    """With ``-W error`` Python prints it, and nothing is left running."""
    stream = stream_of(client, busy)
    await anext(stream)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr("sys.unraisablehook", lambda unraisable: seen.append(unraisable.exc_type))
        warnings.simplefilter("error")
        del stream
    assert seen == [ResourceWarning]
    await asyncio.sleep(1)
    assert left_running(client) == []


async def test_a_stream_dropped_with_outcomes_not_taken_warns(client, simulator):
    """All waits have ended, but outcomes are lost."""
    stream = stream_of(client, tasks(simulator, 3))
    await anext(stream)
    await asyncio.sleep(1)
    with pytest.warns(ResourceWarning):
        del stream
    await turns()


async def test_a_stream_dropped_after_its_exception_does_not_warn(client, simulator):
    """It is at its end."""
    stream = stream_of(client, tasks(simulator, 3), on_event=callback_raising(CallersError()))
    await error_of(anext(stream), CallersError)
    del stream
    gc.collect()


def test_a_stream_dropped_after_its_loop_was_closed_only_warns():
    """There is nothing left to end; nothing is raised or logged."""
    kept = []

    async def main():
        async with Simulator() as simulator, make_client(simulator) as client:
            stream = stream_of(client, tasks(simulator, 3, duration=1.0))
            await anext(stream)
            kept.append(stream)
            await client.aclose()
            await turns()

    run_on_virtual_time(main)
    with pytest.warns(ResourceWarning):
        kept.clear()
    gc.collect()


def test_a_program_that_ends_during_a_batch_ends_quietly(caplog):
    """`asyncio.run` cancels the waits: no task is destroyed pending, nothing is logged."""

    async def main():
        async with Simulator() as simulator, aiohttp.ClientSession() as session:
            client = make_client(simulator, session=session, rate_limit=RateLimit(1, 1e6))
            ids = [f"task{n}" for n in range(2000)]
            left.append(asyncio.create_task(collected(client, Silent(ids))))
            left.append(stream_of(client, Silent(ids)))
            await left[1].__aenter__()
            await asyncio.sleep(1)
            raise CallersError

    left = []
    with pytest.raises(CallersError):
        run_on_virtual_time(main)
    assert left[0].cancelled()
    with pytest.warns(ResourceWarning, match="dropped"):
        left.clear()
    gc.collect()
    assert not caplog.records


# --- a journal ---------------------------------------------------------------------------------


class MemoryJournal:
    """A journal in memory, each of whose answers takes ``delay`` seconds."""

    def __init__(self, *known, delay=0.0):
        self.outcomes = {outcome.task_id: outcome for outcome in known}
        self.delay = delay
        self.begun = []
        self.futures = []

    def begin(self, task_id):
        self.begun.append(task_id)
        return self._answer(lambda: self.outcomes.get(task_id))

    def record(self, outcome):
        return self._answer(lambda: self.outcomes.update({outcome.task_id: outcome}))

    def _answer(self, read):
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.futures.append(future)
        loop.call_later(self.delay, lambda: future.set_result(read()))
        return future


async def test_an_outcome_the_journal_knows_is_handed_on_without_a_request(client, simulator):
    """The other tasks are waited for."""
    tasks(simulator, 3)
    known = ErrorOutcome(task_id="task1", error=CallersKontextError("known"))
    journal = MemoryJournal(known)
    found = await collected(client, ["task0", "task1", "task2"], journal=journal)
    assert sorted(names(found)) == journal.begun == ["task0", "task1", "task2"]
    assert next(outcome for outcome in found if outcome.task_id == "task1") is known
    assert [simulator.polls(f"task{n}") for n in range(3)] == [1, 0, 1]


async def test_an_outcome_is_handed_on_once_the_journal_has_recorded_it(client, simulator):
    """A wait begins once the journal has noted it, and its outcome is durable before it is seen."""
    journal = MemoryJournal(delay=5.0)
    async with stream_of(client, tasks(simulator, 2), journal=journal) as outcomes:
        async for outcome in outcomes:
            assert journal.outcomes[outcome.task_id] is outcome
            assert now() == seconds(10)
    assert [request.time for request in simulator.requests] == seconds([5, 5])


async def test_outcomes_that_are_being_recorded_take_up_room(client, simulator):
    """A slow journal stops the reading, as a slow consumer does."""
    ids = Counted(tasks(simulator, 9))
    journal = MemoryJournal(delay=5.0)
    async with stream_of(client, ids, journal=journal, max_in_flight=2) as outcomes:
        await asyncio.sleep(7)
        assert ids.read == 2
        assert len([outcome async for outcome in outcomes]) == 9


class FailingJournal(MemoryJournal):
    """A journal of which one call raises, or returns a future that fails or is cancelled."""

    def __init__(self, call, how):
        super().__init__()
        self.fails = call, how

    def begin(self, task_id):
        return self._failure("begin") or super().begin(task_id)

    def record(self, outcome):
        return self._failure("record") or super().record(outcome)

    def _failure(self, call):
        if self.fails[0] != call:
            return None
        if self.fails[1] == "raises":
            raise CallersError
        future = asyncio.get_running_loop().create_future()
        if self.fails[1] == "fails":
            future.set_exception(CallersError())
        else:
            future.cancel()
        return future


@pytest.mark.parametrize("call", ["begin", "record"])
@pytest.mark.parametrize("how", ["raises", "fails", "is_cancelled"])
async def test_an_exception_of_the_journal_ends_the_batch_and_is_raised(
    client, simulator, call, how
):
    """The waits under way are cancelled."""
    ids = [*tasks(simulator, 1), simulator.add_task("endless", duration=FOR_EVER)]
    kind = asyncio.CancelledError if how == "is_cancelled" else CallersError
    async with stream_of(client, ids, journal=FailingJournal(call, how)) as outcomes:
        await error_of(anext(outcomes), kind)
        assert [outcome async for outcome in outcomes] == []
    await assert_idle(client)


@pytest.mark.parametrize("refuse", [True, False])
async def test_an_error_outcome_without_a_wait_needs_the_journal_too(simulator, refuse):
    """A refused key, or a batch that is out of time: an exception of the journal ends the batch."""
    simulator._api_key = "another"
    keywords = {} if refuse else {"batch_timeout": 0}
    async with make_client(simulator, max_concurrency=1) as client:
        journal = FailingJournal("record", "raises")
        ids = Silent(f"task{n}" for n in range(5))
        await error_of(collected(client, ids, journal=journal, **keywords), CallersError)
        await assert_idle(client)


@pytest.mark.parametrize("after", [1, 6])
@pytest.mark.parametrize("end", ["leave", "fail"])
async def test_a_batch_that_ends_leaves_the_journals_futures_alone(client, simulator, after, end):
    """It neither waits for them nor cancels them: the journal finishes its work."""
    journal = MemoryJournal(delay=5.0)
    ids = tasks(simulator, 2)

    async def source():
        for task_id in ids:
            yield task_id
        await asyncio.sleep(after)
        raise CallersError

    async with stream_of(client, ids if end == "leave" else source(), journal=journal) as outcomes:
        if end == "leave":
            await asyncio.sleep(after)
        else:
            await error_of(anext(outcomes), CallersError)
    assert now() == seconds(after)
    assert not any(future.done() for future in journal.futures[-2:])
    await asyncio.sleep(5)
    assert [future.cancelled() for future in journal.futures] == [False] * len(journal.futures)
    assert await _all_of(outcomes) == []
    assert len(simulator.requests) == (0 if after == 1 else 2)


async def test_the_outcomes_of_a_refused_key_are_recorded(simulator):
    """Those of waits that were cancelled, and of ids read later."""
    simulator._api_key, simulator._latency = "another", 0.5
    journal = MemoryJournal()
    ids = [f"task{n}" for n in range(20)]
    async with make_client(simulator, max_concurrency=1) as client:
        outcomes = await collected(client, ids, journal=journal, max_in_flight=5)
        assert client.stats.requests == 1
    assert errors(outcomes) == dict.fromkeys(ids, AuthenticationError)
    assert sorted(journal.outcomes) == sorted(ids)


async def test_invalid_ids_do_not_reach_the_journal(client):
    """Each has an error outcome all the same."""
    journal = MemoryJournal()
    outcomes = await collected(client, ["", 5, None], journal=journal)
    assert {type(outcome.error) for outcome in outcomes} == {ConfigurationError}
    assert (len(outcomes), journal.begun, journal.outcomes) == (3, [], {})


# --- a stream ----------------------------------------------------------------------------------


async def test_an_aborted_stream_raises_the_error_once(client, simulator):
    """At the next iteration, even if outcomes were ready; then the stream is at its end."""
    ids = [*tasks(simulator, 3), simulator.add_task("endless", duration=FOR_EVER)]
    async with stream_of(client, ids) as outcomes:
        await anext(outcomes)
        await asyncio.sleep(1)
        error = CallersError()
        await outcomes.abort(error)
        assert left_running(client) == []
        assert await error_of(anext(outcomes), CallersError) is error
        assert await _all_of(outcomes) == []


async def test_aborting_ends_an_iteration_that_waits(client, simulator):
    """The consumer gets the error at once."""
    async with stream_of(client, [simulator.add_task(duration=FOR_EVER)]) as outcomes:
        consumer = asyncio.create_task(anext(outcomes))
        await asyncio.sleep(1)
        await outcomes.abort(CallersError())
        await error_of(consumer, CallersError)
    assert now() == seconds(1)


async def test_aborting_a_stream_that_has_ended_or_not_begun_has_no_effect(client, simulator):
    """No error is raised from it."""
    ids = tasks(simulator, 2)
    over, closed, new = (stream_of(client, ids) for _ in range(3))
    assert len(await _all_of(over)) == 2
    await anext(closed)
    await closed.aclose()
    for stream in (over, closed, new):
        await stream.abort(CallersError())
    assert await _all_of(over) == await _all_of(closed) == []
    assert len(await _all_of(new)) == 2


# --- a client that is closed, or elsewhere -----------------------------------------------------


@BOTH
async def test_closing_the_client_ends_the_batch(simulator, gather, busy):
    """With `ClientStateError`, and nothing is left running."""
    client = make_client(simulator)
    consumer = asyncio.create_task(gather(client, busy))
    await asyncio.sleep(5)
    await client.aclose()
    assert "closed" in str(await error_of(consumer, ClientStateError))
    await assert_idle(client)
    assert busy.closed == 1


async def test_outcomes_from_before_the_closing_can_still_be_taken(simulator):
    """They are not lost with the client."""
    ids = tasks(simulator, 3, duration=1.0)
    client = make_client(simulator)
    async with stream_of(client, [*ids, simulator.add_task(duration=FOR_EVER)]) as outcomes:
        await asyncio.sleep(2)
        await client.aclose()
        assert names([await anext(outcomes) for _ in ids]) == ids
        await error_of(anext(outcomes), ClientStateError)
        assert await _all_of(outcomes) == []


async def test_a_batch_on_a_closed_client_is_refused(simulator):
    """Before anything is read."""
    client = make_client(simulator)
    await client.aclose()
    ids = Counted(["task"])
    for use in (collected(client, ids), ordered(client, ids), anext(stream_of(client, ids))):
        await error_of(use, ClientStateError)
    assert ids.read == 0


async def test_closing_the_client_ends_a_batch_that_only_waits_for_its_source(simulator):
    """Though the batch has no wait that the client could end."""
    client = make_client(simulator)
    source = then_silent(tasks(simulator, 2))
    consumer = asyncio.create_task(collected(client, source))
    await asyncio.sleep(5)
    await client.aclose()
    await error_of(consumer, ClientStateError)
    assert source.ag_frame is None
    await assert_idle(client)


def test_a_batch_belongs_to_its_clients_loop():
    """Starting or continuing a batch in another loop is a `ClientStateError`."""
    kept = []

    async def first():
        simulator = await Simulator().__aenter__()
        client = make_client(simulator)
        stream = stream_of(client, tasks(simulator, 3, duration=FOR_EVER))
        await stream.__aenter__()
        await turns()
        kept.extend([simulator, client, stream])

    async def second():
        for use in (
            ordered(kept[1], ["task"]),
            collected(kept[1], ["task"]),
            anext(kept[2]),
            kept[2].aclose(),
        ):
            assert "another event loop" in str(await error_of(use, ClientStateError))

    async def last():
        with contextlib.suppress(KontextError, asyncio.CancelledError):
            await kept[2].aclose()
        await kept[1].aclose()
        await kept[0].aclose()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as one:
        one.run(first())
        run_on_virtual_time(second)
        one.run(last())


# --- pacing ------------------------------------------------------------------------------------


async def test_a_batch_far_larger_than_the_rate_limit_has_every_result():
    """A thousand tasks of 3 s, 20 requests a second, 10 s for each: a thousand results."""
    ids = [f"task{n}" for n in range(1000)]
    async with Simulator(durations=3.0, auto_create=True) as simulator:
        options = {"rate_limit": RateLimit(20, 1.0), "base_url": simulator.base_url}
        async with KontextClient("marker-key", **options) as client:
            outcomes = await client.wait_for_results(ids, timeout=10)
            await assert_idle(client)
    assert names(outcomes) == ids
    assert sum(outcome.result is not None for outcome in outcomes) == 1000


# --- holding the loop --------------------------------------------------------------------------

MANY = 20_000
AT_MOST = 0.05  # seconds of CPU time for one callback of the loop


class _Longest:
    """Measures the longest callback of the loop, in CPU time of the thread."""

    def run(self, main):
        """Run it up to three times: a callback that is too long is so in each of them.

        On a busy machine the same work takes several times its CPU time now and then.
        """
        for _ in range(3):
            self._measure(main)
            if self.seconds < AT_MOST:
                return
        pytest.fail(f"{self.seconds:.3f} s in {self.callback}")

    def _measure(self, main):
        self.seconds, self.callback = 0.0, ""
        run = asyncio.Handle._run

        def timed(handle):
            began = time.thread_time()
            name = handle._callback
            run(handle)
            took = time.thread_time() - began
            if took > self.seconds:
                self.seconds, self.callback = took, f"{name!r:.300}"

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio.Handle, "_run", timed)
            gc.collect()
            gc.disable()
            try:
                asyncio.run(main(), debug=False)
            finally:
                gc.enable()


def _many(source):
    """Make a client that may send one request in months, and a batch with many waits."""

    @contextlib.asynccontextmanager
    async def context(**options):
        async with Simulator(auto_create=True, durations=FOR_EVER, **options) as simulator:
            limit = RateLimit(1, 1e7)
            ids = source(f"task{n}" for n in range(MANY))
            async with make_client(simulator, rate_limit=limit) as client:
                yield client, stream_of(client, ids, max_in_flight=2 * MANY, timeout=None)

    return context


async def _all_waiting(client):
    while client.stats.waits < MANY - 1:  # noqa: ASYNC110  # the client has no event for it
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("source", [list, aiter_of])
def test_starting_and_leaving_many_waits_yields_to_the_loop(source):
    """Neither is one long callback, whatever the source of the ids."""

    async def main():
        async with _many(source)() as (client, stream):
            async with stream:
                await _all_waiting(client)
            assert client.stats.waits == 0

    _Longest().run(main)


async def test_taking_thousands_of_outcomes_lets_others_run(client):
    """A consumer that finds them all ready never has to wait, yet does not hold the loop."""
    turn = 0

    async def other():
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    async with stream_of(client, (f"{n}\n" for n in range(3000))) as outcomes:
        await asyncio.sleep(1)
        running = asyncio.create_task(other())
        taken = [await anext(outcomes) for _ in range(3000)]
        running.cancel()
    assert len(taken) == 3000
    assert 3 <= turn <= 30


def test_closing_a_client_with_many_waits_yields_to_the_loop():
    """So does ending the batch."""

    async def main():
        async with _many(list)() as (client, stream):
            async with stream:
                await _all_waiting(client)
                await client.aclose()
                await error_of(anext(stream), ClientStateError)
            assert client.stats.waits == 0

    _Longest().run(main)


def test_a_refused_key_with_many_waits_yields_to_the_loop():
    """All of them end, with one request."""

    async def main():
        async with _many(list)(api_key="another") as (client, stream):
            get, all_waiting = client._transport._get, asyncio.Event()

            async def get_later(*args):
                await all_waiting.wait()
                return await get(*args)

            client._transport._get = get_later
            async with stream:
                await _all_waiting(client)
                all_waiting.set()
                found = Counter([type(outcome.error) async for outcome in stream])
            assert found == {AuthenticationError: MANY}
            assert client.stats.requests == 1

    _Longest().run(main)
