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
from kontext_async.results.threads import run_in_thread, until_ended

__all__ = ["Finisher"]

_Work: TypeAlias = asyncio.Future[list[SavedImage | DownloadError]]

# Images that wait for no group under way, because a slow disk would let them wait long. Chosen by
# the benchmark `saving`: with 2 an image takes more CPU time, with 4 fewer are saved a second.
_GROUP = 3


class _Group:
    """Images for one thread, and the futures of their saves. ``work``: None until it begins."""

    def __init__(self) -> None:
        self.images: list[tuple[PartialImage, bytes]] = []
        self.saves: list[asyncio.Future[SavedImage]] = []
        self.work: _Work | None = None


class Finisher:
    """Writes the last data of images, and gives them their names once they are on disk.

    All images are of one folder, which is synced once for a group.
    """

    def __init__(self) -> None:
        self._next = _Group()
        self._running = 0  # groups

    async def finish(self, image: PartialImage, data: bytes) -> SavedImage:
        """Return the saved image. Raises `DownloadError`.

        A cancellation is raised once no thread works on the image.
        """
        if image.takes_long:
            [saved] = await run_in_thread(finish_images, [(image, data)])
            if isinstance(saved, SavedImage):
                return saved
            raise saved
        group = self._next
        save: asyncio.Future[SavedImage] = asyncio.get_running_loop().create_future()
        group.images.append((image, data))
        group.saves.append(save)
        self._start()
        try:
            return await save
        except asyncio.CancelledError:
            if group.work is not None:
                await until_ended(group.work)
            else:
                at = group.saves.index(save)
                del group.images[at], group.saves[at]
            raise

    def _start(self) -> None:
        """Start the next group, unless its images should wait on."""
        group = self._next
        if not group.images or (self._running and len(group.images) < _GROUP):
            return
        self._next = _Group()
        self._running += 1
        loop = asyncio.get_running_loop()
        try:
            group.work = loop.run_in_executor(None, finish_images, group.images)
        except RuntimeError as exc:  # the threads were shut down, or none can be started
            group.work = loop.create_future()
            group.work.set_exception(exc)
        group.work.add_done_callback(functools.partial(self._end, group))

    def _end(self, group: _Group, work: _Work) -> None:
        self._running -= 1
        error = asyncio.CancelledError() if work.cancelled() else work.exception()
        ended = work.result() if error is None else [error] * len(group.saves)
        group.images.clear()  # an error that is kept keeps its group
        for save, saved in zip(group.saves, ended, strict=True):
            if save.cancelled():
                continue
            if isinstance(saved, SavedImage):
                save.set_result(saved)
            else:
                save.set_exception(saved)
        self._start()
