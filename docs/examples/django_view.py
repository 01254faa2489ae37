"""Django views: one under ASGI, and one under WSGI through a thread with its own loop."""

from __future__ import annotations

import functools

from django.http import HttpRequest, HttpResponse, HttpResponseRedirect

from kontext_async import KontextClient, WaitTimeoutError
from thread_with_loop import ImageThread

LIMIT = 25.0  # seconds; less than the usual limit of a reverse proxy


@functools.cache
def client() -> KontextClient:
    """Return the process's client; it belongs to the event loop of the first request."""
    return KontextClient()


@functools.cache
def images() -> ImageThread:
    """Return the process's thread for waits."""
    return ImageThread(KontextClient())


async def image_asgi(request: HttpRequest, task_id: str) -> HttpResponse:
    """Wait without occupying a thread: for a server such as uvicorn or hypercorn."""
    try:
        done = await client().wait_for_result(task_id, timeout=LIMIT)
    except WaitTimeoutError:
        return HttpResponse(b"not ready", status=503, headers={"Retry-After": "10"})
    return HttpResponseRedirect(done.result_image_url)


def image_wsgi(request: HttpRequest, task_id: str) -> HttpResponse:
    """Wait in the thread of this request: for gunicorn or mod_wsgi."""
    try:
        done = images().wait_for_result(task_id, timeout=LIMIT)
    except WaitTimeoutError:
        return HttpResponse(b"not ready", status=503, headers={"Retry-After": "10"})
    return HttpResponseRedirect(done.result_image_url)
