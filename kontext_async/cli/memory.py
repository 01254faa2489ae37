"""The durations that runs of the command have learned: a file for each API, in the user's cache."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from yarl import URL

from kontext_async.schedule import DurationModel

__all__ = ["remembered"]

_MAX_READ = 100_000  # bytes, more than a model may have

_log = logging.getLogger(__name__)


@contextmanager
def remembered(base_url: str, *, wanted: bool) -> Generator[DurationModel]:
    """Give the durations that earlier runs have learned, and save what the block learns.

    Without ``wanted`` nothing is read or saved. Nothing is saved if the block fails. A file that
    cannot be read or written is not an error.
    """
    path = _path(base_url) if wanted else None
    model = _read(path)
    known = model.to_json()
    try:
        yield model
    except asyncio.CancelledError:  # Ctrl-C
        _save(path, model, known)
        raise
    _save(path, model, known)


def _path(base_url: str) -> Path | None:
    """Return the file of an API by its origin; None without a place for it."""
    try:
        url = URL(base_url)
        folder = platformdirs.user_cache_path("kontext-async", appauthor=False)
    except (ValueError, RuntimeError):  # not a URL, as the client will say; no home folder
        return None
    origin = re.sub(r"[^a-z0-9.-]", "_", f"{url.scheme}-{url.raw_host}-{url.port}")
    # Older releases of platformdirs give a relative path where there is no home folder.
    return folder / f"{origin}.json" if folder.is_absolute() else None


def _read(path: Path | None) -> DurationModel:
    try:
        if path is not None and path.is_file():  # a named pipe would keep the command waiting
            with path.open("rb") as file:
                return DurationModel.from_json(file.read(_MAX_READ).decode())
    except (OSError, ValueError) as error:
        _log.debug("Durations are not read from %s: %s", path, error)
    return DurationModel()


def _save(path: Path | None, model: DurationModel, known: str) -> None:
    if path is None or model.to_json() == known:
        return
    others = _read(path)
    if others.to_json() != known:  # another run has ended meanwhile
        model.merge(others)
    from kontext_async.results.partial import write_file  # noqa: PLC0415  # as other results

    try:
        # Not the home folder, which a user of the system may be without on purpose.
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        write_file(path, [model.to_json().encode()], mode=0o600)
    except OSError as error:
        _log.debug("Durations are not saved in %s: %s", path, error)
