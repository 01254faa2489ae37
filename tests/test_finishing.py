"""Finishing images in threads: which of them share one, and what each save is given."""

from __future__ import annotations

import asyncio
import gc
import threading
import traceback

import pytest
from pngs import plain_png

from kontext_async.results import DownloadError
from kontext_async.results.images import files, finishing
from kontext_async.results.images.files import PartialImage, Target
from kontext_async.results.images.finishing import Finisher

DATA = plain_png(1, 1, b"abc")
GROUP = finishing._GROUP


@pytest.fixture(autouse=True)
def _no_pillow(monkeypatch):
    """An image that is decoded has a thread of its own."""
    monkeypatch.setattr(files, "_HAS_PILLOW", False)


class Gate:
    """The groups that were begun, which end once the gate is open."""

    def __init__(self):
        self.groups = []
        self.open = threading.Event()
        self._begun = threading.Semaphore(0)

    def finish_images(self, images):
        self.groups.append([image.target.name for image in images])
        self._begun.release()
        self.open.wait(10)
        return files.finish_images(images)

    async def begun(self, count):
        """Wait for this many more groups; return all of them, in any order."""
        for _ in range(count):
            assert await asyncio.to_thread(self._begun.acquire, timeout=10)
        return sorted(self.groups)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(finishing, "finish_images", gate.finish_images)
    yield gate
    gate.open.set()


class Saving:
    """Saves in a folder, each in a task of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.finisher = Finisher()

    def image(self, name):
        return PartialImage(Target(task_id=name, folder=self.folder, name=name), "png")

    async def start(self, *images, data=DATA):
        """Start saves; return their tasks when all of them wait."""
        tasks = [
            asyncio.create_task(self.finisher.finish(self.image(image), data))
            if isinstance(image, str)
            else asyncio.create_task(self.finisher.finish(image, data))
            for image in images
        ]
        await asyncio.sleep(0)
        return tasks


@pytest.fixture
async def saving(tmp_path):
    saving = Saving(tmp_path)
    yield saving
    saving.finisher.close()


def names(saved):
    return [image.path.name for image in saved]


async def test_an_image_does_not_wait_where_no_other_is_finished(saving, gate):
    """One alone is a group."""
    gate.open.set()
    for name in ("a", "b"):
        [task] = await saving.start(name)
        assert (await task).path.read_bytes() == DATA
    assert gate.groups == [["a"], ["b"]]


async def test_images_that_wait_for_a_thread_share_the_next(saving, gate):
    """They are as few as are left to wait, or a new group begins beside the one under way."""
    first = await saving.start("a")
    waiting = [f"b{n}" for n in range(GROUP - 1)]
    tasks = await saving.start(*waiting)
    assert len(saving.finisher._under_way) == 1
    gate.open.set()
    assert names(await asyncio.gather(*first, *tasks)) == ["a.png", *(f"{n}.png" for n in waiting)]
    assert gate.groups == [["a"], waiting]


async def test_enough_images_do_not_wait_for_a_thread(saving, gate):
    """On a slow disk one group would hold up all others."""
    tasks = await saving.start("a", *(f"b{n}" for n in range(2 * GROUP)), "c")
    assert sorted(map(len, await gate.begun(3))) == [1, GROUP, GROUP]
    gate.open.set()
    await asyncio.gather(*tasks)
    assert gate.groups[3:] == [["c"]]


async def test_an_image_that_takes_long_is_alone(saving, gate):
    """It waits for no group, and none waits for it."""
    long = [saving.image("long0"), saving.image("long1")]
    for image in long:
        image.write(DATA[:20])
    tasks = await saving.start(long[0], data=DATA[20:])
    tasks += await saving.start("a", "b")
    tasks += await saving.start(long[1], data=DATA[20:])
    assert await gate.begun(3) == [["a"], ["long0"], ["long1"]]
    gate.open.set()
    saved = names(await asyncio.gather(*tasks))
    assert saved == ["long0.png", "a.png", "b.png", "long1.png"]


async def test_an_image_that_is_decoded_is_alone(saving, gate, monkeypatch):
    """Decoding several in one thread would leave other cores idle."""
    monkeypatch.setattr(files, "_HAS_PILLOW", True)
    tasks = await saving.start("a", "b", "c")
    assert await gate.begun(3) == [["a"], ["b"], ["c"]]
    gate.open.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("first", [0, 20], ids=["short", "long"])
async def test_an_error_is_that_of_its_own_image(saving, first):
    """Those that were finished with it are saved."""
    broken = saving.image("broken")
    if first:
        broken.write(DATA[:first])
    good = await saving.start("a")
    bad = await saving.start(broken, data=DATA[first:-1])
    good += await saving.start("b", "c")
    with pytest.raises(DownloadError, match=r"task broken: .* its end is missing"):
        await bad[0]
    assert names(await asyncio.gather(*good)) == ["a.png", "b.png", "c.png"]
    broken.discard()


async def test_a_defect_reaches_all_saves_of_a_group(saving, gate, monkeypatch):
    """The next group is finished all the same."""
    broken, complete = saving.image("b0"), PartialImage.complete

    def complete_or_fail(image, data):
        return 1 / 0 if image is broken else complete(image, data)

    monkeypatch.setattr(PartialImage, "complete", complete_or_fail)
    [first] = await saving.start("a")
    tasks = await saving.start(broken, *(f"b{n}" for n in range(1, GROUP)), "c")
    gate.open.set()
    for task in tasks[:-1]:
        with pytest.raises(ZeroDivisionError):
            await task
    assert names(await asyncio.gather(first, tasks[-1])) == ["a.png", "c.png"]


async def test_without_a_thread_all_saves_fail(saving, monkeypatch):
    """The next image is tried anew."""
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        for task in await saving.start("a", "b", "c"):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await task
    [task] = await saving.start("d")
    assert (await task).path.name == "d.png"


def refused(_):
    raise RuntimeError("can't start new thread")


async def test_an_error_that_is_kept_keeps_no_image(saving):
    """Neither its own nor those that were finished with it."""
    broken = saving.image("broken")
    [task] = await saving.start(broken, data=DATA[:-1])
    with pytest.raises(DownloadError) as caught:
        await task
    broken.discard()
    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    groups = [frame.f_locals["group"] for frame in frames if "group" in frame.f_locals]
    assert [group.images for group in groups] == [{}]


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancellation_is_raised_when_no_thread_writes_any_longer(times, saving, gate):
    """At once where none has begun: then the image is not saved."""
    being_written, waiting, other = await saving.start("a", "b", "c")
    await gate.begun(1)
    for _ in range(times):
        being_written.cancel()
        waiting.cancel()
        await asyncio.sleep(0)
    assert waiting.cancelled()
    assert not being_written.done()
    gate.open.set()
    await asyncio.wait([being_written])
    assert being_written.cancelled()
    assert (await other).path.name == "c.png"
    assert gate.groups == [["a"], ["c"]]
    assert sorted(path.name for path in saving.folder.iterdir()) == ["a.png", "c.png"]


async def test_images_that_wait_are_saved_after_closing(saving, gate):
    """A closing that is cancelled does not wait for them."""
    tasks = await saving.start("a", "b", "c")
    await gate.begun(1)
    saving.finisher.close()
    gate.open.set()
    assert names(await asyncio.gather(*tasks)) == ["a.png", "b.png", "c.png"]


async def test_where_all_that_wait_are_cancelled_no_group_begins(saving, gate):
    """The next image is a group of its own."""
    first, waiting = await saving.start("a", "b")
    waiting.cancel()
    gate.open.set()
    await first
    [task] = await saving.start("c")
    await task
    assert gate.groups == [["a"], ["c"]]


async def test_a_failure_of_an_image_whose_save_was_cancelled_is_not_logged(saving, gate, caplog):
    """Nobody waits for it any longer."""
    broken = saving.image("a")
    [task] = await saving.start(broken, data=DATA[:-1])
    await gate.begun(1)
    task.cancel()
    gate.open.set()
    await asyncio.wait([task])
    broken.discard()
    del task
    gc.collect()
    assert caplog.text == ""
