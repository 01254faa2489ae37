"""A Flask view that waits for an image in the thread of its request."""

from __future__ import annotations

from flask import Flask, Response, jsonify, redirect
from werkzeug.wrappers import Response as Redirect

from kontext_async import KontextClient, KontextError, WaitTimeoutError
from thread_with_loop import ImageThread

LIMIT = 25.0  # seconds; less than the usual limit of a reverse proxy


def create_app() -> Flask:
    """Return the app with a thread for waits; each process calls this after the fork."""
    app = Flask(__name__)
    app.extensions["images"] = images = ImageThread(KontextClient())

    @app.get("/images/<task_id>")
    def image(task_id: str) -> Redirect | tuple[Response, int]:
        try:
            done = images.wait_for_result(task_id, timeout=LIMIT)
        except WaitTimeoutError:
            return jsonify(status="not ready", retry_after=10), 503
        except KontextError as error:
            return jsonify(status=type(error).__name__), 502
        return redirect(done.result_image_url)

    return app
