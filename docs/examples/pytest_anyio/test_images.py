"""A test of code that waits for images, in anyio's auto mode: no mark is needed."""

from __future__ import annotations

from kontext_async import KontextClient
from kontext_async.simulator import Simulator


async def test_waits_for_the_image(
    kontext_simulator: Simulator, kontext_client: KontextClient
) -> None:
    """A task that succeeds has a result."""
    task_id = kontext_simulator.add_task()
    done = await kontext_client.wait_for_result(task_id)
    assert done.result_image_url.startswith(kontext_simulator.base_url)
