"""Uses of the public API for type checkers; nothing runs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timedelta
from typing import Any, assert_type

import aiohttp
import tenacity

from kontext_async import (
    ApiError,
    CompletedTask,
    DurationModel,
    ErrorOutcome,
    GenerationFailedError,
    Handling,
    ImageRequest,
    Journal,
    KontextClient,
    KontextError,
    PollEvent,
    PollState,
    RateLimit,
    ResultOutcome,
    Stream,
    SubmittedTask,
    TaskOutcome,
    TaskRecord,
    TaskStatus,
    WaitTimeoutError,
    wait_learned,
)
from kontext_async.callbacks import CallbackNotice, CallbackReceiver, verify_callback
from kontext_async.results import Ledger, RequestOutcome


async def create(client: KontextClient, ledger: Ledger) -> None:
    request = ImageRequest(prompt="a lighthouse", aspect_ratio="16:9", safety_tolerance=2)
    assert_type(ImageRequest.from_json({"prompt": "a"}), ImageRequest)
    task = await client.submit(request, submit_grace=None)
    assert_type(task, SubmittedTask)
    assert_type(task.submitted_at, datetime)
    done = await client.run(request, on_submitted=lambda task: task.task_id, timeout=None)
    assert_type(done, CompletedTask)
    assert_type(await client.credits(), float)
    assert_type(client.notice("task12345"), bool)
    stream = ledger.generate(client, [request, ("key", request)], max_new=5)
    assert_type(stream, Stream[RequestOutcome])
    async for outcome in stream:
        assert_type(outcome.key, str)
        assert_type(outcome.request, ImageRequest)
        if outcome.result is None:
            assert_type(outcome.error, KontextError)
        else:
            assert_type(outcome.result, CompletedTask)
    receiver = CallbackReceiver(client, key=["old", "new"], on_token=ledger.add_candidate)
    assert_type(await receiver.receive({}, b"", token="token"), int)
    assert_type(verify_callback({}, b"", "key"), CallbackNotice)


async def poll(client: KontextClient) -> None:
    record = await client.record_info("task12345")
    assert_type(record, TaskRecord)
    assert_type(record.status, TaskStatus)
    assert_type(record.params, Mapping[str, Any])
    assert_type(record.create_time, datetime | None)
    assert_type(record.result_image_url, str | None)
    assert_type(record.error_code, int | None)


def patient(state: PollState) -> float:
    return 2.0 if state.age < 30 else 10.0


async def wait_patiently(client: KontextClient) -> str:
    await client.wait_for_result("task12345", wait=wait_learned(DurationModel()))
    return (await client.wait_for_result("task12345", wait=patient)).result_image_url


def show(event: PollEvent) -> None:
    assert_type(event.task_id, str)
    assert_type(event.attempt, int)
    assert_type(event.elapsed, float)
    assert_type(event.record, TaskRecord | None)
    assert_type(event.error, KontextError | None)
    assert_type(event.next_delay, float | None)


async def wait(client: KontextClient) -> timedelta | None:
    try:
        done = await client.wait_for_result(
            "task12345",
            timeout=None,
            wait=tenacity.wait_fixed(2) + tenacity.wait_random(0, 1),
            error_grace=60,
            not_found_grace=None,
            on_event=show,
        )
    except GenerationFailedError as error:
        assert_type(error.error_code, int | None)
        assert_type(error.handling, Handling)
        assert_type(error.task_id, str)
        assert_type(error.for_task("task12346"), GenerationFailedError)
        raise
    except WaitTimeoutError as error:
        assert_type(error.task_id, str)
        assert_type(error.last_record, TaskRecord | None)
        raise
    except ApiError as error:
        assert_type(error.retry_after, float | None)
        raise
    assert_type(done, CompletedTask)
    assert_type(done.result_image_url, str)
    assert_type(done.expires_at, datetime | None)
    return done.duration


async def ids() -> AsyncIterator[str]:
    yield "task12345"


async def batch(client: KontextClient) -> list[CompletedTask]:
    results: list[CompletedTask] = []
    async with client.as_completed(ids(), max_in_flight=100, batch_timeout=3600.0) as outcomes:
        async for outcome in outcomes:
            assert_type(outcome, TaskOutcome)
            assert_type(outcome.result, CompletedTask | None)
            assert_type(outcome.error, KontextError | None)
            if outcome.error is None:
                assert_type(outcome, ResultOutcome)
                results.append(outcome.result)
            else:
                assert_type(outcome, ErrorOutcome)
                assert_type(outcome.error, KontextError)
            match outcome:
                case ErrorOutcome(error=GenerationFailedError() as error):
                    assert_type(error.error_code, int | None)
                case ErrorOutcome(error=error):
                    assert_type(error, KontextError)
                case ResultOutcome(result=task):
                    assert_type(task, CompletedTask)
            results.append(outcome.unwrap())
    in_order = await client.wait_for_results({"task1", "task2"}, timeout=60)
    assert_type(in_order, list[TaskOutcome])
    return results


class MemoryJournal:
    def __init__(self) -> None:
        self.outcomes: dict[str, TaskOutcome] = {}

    def begin(self, task_id: str) -> asyncio.Future[TaskOutcome | None]:
        known: asyncio.Future[TaskOutcome | None] = asyncio.get_running_loop().create_future()
        known.set_result(self.outcomes.get(task_id))
        return known

    def record(self, outcome: TaskOutcome) -> asyncio.Future[None]:
        self.outcomes[outcome.task_id] = outcome
        recorded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        recorded.set_result(None)
        return recorded


async def resume(client: KontextClient) -> None:
    journal: Journal = MemoryJournal()
    stream = client.as_completed(["task12345"], journal=journal)
    assert_type(stream, Stream[TaskOutcome])
    await stream.abort(KeyError())
    await stream.aclose()


async def build(session: aiohttp.ClientSession) -> None:
    model = DurationModel()
    async with KontextClient(
        "key",
        base_url="http://127.0.0.1:8080",
        session=session,
        request_timeout=10,
        max_concurrency=8,
        rate_limit=RateLimit(20, 10.0),
        durations=model,
        allow_http=True,
    ) as client:
        assert_type(client, KontextClient)
        await client.wait_for_result("task12345", wait=wait_learned(model))
