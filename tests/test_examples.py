"""The programs under ``docs/examples``: each does for a user what its first line says."""

from __future__ import annotations

import ast
import asyncio
import csv
import importlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from background import serving

import kontext_async
from kontext_async import KontextClient
from kontext_async.simulator import Failure

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture(scope="module")
def simulator():
    with serving() as running:
        for task_id in ("task12345", "task12346"):
            running.add_task(task_id, duration=12.0, outcome="success", age=60.0)
        running.add_task("task-flagged", duration=1.0, outcome=Failure(400, "flagged"), age=60.0)
        running.add_task("task-slow", duration=3600.0)
        yield running


@pytest.fixture(autouse=True)
def user(simulator, monkeypatch, tmp_path):
    """Set up a user's folder and key; the default address is the simulator's."""
    monkeypatch.setenv("APIKLEY_API_KEY", "key")
    monkeypatch.setitem(KontextClient.__init__.__kwdefaults__, "base_url", simulator.base_url)
    monkeypatch.setitem(KontextClient.wait_for_result.__kwdefaults__, "not_found_grace", 0)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)


def example(name):
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def test_every_example_is_tried():
    """No program lies about that these tests do not name."""
    here = Path(__file__).read_text(encoding="utf-8")
    names = [path.stem if path.suffix == ".py" else path.name for path in EXAMPLES.glob("[!._]*")]
    assert [name for name in names if f'"{name}"' not in here] == []


def test_the_web_service_answers_with_plain_data_and_fitting_codes(monkeypatch):
    """FastAPI can encode what the endpoint returns, and each error has a status of its own."""
    from fastapi.testclient import TestClient

    web = example("web_endpoint")
    with TestClient(web.app) as browser:
        found = browser.get("/images/task12345")
        assert found.status_code == 200
        assert found.json()["task_id"] == "task12345"
        assert "param_json" not in found.json()
        assert browser.get("/images/task-flagged").json() == {"detail": "flagged"}
        assert browser.get("/images/unknown").status_code == 404
        monkeypatch.setattr(web, "LIMIT", 0.2)
        late = browser.get("/images/task-slow")
        assert (late.status_code, late.headers["Retry-After"]) == (503, "10")
        assert browser.get("/stats").json()["requests"] >= 4


def test_the_web_service_is_called_back(monkeypatch):
    """FastAPI passes callbacks on; strangers are refused."""
    import base64
    import hashlib
    import hmac
    import time

    from fastapi.testclient import TestClient

    monkeypatch.setenv("CALLBACK_URL", "https://me.example/callbacks/{token}")
    monkeypatch.setenv("CALLBACK_KEY", "callback-key")
    web = example("callbacks_endpoint")
    with TestClient(web.app) as browser:
        assert browser.post("/images", params={"prompt": "a boat"}).json()["url"]
        (token,) = web.app.state.client._creator._tokens
        body, timestamp = '{"data": {"taskId": "task12345"}}', str(int(time.time()))
        message = f"task12345.{timestamp}".encode()
        digest = hmac.new(b"callback-key", message, hashlib.sha256).digest()
        headers = {
            "X-Webhook-Timestamp": timestamp,
            "X-Webhook-Signature": base64.b64encode(digest).decode(),
        }
        for path, sent, expected in (
            (token, headers, 200),
            ("stranger", headers, 404),
            (token, {}, 401),
        ):
            answer = browser.post(f"/callbacks/{path}", content=body, headers=sent)
            assert answer.status_code == expected


async def test_the_bot_replies_to_every_end(simulator):
    """The bot has a reply for an image, a failure, a task that takes long and an unknown one."""
    replies = {}

    async def ask(bot, task_id):
        async def reply(text):
            replies[task_id] = text

        await bot.on_image(task_id, reply)

    async with KontextClient() as client:
        bot = example("bot").ImageBot(client, limit=0.3)
        for task_id in ("task12345", "task-flagged", "task-slow", "unknown"):
            await ask(bot, task_id)
    assert replies.pop("task12345").startswith(simulator.base_url)
    assert replies == {
        "task-flagged": "There is no image: flagged",
        "task-slow": "Still working. Ask again: /image task-slow",
        "unknown": "Try again later.",
    }


def test_the_bot_serves_commands_side_by_side(capsys):
    """The program prints the image of each command."""
    asyncio.run(example("bot").main(["task12345", "task12346"]))
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_thread_with_a_loop_serves_many_threads():
    """Any thread waits through the one client, and closing leaves no thread behind."""
    with example("thread_with_loop").ImageThread(KontextClient()) as images:
        with ThreadPoolExecutor(4) as pool:
            tasks = ["task12345", "task12346"] * 4
            done = list(pool.map(images.wait_for_result, tasks))
        assert [one.task_id for one in done] == tasks
    assert "images" not in [thread.name for thread in threading.enumerate()]


def test_flask_redirects_to_the_image(simulator, monkeypatch):
    """The view answers with the image's address, or says why there is none."""
    flask_app = example("flask_app")
    app = flask_app.create_app()
    with app.extensions["images"]:
        browser = app.test_client()
        assert browser.get("/images/task12345").location.startswith(simulator.base_url)
        assert browser.get("/images/task-flagged").json == {"status": "GenerationFailedError"}
        monkeypatch.setattr(flask_app, "LIMIT", 0.2)
        assert browser.get("/images/task-slow").status_code == 503


def test_django_redirects_to_the_image(simulator, monkeypatch):
    """The asynchronous view and the threaded one answer alike."""
    from django.conf import settings
    from django.test import RequestFactory

    settings.configure(ALLOWED_HOSTS=["*"], SECRET_KEY="unused")
    views = example("django_view")
    request = RequestFactory().get("/")

    async def by_asgi(task_id):
        async with views.client():
            answer = await views.image_asgi(request, task_id)
        views.client.cache_clear()
        return answer

    assert asyncio.run(by_asgi("task12345")).url.startswith(simulator.base_url)
    assert views.image_wsgi(request, "task12345").url.startswith(simulator.base_url)
    monkeypatch.setattr(views, "LIMIT", 0.2)
    assert asyncio.run(by_asgi("task-slow")).status_code == 503
    assert views.image_wsgi(request, "task-slow")["Retry-After"] == "10"
    views.images().close()


def test_a_csv_file_gets_its_results(tmp_path):
    """Each row is in the output once, with its own columns, and a repeated task is no exception."""
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(
        "\ufefftask_id,prompt\ntask12345,a\ntask-flagged,b\ntask12345,c\n", encoding="utf-8"
    )
    asyncio.run(example("csv_progress").fill_in(source, target))
    with target.open(newline="", encoding="utf-8") as file:
        rows = {row["prompt"]: row for row in csv.DictReader(file)}
    assert rows["a"]["url"] == rows["c"]["url"] != ""
    assert "flagged" in rows["b"]["error"]
    assert list(rows["a"]) == ["task_id", "prompt", "url", "error"]


async def test_prometheus_reads_the_counts():
    """The exposition has the requests, the errors by name, and no invented rate."""
    from prometheus_client import CollectorRegistry, generate_latest

    async with KontextClient() as client:
        registry = CollectorRegistry()
        registry.register(example("prometheus_metrics").KontextCollector(client))
        await client.wait_for_results(["task12345", "unknown"], not_found_grace=0)
        text = generate_latest(registry).decode()
    assert "kontext_requests_total 2.0" in text
    assert 'kontext_errors_total{error="TaskNotFoundError"} 1.0' in text
    assert "kontext_rate_limit NaN" in text


def test_a_trace_has_a_span_for_each_poll(simulator):
    """The polls of a wait are children of the caller's span, and no key is in them."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    asyncio.run(example("tracing").main("task12345"))
    *polls, wait = exporter.get_finished_spans()
    assert wait.name == "wait for an image"
    assert [poll.parent.span_id for poll in polls] == [wait.context.span_id]
    assert "Bearer" not in "".join(span.to_json() for span in (*polls, wait))


def test_logging_shows_each_poll(caplog):
    """The log has a line for each poll of the task."""
    with caplog.at_level(logging.DEBUG, "kontext_async"):
        asyncio.run(example("logging_setup").main("task12345"))
    assert "task12345" in caplog.text


async def test_the_notebook_runs(capsys):
    """Each cell runs on a loop that runs already, as notebooks compile them."""
    names = {}
    for cell in json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            code = compile("".join(cell["source"]), "cell", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            running = eval(code, names)
            if running is not None:
                await running
    assert names["done"].task_id == "task12345"
    assert "task-flagged: GENERATE_FAILED (error 400): flagged" in capsys.readouterr().out


def test_the_notebooks_page_has_its_cells():
    """The page shows each cell with code, as the notebook has it."""
    page = (EXAMPLES.parent / "how-to" / "notebooks.md").read_text(encoding="utf-8")
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    shown = re.findall(r"^```\{code-block\} python\n(.*?)\n```$", page, re.DOTALL | re.MULTILINE)
    assert shown == code


@pytest.mark.parametrize("folder", ["pytest_strict", "pytest_auto", "pytest_anyio"])
def test_a_users_own_tests_pass(folder):
    """The fixtures serve pytest-asyncio's two modes and anyio's plugin."""
    environment = os.environ | {"PYTHONPATH": str(Path(kontext_async.__file__).parent.parent)}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [sys.executable, "-BPm", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"],
        cwd=EXAMPLES / folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
