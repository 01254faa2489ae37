"""Saving the images of finished tasks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import aiohttp

from kontext_async.client import KontextClient, checked_session
from kontext_async.errors import ClientStateError, ConfigurationError
from kontext_async.models import CompletedTask
from kontext_async.polling import check_count, check_seconds
from kontext_async.results.images.downloads import DEFAULT_TIMEOUT, Downloads
from kontext_async.results.images.fetching import Fetcher
from kontext_async.results.images.files import (
    SavedImage,
    Target,
    file_stem,
    find_image,
    open_folder,
    sweep_folder,
)
from kontext_async.results.threads import run_in_thread

__all__ = ["ImageSaver", "download"]

_MAX_BYTES = 50 * 1024 * 1024


def _check_path(name: str, value: str | os.PathLike[str]) -> None:
    try:
        usable = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise ConfigurationError(f"{name} cannot be the name of a file: {value!r}")


class ImageSaver:
    """Saves images into a folder, which is created if missing: an async context manager.

    A file is named after its task, with the ending of its kind. It appears under its name when it
    is complete, checked and on disk. With the extra ``images`` the check decodes the image.
    Requests carry neither the API key nor cookies. They use https and public addresses only,
    except at the API's own origin.

    - ``overwrite``: replace an existing file; if False, that is a `DownloadError`.
    - ``max_bytes``: of one image.
    - ``allow_private``: also allow hosts at private, link-local and loopback addresses.
    - ``use_origin``: if ``result_image_url`` fails, try ``origin_image_url``, which expires after
      10 minutes.
    - ``timeout``: seconds for a URL, all attempts included; None for no limit.
    - ``max_concurrency``: images saved at a time.
    - ``session``: your own is used with its proxy, certificates and resolver, and never closed;
      None makes one.

    Only the saver's own session checks the address it connects to. With yours, names that resolve
    to private addresses are not refused, and a proxy connects to any address.

    Raises `ConfigurationError` for an invalid argument.
    """

    def __init__(
        self,
        client: KontextClient,
        folder: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        max_bytes: int = _MAX_BYTES,
        allow_private: bool = False,
        use_origin: bool = False,
        timeout: float | None = DEFAULT_TIMEOUT,
        max_concurrency: int = 8,
        session: aiohttp.ClientSession | None = None,
    ) -> None:
        _check_path("folder", folder)
        self._session = checked_session(session)
        check_count("max_bytes", max_bytes)
        check_count("max_concurrency", max_concurrency)
        check_seconds("timeout", timeout)
        if timeout == 0:
            raise ConfigurationError("timeout must be more than 0 seconds")
        self.client = client
        self._folder = Path(folder)
        self._overwrite = overwrite
        self._max_bytes = max_bytes
        self._allow_private = allow_private
        self._use_origin = use_origin
        self._timeout = timeout
        self._names: set[str] = set()  # files known to exist
        self._downloads: Downloads | None = None  # while this is open
        self.max_concurrency = max_concurrency

    async def __aenter__(self) -> Self:
        """Create the folder; raises `DownloadError` if that fails."""
        if self._downloads is not None:
            raise ClientStateError("this saver is open already")
        self._names = await run_in_thread(open_folder, self._folder)
        self._downloads = Downloads(
            Fetcher(self.client.base_url, session=self._session, allow_private=self._allow_private),
            use_origin=self._use_origin,
            max_bytes=self._max_bytes,
            max_concurrency=self.max_concurrency,
            timeout=self._timeout,
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        downloads, self._downloads = self._downloads, None
        assert downloads is not None, "it was entered"
        await downloads.aclose()

    async def save(self, task: CompletedTask, *, name: str | None = None) -> SavedImage:
        """Save the image of a task. ``name``: of the file, its ending included.

        Raises `ResultExpiredError` if the service has deleted the image, `DownloadError` if it
        could not be saved, and `ClientStateError` if this saver is not open or is closed
        before the image is received.
        """
        if not isinstance(task, CompletedTask):
            raise ConfigurationError(f"task must be a CompletedTask, not {type(task).__name__}")
        if self._downloads is None:
            raise ClientStateError("this saver is not open: save within its `async with`")
        target = self._target(task.task_id, name)
        if not self._overwrite and (there := self._names.intersection(target.names())):
            raise target.exists_error(there.pop())
        saved = await self._downloads.save(task, target)
        self._names.add(target.file_name(saved.kind))
        return saved

    async def find(self, task_id: str) -> SavedImage | None:
        """Return a task's complete image if it was in the folder when this saver was opened.

        So a restart finds images that were saved just before a crash.
        """
        target = self._target(task_id, None)
        if self._names.isdisjoint(target.names()):
            return None
        return await run_in_thread(find_image, target)

    async def sweep(self) -> None:
        """Remove a killed process's temporary files. Call it while no other process saves here."""
        await run_in_thread(sweep_folder, self._folder)

    def _target(self, task_id: str, name: str | None) -> Target:
        if name is not None and (name in {"", ".", ".."} or Path(name).name != name):
            raise ConfigurationError(f"name must be a file name without a folder, not {name!r}")
        if name is not None:
            _check_path("name", name)
        return Target(
            task_id=task_id,
            folder=self._folder,
            name=name or file_stem(task_id),
            exact=name is not None,
            overwrite=self._overwrite,
        )


async def download(
    client: KontextClient,
    task: CompletedTask,
    path_or_folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_bytes: int = _MAX_BYTES,
    allow_private: bool = False,
    use_origin: bool = False,
    timeout: float | None = DEFAULT_TIMEOUT,
    session: aiohttp.ClientSession | None = None,
) -> Path:
    """Save the image of a task, and return its path.

    ``path_or_folder`` is the file to write if it has a suffix and is not a folder. Otherwise it
    is the folder, created if missing, and the file is named after the task. The keywords and
    errors are those of `ImageSaver`, which is the better choice for more than a few images.
    """
    path = Path(path_or_folder)
    is_file = bool(path.suffix) and not await run_in_thread(path.is_dir)
    saver = ImageSaver(
        client,
        path.parent if is_file else path,
        overwrite=overwrite,
        max_bytes=max_bytes,
        allow_private=allow_private,
        use_origin=use_origin,
        timeout=timeout,
        max_concurrency=1,
        session=session,
    )
    async with saver:
        return (await saver.save(task, name=path.name if is_file else None)).path
