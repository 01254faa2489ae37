"""Properties of every batch: one outcome for each id, and nothing left running."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

import attrs
from client_world import EVERY_SECOND, make_client, run_on_virtual_time
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kontext_async import (
    AuthenticationError,
    CompletedTask,
    ConfigurationError,
    GenerationFailedError,
    RateLimit,
    ServerError,
    TaskNotFoundError,
    WaitTimeoutError,
)
from kontext_async.simulator import Simulator

TIMEOUT = 30.0

# Kinds of tasks: seconds until it is done, its first answers, and the end of its wait.
KINDS = {
    "done": (0.0, [], CompletedTask),
    "quick": (0.75, [], CompletedTask),
    "slow": (12.5, [], CompletedTask),
    "endless": (math.inf, [], WaitTimeoutError),
    "failed": (None, ["failed"], GenerationFailedError),
    "failed_later": (None, ["generating", "http_500", "failed"], GenerationFailedError),
    "shaky": (None, ["http_500", "empty_200", "truncated", "success"], CompletedTask),
    "refused_once": (None, ["rate_limited", "success"], CompletedTask),
    "unknown": (None, ["not_found"] * 99, TaskNotFoundError),
    "broken": (None, ["http_500"] * 99, ServerError),
    "invalid": (None, [], ConfigurationError),
}


@attrs.frozen
class Batch:
    """The tasks of a batch, and its options."""

    kinds: list[str]
    given: list[int]  # places in the list of kinds, perhaps several times
    room: int
    concurrency: int
    rate: int
    asynchronous: bool
    pauses: list[float]  # of the source and of the consumer, in a cycle

    def name(self, place):
        bad = " " * (place + 1)
        return bad if self.kinds[place] == "invalid" else f"{self.kinds[place]}-{place}"

    @property
    def names(self):
        return [self.name(place) for place in self.given]

    @property
    def may_pause(self):
        """True if five tasks can fail in a row, which is an outage."""
        kinds = [self.kinds[place] for place in set(self.given)]
        return sum(kind in {"broken", "shaky", "failed_later"} for kind in kinds) >= 5

    def pause(self, step):
        return self.pauses[step % len(self.pauses)]


@st.composite
def batches(draw):
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=12))
    places = st.integers(0, len(kinds) - 1)
    return Batch(
        kinds=kinds,
        given=draw(st.lists(places, max_size=25)),
        room=draw(st.integers(1, 15)),
        concurrency=draw(st.integers(1, 4)),
        rate=draw(st.sampled_from([3, 20, 1000])),
        asynchronous=draw(st.booleans()),
        pauses=draw(st.lists(st.sampled_from([0.0, 0.0, 0.3, 5.0, 40.0]), min_size=1, max_size=4)),
    )


class _World:
    """A simulator with a batch's tasks, a client, and its events."""

    def __init__(self, batch):
        self.batch = batch
        self.read = self.taken = 0
        self.events = Counter()

    async def __aenter__(self):
        self.simulator = await Simulator().__aenter__()
        for place, kind in enumerate(self.batch.kinds):
            if kind != "invalid":
                duration, script, _ = KINDS[kind]
                self.simulator.add_task(self.batch.name(place), duration=duration, script=script)
        self.client = make_client(
            self.simulator,
            max_concurrency=self.batch.concurrency,
            rate_limit=RateLimit(self.batch.rate, 1.0),
        )
        return self

    async def __aexit__(self, *exc_info):
        await self.client.aclose()
        await self.simulator.aclose()

    @property
    def keywords(self):
        return {
            "max_in_flight": self.batch.room,
            "timeout": TIMEOUT,
            "wait": EVERY_SECOND,
            "error_grace": 15.0,
            "on_event": self.count,
        }

    def count(self, event):
        self.events[event.task_id] += 1

    def source(self):
        return self._async_ids() if self.batch.asynchronous else self._ids()

    def _ids(self):
        for name in self.batch.names:
            assert self.client.stats.waits <= self.batch.room
            self.read += 1
            yield name

    async def _async_ids(self):
        for step, name in enumerate(self._ids()):
            await asyncio.sleep(self.batch.pause(step))
            yield name

    def check(self, outcome):
        """Assert that an outcome is right for its task, which one wait alone has polled."""
        kind = outcome.task_id.partition("-")[0].strip() or "invalid"
        assert isinstance(outcome.result or outcome.error, KINDS[kind][2]) or (
            kind == "broken" and self.batch.may_pause and _was_held(outcome.error)
        )
        assert (outcome.result is None) != (outcome.error is None)
        if kind != "invalid":
            assert self.simulator.polls(outcome.task_id) <= self.events[outcome.task_id]
            subject = outcome.result or outcome.error
            assert subject.task_id == outcome.task_id

    def assert_idle(self):
        stats = self.client.stats
        assert (stats.waits, stats.in_flight) == (0, 0)
        ours = [
            task
            for task in asyncio.all_tasks() - {asyncio.current_task()}
            if "simulator" not in (file := task.get_coro().cr_code.co_filename)
            and "kontext_async" in file
        ]
        assert not ours


def _was_held(error):
    """Return True for a timeout in a pause: failing polls may extend one until the deadline."""
    return isinstance(error, WaitTimeoutError) and isinstance(error.last_error, ServerError)


@settings(max_examples=40)
@given(batches())
@example(Batch(["done"], [0, 0, 0], 1, 1, 3, asynchronous=True, pauses=[40.0]))
@example(Batch(sorted(KINDS), [*range(11), *range(11)], 1, 1, 3, asynchronous=False, pauses=[0.0]))
def test_each_distinct_id_has_exactly_one_outcome_its_own(batch):
    """However tasks go, ids repeat, room and limit are short, or source and consumer slow."""

    async def main():
        async with _World(batch) as world:
            found = []
            async with world.client.as_completed(world.source(), **world.keywords) as outcomes:
                async for outcome in outcomes:
                    world.check(outcome)
                    found.append(outcome.task_id)
                    await asyncio.sleep(batch.pause(len(found)))
            assert sorted(found) == sorted(set(batch.names))
            world.assert_idle()

    run_on_virtual_time(main)


@settings(max_examples=25)
@given(batches())
def test_results_are_in_the_order_given(batch):
    """One for each id, and the same outcome for the same id."""

    async def main():
        async with _World(batch) as world:
            outcomes = await world.client.wait_for_results(world.source(), **world.keywords)
            assert [outcome.task_id for outcome in outcomes] == batch.names
            for outcome in outcomes:
                world.check(outcome)
            assert len({id(outcome) for outcome in outcomes}) == len(set(batch.names))
            world.assert_idle()

    run_on_virtual_time(main)


@settings(max_examples=25)
@given(batches(), st.sampled_from([0.0, 0.5, 3.0, 14.0]), st.booleans())
def test_at_the_batchs_deadline_every_id_has_its_outcome(batch, limit, refuse):
    """Even if the key is refused on the way: earlier results remain, the others have an error."""

    async def main():
        async with _World(batch) as world:
            loop = asyncio.get_running_loop()
            began = loop.time()
            if refuse:
                loop.call_later(1.5, setattr, world.simulator, "_api_key", "another")
            outcomes = await world.client.wait_for_results(
                batch.names, **world.keywords, batch_timeout=limit
            )
            assert loop.time() - began < limit + 0.001
            assert [outcome.task_id for outcome in outcomes] == batch.names
            for outcome in outcomes:
                if not isinstance(outcome.error, (WaitTimeoutError, AuthenticationError)):
                    world.check(outcome)
                assert refuse or not isinstance(outcome.error, AuthenticationError)
            world.assert_idle()

    run_on_virtual_time(main)


@settings(max_examples=30)
@given(batches(), st.floats(0, 20), st.sampled_from(["leave", "cancel", "close"]))
def test_a_batch_that_ends_at_any_moment_leaves_nothing_running(batch, after, how):
    """By leaving, by cancellation, or by closing the client: no request comes later."""

    async def main():
        async with _World(batch) as world:

            async def consume():
                async with world.client.as_completed(world.source(), **world.keywords) as outcomes:
                    if how == "leave":
                        await asyncio.sleep(after)
                    else:
                        async for _ in outcomes:
                            pass

            consumer = asyncio.create_task(consume())
            await asyncio.sleep(after)
            if how == "cancel":
                consumer.cancel()
            elif how == "close":
                await world.client.aclose()
            await asyncio.wait([consumer], timeout=1)
            assert consumer.done()
            world.assert_idle()
            sent = len(world.simulator.requests)
            await asyncio.sleep(60)
            assert len(world.simulator.requests) == sent

    run_on_virtual_time(main)
