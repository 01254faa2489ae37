"""One wait, against the simulator on a loop whose clock jumps: every time here is exact."""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import random
from datetime import timedelta
from unittest.mock import AsyncMock

import pytest
import tenacity
from client_world import (
    EVERY_SECOND,
    error_of,
    make_client,
    run_on_virtual_time,
    seconds,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tenacity import wait_fixed, wait_none

from kontext_async import (
    ApiError,
    AuthenticationError,
    ClientStateError,
    CompletedTask,
    ConfigurationError,
    DurationModel,
    GenerationFailedError,
    InvalidRequestError,
    KontextError,
    MaintenanceError,
    PollEvent,
    RateLimit,
    RateLimitedError,
    ResponseFormatError,
    ServerError,
    TaskNotFoundError,
    TaskStatus,
    TransportError,
    WaitTimeoutError,
)
from kontext_async.notices import Noticeboard
from kontext_async.pacing import RequestBudget
from kontext_async.polling import TaskWait, WaitPolicy
from kontext_async.schedule import wait_learned
from kontext_async.simulator import STEPS, Simulator
from kontext_async.simulator.replies import refused

pytestmark = pytest.mark.virtual_time


def gaps(times):
    return [b - a for a, b in itertools.pairwise(times)]


def request_times(simulator, task_id=None):
    return [r.time for r in simulator.requests if task_id in (None, r.task_id)]


async def outcome_of(awaitable):
    """Return the result, or the error of this library."""
    try:
        return await awaitable
    except KontextError as error:
        return error


class _Wait:
    """Waits for one scripted task, and records the times of its polls and of its end."""

    def __init__(self, client, simulator):
        self.client = client
        self.simulator = simulator
        self.events = []

    async def __call__(self, *script, duration=None, age=0.0, task_id=None, **keywords):
        """Return the outcome of a wait that polls every second, or as the keywords say."""
        task_id = self.simulator.add_task(task_id, script=script, duration=duration, age=age)
        return await self.again(task_id, **keywords)

    async def again(self, task_id, **keywords):
        keywords = {"wait": EVERY_SECOND, "on_event": self.events.append, **keywords}
        before = len(request_times(self.simulator, task_id))
        began, self.began = asyncio.get_running_loop().time(), self.simulator.now
        try:
            return await outcome_of(self.client.wait_for_result(task_id, **keywords))
        finally:
            self.took = asyncio.get_running_loop().time() - began
            self.poll_times = [
                t - self.began for t in request_times(self.simulator, task_id)[before:]
            ]


@pytest.fixture
def wait(client, simulator):
    return _Wait(client, simulator)


DONE = "the task is done"
AGAIN = "still generating"
PAUSE = "the whole client pauses"
VARIANTS = {
    # The treatment of each answer; that of an error is (its class, True if it is retried).
    "generating": AGAIN,
    "generating_sparse": AGAIN,
    "success": DONE,
    "success_nulls": DONE,
    "success_error_400": DONE,
    "success_error_0": DONE,
    "success_no_url": (ResponseFormatError, True),
    "response_text": DONE,
    "response_empty": (ResponseFormatError, True),
    "response_null": (ResponseFormatError, True),
    "flag_text": DONE,
    "flag_missing": (ResponseFormatError, True),
    "flag_unknown": (ResponseFormatError, True),
    "code_text": DONE,
    "failed": (GenerationFailedError, False),
    "failed_create": (GenerationFailedError, False),
    "failed_flagged": (GenerationFailedError, False),
    "failed_code_text": (GenerationFailedError, False),
    "failed_code_blank": (GenerationFailedError, False),
    "failed_code_null": (GenerationFailedError, False),
    "failed_code_unknown": (GenerationFailedError, False),
    "failed_no_message": (GenerationFailedError, False),
    "times_plain": DONE,
    "times_ms": DONE,
    "times_ms_text": DONE,
    "times_unreadable": DONE,
    "params_broken": DONE,
    "params_null": DONE,
    "extra_fields": DONE,
    "no_task_id": DONE,
    "other_task": (ResponseFormatError, True),
    "not_an_object": (ResponseFormatError, True),
    "data_text": (ResponseFormatError, True),
    "code_401": (AuthenticationError, False),
    "code_402": (ApiError, False),
    "code_403": (ApiError, False),
    "code_404": (TaskNotFoundError, True),
    "code_408": (ApiError, True),
    "code_422": (InvalidRequestError, False),
    "code_429": PAUSE,
    "code_451": (ApiError, False),
    "code_455": PAUSE,
    "code_500": (ServerError, True),
    "code_501": (GenerationFailedError, False),
    "code_501_record": (GenerationFailedError, False),
    "code_502": (ServerError, True),
    "code_503": (ServerError, True),
    "code_504": (ServerError, True),
    "code_505": (ServerError, False),
    "code_524": (ServerError, True),
    "http_429": PAUSE,
    "http_500": (ServerError, True),
    "http_502": (ServerError, True),
    "http_503": (ServerError, True),
    "http_504": (ServerError, True),
    "rate_limited": PAUSE,
    "rate_limited_until": PAUSE,
    "rate_limited_in_body": PAUSE,
    "not_found": (TaskNotFoundError, True),
    "not_visible": (TaskNotFoundError, True),
    "data_null": (TaskNotFoundError, True),
    "data_missing": (TaskNotFoundError, True),
    "html_403": (ApiError, True),
    "gateway_403": (ApiError, True),
    "html_404": (ApiError, False),
    "empty_404": (ApiError, False),
    "html_429": PAUSE,
    "empty_429": PAUSE,
    "html_500": (ServerError, True),
    "html_502": (ServerError, True),
    "html_503": (ServerError, True),
    "html_504": (ServerError, True),
    "empty_500": (ServerError, True),
    "empty_502": (ServerError, True),
    "empty_503": (ServerError, True),
    "empty_504": (ServerError, True),
    "html_503_retry_after": PAUSE,
    "html_200": (ResponseFormatError, True),
    "empty_200": (ResponseFormatError, True),
    "reset": (TransportError, True),
    "reset_mid_body": (TransportError, True),
    "closed": (TransportError, True),
    "closed_after": DONE,
    "stall": (TransportError, True),
    "stall_mid_body": (TransportError, True),
    "slow": DONE,
    "truncated": (TransportError, True),
    "overrun": (TransportError, True),
    "not_http": (TransportError, True),
    "chunked": DONE,
    "gzip": DONE,
    "oversized": (ResponseFormatError, True),
    "oversized_chunked": (ResponseFormatError, True),
    "oversized_gzip": (ResponseFormatError, True),
    "redirect": (TransportError, False),
}
# aiohttp itself sends a request again that a closing connection left unanswered.
RESENT = ("reset", "closed")


def test_every_variant_that_the_simulator_knows_is_tried():
    """The table above names each step of the simulator."""
    assert VARIANTS.keys() == STEPS.keys()


@pytest.mark.parametrize("name", VARIANTS)
async def test_a_wait_retries_a_retryable_answer_and_ends_with_any_other(wait, name):
    """It polls again exactly where that may help, and then has the result."""
    treatment = VARIANTS[name]
    outcome = await wait(name, *([name] if name in RESENT else []))
    if treatment is DONE or treatment in (AGAIN, PAUSE) or treatment[1]:
        assert isinstance(outcome, CompletedTask)
        assert outcome.result_image_url.startswith(wait.simulator.base_url)
        assert len(wait.events) == (1 if treatment is DONE else 2)
    else:
        assert type(outcome) is treatment[0]
        assert outcome.task_id in str(outcome)
        assert len(wait.events) == 1
        assert wait.events[0].error is (None if wait.events[0].record else outcome)


@pytest.mark.parametrize("name", [n for n, t in VARIANTS.items() if isinstance(t, tuple)])
async def test_with_no_grace_a_variant_raises_its_own_error_at_once(wait, name):
    """Each kind of refusal, failure and unreadable answer has its own class."""
    outcome = await wait(*[name] * 2, error_grace=0, not_found_grace=0)
    assert type(outcome) is VARIANTS[name][0]
    assert len(wait.events) == 1


NOT_GENERATED = "The image could not be generated."


@pytest.mark.parametrize(
    ("name", "code", "message", "status"),
    [
        ("failed", 501, NOT_GENERATED, TaskStatus.GENERATE_FAILED),
        ("failed_create", 500, "Could not be created.", TaskStatus.CREATE_TASK_FAILED),
        ("failed_code_text", 500, NOT_GENERATED, TaskStatus.GENERATE_FAILED),
        ("failed_code_blank", None, NOT_GENERATED, TaskStatus.GENERATE_FAILED),
        ("failed_code_null", None, NOT_GENERATED, TaskStatus.GENERATE_FAILED),
        ("failed_code_unknown", 433, NOT_GENERATED, TaskStatus.GENERATE_FAILED),
        ("failed_no_message", 501, "", TaskStatus.GENERATE_FAILED),
    ],
)
async def test_a_failed_task_says_why(wait, name, code, message, status):
    """The reason is the record's own, not the envelope's "success"."""
    error = await wait(name)
    assert (error.error_code, error.error_message, error.status) == (code, message, status)
    assert error.record.status is status
    assert error.record == wait.events[-1].record


async def test_a_failure_without_a_record_has_none(wait):
    """Envelope code 501 alone ends the wait."""
    error = await wait("code_501")
    assert error.record is None
    assert (error.error_code, error.status) == (501, TaskStatus.GENERATE_FAILED)


async def test_an_envelope_501_with_a_record_of_success_is_a_success(wait):
    """If there is a record, its flag decides."""

    def step(request):
        request.task.end(request.now, None)
        return refused(501, data=request.record())

    assert isinstance(await wait(step), CompletedTask)


async def test_a_completed_task_has_the_records_fields(wait):
    """The result has the times of the record."""
    done = await wait(duration=10.0, age=5.0)
    assert done.task_id == wait.events[-1].task_id
    assert done.duration == timedelta(seconds=10)
    assert done.params["prompt"] == "A lighthouse at dusk"
    assert done.expires_at - done.complete_time == timedelta(days=14)


# --- failures and graces -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "keywords", "poll_times"),
    [
        ("not_found", {"wait": wait_fixed(3)}, [0, 3, 6, 9, 10]),  # the default of 10 s
        ("not_visible", {"not_found_grace": 0}, [0]),
        ("http_500", {"wait": wait_fixed(120)}, [0, 120, 240, 300]),  # the default of 300 s
        ("http_500", {"error_grace": 4.5}, [0, 1, 2, 3, 4, 4.5]),
        ("code_408", {"error_grace": 4.5}, [0, 1, 2, 3, 4, 4.5]),
        ("gateway_403", {"error_grace": 4.5}, [0, 1, 2, 3, 4, 4.5]),
        ("empty_200", {"error_grace": 4.5}, [0, 1, 2, 3, 4, 4.5]),
        ("truncated", {"error_grace": 4.5}, [0, 1, 2, 3, 4, 4.5]),
        ("success_no_url", {"error_grace": 2.5}, [0, 1, 2, 2.5]),  # it may be set a moment later
    ],
)
async def test_failures_are_retried_until_their_grace_is_over(wait, step, keywords, poll_times):
    """The grace counts from the first failed poll, and the last poll is at its very end."""
    error = await wait(*[step] * 99, **keywords)
    assert type(error) is VARIANTS[step][0]
    assert error is wait.events[-1].error
    assert ("resultImageUrl" in str(error)) == (step == "success_no_url")
    assert wait.poll_times == seconds(poll_times)
    assert wait.took == seconds(poll_times[-1])


@pytest.mark.parametrize("step", ["not_found", "http_500"])
async def test_without_a_grace_failures_are_retried_until_the_deadline(wait, step):
    """A grace of None has no limit of its own."""
    keywords = {"error_grace": None, "not_found_grace": None, "wait": wait_fixed(150)}
    error = await wait(*[step] * 99, timeout=400, **keywords)
    assert type(error) is WaitTimeoutError
    assert type(error.last_error) is VARIANTS[step][0]
    assert wait.took == seconds(400)


async def test_a_good_record_resets_the_grace_of_an_unknown_task(wait):
    """The grace counts from the first such poll since the last good record."""
    script = ["not_found"] * 4 + ["generating"] + ["not_found"] * 99
    await wait(*script, not_found_grace=4.5)
    assert wait.poll_times == seconds([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9.5])


async def test_the_grace_counts_failures_of_all_kinds_together(wait):
    """A gateway may fail each time in another way; the last error is raised."""
    script = ["http_500", "truncated", "empty_200", "gateway_403", "code_408", "html_502"]
    error = await wait(*script, error_grace=4.5)
    assert type(error) is ServerError
    assert error.code == 502
    assert wait.poll_times == seconds([0, 1, 2, 3, 4, 4.5])


async def test_a_good_record_resets_the_grace_of_failures(wait):
    """Failures after it have the full grace."""
    script = ["http_500"] * 4 + ["generating"] + ["http_500"] * 4
    assert isinstance(await wait(*script, error_grace=4.5), CompletedTask)


def refused_for(retry_after, code=429):
    return refused(code, status=code, retry_after=retry_after)


@pytest.mark.parametrize("step", ["code_408", "not_found"])
async def test_time_in_a_pause_does_not_count_against_a_grace(wait, step):
    """After 4 s of failures and 20 s of pause, one second of a grace of 5 s is left."""
    script = [step, step, refused_for(20), *[step] * 9]
    error = await wait(*script, error_grace=5, not_found_grace=5, wait=wait_fixed(2))
    assert type(error) is VARIANTS[step][0]
    assert wait.poll_times == seconds([0, 2, 4, 24, 25])


async def test_a_refusal_neither_begins_nor_resets_a_grace(wait):
    """It says nothing about the task: without a grace it is retried, and a running one goes on."""
    outcome = await wait("code_429", "code_455", error_grace=0, not_found_grace=0)
    assert isinstance(outcome, CompletedTask)
    script = ["code_408", "code_429", "code_408", "code_408", "code_408", "success"]
    assert type(await wait(*script, error_grace=2.5)) is ApiError


# --- the client-wide pause ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "pause"),
    [
        ("rate_limited", 2),
        ("rate_limited_until", 2),
        ("html_503_retry_after", 2),
        (refused_for(7, code=455), 7),
        (refused_for(7, code=503), 7),
        (refused_for(100_000), 300),
        (refused_for(0), 0.25),
        ("code_429", 0.25),
        ("code_455", 5),
        ("rate_limited_in_body", 0.25),
    ],
)
async def test_a_pause_is_as_long_as_the_service_asks(wait, step, pause):
    """Retry-After is seconds or a date, at most 300 s; without it, 0.25 s for 429, 5 s for 455."""
    await wait(step, wait=wait_none())
    assert wait.poll_times == seconds([0, pause])
    assert wait.events[0].next_delay == seconds(pause)


async def test_a_wait_sleeps_the_longer_of_pause_and_schedule(wait):
    """A pause does not shorten the schedule's own delay."""
    await wait("rate_limited", wait=wait_fixed(5))
    assert wait.poll_times == seconds([0, 5])
    assert wait.events[0].next_delay == seconds(5)


async def test_a_pause_grows_up_to_a_minute(wait):
    """It trebles from 0.25 s, or doubles from 5 s for maintenance; a good answer resets it."""
    refusals = ["code_429"] * 7
    await wait(*refusals, "generating", "code_429", wait=wait_fixed(0.2))
    pauses = [0.25, 0.75, 2.25, 6.75, 20.25, 60, 60]
    assert gaps(wait.poll_times) == seconds([*pauses, 0.2, 0.25])
    await wait(*["code_455"] * 6)
    assert gaps(wait.poll_times) == seconds([5, 10, 20, 40, 60, 60])


async def test_failures_after_a_refusal_end_with_their_grace(wait):
    """The pause is over, so they are this task's own failures."""
    error = await wait("code_429", *["http_500"] * 99, error_grace=3, timeout=100)
    assert type(error) is ServerError
    assert wait.poll_times == seconds([0, 1, 2, 3, 4])


async def test_a_pause_holds_all_waits_of_the_client_and_one_request_probes_its_end(simulator):
    """While the probe is unanswered no other wait polls; a good answer releases them all."""
    simulator._latency = 0.5
    refused = simulator.add_task(script=[refused_for(10)], duration=30.0)
    others = [simulator.add_task(duration=30.0) for _ in range(5)]
    async with make_client(simulator) as client:
        waits = [client.wait_for_result(t, wait=EVERY_SECOND) for t in (*others, refused)]
        await asyncio.gather(*waits)
    # All poll at 0; the refusal arrives at 0.5 and asks for 10 s.
    assert [t for t in request_times(simulator) if 0 < t < 10.5] == []
    assert [t for t in request_times(simulator) if 10.5 <= t < 11] == seconds([10.5])
    interval = 1.0105 / 0.88 / 1e6  # a known limit that was refused is spaced
    assert [t for t in request_times(simulator) if 11 <= t < 11.5] == seconds(
        [11 + n * interval for n in range(1, 6)]
    )


async def test_a_task_that_always_fails_does_not_hold_up_another_after_a_refusal(simulator):
    """Otherwise it would probe the pause again and again, because its poll is due first."""
    broken = simulator.add_task(script=["http_500"] * 99)
    refused = simulator.add_task(script=["code_429"], duration=0.0)
    async with make_client(simulator, max_concurrency=1) as client:
        options = {"timeout": 300, "wait": wait_fixed(0.5)}
        failing = asyncio.create_task(client.wait_for_result(broken, **options))
        await asyncio.sleep(0.1)
        await client.wait_for_result(refused, wait=wait_fixed(0.5))
        assert asyncio.get_running_loop().time() < 10
    with pytest.raises(ClientStateError):
        await failing


async def test_after_a_late_permit_the_last_poll_is_sent_at_most_twice(wait):
    """Once early enough for another late permit, and once shortly before the deadline."""
    error = await wait(refused_for(5), *["generating"] * 99, wait=wait_fixed(4), timeout=20)
    assert type(error) is WaitTimeoutError
    assert wait.poll_times[:5] == seconds([0, 5, 9, 13, 17])
    assert 18.9 < wait.poll_times[5] < 19.0
    assert wait.poll_times[6:] == seconds([19.95])


async def test_a_cancelled_probe_lets_the_next_one_go(simulator, client):
    """The pause does not depend on a wait that was cancelled."""
    probe = simulator.add_task(script=[refused_for(10), "stall"])
    probing = asyncio.create_task(client.wait_for_result(probe, wait=wait_none()))
    await asyncio.sleep(10.25)
    other = simulator.add_task(duration=0.0)
    waiting = asyncio.create_task(client.wait_for_result(other))
    await asyncio.sleep(0.25)
    assert request_times(simulator) == seconds([0, 10])
    probing.cancel()
    await waiting
    assert request_times(simulator) == seconds([0, 10, 10.5])
    with pytest.raises(asyncio.CancelledError):
        await probing


async def test_an_outage_is_one_pause_for_all_probed_by_single_requests(simulator, client):
    """Five tasks that begin to fail in a row are an outage; a success ends it for all."""
    tasks = [simulator.add_task(script=["generating", *["http_500"] * 3]) for _ in range(6)]
    keywords = {"wait": EVERY_SECOND, "error_grace": None, "timeout": None}
    await asyncio.gather(*(client.wait_for_result(t, **keywords) for t in tasks))
    later = [t - 1 for t in request_times(simulator) if t > 1]
    # One probe at a time: after 1 s, 2 s, 4 s …
    assert later[:4] == seconds([1, 3, 7, 15])
    assert len(later) == len(tasks) * 3
    assert client.stats.pause == 0


# --- the deadline -------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0.01, 0.04, 0.05, 0.3, 1.0, 7.5, 600])
async def test_a_wait_ends_exactly_at_its_deadline(wait, timeout):
    """Neither later nor much earlier."""
    error = await wait(duration=math.inf, timeout=timeout)
    assert type(error) is WaitTimeoutError
    assert wait.took == seconds(timeout)
    assert error.elapsed == seconds(timeout)
    assert error.polls == len(wait.poll_times) == len(wait.events)


async def test_the_last_poll_is_50_ms_before_the_deadline(wait):
    """It is earlier than the schedule asks, so that a task done by then has its result."""
    assert isinstance(await wait(duration=9.9, timeout=10, wait=wait_fixed(6)), CompletedTask)
    assert wait.poll_times == seconds([0, 6, 9.95])
    assert type(await wait(duration=9.96, timeout=10, wait=wait_fixed(6))) is WaitTimeoutError
    assert wait.poll_times == seconds([0, 6, 9.95])


async def test_the_last_poll_leaves_time_for_two_round_trips(simulator, wait):
    """With answers that take 0.3 s it is sent 0.6 s before the deadline."""
    simulator._latency = 0.3
    await wait(duration=math.inf, timeout=10, wait=wait_fixed(6))
    assert wait.poll_times == seconds([0, 6.3, 9.4])
    assert wait.took == seconds(10)


async def test_no_poll_is_sent_whose_answer_would_be_too_late(simulator, wait):
    """Though the schedule asks for one."""
    simulator._latency = 0.3
    error = await wait(duration=math.inf, timeout=0.8, wait=wait_none())
    assert wait.poll_times == seconds([0])
    assert wait.events[-1].next_delay is None
    assert (wait.took, error.polls) == (seconds(0.8), 1)


@pytest.mark.parametrize("step", ["stall", "stall_mid_body"])
async def test_a_request_is_cut_at_the_deadline(wait, step):
    """A stalled answer, or one that does not end, does not delay the end of the wait."""
    error = await wait(step, timeout=7.3)
    assert (type(error), error.polls, error.last_error) == (WaitTimeoutError, 1, None)
    assert wait.took == seconds(7.3)
    assert wait.client.stats.in_flight == 0


async def test_a_request_is_cut_at_the_request_timeout(simulator, wait):
    """A stalled answer is a failure, and the next poll has the result."""
    async with make_client(simulator, request_timeout=5.5) as wait.client:
        assert isinstance(await wait("stall", "stall_mid_body"), CompletedTask)
    assert wait.poll_times == seconds([0, 6.5, 13])
    assert type(wait.events[0].error) is TransportError
    assert "5.5 s" in str(wait.events[0].error)


async def test_a_deadline_that_coincides_with_the_request_timeout_is_the_deadline(wait):
    """Both are at 30 s."""
    assert type(await wait("stall", timeout=30)) is WaitTimeoutError
    assert wait.took == seconds(30)


async def test_without_a_timeout_a_wait_lasts_as_long_as_the_task(wait):
    """timeout=None lasts longer than the default, and longer than an hour."""
    assert isinstance(
        await wait(duration=4000.0, timeout=None, wait=wait_fixed(900)), CompletedTask
    )
    assert wait.poll_times == seconds([0, 900, 1800, 2700, 3600, 4500])


async def test_by_default_a_wait_lasts_ten_minutes(simulator, client):
    """The provider gives up on a task after as long."""
    began = asyncio.get_running_loop().time()
    error = await error_of(client.wait_for_result(simulator.add_task(duration=math.inf)))
    assert type(error) is WaitTimeoutError
    assert asyncio.get_running_loop().time() - began == seconds(600)


async def test_a_timeout_has_the_last_record_and_the_last_error(wait):
    """Whichever came last."""
    error = await wait("generating", "http_500", "generating", duration=math.inf, timeout=2.5)
    assert error.last_record == wait.events[-1].record
    assert error.last_record.status is TaskStatus.GENERATING
    assert error.last_error is wait.events[1].error
    assert error.polls == 4
    assert isinstance(error, TimeoutError)
    assert error.task_id in str(error)


async def test_a_timeout_after_good_polls_only_has_no_error(wait):
    """One after failed polls only has no record."""
    error = await wait(duration=math.inf, timeout=3)
    assert error.last_error is None
    error = await wait(*["http_500"] * 9, timeout=3)
    assert error.last_record is None
    assert type(error.last_error) is ServerError


async def test_a_wait_that_timed_out_can_be_resumed(wait):
    """A timeout is not a failure: waiting for the same id again has the result."""
    error = await wait(duration=20.0, timeout=5)
    assert type(error) is WaitTimeoutError
    assert isinstance(await wait.again(error.task_id, timeout=60), CompletedTask)
    assert wait.took == seconds(15)


async def test_a_timeout_in_a_pause_names_the_pause(wait):
    """last_error is the pause, with the time that is left of it; the last poll is not sent."""
    error = await wait("generating", refused_for(60), timeout=11)
    assert type(error.last_error) is RateLimitedError
    assert error.last_error.retry_after == seconds(50)
    assert error.last_error.task_id == error.task_id
    assert (wait.poll_times, wait.took) == (seconds([0, 1]), seconds(11))
    assert wait.events[-1].next_delay is None


async def test_a_pause_that_another_task_met_is_named_too(simulator, client, wait):
    """A wait that was not refused itself says why it did not poll."""
    await error_of(client.record_info(simulator.add_task(script=[refused_for(60, code=455)])))
    error = await wait(duration=0.0, timeout=5)
    assert type(error.last_error) is MaintenanceError
    assert error.last_error.retry_after == seconds(55)
    assert error.last_error.task_id == error.task_id
    assert (error.polls, wait.poll_times, wait.took) == (0, [], seconds(5))


async def test_a_pause_that_ends_before_the_deadline_is_followed_by_a_poll(wait):
    """Even if the time of the last poll has passed."""
    assert isinstance(await wait(refused_for(10), timeout=10.02), CompletedTask)
    assert wait.poll_times == seconds([0, 10])


async def test_a_timeout_under_an_exhausted_rate_limit_names_the_limit(simulator, wait):
    """One request in 100 s: the second poll cannot be sent."""
    async with make_client(simulator, rate_limit=RateLimit(1, 100.0)) as wait.client:
        error = await wait(duration=math.inf, timeout=30)
    assert type(error.last_error) is RateLimitedError
    assert error.last_error.http_status is None
    assert error.last_error.retry_after == seconds(70)
    assert "rate limit" in str(error.last_error)
    assert (wait.poll_times, wait.took) == ([0], seconds(30))


async def test_a_timeout_at_max_concurrency_does_not_name_a_pause(simulator, wait):
    """The service refused nothing; max_concurrency is the user's own choice."""
    async with make_client(simulator, max_concurrency=1) as wait.client:
        stalled = wait.client.wait_for_result(simulator.add_task(script=["stall"]))
        stalling = asyncio.create_task(stalled)
        await asyncio.sleep(0)
        error = await wait(duration=0.0, timeout=3)
        assert (error.polls, error.last_error, wait.took) == (0, None, seconds(3))
        stalling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stalling


async def test_a_timeout_of_0_polls_once(wait):
    """It has the result of a finished task, and otherwise ends at once."""
    assert isinstance(await wait(duration=0.0, timeout=0), CompletedTask)
    error = await wait(duration=5.0, timeout=0)
    assert (type(error), error.polls, error.last_error) == (WaitTimeoutError, 1, None)
    assert error.last_record.status is TaskStatus.GENERATING
    assert (wait.poll_times, wait.took) == ([0], 0)
    assert wait.events[-1].next_delay is None


async def test_a_single_poll_that_fails_is_a_timeout_with_the_error(wait):
    """With more time it would be retried."""
    error = await wait("http_500", timeout=0)
    assert type(error) is WaitTimeoutError
    assert type(error.last_error) is ServerError
    assert type(await wait("http_500", timeout=0, error_grace=0)) is ServerError


async def test_a_single_poll_may_take_as_long_as_a_request(simulator, wait):
    """timeout=0 is bounded by request_timeout."""
    async with make_client(simulator, request_timeout=4.5) as wait.client:
        error = await wait("stall", timeout=0)
        assert (type(error), error.polls, wait.took) == (WaitTimeoutError, 1, seconds(4.5))
        simulator._latency = 4.0
        assert isinstance(await wait(duration=0.0, timeout=0), CompletedTask)
        assert wait.took == seconds(4)


async def test_a_single_poll_in_a_pause_ends_with_the_pause_as_its_reason(simulator, wait):
    """timeout=0 waits for its permit no longer than for an answer."""
    async with make_client(simulator, request_timeout=4.5) as wait.client:
        await error_of(wait.client.record_info(simulator.add_task(script=[refused_for(60)])))
        error = await wait(duration=0.0, timeout=0)
    assert (error.polls, wait.took) == (0, seconds(4.5))
    assert type(error.last_error) is RateLimitedError


@pytest.mark.parametrize("value", [-1, -0.001, math.nan, math.inf, -math.inf, True, "5", b"5", [1]])
@pytest.mark.parametrize("name", ["timeout", "error_grace", "not_found_grace"])
async def test_a_value_that_is_not_seconds_is_refused_before_any_request(wait, name, value):
    """The message names the argument."""
    error = await wait(**{name: value})
    assert type(error) is ConfigurationError
    assert name in str(error)
    assert not wait.simulator.requests


# --- wait strategies ---------------------------------------------------------------------------


def by_attempt(state):
    return state.attempt_number * 2


STRATEGIES = {
    # Strategies of tenacity, and plain callables: the times of the first four polls.
    "fixed": (tenacity.wait_fixed(3), [0, 3, 6, 9]),
    "fixed_timedelta": (tenacity.wait_fixed(timedelta(seconds=3)), [0, 3, 6, 9]),
    "chain": (tenacity.wait_chain(wait_fixed(1), wait_fixed(5)), [0, 1, 6, 11]),
    "incrementing": (tenacity.wait_incrementing(start=1, increment=2), [0, 1, 4, 9]),
    "exponential": (tenacity.wait_exponential(multiplier=1, max=60), [0, 1, 3, 7]),
    "jitter": (tenacity.wait_exponential_jitter(multiplier=1, jitter=0), [0, 1, 3, 7]),
    "combined": (wait_fixed(1) + tenacity.wait_incrementing(1, 1), [0, 2, 5, 9]),
    "with_callable": (wait_fixed(1) + by_attempt, [0, 3, 8, 15]),
    "function": (by_attempt, [0, 2, 6, 12]),
    "lambda": (lambda state: 1.5, [0, 1.5, 3, 4.5]),
    "partial": (functools.partial(lambda factor, state: factor, 2), [0, 2, 4, 6]),
    "int_like": (lambda state: True, [0, 1, 2, 3]),
}


@pytest.mark.parametrize("name", STRATEGIES)
async def test_any_wait_strategy_decides_when_to_poll(wait, name):
    """tenacity's own, sums of them, and plain functions of the retry state."""
    strategy, due = STRATEGIES[name]
    await wait(*["generating"] * 3, wait=strategy)
    assert wait.poll_times == seconds(due)
    assert [event.next_delay for event in wait.events] == [
        *map(seconds, gaps(due)),
        None,
    ]


@pytest.mark.parametrize(
    "strategy",
    [
        tenacity.wait_random(1, 3),
        tenacity.wait_random_exponential(multiplier=1, max=3),
        tenacity.wait_exponential_jitter(multiplier=1, max=2, jitter=1),
    ],
)
async def test_random_strategies_are_accepted(wait, strategy):
    """Their delays stay within their bounds."""
    await wait(*["generating"] * 5, wait=strategy)
    assert all(0 <= gap <= 3 for gap in gaps(wait.poll_times))


async def test_a_delay_of_0_polls_again_at_once(wait):
    """With wait_none only the answers take time."""
    await wait(*["generating"] * 5, wait=wait_none())
    assert wait.poll_times == seconds([0] * 6)


async def test_a_strategy_can_read_the_error(wait):
    """tenacity's wait_exception reads it from the state's outcome."""
    by_error = tenacity.wait_exception(lambda error: 4 if error.code == 502 else 2)
    await wait("http_502", "http_500", wait=by_error)
    assert wait.poll_times == seconds([0, 4, 6])


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -1, -1e-9, "1", None, 1j, timedelta(seconds=1)]
)
@pytest.mark.parametrize("step", ["generating", "http_500"])
async def test_a_delay_that_is_not_a_number_of_seconds_is_refused(wait, step, value):
    """A strategy that returns one ends the wait, and the message shows the value."""
    error = await wait(step, wait=lambda state: value)
    assert type(error) is ConfigurationError
    assert repr(value) in str(error)
    assert wait.poll_times == [0]
    assert wait.client.stats.in_flight == wait.client.stats.waits == 0


async def test_a_strategy_is_not_called_if_no_poll_will_follow(wait):
    """Neither after the end nor if only the deadline is left."""
    calls = []
    await wait("success", wait=calls.append)
    await wait("failed", wait=calls.append)
    await wait("generating", wait=calls.append, timeout=0.04)
    await wait("generating", wait=calls.append, timeout=0)
    assert not calls


async def test_what_a_strategy_raises_reaches_the_caller(wait):
    """The exception is unchanged."""
    with pytest.raises(ZeroDivisionError):
        await wait("generating", wait=lambda state: 1 / 0)


async def test_a_strategy_gets_the_state_of_the_wait(simulator, wait):
    """Times, attempts, the last answer, failures in a row, and the rest of tenacity's state."""
    simulator._latency = 0.25
    seen = []

    def strategy(state):
        outcome = state.outcome
        seen.append(
            (
                state.attempt_number,
                state.seconds_since_start,
                state.record and state.record.status,
                type(state.error),
                state.failures,
                state.upcoming_sleep,
                state.idle_for,
                outcome.failed,
                outcome.exception() is state.error,
                None if outcome.failed else outcome.result() is state.record,
            )
        )
        assert (state.args, state.kwargs, state.fn) == ((), {}, None)
        return 1.0 + state.attempt_number

    await wait("generating", "http_500", "truncated", "generating", wait=strategy)
    nothing, running = type(None), TaskStatus.GENERATING
    assert seen == [
        (1, seconds(0.25), running, nothing, 0, 0.0, 0.0, False, True, True),
        (2, seconds(2.5), None, ServerError, 1, 2.0, 2.0, True, True, None),
        (3, seconds(5.75), None, TransportError, 2, 3.0, 5.0, True, True, None),
        (4, seconds(10.0), running, nothing, 0, 4.0, 9.0, False, True, True),
    ]


def every_ten_seconds(ages):
    """Return a strategy that notes the ages it gets."""

    def strategy(state):
        ages.append(state.age)
        return 10.0

    return strategy


async def test_a_strategy_gets_the_tasks_age_by_the_services_clock(wait):
    """Date minus createTime, in whole seconds; it then grows with the wait."""
    ages = []
    await wait(*["generating"] * 3, age=100.0, wait=every_ten_seconds(ages))
    assert ages[0] == pytest.approx(100, abs=1)
    assert ages == seconds([ages[0], ages[0] + 10, ages[0] + 20])


@pytest.mark.parametrize("age", [-5.0, 4000.0])
async def test_an_implausible_age_is_replaced_by_the_time_since_the_wait_began(wait, age):
    """For a task from the future, or one more than an hour old."""
    ages = []
    await wait(*["generating"] * 3, age=age, wait=every_ten_seconds(ages))
    # The age of a task from the future becomes plausible.
    assert ages[0] == 0
    assert ages[1] == pytest.approx(10 if age > 0 else 5, abs=1)


async def test_without_a_record_the_age_is_the_time_since_the_wait_began(wait):
    """An error has no age; the first record has one."""
    ages = []
    strategy = every_ten_seconds(ages)
    await wait("http_500", "http_500", "generating", age=500.0, wait=strategy)
    assert ages == [0, seconds(10), pytest.approx(520, abs=1)]


async def test_the_default_schedule_is_the_learned_one(simulator):
    """It asks the client's own model when to poll."""

    class Every(DurationModel):
        def next_age(self, age, step=1.0):
            return age + 7.0

    async with make_client(simulator, durations=Every()) as client:
        task_id = simulator.add_task(duration=20.0)
        await client.wait_for_result(task_id)
    assert request_times(simulator, task_id) == seconds([0, 7, 14, 21])


# --- the duration model -------------------------------------------------------------------------


class _Noted(DurationModel):
    def __init__(self):
        super().__init__()
        self.observed = []

    def observe(self, task_id, age, duration=None):
        self.observed.append((task_id, age, duration))
        super().observe(task_id, age, duration)

    def forget(self, task_id):
        self.observed.append((task_id, "forgotten"))
        super().forget(task_id)


@pytest.fixture
async def noted(simulator, wait):
    model = _Noted()
    async with make_client(simulator, durations=model) as wait.client:
        yield model.observed


async def test_the_model_observes_every_good_poll(wait, noted):
    """The age while the task runs, the exact duration at its end, and nothing of failed polls."""
    script = ["generating", "http_500", "generating", "code_429", "not_found"]
    await wait(*script, duration=6.0, task_id="a")
    running = [("a", seconds(at), None) for at in (0, 2, 5)]
    assert noted == [*running, ("a", seconds(6), 6.0), ("a", "forgotten")]


async def test_the_model_learns_from_a_task_that_failed(wait, noted):
    """Its duration counts too."""
    await wait("generating", "failed", task_id="a")
    assert noted == [("a", 0, None), ("a", seconds(1), 1.0), ("a", "forgotten")]


async def test_the_model_does_not_observe_an_end_without_times(wait, noted):
    """Without createTime there is no duration."""
    await wait("times_unreadable", task_id="a")
    assert noted == [("a", "forgotten")]


async def test_the_model_forgets_a_task_whose_wait_ends_early(wait, noted):
    """After a timeout, an error of the callback, or cancellation."""
    await wait(duration=math.inf, timeout=0.5, task_id="a")
    with pytest.raises(ZeroDivisionError):
        await wait(duration=math.inf, task_id="b", on_event=lambda event: 1 / 0)
    waiting = asyncio.create_task(wait(duration=math.inf, task_id="c"))
    await asyncio.sleep(0.5)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert [call[0] for call in noted if call[1] == "forgotten"] == ["a", "b", "c"]


# --- events -------------------------------------------------------------------------------------


async def test_each_poll_is_one_event(simulator, wait):
    """In order, with the record or the error, the time, and the delay until the next poll."""
    simulator._latency = 0.5
    done = await wait("generating", "http_500", "code_429", "generating", wait=wait_fixed(2))
    first, second, third, fourth, last = events = wait.events
    assert {event.task_id for event in events} == {done.task_id}
    assert [event.attempt for event in events] == [1, 2, 3, 4, 5]
    assert [event.elapsed for event in events] == seconds([0.5, 3, 5.5, 8, 10.5])
    assert [event.next_delay for event in events] == [*seconds([2] * 4).expected, None]
    assert [event.error and event.error.code for event in events] == [None, 500, 429, None, None]
    assert all((event.record is None) != (event.error is None) for event in events)
    assert first.record.status is fourth.record.status is TaskStatus.GENERATING
    assert (type(second.error), type(third.error)) == (ServerError, RateLimitedError)
    assert last.record.result_image_url == done.result_image_url


async def test_a_poll_cut_by_the_deadline_has_no_event(wait):
    """The error counts it as a poll."""
    error = await wait("generating", "stall", timeout=5)
    assert (len(wait.events), error.polls) == (1, 2)


@pytest.mark.parametrize(
    ("script", "count"),
    [
        (["success"], 1),
        (["failed"], 1),
        (["generating"], 1),
        (["http_500"], 1),
        (["code_401"], 1),
        (["code_429"], 1),
        (["generating", "not_found"], 2),
    ],
)
@pytest.mark.parametrize(
    "raised",
    [
        ValueError("mine"),
        TimeoutError("mine"),
        ServerError("mine", code=500),
        WaitTimeoutError(task_id="mine", elapsed=0.0, polls=0),
        ConfigurationError("mine"),
        asyncio.CancelledError("mine"),
        KeyboardInterrupt("mine"),
    ],
    ids=lambda raised: type(raised).__name__,
)
async def test_what_a_callback_raises_reaches_the_caller_unchanged(wait, script, count, raised):
    """It ends the wait at any poll, even if it is an error of this library."""
    events = []

    def callback(event):
        events.append(event)
        if len(events) == count:
            raise raised

    task_id = wait.simulator.add_task(script=[*script, "generating"])
    waiting = wait.client.wait_for_result(task_id, wait=EVERY_SECOND, on_event=callback)
    with pytest.raises(type(raised)) as caught:
        await waiting
    assert caught.value is raised
    assert raised.__cause__ is None
    assert len(events) == count
    assert wait.client.stats.in_flight == wait.client.stats.waits == 0


async def coroutine_function(event):
    """Never to be called."""


class _AsyncCallable:
    async def __call__(self, event):
        """Never to be called."""

    async def method(self, event):
        """Never to be called."""


@pytest.mark.parametrize(
    "function",
    [
        coroutine_function,
        functools.partial(coroutine_function),
        functools.partial(functools.partial(coroutine_function)),
        _AsyncCallable(),
        functools.partial(_AsyncCallable()),
        _AsyncCallable().method,
        functools.partial(_AsyncCallable().method),
        AsyncMock(),
    ],
)
@pytest.mark.parametrize("name", ["on_event", "wait"])
async def test_a_coroutine_function_is_refused_before_any_request(wait, name, function):
    """It would never be awaited."""
    error = await wait(**{name: function})
    assert type(error) is ConfigurationError
    assert name in str(error)
    assert "async def" in str(error)
    assert not wait.simulator.requests


@pytest.mark.parametrize("name", ["on_event", "wait"])
async def test_what_cannot_be_called_is_refused_before_any_request(wait, name):
    """wait=5 is refused, not taken for five seconds."""
    error = await wait(**{name: 5})
    assert type(error) is ConfigurationError
    assert "callable" in str(error)
    assert not wait.simulator.requests


async def test_what_a_callback_returns_is_ignored(wait):
    """Even a true value, or an exception."""
    assert isinstance(await wait("generating", on_event=lambda event: ValueError()), CompletedTask)


def test_an_event_shows_no_prompt():
    """Events are printed and logged, so prompts must stay out of their repr."""
    names = {attribute.name for attribute in PollEvent.__attrs_attrs__}
    assert names == {"task_id", "attempt", "elapsed", "record", "error", "next_delay"}


# --- without a client ---------------------------------------------------------------------------


class _Scripted:
    """A poller with scripted permits and answers."""

    request_timeout = 30.0

    def __init__(self, permits, answers=()):
        self.budget = RequestBudget(max_concurrency=1, rate_limit=None)
        self.durations = DurationModel()
        self.notices = Noticeboard()
        self.permits = list(permits)
        self.answers = list(answers)

    async def acquire(self, at, *, until, **options):
        permit = self.permits.pop(0)
        if permit is None:
            await asyncio.sleep(until - asyncio.get_running_loop().time())
        return permit

    async def poll(self, task_id, sent, *, until, **options):
        return self.answers.pop(0)


def policy(**options):
    keywords = {"timeout": 5.0, "error_grace": 0.0, "not_found_grace": 0.0, "on_event": None}
    return WaitPolicy(wait=EVERY_SECOND, **{**keywords, **options})


async def test_a_wait_without_a_permit_has_not_polled():
    """`acquire` returns None if none came in time."""
    error = (await TaskWait("task", policy(), _Scripted([None])).run()).error
    assert (type(error), error.polls, error.last_error) == (WaitTimeoutError, 0, None)


async def test_a_poll_that_was_cut_ends_the_wait():
    """`poll` returns None, and that poll counts."""
    error = (await TaskWait("task", policy(), _Scripted([0.0], [None])).run()).error
    assert (type(error), error.polls) == (WaitTimeoutError, 1)


async def test_the_timeout_of_a_batchs_wait_counts_from_its_first_poll(simulator):
    """However long that was in the queue; `latest` ends the wait in any case."""
    loop = asyncio.get_running_loop()
    async with make_client(simulator, rate_limit=RateLimit(1, 10.0)) as client:
        await client.record_info(simulator.add_task(script=["generating"]))
        task_id = simulator.add_task(duration=math.inf)
        transport = client._transport
        wait = TaskWait(task_id, policy(timeout=15.0), transport, timeout_from_first_poll=True)
        error = (await wait.run()).error
        assert (error.elapsed, loop.time()) == (seconds(15), seconds(25))
        wait = TaskWait(task_id, policy(), transport, timeout_from_first_poll=True, latest=28.0)
        error = (await wait.run()).error
        assert (error.elapsed, loop.time(), error.polls) == (seconds(3), seconds(28), 0)
        wait = TaskWait(task_id, policy(timeout=None), transport, latest=40.0)
        error = (await wait.run()).error
        assert (error.elapsed, loop.time(), error.polls) == (seconds(12), seconds(40), 1)


# --- long series -------------------------------------------------------------------------------


async def test_a_wait_retries_a_long_series_of_failures(wait):
    """Three 500s, an HTML 502, resets, a truncated body, and a 429 that asks for two seconds."""
    script = ["http_500"] * 3 + ["html_502", "reset", "reset", "truncated", "rate_limited"]
    assert isinstance(await wait(*script, "generating"), CompletedTask)
    assert wait.poll_times[-3:] == seconds([6, 8, 9])


PAUSES = ("code_429", "rate_limited", "code_455")
FAILURES = ("code_408", "http_500", "empty_200", "success_no_url", "truncated")
FINAL = {
    "success": CompletedTask,
    "failed": GenerationFailedError,
    "code_402": ApiError,
}


class _RefusedKey:
    """A 401 is final at first, and after a good answer when it is the third in a row."""

    def __init__(self):
        self.allowed = 1

    def by(self, step):
        if step in {"generating", "success_no_url"}:
            self.allowed = 3
        self.allowed -= step == "code_401"
        return step == "code_401" and self.allowed <= 0


def predicted(script, *, timeout, delay, error_grace, not_found_grace):
    """Return how a wait ends, its polls and its end by the contract, if answers take no time."""
    now = paused = until = late = 0.0
    streak = 0
    had_early = False
    since = {"failure": None, "missing": None}
    grace = {"failure": error_grace, "missing": not_found_grace}
    polls = []
    refused = _RefusedKey()
    while True:
        polls.append(now)
        step = script[len(polls) - 1] if len(polls) <= len(script) else "success"
        left = math.inf
        if step in FINAL:
            return FINAL[step], polls, now
        if refused.by(step):
            return AuthenticationError, polls, now
        if step == "generating":
            since = dict.fromkeys(since)
        elif step not in PAUSES:
            kind = "missing" if step == "not_found" else "failure"
            if since[kind] is None:
                since[kind] = now - paused
            left = math.inf if grace[kind] is None else grace[kind] - (now - paused - since[kind])
            if left < 1e-6:
                error = {"not_found": TaskNotFoundError, "code_408": ApiError}
                error |= {"http_500": ServerError, "truncated": TransportError}
                error |= {"code_401": AuthenticationError}
                return error.get(step, ResponseFormatError), polls, now
        if step in PAUSES:
            streak += 1
            first, growth = (5.0, 2) if step == "code_455" else (0.25, 3)
            pause = 2.0 if step == "rate_limited" else min(first * growth ** (streak - 1), 60.0)
            until = now + pause
            paused += pause
        else:
            streak = 0
        last = timeout - 0.05
        # A permit may be late again: the last poll is planned earlier by that, and once more then.
        early = last if had_early else last - late
        final = early if now < early else last
        had_early = had_early or final <= now + min(delay, left)
        wanted = min(now + min(delay, left), final) if now < last else math.inf
        now = max(wanted, until)
        late = max(0.99 * late, now - wanted)
        if now >= timeout:
            return WaitTimeoutError, polls, timeout


graces = st.one_of(st.none(), st.sampled_from([0.0, 0.7, 3.3, 12.1]))


@given(
    script=st.lists(
        st.sampled_from(["generating", "not_found", "code_401", *PAUSES, *FAILURES, *FINAL]),
        max_size=12,
    ),
    timeout=st.sampled_from([0.37, 4.27, 33.83, 600.0]),
    delay=st.sampled_from([0.31, 1.03, 7.19]),
    error_grace=graces,
    not_found_grace=graces,
)
@example(script=["code_429"] * 12, timeout=33.83, delay=1.03, error_grace=0.0, not_found_grace=0.0)
@example(
    script=["code_455", "http_500", "truncated"] * 4,
    timeout=600.0,
    delay=1.03,
    error_grace=3.3,
    not_found_grace=0.0,
)
@settings(max_examples=80)
def test_any_script_ends_as_the_contract_says(script, **policy):
    """A reference model, written from the contract's words, predicts the same end and times."""
    outcome, polls, end = predicted(script, **policy)
    # Those that are closer may be spaced by a rate that refusals have shown.
    is_refused = not set(PAUSES).isdisjoint(script[: len(polls)])
    are_close = any(later - earlier < 0.05 for earlier, later in itertools.pairwise(polls))
    assume(not (is_refused and are_close))

    async def main():
        async with Simulator() as simulator, make_client(simulator) as client:
            wait = _Wait(client, simulator)
            policy["wait"] = wait_fixed(policy.pop("delay"))
            assert type(await wait(*script, "success", **policy)) is outcome
            assert wait.poll_times == seconds(polls)
            assert wait.took == seconds(end)

    run_on_virtual_time(main)


@given(data=st.data(), seed=st.integers(0, 2**32))
@settings(max_examples=25)
def test_no_wait_lasts_longer_than_its_deadline(data, seed):
    """For any answers, however slow, and several tasks at once, under an unknown rate limit."""
    names = st.sampled_from([n for n in sorted(STEPS) if not n.startswith("oversized")])
    scripts = data.draw(st.lists(st.lists(names, max_size=8), min_size=1, max_size=5))
    latency = data.draw(st.sampled_from([0.0, 0.013, 0.4, 2.5]))
    timeouts = [data.draw(st.floats(0.001, 40.0)) for _ in scripts]
    draw = random.Random(seed)

    async def one(client, task_id, timeout):
        began = asyncio.get_running_loop().time()
        ended = await outcome_of(
            client.wait_for_result(
                task_id, timeout=timeout, wait=lambda state: draw.choice([0.0, 0.1, 3.0, 50.0])
            )
        )
        took = asyncio.get_running_loop().time() - began
        assert ended.task_id == task_id
        assert took <= timeout + 1e-6
        if isinstance(ended, WaitTimeoutError):
            assert (took, ended.elapsed) == (seconds(timeout), seconds(timeout))

    async def main():
        async with (
            Simulator(latency=latency, durations=5.0) as simulator,
            make_client(simulator, rate_limit=None, max_concurrency=2) as client,
        ):
            tasks = [simulator.add_task(script=script) for script in scripts]
            await asyncio.gather(*map(one, [client] * len(tasks), tasks, timeouts))
            assert client.stats.in_flight == client.stats.waits == 0

    run_on_virtual_time(main)


# --- polls that move ----------------------------------------------------------------------------


async def batch_polls(simulator, durations, /, **options):
    """Wait for tasks of these durations at once with a fresh model; return the outcomes."""
    ids = [simulator.add_task(duration=duration) for duration in durations]
    async with make_client(simulator, **options) as client:
        return ids, await client.wait_for_results(ids)


async def test_what_a_batch_learns_moves_the_polls_of_its_other_tasks(simulator):
    """Of 200 tasks of 12 s few are polled before, where a backoff polls each six times."""
    ids, outcomes = await batch_polls(simulator, [12.0] * 200)
    assert all(outcome.result for outcome in outcomes)
    times = [request_times(simulator, task_id) for task_id in ids]
    assert sum(map(len, times)) < 3 * len(ids)  # the first poll included
    assert sum(at[-1] for at in times) < 16.0 * len(ids)


async def test_no_plan_is_made_where_no_poll_sleeps(simulator):
    """A plan costs as much as ten polls; where all tasks have ended already, none can move."""
    asked = []

    class Asked(DurationModel):
        @property
        def revision(self):
            asked.append(self)
            return super().revision

    _, outcomes = await batch_polls(simulator, [0.0] * 50, durations=Asked())
    assert all(outcome.result for outcome in outcomes)
    assert not asked
    await batch_polls(simulator, [3.0, 5.0], durations=Asked())
    assert asked


class _Changed(DurationModel):
    """Expects all tasks to end at 20 s, and at 3 s once they are seen to."""

    expected = 20.0

    def next_age(self, age, step=1.0):
        return max(age + 0.25, self.expected)

    @property
    def revision(self):
        return int(self.expected)

    def observe(self, task_id, age, duration=None):
        if duration is not None:
            self.expected = 3.0


async def polls_after_a_change(simulator, **options):
    """Poll a task of 7 s, while another is seen to end after 5.3 s; return the times."""
    model = options.pop("model", _Changed())
    slow, quick = simulator.add_task(duration=7.0), simulator.add_task(duration=5.0)
    async with make_client(simulator, durations=model) as client:
        await asyncio.gather(
            client.wait_for_result(slow, **options),
            client.wait_for_result(quick, wait=wait_fixed(5.3)),
        )
    return request_times(simulator, slow)


async def test_a_poll_that_moves_to_before_now_is_sent_at_the_next_whole_second(simulator):
    """Tasks end at whole seconds, so that one just before would come too early for some."""
    assert await polls_after_a_change(simulator) == seconds([0.0, 6.0, 6.25, 6.5, 6.75, 7.0])


async def test_the_polls_of_a_strategy_derived_from_the_learned_one_do_not_move(simulator):
    """It is asked once after each poll, as any other strategy is."""

    class Patient(wait_learned):
        def __call__(self, retry_state):
            return super().__call__(retry_state) + 10.0

    model = _Changed()
    times = await polls_after_a_change(simulator, model=model, wait=Patient(model))
    assert times == seconds([0.0, 30.0])


async def test_the_last_poll_before_a_deadline_does_not_move(simulator):
    """No matter what others show, a task that ends before its deadline is seen to."""
    ids, outcomes = [], []
    async with make_client(simulator) as client:
        ids = [simulator.add_task(duration=14.0 + k / 10) for k in range(60)]
        outcomes = await client.wait_for_results(ids, timeout=20.5)
    assert all(outcome.result for outcome in outcomes)
