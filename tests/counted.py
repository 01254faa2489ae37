"""Sources of ids, for the tests of backpressure and of ending a batch."""

from __future__ import annotations

import asyncio


class Counted:
    """An iterable that remembers how much of it was read."""

    def __init__(self, task_ids):
        self.ids = iter(task_ids)
        self.read = 0

    def __iter__(self):
        for task_id in self.ids:
            self.read += 1
            yield task_id


class CountedAsync(Counted):
    """An asynchronous one that counts how often it was closed early and could clean up."""

    closed = 0
    ends = True
    cleanup = 0.5

    async def __aiter__(self):
        try:
            for task_id in self.ids:
                self.read += 1
                yield task_id
            if not self.ends:
                await never()
        except (GeneratorExit, asyncio.CancelledError):
            await asyncio.sleep(self.cleanup)
            self.closed += 1
            raise


class Silent(CountedAsync):
    """One that after its ids gives neither another nor an end."""

    ends = False


async def never():
    await asyncio.get_running_loop().create_future()


def raising(error, task_ids):
    yield from task_ids
    raise error


async def raising_async(error, task_ids):
    for task_id in task_ids:
        yield task_id
    raise error
