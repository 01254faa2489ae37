"""Finishing images in threads, short ones in groups.

On more than one core, each thread that is woken contends with the event loop's thread for Python's
lock. For an image of its own, that would cost more than writing the image.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence

from kontext_async.results.images.files import PartialImage, SavedImage, finish_images
from kontext_async.results.threads import Threads, until_ended

__all__ = ["Finisher"]

# Images that wait for no group under way, because a slow disk would let them wait long. Chosen by
# the benchmark `saving`: with 2 an image takes more CPU time, with 4 fewer are saved a second.
_GROUP = 3


class _Group:
    """Images for one thread, and the futures of their saves. ``work``: None until it begins."""

    def __init__(self) -> None:
        self.images: dict[PartialImage, bytes] = {}  # each with its last data
        self.saves: list[asyncio.Future[SavedImage]] = []  # of the images
        self.work: asyncio.Future[None] | None = None

    def add(self, image: PartialImage, data: bytes) -> asyncio.Future[SavedImage]:
        save: asyncio.Future[SavedImage] = asyncio.get_running_loop().create_future()
        self.images[image] = data
        self.saves.append(save)
        return save

    def remove(self, image: PartialImage, save: asyncio.Future[SavedImage]) -> None:
        del self.images[image]
        self.saves.remove(save)


class Finisher:
    """Writes the last data of images, and gives them their names once they are on disk.

    All images are of one folder, which is synced once for a group.
    """

    def __init__(self) -> None:
        self._threads = Threads()
        self._next = _Group()
        self._under_way: set[_Group] = set()  # without the images that take long

    def close(self) -> None:
        """End the threads once they have finished what they were given."""
        self._threads.close()

    async def finish(self, image: PartialImage, data: bytes) -> SavedImage:
        """Return the saved image. Raises `DownloadError`.

        A cancellation is raised once no thread works on the image.
        """
        group = _Group() if image.takes_long else self._next
        save = group.add(image, data)
        if group is not self._next:
            self._begin(group)
        else:
            self._begin_next()
        try:
            return await save
        except asyncio.CancelledError:
            if group.work is None:
                group.remove(image, save)
            else:
                await until_ended(group.work)
            raise

    def _begin_next(self) -> None:
        """Begin the next group, unless its images should wait on."""
        group = self._next
        if group.images and (not self._under_way or len(group.images) >= _GROUP):
            self._next = _Group()
            self._under_way.add(group)
            self._begin(group)

    def _begin(self, group: _Group) -> None:
        group.work = asyncio.get_running_loop().create_future()
        try:
            self._threads.start(functools.partial(self._finish, group))
        except Exception as exc:  # noqa: BLE001  # no thread can be started
            self._end(group, [exc] * len(group.images))

    def _finish(self, group: _Group) -> Callable[[], None]:
        """Finish the images of a group, in a thread; return what remains to be done."""
        ended: Sequence[SavedImage | BaseException]
        try:
            ended = finish_images(group.images)
        except BaseException as exc:  # noqa: BLE001  # raised by the saves
            ended = [exc] * len(group.images)
        return functools.partial(self._end, group, ended)

    def _end(self, group: _Group, ended: Sequence[SavedImage | BaseException]) -> None:
        self._under_way.discard(group)
        assert group.work is not None, "it has begun"
        group.work.set_result(None)
        group.images.clear()  # an error that is kept keeps its group
        for save, saved in zip(group.saves, ended, strict=True):
            if save.cancelled():
                continue
            if isinstance(saved, SavedImage):
                save.set_result(saved)
            else:
                save.set_exception(saved)
        self._begin_next()
