"""Image files: their names, what is taken for an image, and how a whole one gets its name.

What blocks is written as plain functions, for `in_thread` and the `Writer`.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import re
import secrets
import struct
import threading
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, TypeVar, TypeVarTuple, Unpack

import attrs

from kontext_async.results.errors import DownloadError

__all__ = [
    "Draft",
    "Place",
    "SavedImage",
    "Writer",
    "decoding_problem",
    "done",
    "file_stem",
    "find_image",
    "image_kind",
    "in_thread",
    "open_folder",
    "remove_drafts",
]

_Args = TypeVarTuple("_Args")
_T = TypeVar("_T")

_HAS_PILLOW = importlib.util.find_spec("PIL") is not None

_ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}

# Ids that can be file names as they are. Where case does not count, "A" would be "a".
_PLAIN = re.compile(r"[a-z0-9_][a-z0-9._-]{0,99}")
# Windows takes these for devices, whatever follows the dot.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")

_DRAFT = re.compile(r"\..*\.[0-9a-f]{12}\.part", re.DOTALL)

_NAMING = threading.Lock()


@attrs.frozen(kw_only=True)
class SavedImage:
    """An image on disk.

    ``size`` is in bytes, ``sha256`` in hex; ``kind`` is ``"png"``, ``"jpeg"`` or ``"webp"``.
    """

    path: Path
    size: int
    sha256: str
    kind: str


def file_stem(task_id: str) -> str:
    """The name of a task's image, less its ending: safe anywhere, and no other id's.

    An id that is no safe name is made one and marked with its hash. Plain ids have no ``~``.
    """
    if _PLAIN.fullmatch(task_id) and not _DEVICE.fullmatch(task_id):
        return task_id
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", task_id[:60]).lstrip("-")
    digest = hashlib.sha256(task_id.encode(errors="surrogatepass")).hexdigest()
    return f"{readable}~{digest[:16]}"


def image_kind(head: bytes) -> str | None:
    """What the first 12 bytes of a file say it is; None where that is no image we know."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else None


async def in_thread(function: Callable[[Unpack[_Args]], _T], *args: *_Args) -> _T:
    """Run ``function`` in a thread; a cancellation is raised when the thread is done with it."""
    return await done(asyncio.get_running_loop().run_in_executor(None, function, *args))


async def done(work: asyncio.Future[_T]) -> _T:
    """What a thread's work comes to; a cancellation is raised when the thread is done with it."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():  # what is cancelled leaves no thread at work in the folder
            with suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        if not work.cancelled():
            work.exception()  # seen, as far as asyncio is concerned
        raise


@contextmanager
def _told(folder: str, task_id: str | None) -> Generator[None]:
    """Turn what the file system says into a `DownloadError`."""
    try:
        yield
    except OSError as exc:
        raise DownloadError(
            f"in {folder}: {exc.strerror or exc}", task_id=task_id, retryable=False
        ) from exc


def open_folder(folder: str) -> set[str]:
    """Make the folder where it is missing; returns the names that are in it."""
    with _told(folder, None):
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        return {entry.name for entry in path.iterdir()}


def remove_drafts(folder: str) -> None:
    """Remove temporary files, whoever's they are."""
    with _told(folder, None):
        for path in Path(folder).iterdir():
            if _DRAFT.fullmatch(path.name):
                path.unlink(missing_ok=True)


@attrs.frozen(kw_only=True)
class Place:
    """Where the image of a task goes: ``name`` in ``folder``, with an ending unless ``exact``."""

    task_id: str
    folder: str
    name: str
    exact: bool = False
    overwrite: bool = False

    def names(self) -> list[str]:
        """What the file may be called, before its kind is known."""
        return [self.name] if self.exact else [self.name + end for end in _ENDINGS.values()]

    def path(self, kind: str) -> str:
        name = self.name if self.exact else self.name + _ENDINGS[kind]
        return os.path.join(self.folder, name)  # noqa: PTH118  # a quarter of the time

    def taken(self, name: str) -> DownloadError:
        """The error where there is a file of that name."""
        return DownloadError(
            f"there is a file {name!r} already (overwrite=True replaces it)",
            task_id=self.task_id,
            retryable=False,
        )

    def told(self) -> AbstractContextManager[None]:
        """Turn what the file system says into a `DownloadError`."""
        return _told(self.folder, self.task_id)


class Draft:
    """An image on its way to its place, in a temporary file beside it until it is whole.

    Where a method raises, the temporary file is gone.
    """

    def __init__(self, place: Place, kind: str) -> None:
        self._place = place
        self._kind = kind
        self._path = place.path(kind)
        folder, name = os.path.split(self._path)
        # Short, so that a name of 255 bytes stays one with what is added to it.
        part = f".{name[:50]}.{secrets.token_hex(6)}.part"
        self._part = os.path.join(folder, part)  # noqa: PTH118  # a quarter of the time
        self._file: FileIO | None = None
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        """Add to the file."""
        with self._cleaning():
            self._write(data)

    def complete(self, data: bytes) -> None:
        """Add the last of the file, and check it."""
        with self._cleaning():
            file = self._write(data)
            problem = decoding_problem(file, self._kind)
            if problem is not None:
                raise DownloadError(problem, task_id=self._place.task_id, http_status=200)
            _begin_writing_back(file)

    def settle(self) -> SavedImage:
        """Give what is complete its name, once it is on disk."""
        assert self._file is not None, "it is complete"
        with self._cleaning():
            os.fsync(self._file.fileno())
            self._file.close()
            self._name()
        return SavedImage(
            path=Path(self._path),
            size=self._size,
            sha256=self._digest.hexdigest(),
            kind=self._kind,
        )

    def discard(self) -> None:
        """Remove what was written, as far as the file system lets us."""
        if self._file is None:
            return
        with suppress(OSError):  # some file systems write what they have only now
            self._file.close()
        with suppress(OSError):
            os.unlink(self._part)  # noqa: PTH108  # paths are str here

    def _write(self, data: bytes) -> FileIO:
        if self._file is None:
            self._file = FileIO(self._part, "x+")
        rest = memoryview(data)
        while rest:  # a system may take less than it is given
            rest = rest[self._file.write(rest) :]
        self._digest.update(data)
        self._size += len(data)
        return self._file

    def _name(self) -> None:
        with _NAMING:  # so that of two savers in this process one is told
            if not self._place.overwrite and os.path.lexists(self._path):
                raise self._place.taken(os.path.basename(self._path))  # noqa: PTH119  # as above
            os.replace(self._part, self._path)  # noqa: PTH105  # as above

    @contextmanager
    def _cleaning(self) -> Generator[None]:
        try:
            with self._place.told():
                yield
        except BaseException:
            self.discard()
            raise


def _begin_writing_back(file: FileIO) -> None:
    """Have a file on its way to the disk before `fsync` waits for it.

    Of several files on their way the first `fsync` then commits the metadata of all.
    """
    with suppress(AttributeError, OSError):  # a hint, and not known everywhere
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Finish:
    """The last of a draft, and what comes of it."""

    def __init__(self, draft: Draft, data: bytes, told: asyncio.Future[SavedImage]) -> None:
        self._draft = draft
        self._data = data
        self._told = told
        self._error: BaseException | None = None

    def complete(self) -> None:
        try:
            self._draft.complete(self._data)
        except BaseException as exc:  # noqa: BLE001  # it is raised where the image is waited for
            self._error = exc

    def settle(self) -> None:
        if self._error is None:
            try:
                self._saved = self._draft.settle()
            except BaseException as exc:  # noqa: BLE001  # as above
                self._error = exc

    def tell(self) -> None:
        if self._error is None:
            self._told.set_result(self._saved)
        else:
            self._told.set_exception(self._error)


class Writer:
    """The one thread that writes drafts.

    All that wait are finished together, and the loop is told of them at once: a hand-over from
    thread to thread costs as much as the writing. More threads would wait for each other, as a
    folder takes one new name at a time.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "kontext-saver")
        self._waiting: list[_Finish] = []
        self._is_busy = False
        self._is_closed = False

    async def write(self, draft: Draft, data: bytes) -> None:
        """Add to a draft."""
        await done(self._loop.run_in_executor(self._thread, draft.write, data))

    async def finish(self, draft: Draft, data: bytes) -> SavedImage:
        """Add the last of a draft, and save it."""
        told: asyncio.Future[SavedImage] = self._loop.create_future()
        self._waiting.append(_Finish(draft, data, told))
        if not self._is_busy:
            self._go_on()
        return await done(told)

    def close(self) -> None:
        """Let the thread end when it has done what it was given."""
        self._is_closed = True
        if not self._is_busy:
            self._go_on()

    def _go_on(self) -> None:
        batch, self._waiting = self._waiting, []
        self._is_busy = bool(batch)
        if batch:
            self._thread.submit(self._work, batch)
        elif self._is_closed:
            self._thread.shutdown(wait=False)

    def _work(self, batch: list[_Finish]) -> None:
        for finish in batch:
            finish.complete()
        for finish in batch:
            finish.settle()
        self._loop.call_soon_threadsafe(self._tell, batch)

    def _tell(self, batch: list[_Finish]) -> None:
        for finish in batch:
            finish.tell()
        self._go_on()


# What Pillow's decoders raise for broken files; the first is also what it raises for truncated,
# the last what it raises for very many pixels where warnings are errors.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Warning,
)


def decoding_problem(file: IO[bytes], kind: str) -> str | None:
    """Why the file is no whole image, as far as Pillow can tell; without Pillow it is one."""
    if not _HAS_PILLOW:
        return None
    from PIL import Image  # noqa: PLC0415  # an extra

    file.seek(0)
    try:
        # `verify()` would accept a JPEG that was cut short.
        with Image.open(file, formats=[kind]) as image:
            image.load()
    except (*_BROKEN, Image.DecompressionBombError) as exc:
        return f"the {kind} is broken: {exc}"
    return None


def find_image(place: Place) -> SavedImage | None:
    """The image that is in its place already, if it is a whole one."""
    for name in place.names():
        path = Path(place.folder, name)
        with place.told(), suppress(FileNotFoundError), path.open("rb") as file:
            kind = image_kind(file.read(12))
            if kind is None or decoding_problem(file, kind) is not None:
                continue
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256")
            size = file.tell()
            return SavedImage(path=path, size=size, sha256=digest.hexdigest(), kind=kind)
    return None
