"""Tests of code that waits for images, in pytest-asyncio's strict mode."""

from __future__ import annotations

import pytest

from kontext_async import GenerationFailedError, KontextClient
from kontext_async.simulator import Failure, Simulator


async def caption(client: KontextClient, task_id: str) -> str:
    """Return what a page would show: the code under test."""
    try:
        return (await client.wait_for_result(task_id)).result_image_url
    except GenerationFailedError as error:
        return f"no image: {error.error_message}"


@pytest.mark.asyncio
async def test_shows_the_image(kontext_simulator: Simulator, kontext_client: KontextClient) -> None:
    """A task that succeeds shows its image."""
    task_id = kontext_simulator.add_task()
    assert (await caption(kontext_client, task_id)).startswith(kontext_simulator.base_url)


@pytest.mark.asyncio
async def test_shows_the_reason(
    kontext_simulator: Simulator, kontext_client: KontextClient
) -> None:
    """A task that fails shows the service's reason, even if polls fail before it does."""
    task_id = kontext_simulator.add_task(
        outcome=Failure(400, "The prompt was flagged."), script=["http_500", "html_502"]
    )
    assert await caption(kontext_client, task_id) == "no image: The prompt was flagged."
