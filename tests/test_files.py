"""Image files: their names, the check of their contents, and writing them."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import io
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pngs import decompression_bomb, plain_png

from kontext_async.results import DownloadError, SavedImage
from kontext_async.results import partial as partial_module
from kontext_async.results.images import files
from kontext_async.results.images.files import (
    PartialImage,
    Target,
    decoding_problem,
    file_stem,
    find_image,
    finish_images,
    image_kind,
    open_folder,
    sweep_folder,
)
from kontext_async.results.partial import PartialFile
from kontext_async.simulator.images import make_image

KINDS = ["png", "jpeg", "webp"]


def image(kind="png", **options):
    out = io.BytesIO()
    Image.effect_noise((64, 48), 50).convert("RGB").save(out, kind, **options)
    return out.getvalue()


def target(folder, name="t", **options):
    return Target(**{"task_id": "t", "folder": Path(folder), "name": name, **options})


def finished(partial, data=b""):
    """Finish an image; if that fails, discard it as a saver does."""
    [ended] = ended_together({partial: data})
    if isinstance(ended, DownloadError):
        raise ended
    return ended


def ended_together(images):
    try:
        return finish_images(images)
    finally:
        for partial in images:
            partial.discard()


def saved(at, data, kind="png"):
    return finished(PartialImage(at, kind), data)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refusal_of(function, *args):
    with pytest.raises(DownloadError) as caught:
        function(*args)
    assert caught.value.retryable is False
    return str(caught.value)


@pytest.fixture
def no_pillow(monkeypatch):
    """Act as if the extra were not installed."""
    monkeypatch.setattr(files, "_HAS_PILLOW", False)


# Names


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
    """The name is one short part of a path, in ASCII, and not a device or an option."""
    stem = file_stem(task_id)
    assert set(stem) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-~")
    assert len(stem) <= 80
    assert "~" in stem
    assert stem[0] != "-"
    got = saved(target(tmp_path, stem, task_id=task_id), plain_png(1, 1, b"abc"))
    assert got.path == tmp_path / f"{stem}.png"
    assert names(tmp_path) == [f"{stem}.png"]


GOLDEN = [
    ("task12345", "task12345"),
    ("task-1", "task-1"),
    ("Task-1", "Task-1~2bc4a5868005996a"),
    ("", "~e3b0c44298fc1c14"),
    ("..", "__~5ec1f7e700f37c3d"),
    ("../../etc/passwd", "______etc_passwd~3754d6cb3a38e118"),
    ("a b", "a_b~c8687a08aa5d6ed2"),
    ("CON", "CON~a3dbc4b644a9a2c5"),
    ("nul.png", "nul_png~f451cbad9438d303"),
    ("-rf", "rf~686c39acd6327bbd"),
    ("\u043a\u043e\u0442", "___~77095ebdd157b841"),
    ("x" * 101, f"{'x' * 60}~c675a2e604b0cd12"),
    ("\ud800", "_~91a681b998555fb4"),
]


@pytest.mark.parametrize(("task_id", "stem"), GOLDEN, ids=ascii)
def test_the_name_of_an_id_never_changes(task_id, stem):
    """A restart with a newer release finds the images of an older one."""
    assert file_stem(task_id) == stem


@given(st.text(), st.text())
def test_two_ids_never_share_a_name(one, other):
    """Not even where the case of letters does not count."""
    shared = file_stem(one).casefold() == file_stem(other).casefold()
    assert shared is (one == other)


def test_ids_that_differ_in_what_is_replaced_have_two_names():
    """The hash distinguishes them."""
    alike = ["a/b", "a\\b", "a b", "a_B", "A_b", "x" * 300, "x" * 301, "\ud800", "\ud801", "nul"]
    assert len({file_stem(task_id).casefold() for task_id in [*alike, "a_b"]}) == len(alike) + 1


def test_a_target_has_a_name_for_each_ending_or_the_exact_one():
    """Each ending is possible before the kind is known."""
    assert target("f").names() == ["t.png", "t.jpg", "t.webp"]
    assert target("f", "t.gif", exact=True).names() == ["t.gif"]
    assert target("f").file_name("jpeg") == "t.jpg"
    assert target("f", "t.gif", exact=True).file_name("png") == "t.gif"


# The check of an image


@pytest.mark.parametrize("kind", KINDS)
def test_twelve_bytes_are_enough_for_the_kind(kind):
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
def test_anything_else_is_not_an_image(head):
    """Other formats, pages, and beginnings that are too short."""
    assert image_kind(head) is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_decodes_to_its_end(kind):
    """A complete image is accepted; one cut at nine tenths is not, in any format."""
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
    """The decoder compares its checksums."""
    data = bytearray(image("png"))
    data[len(data) // 2] ^= 1
    assert decoding_problem(io.BytesIO(data), "png") is not None


def test_an_image_of_another_kind_is_broken():
    """Only the decoder of the announced kind is used."""
    assert decoding_problem(io.BytesIO(image("jpeg")), "png") is not None


@pytest.mark.parametrize("side", [10_000, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_not_decoded(side):
    """Pillow raises an error for too many pixels, or a warning, which is an error here."""
    assert "broken" in decoding_problem(io.BytesIO(decompression_bomb(side)), "png")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 48), (400, 300)])
def test_without_pillow_an_image_without_its_end_is_broken(kind, size, no_pillow):
    """Wherever it is cut; a few bytes after the end do no harm."""
    out = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(out, kind)
    data = out.getvalue()
    for whole in (data, data + bytes(900)):
        assert decoding_problem(io.BytesIO(whole), kind) is None
    for length in (12, 100, len(data) // 2, len(data) * 9 // 10, len(data) - 1):
        problem = decoding_problem(io.BytesIO(data[:length]), kind)
        assert problem == f"the {kind} is broken: its end is missing"


def test_without_pillow_only_the_end_is_checked(no_pillow):
    """A changed bit passes without the extra."""
    data = bytearray(image("png"))
    data[len(data) // 2] ^= 1
    assert decoding_problem(io.BytesIO(data), "png") is None


# A partial image


@pytest.mark.parametrize("has_pillow", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_gets_its_name_when_it_is_complete(kind, has_pillow, monkeypatch, tmp_path):
    """Until then it is in a hidden file in the same folder."""
    monkeypatch.setattr(files, "_HAS_PILLOW", has_pillow)
    data = image(kind)
    partial = PartialImage(target(tmp_path), kind)
    assert names(tmp_path) == []
    partial.write(data[:100])
    [part] = names(tmp_path)
    assert part.startswith(".t.")
    assert part.endswith(".part")
    got = finished(partial, data[100:])
    path = tmp_path / f"t{files._ENDINGS[kind]}"
    assert got == SavedImage(
        path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest(), kind=kind
    )
    assert names(tmp_path) == [path.name]
    assert path.read_bytes() == data


def test_discarding_a_partial_image_leaves_nothing(tmp_path):
    """This holds before the first write, and for a second call."""
    partial = PartialImage(target(tmp_path), "png")
    partial.discard()
    partial.write(b"abc")
    partial.discard()
    partial.discard()
    assert names(tmp_path) == []


@pytest.mark.parametrize("has_pillow", [False, True])
@pytest.mark.parametrize("first", [0, 100, -100])
def test_a_broken_image_is_not_saved(first, has_pillow, monkeypatch, tmp_path):
    """A retry may bring a complete one, so the error is retryable. It comes in one piece or two."""
    monkeypatch.setattr(files, "_HAS_PILLOW", has_pillow)
    data = image("jpeg")[:-500]
    partial = PartialImage(target(tmp_path), "jpeg")
    if first:
        partial.write(data[:first])
    with pytest.raises(DownloadError, match="the jpeg is broken") as caught:
        finished(partial, data[first:])
    assert (caught.value.retryable, caught.value.http_status) == (True, 200)
    assert names(tmp_path) == []


def test_an_existing_file_stays(tmp_path):
    """Here it is written by somebody during the download."""
    partial = PartialImage(target(tmp_path), "png")
    partial.write(plain_png(1, 1, b"new"))
    (tmp_path / "t.png").write_bytes(b"old")
    assert "'t.png' already" in refusal_of(finished, partial)
    assert names(tmp_path) == ["t.png"]
    assert (tmp_path / "t.png").read_bytes() == b"old"


def test_a_dangling_link_counts_as_an_existing_file(tmp_path):
    """The image is not written to where the link points."""
    (tmp_path / "t.png").symlink_to("nowhere")
    refusal_of(saved, target(tmp_path), plain_png(1, 1, b"new"))
    assert names(tmp_path) == ["t.png"]


def test_overwriting_replaces_the_file(tmp_path):
    """A link is replaced, and the file it points to stays as it was."""
    new = plain_png(1, 1, b"new")
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "t.png").symlink_to("old")
    saved(target(tmp_path, overwrite=True), new)
    assert (tmp_path / "t.png").read_bytes() == new
    assert (tmp_path / "old").read_bytes() == b"old"


def test_a_folder_under_the_name_is_an_error(tmp_path):
    """The folder stays, and no temporary file is left."""
    (tmp_path / "t.png").mkdir()
    refusal_of(saved, target(tmp_path, overwrite=True), plain_png(1, 1, b"new"))
    assert names(tmp_path) == ["t.png"]


@pytest.mark.parametrize("name", ["x" * 251, "Ж" * 125, "字" * 83, "🦊" * 62], ids=ascii)
def test_a_name_of_the_maximum_length_can_be_written(name, tmp_path):
    """The temporary name is cut, so it is not too long either."""
    saved(target(tmp_path, f"{name}.png", exact=True), plain_png(1, 1, b"abc"))
    assert names(tmp_path) == [f"{name}.png"]


def test_of_several_that_save_one_name_at_once_all_except_one_fail(tmp_path):
    """The file is that of the one which succeeded."""
    images = [plain_png(1, 1, bytes([n] * 3)) for n in range(8)]
    barrier = threading.Barrier(len(images))

    def save(data):
        partial = PartialImage(target(tmp_path), "png")
        partial.write(data)
        barrier.wait()
        try:
            return finished(partial)
        except DownloadError:
            return None

    with ThreadPoolExecutor(len(images)) as pool:
        results = list(pool.map(save, images))
    [(winner, data)] = [(r, d) for r, d in zip(results, images, strict=True) if r is not None]
    assert winner.path.read_bytes() == data
    assert names(tmp_path) == ["t.png"]


# Errors of the file system


@contextlib.contextmanager
def small_files():
    """Limit the files of this process to 64 KiB, around the code under test only.

    The limit is the process's, so pytest's own output to a file would end at it too.
    """
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("count", [1, 2, 50])
def test_a_file_that_cannot_grow_leaves_nothing(count, tmp_path):
    """The temporary file is removed at whichever write fails."""
    data = make_image('{"prompt": ""}', "png", 100_000)
    step = len(data) // count + 1
    pieces = [data[at : at + step] for at in range(0, len(data), step)]
    partial = PartialImage(target(tmp_path), "png")
    with small_files(), pytest.raises(OSError, match="File too large"):
        [partial.write(piece) for piece in pieces]
    partial.discard()
    assert names(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")  # noqa: PTH110
@pytest.mark.parametrize("size", [100, 100_000])
def test_a_full_disk_is_an_error(size, monkeypatch, tmp_path):
    """The first write fails, and the temporary file is removed."""

    def full(*args, create=os.open):
        descriptor, full = create(*args), create("/dev/full", os.O_WRONLY)
        os.dup2(full, descriptor)  # the file is created, as on a disk just now full
        os.close(full)
        return descriptor

    monkeypatch.setattr(partial_module.os, "open", full)
    text = refusal_of(saved, target(tmp_path), make_image('{"prompt": ""}', "png", size))
    assert "No space left on device" in text
    assert names(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="needs a list of open files")  # noqa: PTH110
@pytest.mark.parametrize("end", [PartialFile.rename, PartialFile.discard, lambda file: None])
def test_a_file_is_closed_at_its_end(end, tmp_path):
    """A process may only have some 1,000 open."""
    gc.collect()
    before = os.listdir("/dev/fd")  # noqa: PTH208
    for name in "abc":
        file = PartialFile(os.fspath(tmp_path), name)
        file.write(b"abc")
        end(file)
        del file
    assert os.listdir("/dev/fd") == before  # noqa: PTH208


def test_what_has_the_temporary_name_is_left_alone(tmp_path):
    """In a folder that others may write to, it could be a link to any file."""
    (tmp_path / "other").write_bytes(b"other")
    part = PartialFile(os.fspath(tmp_path), "t.png")
    Path(part.temporary).symlink_to(tmp_path / "other")
    with pytest.raises(FileExistsError):
        part.write(b"abc")
    part.discard()
    assert len(names(tmp_path)) == 2
    assert (tmp_path / "other").read_bytes() == b"other"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_processes_that_forked_use_other_temporary_names():
    """They may save into one folder."""
    program = (
        "import os; from kontext_async.results.partial import PartialFile;"
        "os.fork() and os.wait(); print(PartialFile('', 'a').temporary)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert len(set(ran.stdout.split())) == 2


def test_an_image_written_in_parts_is_whole(monkeypatch, tmp_path):
    """The system may write less than it is given, such as 2 GiB of more."""

    def in_parts(descriptor, data, write=os.write):
        return write(descriptor, data[:100])

    monkeypatch.setattr(partial_module.os, "write", in_parts)
    data = make_image('{"prompt": ""}', "png", 1050)
    assert saved(target(tmp_path), data).path.read_bytes() == data


@pytest.mark.parametrize("has_pillow", [False, True])
def test_an_image_is_on_disk_before_it_gets_its_name(has_pillow, monkeypatch, tmp_path):
    """If syncing fails, no file has the name."""
    data = plain_png(1, 1, b"abc")

    def failing(fd):
        assert os.fstat(fd).st_size == len(data)
        assert not (tmp_path / "t.png").exists()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "_HAS_PILLOW", has_pillow)
    monkeypatch.setattr(os, "fsync", failing)
    assert "Input/output error" in refusal_of(saved, target(tmp_path), data)
    assert names(tmp_path) == []


def syncs_of_folders(monkeypatch, error=None):
    """Return a list that fills with the names in each folder that is synced."""
    fsync, seen = os.fsync, []

    def watched(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            seen.append(os.listdir(fd))  # noqa: PTH208  # paths take no descriptors
            if error is not None:
                raise OSError(error, os.strerror(error))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    return seen


@pytest.mark.skipif(os.name == "nt", reason="Windows has no sync of a folder")
def test_the_name_of_an_image_is_on_disk_too(monkeypatch, tmp_path):
    """The folder is synced after the rename, also where it is the working folder."""
    seen = syncs_of_folders(monkeypatch)
    saved(target(tmp_path), image())
    monkeypatch.chdir(tmp_path)
    saved(target("", "u"), image())
    assert list(map(sorted, seen)) == [["t.png"], ["t.png", "u.png"]]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no sync of a folder")
def test_images_finished_together_share_a_sync(monkeypatch, tmp_path):
    """One that is broken keeps the others from nothing."""
    seen = syncs_of_folders(monkeypatch)
    data = [image(), image()[:-500], image()]
    partials = [PartialImage(target(tmp_path, f"t{n}"), "png") for n in range(3)]
    first, broken, last = ended_together(dict(zip(partials, data, strict=True)))
    assert [first.path.name, last.path.name] == ["t0.png", "t2.png"] == names(tmp_path)
    assert "the png is broken" in str(broken)
    assert [len({"t0.png", "t2.png"}.intersection(at_sync)) for at_sync in seen] == [2]


def test_images_finished_together_are_all_on_disk_before_one_has_its_name(monkeypatch, tmp_path):
    """To sync a file after a rename would write the folder once more."""
    fsync, seen = os.fsync, []

    def watched(fd):
        if stat.S_ISREG(os.fstat(fd).st_mode):
            seen.append([path.name for path in tmp_path.glob("t*")])
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    ended_together({PartialImage(target(tmp_path, f"t{n}"), "png"): image() for n in range(3)})
    assert seen == [[], [], []]
    assert names(tmp_path) == ["t0.png", "t1.png", "t2.png"]


def test_of_images_finished_together_one_may_be_too_large_for_the_disk(tmp_path):
    """Its error is that of the write, and the others are saved."""
    data = [image(), make_image('{"prompt": ""}', "png", 100_000), image()]
    partials = [PartialImage(target(tmp_path, f"t{n}"), "png") for n in range(3)]
    with small_files():
        first, large, last = ended_together(dict(zip(partials, data, strict=True)))
    assert [first.path.name, last.path.name] == ["t0.png", "t2.png"] == names(tmp_path)
    assert "File too large" in str(large)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no sync of a folder")
@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_folder_that_cannot_be_synced_is_no_error(error, monkeypatch, tmp_path):
    """Some file systems and permissions do not allow it; the image is saved all the same."""
    seen = syncs_of_folders(monkeypatch, error)
    assert saved(target(tmp_path), image()).path.exists()
    assert seen == [["t.png"]]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no sync of a folder")
def test_a_disk_that_fails_at_the_sync_of_a_folder_is_an_error(monkeypatch, tmp_path):
    """All its images may be gone after a power cut. One that failed before keeps its own error."""
    syncs_of_folders(monkeypatch, errno.EIO)
    ids = ["a", "b", "c"]
    partials = [PartialImage(target(tmp_path, n, task_id=n), "png") for n in ids]
    data = [image(), image()[:-500], image()]
    errors = ended_together(dict(zip(partials, data, strict=True)))
    assert [error.task_id for error in errors] == ids
    assert [error.retryable for error in errors] == [False, True, False]
    assert "Input/output error" in str(errors[0])
    assert isinstance(errors[0].__cause__, OSError)


def test_windows_syncs_no_folder(monkeypatch, tmp_path):
    """It has no such call."""
    seen = syncs_of_folders(monkeypatch)
    monkeypatch.setattr(files.os, "name", "nt")
    files._sync_folder(tmp_path)
    assert seen == []


def test_a_folder_that_is_missing_or_a_file_is_an_error(tmp_path):
    """It may have been removed or replaced since the saver was opened."""
    (tmp_path / "file").write_bytes(b"")
    data = plain_png(1, 1, b"abc")
    assert "Not a directory" in refusal_of(saved, target(tmp_path / "file"), data)
    assert "No such file" in refusal_of(saved, target(tmp_path / "gone"), data)
    assert names(tmp_path) == ["file"]


def test_a_temporary_file_that_was_removed_is_an_error(tmp_path):
    """A sweep of another process may do that."""
    partial = PartialImage(target(tmp_path), "png")
    partial.write(plain_png(1, 1, b"abc"))
    sweep_folder(tmp_path)
    refusal_of(finished, partial)
    assert names(tmp_path) == []


# A folder


def test_opening_a_folder_creates_it_and_returns_its_names(tmp_path):
    """Its parents are created too."""
    folder = tmp_path / "a" / "b"
    assert open_folder(folder) == set()
    (folder / "t.png").write_bytes(b"")
    assert open_folder(folder) == {"t.png"}


@pytest.mark.parametrize("below", ["", "b/c"])
def test_a_folder_that_cannot_be_created_is_an_error_without_a_task(below, tmp_path):
    """A file has its name, or that of a parent."""
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(DownloadError, match="image not saved: in ") as caught:
        open_folder(tmp_path / "a" / below)
    assert caught.value.task_id is None


def test_a_sweep_removes_only_temporary_files(tmp_path):
    """Similar names stay."""
    part = tmp_path / ".t\n.png.0123456789ab.part"
    kept = [".t.png.part", "t.png.0123456789ab.part", ".t.png.0123456789AB.part", "t.png"]
    for name in [*kept, part.name]:
        (tmp_path / name).write_bytes(b"")
    sweep_folder(tmp_path)
    assert names(tmp_path) == sorted(kept)
    refusal_of(sweep_folder, tmp_path / "gone")


def test_a_sweep_removes_what_a_killed_saver_left(tmp_path):
    """Long and odd names are recognized."""
    partials = [PartialImage(target(tmp_path, name), "png") for name in ("t", "x" * 100, "\n")]
    for partial in partials:
        partial.write(b"abc")
    sweep_folder(tmp_path)
    assert names(tmp_path) == []
    for partial in partials:
        partial.discard()


@pytest.mark.parametrize("gone", [0, 1])
def test_a_partial_file_that_disappears_during_a_sweep_is_passed_over(gone, monkeypatch, tmp_path):
    """Its writer has finished it, or another sweep was quicker; the others are removed."""
    for n in range(3):
        (tmp_path / f".t.png.{n:012x}.part").write_bytes(b"")
    unlink, seen = Path.unlink, []

    def racing(path, **options):
        seen.append(path)
        if len(seen) == gone + 1:
            os.unlink(path)  # noqa: PTH108  # the original is replaced
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", racing)
    sweep_folder(tmp_path)
    assert (len(seen), names(tmp_path)) == (3, [])


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_found_again(kind, tmp_path):
    """It is described as when it was saved."""
    was = saved(target(tmp_path), image(kind), kind)
    assert find_image(target(tmp_path)) == was


def test_only_a_complete_image_is_found(tmp_path):
    """A broken file under one ending does not hide a complete image under the next."""
    assert find_image(target(tmp_path)) is None
    (tmp_path / "t.png").write_bytes(b"<!doctype html>")
    (tmp_path / "t.jpg").write_bytes(image("jpeg")[:-500])
    assert find_image(target(tmp_path)) is None
    was = saved(target(tmp_path), image("webp"), "webp")
    assert find_image(target(tmp_path)) == was


def test_an_image_that_cannot_be_read_is_an_error(tmp_path):
    """The error names the task."""
    (tmp_path / "t.png").mkdir()
    assert refusal_of(find_image, target(tmp_path)).startswith("task t: ")
