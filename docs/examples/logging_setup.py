"""Log lines of the client: outages and pauses at WARNING, each poll at DEBUG."""

from __future__ import annotations

import asyncio
import logging

from kontext_async import KontextClient


async def main(task_id: str) -> None:
    """Wait for a task with every poll in the log."""
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("kontext_async").setLevel(logging.DEBUG)
    async with KontextClient() as client:
        await client.wait_for_result(task_id)


if __name__ == "__main__":
    asyncio.run(main("task12345"))
