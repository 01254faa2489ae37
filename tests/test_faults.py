"""Faults met in the wild: one bad answer harms nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tenacity import wait_fixed
from virtual_time import VirtualTimeLoop

from kontext_async import (
    ApiError,
    AuthenticationError,
    ConfigurationError,
    KontextClient,
    RateLimit,
    ServerError,
    TransportError,
    WaitTimeoutError,
)
from kontext_async import batch as batch_module
from kontext_async.simulator import Simulator
from kontext_async.simulator.steps import http, rate_limited, refused

pytestmark = [pytest.mark.virtual_time, pytest.mark.usefixtures("fetcher")]

UNBOUND = RateLimit(1_000_000, 1.0)
GATEWAY_401 = http(401)
DEAD = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
async def client(simulator):
    async with KontextClient("key", base_url=simulator.base_url, rate_limit=UNBOUND) as client:
        yield client


async def outcomes_of(client, task_ids, **keywords):
    keywords = {"wait": wait_fixed(1), **keywords}
    return {o.task_id: o for o in await client.wait_for_results(task_ids, **keywords)}


# Refusals that earlier good answers contradict


@pytest.mark.parametrize("step", [GATEWAY_401, "code_401", http(404)])
async def test_a_refusal_between_good_answers_is_trouble_of_that_poll(simulator, client, step):
    ids = [
        simulator.add_task(script=["generating", *([step] if n == 50 else []), "success"])
        for n in range(100)
    ]
    outcomes = await outcomes_of(client, ids)
    assert all(outcome.result for outcome in outcomes.values())


@pytest.mark.parametrize("step", [GATEWAY_401, "code_401", http(404)])
async def test_a_refusal_before_any_good_answer_is_final(simulator, client, step):
    task_id = simulator.add_task(script=[step])
    with pytest.raises(ApiError) as caught:
        await client.wait_for_result(task_id)
    assert caught.value.code in {401, 404}
    assert len(simulator.requests) == 1


async def test_three_polls_in_a_row_refused_with_401_refuse_the_key(simulator, client):
    """Of three tasks, where there are three; the outcomes before them stay."""
    first = simulator.add_task(duration=0)
    ids = [simulator.add_task(script=["generating", *["code_401"] * 50]) for _ in range(5)]
    outcomes = await outcomes_of(client, [first, *ids])
    assert outcomes[first].result
    assert {type(outcomes[i].error) for i in ids} == {AuthenticationError}
    assert len(simulator.requests) <= 1 + 5 + 5


async def test_one_task_refused_three_times_refuses_the_key_only_if_it_is_alone(simulator, client):
    good = simulator.add_task(duration=20)
    bad = simulator.add_task(script=["generating", *itertools.repeat("code_401", 10), "success"])
    outcomes = await outcomes_of(client, [good, bad], error_grace=60)
    assert all(outcome.result for outcome in outcomes.values())
    alone = simulator.add_task(script=["generating", *itertools.repeat("code_401", 10)])
    assert type((await outcomes_of(client, [alone]))[alone].error) is AuthenticationError
    assert len([r for r in simulator.requests if r.task_id == alone]) == 4


async def test_a_403_about_one_task_is_that_tasks_alone(simulator, client):
    good = simulator.add_task(duration=5)
    bad = simulator.add_task(script=[refused(403)])
    outcomes = await outcomes_of(client, [bad, good])
    assert outcomes[good].result
    assert (type(outcomes[bad].error), outcomes[bad].error.code) == (ApiError, 403)


@pytest.mark.parametrize("status", [400, 403, 408, 409, 421, 425])
async def test_a_gateways_bare_refusal_is_trouble(simulator, client, status):
    task_id = simulator.add_task(script=[http(status), http(status), "success"])
    assert (await outcomes_of(client, [task_id]))[task_id].result


# Arguments and exceptions


@pytest.mark.parametrize("host", ["api..example", "a" * 64 + ".example"])
def test_a_host_that_cannot_be_a_name_is_refused_at_once(host):
    with pytest.raises(ConfigurationError, match="cannot be a name"):
        KontextClient("key", base_url=f"https://{host}")


async def test_a_callback_that_raises_stop_async_iteration_ends_the_batch_with_an_error(
    simulator, client
):
    def on_event(event):
        raise StopAsyncIteration

    ids = [simulator.add_task(duration=math.inf)]
    with pytest.raises(RuntimeError, match="StopAsyncIteration"):
        await outcomes_of(client, ids, on_event=on_event)


# Endless sources


async def test_a_stream_forgets_old_ids(simulator, client, monkeypatch):
    """Memory is bounded: an id is a duplicate only among those in flight and the newest ended."""
    monkeypatch.setattr(batch_module, "_ENDED_IDS", 3)
    ids = [simulator.add_task(f"t{n}", duration=0) for n in range(6)]
    source = [*ids, "t5", "t4", "t3", "t0"]
    seen = []
    async with client.as_completed(source, max_in_flight=1) as outcomes:
        async for outcome in outcomes:
            seen.append(outcome.task_id)
            await asyncio.sleep(0)
    assert seen == [*ids, "t0"]


async def test_a_list_of_results_remembers_all_ids(simulator, client, monkeypatch):
    monkeypatch.setattr(batch_module, "_ENDED_IDS", 1)
    ids = [simulator.add_task(f"t{n}", duration=0) for n in range(4)]
    outcomes = await client.wait_for_results([*ids, *ids], max_in_flight=1)
    assert [o.task_id for o in outcomes] == [*ids, *ids]
    assert len(simulator.requests) == 4


# Broken tasks and outages


@pytest.mark.parametrize(
    ("broken", "first"), [(5, True), (20, True), (20, False), (60, True), (100, False)]
)
async def test_broken_tasks_do_not_starve_healthy_ones(simulator, client, broken, first):
    """With all defaults; the healthy ones take 12 s undisturbed, the broken ones their grace."""
    healthy = [simulator.add_task(duration=12) for _ in range(100)]
    bad = [simulator.add_task(script=itertools.repeat("http_500")) for _ in range(broken)]
    ended = {}
    async with client.as_completed(bad + healthy if first else healthy + bad) as outcomes:
        async for outcome in outcomes:
            ended[outcome.task_id] = (simulator.now, outcome)
    assert all(ended[task_id][1].result for task_id in healthy)
    assert max(ended[task_id][0] for task_id in healthy) < 3 * 14
    assert {type(ended[task_id][1].error) for task_id in bad} == {ServerError}
    assert all(300 <= ended[task_id][0] < 380 for task_id in bad)


async def test_a_dead_api_ends_all_waits_by_their_grace_or_timeout():
    """Each names the cause; a thousand take no longer than one."""
    async with KontextClient("key", base_url=DEAD) as client:
        loop = asyncio.get_running_loop()
        began = loop.time()
        outcomes = await client.wait_for_results([f"t{n}" for n in range(1000)])
        assert loop.time() - began <= 600
    assert all(
        "cannot be reached: Connection refused" in str(outcome.error) for outcome in outcomes
    )
    assert {type(outcome.error) for outcome in outcomes} == {TransportError, WaitTimeoutError}


async def test_an_outage_ends_with_the_first_good_answer(simulator, client):
    """Tasks that were polled before probe it, and all go on."""
    ids = [
        simulator.add_task(script=["generating", *["http_503"] * 2, "success"]) for _ in range(30)
    ]
    outcomes = await outcomes_of(client, ids, error_grace=None, timeout=None)
    assert all(outcome.result for outcome in outcomes.values())


async def test_a_wait_blocked_by_an_outage_shows_no_other_tasks_error(simulator, client):
    ids = [simulator.add_task(script=itertools.repeat("http_500")) for _ in range(8)]
    outcomes = await outcomes_of(client, ids, timeout=40, error_grace=None)
    for task_id, outcome in outcomes.items():
        others = [other for other in ids if other != task_id]
        assert not any(other in str(outcome.error) for other in others)


@given(
    healthy=st.integers(1, 40),
    broken=st.integers(0, 120),
    duration=st.sampled_from([2.0, 12.0, 45.0]),
    wait=st.sampled_from([None, wait_fixed(2), wait_fixed(10)]),
    known=st.sampled_from([UNBOUND, None]),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=5)
@pytest.mark.parametrize("step", ["http_500", "http_503"])
def test_any_share_of_broken_tasks_leaves_the_others_alone(
    step, healthy, broken, duration, wait, known, order
):
    """The others end within three times their undisturbed time, the broken ones by their grace."""

    async def main():
        async with Simulator() as simulator:
            good = [simulator.add_task(duration=duration) for _ in range(healthy)]
            bad = [simulator.add_task(script=itertools.repeat(step)) for _ in range(broken)]
            ids = [*good, *bad]
            order.shuffle(ids)
            ended = {}
            keywords = {"error_grace": 100, "wait": wait}
            async with (
                KontextClient("key", base_url=simulator.base_url, rate_limit=known) as client,
                client.as_completed(ids, **keywords) as outcomes,
            ):
                async for outcome in outcomes:
                    ended[outcome.task_id] = (simulator.now, type(outcome.error))
            assert max(ended[task_id][0] for task_id in good) < 3 * (duration + 10)
            assert {ended[task_id][1] for task_id in good} == {type(None)}
            assert {ended[task_id][1] for task_id in bad} <= {ServerError}

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())


async def test_a_pause_that_was_asked_for_extends_the_grace_of_a_blocked_wait(simulator, client):
    """The failing task may poll no more before its grace ends, but that time does not count."""
    failing = simulator.add_task(script=itertools.repeat("http_500"))
    paused = simulator.add_task(script=["generating", rate_limited(20), "success"])
    ended = {}

    async def wait_for(task_id):
        with contextlib.suppress(ServerError):
            await client.wait_for_result(task_id, wait=wait_fixed(1), error_grace=3)
        ended[task_id] = simulator.now

    await asyncio.gather(wait_for(failing), wait_for(paused))
    assert ended == {paused: pytest.approx(21), failing: pytest.approx(23)}


async def test_a_queue_does_not_end_the_wait_for_a_task_that_is_not_visible_yet(simulator):
    """The grace ends it only with a poll that says again that the task is unknown."""
    task_id = simulator.add_task(script=["not_visible", "success"])
    limit = RateLimit(1, 20.0)
    async with KontextClient("key", base_url=simulator.base_url, rate_limit=limit) as client:
        assert await client.wait_for_result(task_id, not_found_grace=10.0)
    assert simulator.now >= 20.0


async def test_an_exception_of_the_clients_own_session_is_not_hidden(simulator, client):
    """It would be a defect, not the network."""
    await client.record_info(simulator.add_task())
    client._transport._fetcher.fetch = Mock(side_effect=ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        await client.record_info(simulator.add_task())
    assert client.stats.in_flight == 0


async def test_a_source_that_ends_when_it_is_cancelled_ends_with_its_batch(simulator, client):
    async def source():
        yield simulator.add_task(duration=math.inf)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(math.inf)

    async with client.as_completed(source()) as outcomes:
        reading = asyncio.create_task(anext(outcomes, None))
        await asyncio.sleep(5)
    assert await reading is None
