"""Finishing images in threads, short ones in groups.

On more than one core, each thread that is woken contends with the event loop's thread for Python's
lock. For an image of its own, that would cost more than writing the image.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TypeAlias

from kontext_async.results.errors import DownloadError
from kontext_async.results.images.files import PartialImage, SavedImage, finish_images
from kontext_async.results.threads import run_in_thread, uncancellable

__all__ = ["Finisher"]

_Waiting: TypeAlias = tuple[PartialImage, bytes, asyncio.Future[SavedImage]]

# Images that wait for no group under way, because a slow disk would let them wait long. Chosen by
# the benchmark `saving`: with 2 an image takes more CPU time, with 4 fewer are saved a second.
_GROUP = 3


class Finisher:
    """Writes the last data of images, and gives them their names once they are on disk.

    All images are of one folder, which is synced once for a group.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._running = 0  # groups

    async def finish(self, image: PartialImage, data: bytes) -> SavedImage:
        """Return the saved image. A cancellation is raised when the image is finished.

        Raises `DownloadError`.
        """
        if image.takes_long:
            [saved] = await run_in_thread(finish_images, [(image, data)])
            if isinstance(saved, SavedImage):
                return saved
            raise saved
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((image, data, done))
        self._start()
        return await uncancellable(done)

    def _start(self) -> None:
        """Start a group of all that wait, unless they should wait on."""
        if not self._waiting or (self._running and len(self._waiting) < _GROUP):
            return
        group, self._waiting = self._waiting, []
        self._running += 1
        work = asyncio.get_running_loop().run_in_executor(
            None, finish_images, [(image, data) for image, data, _ in group]
        )
        work.add_done_callback(functools.partial(self._end, group))

    def _end(
        self, group: list[_Waiting], work: asyncio.Future[list[SavedImage | DownloadError]]
    ) -> None:
        self._running -= 1
        error = asyncio.CancelledError() if work.cancelled() else work.exception()
        ended = work.result() if error is None else [error] * len(group)
        for (_, _, done), saved in zip(group, ended, strict=True):
            if isinstance(saved, SavedImage):
                done.set_result(saved)
            else:
                done.set_exception(saved)
        self._start()
