"""Image files: their names, the check of their contents, and writing them.

Functions that block are for threads.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import os
import re
import struct
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import attrs

from kontext_async.results.errors import DownloadError
from kontext_async.results.partial import PartialFile, remove_partial_files

__all__ = [
    "DECODER_ERRORS",
    "PartialImage",
    "SavedImage",
    "Target",
    "decoding_problem",
    "file_stem",
    "find_image",
    "finish_images",
    "image_kind",
    "open_folder",
    "sweep_folder",
]

_HAS_PILLOW = importlib.util.find_spec("PIL") is not None

DECODER_ERRORS = (SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error, Warning)
"""Exceptions of Pillow's decoders for damaged files, beside OSError.

`Warning`: what it raises for very many pixels where warnings are errors.
"""

_ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}

# How an image ends: the chunk IEND with its checksum, the marker EOI. JPEG escapes FF in its data.
_ENDS = {"png": b"IEND\xaeB`\x82", "jpeg": b"\xff\xd9"}
_TAIL = 1024  # bytes in which the end must be

# Windows reserves these names for devices, also with an ending.
_DEVICE = r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|\Z)"
# Ids that are safe as file names. Upper case is not: some file systems ignore case.
_PLAIN = re.compile(rf"(?!{_DEVICE})[a-z0-9_][a-z0-9._-]{{0,99}}")

_RENAMING = threading.Lock()


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
    """Return the name of a task's image without its ending: safe anywhere, and unique to the id.

    A plain id is the name itself and has no ``~``. Other ids are made safe, with a hash added.
    """
    if _PLAIN.fullmatch(task_id):
        return task_id
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", task_id[:60]).lstrip("-")
    digest = hashlib.sha256(task_id.encode(errors="surrogatepass")).hexdigest()
    return f"{readable}~{digest[:16]}"


def image_kind(head: bytes) -> str | None:
    """Return the kind that the first 12 bytes of a file announce; None if it is not an image."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else None


def _file_error(exc: OSError, folder: Path, task_id: str | None) -> DownloadError:
    error = DownloadError(f"in {folder}: {exc.strerror or exc}", task_id=task_id, retryable=False)
    error.__cause__ = exc
    return error


@contextmanager
def _translate_errors(folder: Path, task_id: str | None) -> Generator[None]:
    try:
        yield
    except OSError as exc:
        raise _file_error(exc, folder, task_id) from exc


def open_folder(folder: Path) -> set[str]:
    """Create the folder if it is missing, and return the names in it."""
    with _translate_errors(folder, None):
        folder.mkdir(parents=True, exist_ok=True)
        return {entry.name for entry in folder.iterdir()}


def sweep_folder(folder: Path) -> None:
    """Remove the temporary files that killed processes left."""
    with _translate_errors(folder, None):
        remove_partial_files(folder)


class Target(NamedTuple):
    """The file for a task's image: ``name`` in ``folder``, plus an ending unless ``exact``."""

    task_id: str
    folder: Path
    name: str
    exact: bool = False
    overwrite: bool = False

    def names(self) -> list[str]:
        """Return the names the file may have, before its kind is known."""
        return [self.name] if self.exact else [self.name + end for end in _ENDINGS.values()]

    def file_name(self, kind: str) -> str:
        return self.name if self.exact else self.name + _ENDINGS[kind]

    def exists_error(self, name: str) -> DownloadError:
        """Return the error to raise if a file of that name exists."""
        return DownloadError(
            f"the file {name!r} already exists (overwrite=True replaces it)",
            task_id=self.task_id,
            retryable=False,
        )

    def error(self, exc: OSError) -> DownloadError:
        """Return the error to raise for one of the file system."""
        return _file_error(exc, self.folder, self.task_id)

    def translate_errors(self) -> AbstractContextManager[None]:
        """Raise errors of the file system as `DownloadError`."""
        return _translate_errors(self.folder, self.task_id)


class PartialImage:
    """An image in a temporary file beside its target, until it is renamed.

    What works on the file raises `OSError`.
    """

    def __init__(self, target: Target, kind: str) -> None:
        self.target = target
        self._kind = kind
        self._name = target.file_name(kind)
        self._file = PartialFile(os.fspath(target.folder), self._name)
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    @property
    def takes_long(self) -> bool:
        """True if its finish does: it is decoded, or is more than the data that comes last."""
        return _HAS_PILLOW or self._size > 0

    def complete(self, data: bytes) -> None:
        """Write the last data, and check the image. Raises `DownloadError` if it is broken."""
        self.write(data)
        problem = self._problem(data)
        if problem is not None:
            raise DownloadError(problem, task_id=self.target.task_id, http_status=200)

    def sync(self) -> None:
        """Return when the contents are on disk."""
        self._file.sync()

    def rename(self) -> None:
        """Give the image its name, which is not on disk until the folder is synced.

        Raises `DownloadError` if a file has the name and is not to be replaced.
        """
        with _RENAMING:  # so that of two savers in this process one gets the error
            if not self.target.overwrite and os.path.lexists(self._file.path):
                raise self.target.exists_error(self._name)
            self._file.rename()

    def saved(self) -> SavedImage:
        """Return the image now that it has its name."""
        return SavedImage(
            path=self.target.folder / self._name,
            size=self._size,
            sha256=self._digest.hexdigest(),
            kind=self._kind,
        )

    def discard(self) -> None:
        """Remove the temporary file. Idempotent."""
        self._file.discard()

    def _problem(self, data: bytes) -> str | None:
        """Return why the image is broken, or None. ``data`` came last."""
        if len(data) < self._size:
            with self._file.read() as file:
                return decoding_problem(file, self._kind)
        # In memory where possible: each read of a file hands Python's lock over.
        if _HAS_PILLOW:
            return decoding_problem(io.BytesIO(data), self._kind)
        return _end_problem(data, data[-_TAIL:], self._size, self._kind)


# Errors of file systems that cannot sync a folder, and of folders that may not be read.
_CANNOT_SYNC = (errno.EACCES, errno.EINVAL, errno.ENOTSUP)


def _sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on disk, so that a power cut loses no image.

    Windows has no such call.
    """
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as exc:
        if exc.errno not in _CANNOT_SYNC:
            raise


def finish_images(images: Mapping[PartialImage, bytes]) -> list[SavedImage | DownloadError]:
    """Finish images of one folder, each with its last data.

    Return each as it is saved, or the error that kept it from being saved.
    """
    # In steps, because an image's data pushes the code of all steps out of the processor's cache.
    # And a file system that is synced between two renames writes the folder twice.
    errors: dict[PartialImage, DownloadError] = {}
    _take_step(lambda image: image.complete(images[image]), images, errors)
    _take_step(PartialImage.sync, images, errors)
    _take_step(PartialImage.rename, images, errors)
    if len(errors) < len(images):
        try:
            _sync_folder(next(iter(images)).target.folder)
        except OSError as exc:
            for image in images:
                errors.setdefault(image, image.target.error(exc))
    return [errors.get(image) or image.saved() for image in images]


def _take_step(
    step: Callable[[PartialImage], None],
    images: Iterable[PartialImage],
    errors: dict[PartialImage, DownloadError],
) -> None:
    """Take a step with each image that has no error; add the errors."""
    for image in images:
        if image not in errors:
            try:
                step(image)
            except OSError as exc:
                errors[image] = image.target.error(exc)
            except DownloadError as error:
                errors[image] = error


def decoding_problem(file: BinaryIO, kind: str) -> str | None:
    """Return why an image is broken, or None. Without Pillow only its end is checked."""
    if not _HAS_PILLOW:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(8)
        file.seek(max(size - _TAIL, 0))
        return _end_problem(head, file.read(), size, kind)
    from PIL import Image  # noqa: PLC0415  # an extra

    file.seek(0)
    try:
        # `verify()` would accept a JPEG that was cut short.
        with Image.open(file, formats=[kind]) as image:
            image.load()
    except (OSError, *DECODER_ERRORS, Image.DecompressionBombError) as exc:
        return f"the {kind} is broken: {exc}"
    return None


def _end_problem(head: bytes, tail: bytes, size: int, kind: str) -> str | None:
    """Return why an image has no end, or None. Something may follow its end."""
    if kind == "webp":  # the format of RIFF: the size of what follows is in bytes 4 to 8
        has_end = size >= 8 + int.from_bytes(head[4:8], "little")
    else:
        has_end = _ENDS[kind] in tail
    return None if has_end else f"the {kind} is broken: its end is missing"


def find_image(target: Target) -> SavedImage | None:
    """Return the image that the target already has, if it is complete."""
    for name in target.names():
        path = target.folder / name
        with target.translate_errors(), suppress(FileNotFoundError), path.open("rb") as file:
            kind = image_kind(file.read(12))
            if kind is None or decoding_problem(file, kind) is not None:
                continue
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256")
            size = file.tell()
            return SavedImage(path=path, size=size, sha256=digest.hexdigest(), kind=kind)
    return None
