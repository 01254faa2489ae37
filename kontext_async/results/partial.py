"""Files written under a temporary name and renamed when they are complete."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["THUMBNAILS", "PartialFile", "remove_partial_files", "write_file"]

THUMBNAILS = "thumbnails"
"""The folder of a report's thumbnails, in the folder of the images."""

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)

_END = r"[0-9a-f]{12}\.part"
_NAME = re.compile(rf"\..*\.{_END}", re.DOTALL)

# For names alone: a file that exists is never opened. `secrets` would ask the system each time.
_random = random.Random()  # noqa: S311  # as above
with suppress(AttributeError):  # Windows does not fork
    os.register_at_fork(after_in_child=_random.seed)


def _beginning(name: str) -> str:
    """Return how the temporary names of a file begin.

    Cut, so that a name of 255 bytes leaves room for what is added to it.
    """
    return f".{name[:50]}."


class PartialFile:
    """A file under a temporary name in its folder. The first `write` creates it."""

    def __init__(self, folder: str, name: str, *, mode: int = 0o666) -> None:
        prefix = os.path.join(folder, "")  # noqa: PTH118  # a quarter of the time
        self.path = prefix + name
        self.temporary = f"{prefix}{_beginning(name)}{_random.getrandbits(48):012x}.part"
        self._mode = mode
        self._exists = False
        self._descriptor = -1  # while it is closed

    def write(self, data: bytes) -> None:
        if not self._exists:
            self._descriptor = os.open(self.temporary, _NEW, self._mode)
            self._exists = True
        left: bytes | memoryview = data
        while (written := os.write(self._descriptor, left)) < len(left):
            left = memoryview(left)[written:]

    def read(self) -> BinaryIO:
        """Open what has been written so far."""
        return Path(self.temporary).open("rb")

    def sync(self) -> None:
        """Return when the contents are on disk."""
        os.fsync(self._descriptor)

    def rename(self) -> None:
        """Give the file its own name; this replaces a file of that name."""
        self._close()
        os.replace(self.temporary, self.path)  # noqa: PTH105  # as above
        self._exists = False

    def discard(self) -> None:
        """Remove the temporary file as far as the file system allows. Idempotent."""
        if not self._exists:
            return
        with suppress(OSError):  # some file systems write only now
            self._close()
        with suppress(OSError):
            os.unlink(self.temporary)  # noqa: PTH108  # as above
        self._exists = False

    def __del__(self) -> None:
        if self._descriptor >= 0:  # its event loop was closed before it was discarded
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)


def write_file(path: Path, parts: Iterable[bytes], *, mode: int = 0o666) -> None:
    """Write a file. Until it is complete, its name has the old contents.

    ``mode``: the permissions of the new file, as far as the process's umask grants them.
    """
    partial = PartialFile(os.fspath(path.parent), path.name, mode=mode)
    try:
        for part in parts:
            partial.write(part)
        partial.rename()
    finally:
        partial.discard()


def remove_partial_files(folder: Path, *, of: str | None = None) -> None:
    """Remove the temporary files that killed processes left in a folder of results.

    ``of``: only those of the file of this name.
    """
    pattern = _NAME if of is None else re.compile(re.escape(_beginning(of)) + _END)
    for path in [*folder.iterdir(), *folder.glob(f"{THUMBNAILS}/*")]:
        if pattern.fullmatch(path.name):
            path.unlink(missing_ok=True)
