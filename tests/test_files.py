"""Image files: their names, what is taken for an image, and how a whole one gets its name."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import io
import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import FileIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kontext_async.results import DownloadError, SavedImage
from kontext_async.results.images import files
from kontext_async.results.images.files import (
    Draft,
    Place,
    Writer,
    decoding_problem,
    done,
    file_stem,
    find_image,
    image_kind,
    in_thread,
    open_folder,
    remove_drafts,
)
from kontext_async.simulator.images import make_image, plain_png

KINDS = ["png", "jpeg", "webp"]


def image(kind="png", **options):
    out = io.BytesIO()
    Image.effect_noise((64, 48), 50).convert("RGB").save(out, kind, **options)
    return out.getvalue()


def place(folder, name="t", **options):
    return Place(**{"task_id": "t", "folder": str(folder), "name": name, **options})


def finished(draft, data=b""):
    draft.complete(data)
    return draft.settle()


def saved(at, data, kind="png"):
    return finished(Draft(at, kind), data)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refusal_of(function, *args):
    with pytest.raises(DownloadError) as caught:
        function(*args)
    assert caught.value.retryable is False
    return str(caught.value)


@pytest.fixture
def no_pillow(monkeypatch):
    """As if the extra were not installed."""
    monkeypatch.setattr(files, "_HAS_PILLOW", False)


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_id", ["task12345", "0", "_a.b-c", "a..b", "con1", "x" * 100])
def test_a_plain_id_is_the_name(task_id):
    """Lower case, digits, dots, hyphens and underscores are safe everywhere."""
    assert file_stem(task_id) == task_id


HOSTILE = [
    *["../../x", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "C:\\x", "x:stream", "\0", "a\nb"],
    *["con", "CON", "nul.png", "com1", "LPT9.x", "-rf", "--", "~root", ".hidden", " ", "a "],
    *["x" * 101, "x" * 300, "Ж" * 300, "кот", "\ud800", "a\udfff", "\u202egnp.exe", "A", "%2e%2e"],
]


@pytest.mark.parametrize("task_id", HOSTILE, ids=ascii)
def test_any_other_id_is_made_a_safe_name(task_id, tmp_path):
    """One part of a path, short, printable ASCII, no device, no option, and the file is there."""
    stem = file_stem(task_id)
    assert set(stem) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-~")
    assert len(stem) <= 80
    assert "~" in stem
    assert stem[0] != "-"
    got = saved(place(tmp_path, stem, task_id=task_id), plain_png(1, 1, b"abc"))
    assert got.path == tmp_path / f"{stem}.png"
    assert names(tmp_path) == [f"{stem}.png"]


@given(st.text(), st.text())
def test_two_ids_never_share_a_name(one, other):
    """Not even where the case of letters does not count."""
    shared = file_stem(one).casefold() == file_stem(other).casefold()
    assert shared is (one == other)


def test_ids_that_differ_in_what_is_replaced_have_two_names():
    """The hash tells apart what looks the same."""
    alike = ["a/b", "a\\b", "a b", "a_B", "A_b", "x" * 300, "x" * 301, "\ud800", "\ud801", "nul"]
    assert len({file_stem(task_id).casefold() for task_id in [*alike, "a_b"]}) == len(alike) + 1


def test_a_file_may_be_called_by_any_of_the_endings_or_exactly():
    """Before its kind is known all of them are possible."""
    assert place("f").names() == ["t.png", "t.jpg", "t.webp"]
    assert place("f", "t.gif", exact=True).names() == ["t.gif"]
    assert place("f").path("jpeg") == os.path.join("f", "t.jpg")  # noqa: PTH118  # as it is made
    assert place("f", "t.gif", exact=True).path("png").endswith("t.gif")


# --- what is an image ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_twelve_bytes_tell_the_kind(kind):
    """The signatures are those that Pillow writes."""
    assert image_kind(image(kind)[:12]) == kind


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\x89PN",
        b"\xff\xd8",
        b"RIFF....WAVE",
        b"RIFF",
        b"GIF89a",
        b"<!doctype html>",
        b"\0" * 12,
    ],
)
def test_anything_else_is_no_image(head):
    """Other formats, pages, and beginnings too short to tell."""
    assert image_kind(head) is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_decodes_to_its_end(kind):
    """A whole one has no problem; one cut at nine tenths has, whatever the format."""
    data = image(kind)
    assert decoding_problem(io.BytesIO(data), kind) is None
    problem = decoding_problem(io.BytesIO(data[: len(data) * 9 // 10]), kind)
    assert problem.startswith(f"the {kind} is broken")


def test_a_progressive_jpeg_cut_short_is_broken():
    """Its first scan alone would show the whole picture, blurred."""
    data = image("jpeg", progressive=True)
    assert decoding_problem(io.BytesIO(data), "jpeg") is None
    assert decoding_problem(io.BytesIO(data[: len(data) // 2]), "jpeg") is not None


def test_a_changed_bit_breaks_a_png():
    """Its checksums are looked at."""
    data = bytearray(image("png"))
    data[len(data) // 2] ^= 1
    assert decoding_problem(io.BytesIO(data), "png") is not None


def test_an_image_of_another_kind_is_broken():
    """Only the decoder of the kind is asked."""
    assert decoding_problem(io.BytesIO(image("jpeg")), "png") is not None


def wide_png(width, height):
    """Claims a size that its data does not have."""
    png = bytearray(plain_png(1, 1, b"abc"))
    png[16:24] = struct.pack(">2I", width, height)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


@pytest.mark.parametrize("side", [10_000, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_not_decoded(side):
    """Too many pixels for Pillow, be it an error or, where warnings are errors, a warning."""
    assert "broken" in decoding_problem(io.BytesIO(wide_png(side, side)), "png")


def test_without_pillow_the_signature_has_to_do(no_pillow):
    """The extra is what tells a file that was cut short."""
    assert decoding_problem(io.BytesIO(image("jpeg")[:100]), "jpeg") is None


# --- a draft ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_has_its_name_when_it_is_whole(kind, tmp_path):
    """Until then it is in a hidden file beside it."""
    data = image(kind)
    draft = Draft(place(tmp_path), kind)
    assert names(tmp_path) == []
    draft.write(data[:100])
    [part] = names(tmp_path)
    assert part.startswith(".t.")
    assert part.endswith(".part")
    got = finished(draft, data[100:])
    path = tmp_path / f"t{files._ENDINGS[kind]}"
    assert got == SavedImage(
        path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest(), kind=kind
    )
    assert names(tmp_path) == [path.name]
    assert path.read_bytes() == data


def test_a_draft_discarded_leaves_nothing(tmp_path):
    """Begun or not, and twice."""
    draft = Draft(place(tmp_path), "png")
    draft.discard()
    draft.write(b"abc")
    draft.discard()
    draft.discard()
    assert names(tmp_path) == []


def test_a_broken_image_gets_no_name(tmp_path):
    """It may come whole the next time, so the error is not final."""
    with pytest.raises(DownloadError, match="the jpeg is broken") as caught:
        saved(place(tmp_path), image("jpeg")[:-500], "jpeg")
    assert (caught.value.retryable, caught.value.http_status) == (True, 200)
    assert names(tmp_path) == []


def test_a_file_that_is_there_stays(tmp_path):
    """Whoever wrote it, and whenever: it may have come during the download."""
    draft = Draft(place(tmp_path), "png")
    draft.write(plain_png(1, 1, b"new"))
    (tmp_path / "t.png").write_bytes(b"old")
    assert "'t.png' already" in refusal_of(finished, draft)
    assert names(tmp_path) == ["t.png"]
    assert (tmp_path / "t.png").read_bytes() == b"old"


def test_a_link_that_leads_nowhere_is_there_too(tmp_path):
    """A dangling link is not written through."""
    (tmp_path / "t.png").symlink_to("nowhere")
    refusal_of(saved, place(tmp_path), plain_png(1, 1, b"new"))
    assert names(tmp_path) == ["t.png"]


def test_overwriting_replaces_the_file(tmp_path):
    """By another: who has the old one open reads it on, and a link is replaced, not followed."""
    new = plain_png(1, 1, b"new")
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "t.png").symlink_to("old")
    saved(place(tmp_path, overwrite=True), new)
    assert (tmp_path / "t.png").read_bytes() == new
    assert (tmp_path / "old").read_bytes() == b"old"


def test_a_folder_under_the_name_is_an_error(tmp_path):
    """It is not replaced, and nothing is left beside it."""
    (tmp_path / "t.png").mkdir()
    refusal_of(saved, place(tmp_path, overwrite=True), plain_png(1, 1, b"new"))
    assert names(tmp_path) == ["t.png"]


@pytest.mark.parametrize("name", ["x" * 251, "Ж" * 125, "字" * 83, "🦊" * 62], ids=ascii)
def test_a_name_as_long_as_a_name_may_be_can_be_written(name, tmp_path):
    """The temporary file's has room for what is added to it."""
    saved(place(tmp_path, f"{name}.png", exact=True), plain_png(1, 1, b"abc"))
    assert names(tmp_path) == [f"{name}.png"]


def test_of_two_who_save_under_a_name_at_once_one_is_told(tmp_path):
    """Neither's file is half the other's."""
    images = [plain_png(1, 1, bytes([n] * 3)) for n in range(8)]
    barrier = threading.Barrier(len(images))

    def save(data):
        draft = Draft(place(tmp_path), "png")
        draft.write(data)
        barrier.wait()
        try:
            return finished(draft)
        except DownloadError:
            return None

    with ThreadPoolExecutor(len(images)) as pool:
        results = list(pool.map(save, images))
    [(winner, data)] = [(r, d) for r, d in zip(results, images, strict=True) if r is not None]
    assert winner.path.read_bytes() == data
    assert names(tmp_path) == ["t.png"]


# --- a file system that says no -----------------------------------------------------------------


@contextlib.contextmanager
def small_files():
    """Let no file of this process grow over 64 KiB: around the code under test alone.

    The limit is the process's, so pytest's own output to a file would end at it too.
    """
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("pieces", [1, 2, 50])
def test_a_file_that_cannot_grow_leaves_nothing(pieces, tmp_path):
    """Whichever write meets the limit, the half file is gone and the error says why."""
    data = make_image('{"prompt": ""}', "png", 100_000)
    step = len(data) // pieces + 1
    first, *others = [data[at : at + step] for at in range(0, len(data), step)]

    def save():
        draft = Draft(place(tmp_path), "png")
        draft.write(first)
        for piece in others:
            draft.write(piece)
        finished(draft)

    with small_files():
        text = refusal_of(save)
    assert "File too large" in text
    assert str(tmp_path)[:20] in text
    assert names(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")  # noqa: PTH110
@pytest.mark.parametrize("size", [100, 100_000])
def test_a_full_disk_is_an_error(size, monkeypatch, tmp_path):
    """The first write meets it, and the part that was made just before is gone."""

    def full(path, mode):
        with FileIO(path, mode):  # the part is made, as on a disk just now full
            return FileIO("/dev/full", "r+")

    monkeypatch.setattr(files, "FileIO", full)
    text = refusal_of(saved, place(tmp_path), make_image('{"prompt": ""}', "png", size))
    assert "No space left on device" in text
    assert names(tmp_path) == []


@pytest.mark.parametrize("has_pillow", [False, True])
def test_nothing_gets_its_name_before_it_is_on_disk(has_pillow, monkeypatch, tmp_path):
    """A disk that fails to keep it is noticed while the name is still free."""
    data = plain_png(1, 1, b"abc")

    def failing(fd):
        assert os.fstat(fd).st_size == len(data)
        assert not (tmp_path / "t.png").exists()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "_HAS_PILLOW", has_pillow)
    monkeypatch.setattr(os, "fsync", failing)
    assert "Input/output error" in refusal_of(saved, place(tmp_path), data)
    assert names(tmp_path) == []


def test_a_folder_that_takes_no_files_is_an_error(tmp_path):
    """Here because it is none: a file is in its place, or it has gone since."""
    (tmp_path / "file").write_bytes(b"")
    data = plain_png(1, 1, b"abc")
    assert "Not a directory" in refusal_of(saved, place(tmp_path / "file"), data)
    assert "No such file" in refusal_of(saved, place(tmp_path / "gone"), data)
    assert names(tmp_path) == ["file"]


def test_a_part_that_somebody_removed_is_an_error(tmp_path):
    """As a sweep of another process does it."""
    draft = Draft(place(tmp_path), "png")
    draft.write(plain_png(1, 1, b"abc"))
    remove_drafts(str(tmp_path))
    refusal_of(finished, draft)
    assert names(tmp_path) == []


@pytest.mark.parametrize("problem", [OSError(22, "Invalid argument"), AttributeError("missing")])
def test_a_hint_that_is_not_understood_does_no_harm(problem, monkeypatch, tmp_path):
    """Not every system takes it, and some lack it."""

    def unknown(*_):
        raise problem

    monkeypatch.setattr(os, "posix_fadvise", unknown, raising=False)
    saved(place(tmp_path), plain_png(1, 1, b"abc"))
    assert names(tmp_path) == ["t.png"]


def test_a_write_that_takes_a_part_is_followed_by_the_rest(monkeypatch, tmp_path):
    """As a system may do with a long one."""

    class Slow(FileIO):
        def write(self, data):
            return super().write(data[:10])

    data = plain_png(1, 1, b"abc")
    monkeypatch.setattr(files, "FileIO", Slow)
    assert saved(place(tmp_path), data).path.read_bytes() == data


# --- the writer ---------------------------------------------------------------------------------


@pytest.fixture
async def writer():
    writer = Writer()
    yield writer
    writer.close()
    writer._thread.shutdown()


class Slow:
    """A draft whose steps are told, and which begins when it may."""

    def __init__(self, steps, name, may_begin=None, problems=()):
        self.steps = steps
        self.name = name
        self.may_begin = may_begin
        self.problems = problems

    def complete(self, data):
        if self.may_begin is not None:
            self.may_begin.wait(10)
        self._step("complete")

    def settle(self):
        return self._step("settle")

    def _step(self, step):
        self.steps.append(f"{step} {self.name}")
        if step in self.problems:
            raise LookupError(self.name)
        return self.name


async def batch_of(writer, **problems):
    """What becomes of drafts that came while the thread was at work on another, and the steps."""
    steps, may_begin = [], threading.Event()
    drafts = [Slow(steps, "first", may_begin)]
    drafts += [Slow(steps, name, problems=problem) for name, problem in problems.items()]
    saves = [asyncio.ensure_future(writer.finish(draft, b"")) for draft in drafts]
    await asyncio.sleep(0.01)
    assert steps == []
    may_begin.set()
    return await asyncio.gather(*saves, return_exceptions=True), steps


async def test_what_came_meanwhile_is_finished_together(writer):
    """All are written before the first of them is waited for: so they reach the disk together."""
    results, steps = await batch_of(writer, a="", b="")
    assert results == ["first", "a", "b"]
    assert steps[:2] == ["complete first", "settle first"]
    assert steps[2:] == ["complete a", "complete b", "settle a", "settle b"]


@pytest.mark.parametrize("step", ["complete", "settle"])
async def test_a_draft_that_fails_harms_no_other(step, writer):
    """Whatever it raises is raised where that draft is waited for; it gets no name."""
    results, steps = await batch_of(writer, a="", b=[step], c="")
    assert [repr(result) for result in results] == ["'first'", "'a'", "LookupError('b')", "'c'"]
    assert ("settle b" in steps) is (step == "settle")


async def test_a_writer_closed_at_work_ends_when_all_is_done():
    """What waits is finished, then the thread ends."""
    writer = Writer()
    steps, may_begin = [], threading.Event()
    drafts = [Slow(steps, "a", may_begin), Slow(steps, "b")]
    saves = [asyncio.ensure_future(writer.finish(draft, b"")) for draft in drafts]
    await asyncio.sleep(0.01)
    writer.close()
    may_begin.set()
    assert await asyncio.gather(*saves) == ["a", "b"]
    [thread] = writer._thread._threads
    await in_thread(thread.join, 10)
    assert not thread.is_alive()


# --- a folder -----------------------------------------------------------------------------------


def test_opening_a_folder_makes_it_and_tells_what_is_in_it(tmp_path):
    """With all above it."""
    folder = tmp_path / "a" / "b"
    assert open_folder(str(folder)) == set()
    (folder / "t.png").write_bytes(b"")
    assert open_folder(str(folder)) == {"t.png"}


@pytest.mark.parametrize("below", ["", "b/c"])
def test_a_folder_that_cannot_be_made_is_an_error_of_no_task(below, tmp_path):
    """A file is in its place, or in the place of one above it."""
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(DownloadError, match="image not saved: in ") as caught:
        open_folder(str(tmp_path / "a" / below))
    assert caught.value.task_id is None


def test_a_sweep_removes_unfinished_files_and_no_others(tmp_path):
    """Whoever left them: a killed process cannot."""
    part = tmp_path / ".t\n.png.0123456789ab.part"
    kept = [".t.png.part", "t.png.0123456789ab.part", ".t.png.0123456789AB.part", "t.png"]
    for name in [*kept, part.name]:
        (tmp_path / name).write_bytes(b"")
    remove_drafts(str(tmp_path))
    assert names(tmp_path) == sorted(kept)
    refusal_of(remove_drafts, str(tmp_path / "gone"))


def test_what_a_draft_leaves_when_it_is_killed_a_sweep_takes(tmp_path):
    """Long names too."""
    drafts = [Draft(place(tmp_path, name), "png") for name in ("t", "x" * 100, "\n")]
    for draft in drafts:
        draft.write(b"abc")
    remove_drafts(str(tmp_path))
    assert names(tmp_path) == []
    for draft in drafts:
        draft.discard()


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_found_again(kind, tmp_path):
    """The same as when it was saved."""
    was = saved(place(tmp_path), image(kind), kind)
    assert find_image(place(tmp_path)) == was


def test_only_a_whole_image_is_found(tmp_path):
    """A broken one, or another file, under one ending does not hide a whole one under the next."""
    assert find_image(place(tmp_path)) is None
    (tmp_path / "t.png").write_bytes(b"<!doctype html>")
    (tmp_path / "t.jpg").write_bytes(image("jpeg")[:-500])
    assert find_image(place(tmp_path)) is None
    was = saved(place(tmp_path), image("webp"), "webp")
    assert find_image(place(tmp_path)) == was


def test_an_image_that_cannot_be_read_is_an_error(tmp_path):
    """Of its task."""
    (tmp_path / "t.png").mkdir()
    assert refusal_of(find_image, place(tmp_path)).startswith("task t: ")


# --- threads ------------------------------------------------------------------------------------


async def test_work_in_a_thread_gives_its_result_or_raises():
    """As if it were called here."""
    assert await in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 7, 0)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancellation_is_raised_when_the_thread_is_done(times, fails, caplog):
    """However often it comes; and what the thread then raises is not complained about."""
    loop = asyncio.get_running_loop()
    begun, go, ended = asyncio.Event(), threading.Event(), threading.Event()

    def work():
        loop.call_soon_threadsafe(begun.set)
        go.wait(10)
        ended.set()
        if fails:
            raise ValueError

    task = asyncio.create_task(in_thread(work))
    await begun.wait()
    for _ in range(times):
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
    go.set()
    await asyncio.wait([task])
    assert task.cancelled()
    assert ended.is_set()
    del task
    await asyncio.sleep(0.01)  # the thread lets go of what it raised
    gc.collect()
    assert caplog.text == ""


async def test_work_that_is_cancelled_itself_ends_the_wait():
    """As an executor does with what it has not begun when it is shut down."""
    work = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(done(work))
    await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
