"""A chat bot whose platform gives a command a limited time to answer.

Discord's interactions end after 15 minutes, and slash commands of Slack after 30. The bot answers
within the limit; the task goes on, so a later command gets the image.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from kontext_async import GenerationFailedError, KontextClient, KontextError, WaitTimeoutError

LIMIT = 14 * 60.0  # seconds


class ImageBot:
    """The replies of a bot to its command ``/image ID``."""

    def __init__(self, client: KontextClient, *, limit: float = LIMIT) -> None:
        self._client = client
        self._limit = limit

    async def on_image(self, task_id: str, reply: Callable[[str], Awaitable[None]]) -> None:
        """Reply with the image of a task, the reason why there is none, or a hint to ask again."""
        try:
            done = await self._client.wait_for_result(task_id, timeout=self._limit)
        except WaitTimeoutError:
            await reply(f"Still working. Ask again: /image {task_id}")
        except GenerationFailedError as error:
            await reply(f"There is no image: {error.error_message}")
        except KontextError as error:
            await reply("Try again later." if error.retryable else "This does not work.")
        else:
            await reply(done.result_image_url)


async def main(task_ids: list[str]) -> None:
    """Serve several commands at once; a platform's library would call `on_image`."""

    async def reply(text: str) -> None:
        print(text)

    async with KontextClient() as client, asyncio.TaskGroup() as group:
        bot = ImageBot(client)
        for task_id in task_ids:
            group.create_task(bot.on_image(task_id, reply))


if __name__ == "__main__":
    asyncio.run(main(["task12345", "task12346"]))
