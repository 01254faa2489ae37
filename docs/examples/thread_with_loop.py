"""Images for threaded code, such as Flask or Django under WSGI.

One thread has an event loop and the client. Any other thread waits through it, so that all of
them share one rate limit and one schedule.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from kontext_async import CompletedTask, KontextClient

T = TypeVar("T")


class ImageThread:
    """A client in a thread of its own; every method may be called from any thread."""

    def __init__(self, client: KontextClient) -> None:
        self._client = client
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="images", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def wait_for_result(self, task_id: str, *, timeout: float | None = 600.0) -> CompletedTask:
        """Wait for a task as `KontextClient.wait_for_result` does, blocking this thread only."""
        return self._run(self._client.wait_for_result(task_id, timeout=timeout))

    def close(self) -> None:
        """Close the client and end the thread; waits of other threads end with an error."""
        self._run(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


if __name__ == "__main__":
    with ImageThread(KontextClient()) as images:
        print(images.wait_for_result("task12345").result_image_url)
