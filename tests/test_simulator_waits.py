"""Every named step, met by a wait of the real client."""

from __future__ import annotations

import pytest

from kontext_async import (
    ApiError,
    AuthenticationError,
    CompletedTask,
    GenerationFailedError,
    InvalidRequestError,
    KontextClient,
    KontextError,
    ServerError,
    TransportError,
)
from kontext_async.simulator import FAULTS, STEPS, Simulator

ENDS_BADLY = {
    **{name: GenerationFailedError for name in STEPS if name.startswith("failed")},
    "code_401": AuthenticationError,
    "code_402": ApiError,
    "code_403": ApiError,
    "code_422": InvalidRequestError,
    "code_451": ApiError,
    "code_501": GenerationFailedError,
    "code_501_record": GenerationFailedError,
    "code_505": ServerError,
    "empty_404": ApiError,
    "html_404": ApiError,
    "redirect": TransportError,
}


async def end_of_wait(*script, timeout=600.0):
    """Wait for a scripted task; return the result or the error."""
    async with Simulator() as simulator:
        task_id = simulator.add_task(script=script)
        async with KontextClient("k", base_url=simulator.base_url) as client:
            try:
                return await client.wait_for_result(task_id, timeout=timeout)
            except KontextError as error:
                return error


@pytest.mark.virtual_time
@pytest.mark.parametrize("name", STEPS)
async def test_a_step_ends_a_wait_as_expected(name):
    assert type(await end_of_wait(name)) is ENDS_BADLY.get(name, CompletedTask)


@pytest.mark.virtual_time
async def test_one_wait_survives_every_fault():
    script = [name for fault in FAULTS for name in (fault, "generating")]
    assert isinstance(await end_of_wait(*script, timeout=None), CompletedTask)
