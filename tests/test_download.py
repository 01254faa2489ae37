"""Saving the images of finished tasks, against the simulator and servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import hashlib
import io
import itertools
import pickle
import threading
import time
import traceback
import tracemalloc
import types
import warnings
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest
from PIL import Image
from pngs import plain_png
from raw_server import http, raw_server
from tenacity import wait_fixed

from kontext_async import (
    ClientStateError,
    CompletedTask,
    ConfigurationError,
    ErrorOutcome,
    GenerationFailedError,
    KontextClient,
    KontextError,
    ResultOutcome,
    TaskStatus,
)
from kontext_async.results import (
    DownloadError,
    ImageSaver,
    Ledger,
    ResultExpiredError,
    SavedImage,
    download,
    save_outcomes,
)
from kontext_async.results.images import downloads, fetching, files
from kontext_async.simulator import IMAGE_STEPS, Simulator, steps
from kontext_async.simulator.images import make_image

pytestmark = pytest.mark.usefixtures("fetcher")
virtual_time = pytest.mark.virtual_time
KEY = "marker-0123456789-key"
MIB = 1024 * 1024
DAY = timedelta(days=1)

PNG = plain_png(2, 2, b"abc")
LARGE = make_image('{"prompt": "a boat"}', "png", MIB * 3 // 2)
IMAGE = http(PNG, "Content-Type: image/png")


@pytest.fixture
async def simulator():
    async with Simulator(api_key=KEY) as simulator:
        yield simulator


@pytest.fixture
async def client(simulator):
    async with KontextClient(KEY, base_url=simulator.base_url) as client:
        yield client


def client_of(server):
    """Return a client whose API is the server of the images."""
    return KontextClient(KEY, base_url=server.base_url)


def task_at(server, task_id="t", *, path="/x", age=timedelta(0), origin=None):
    return CompletedTask(
        task_id=task_id,
        result_image_url=server.base_url + path,
        origin_image_url=origin,
        complete_time=datetime.now(UTC) - age,
    )


def task_in(simulator, task_id="t", *script, **params):
    """Return a task of the simulator that has ended; ``script`` comes before its image."""
    params = {"prompt": "a boat", "outputFormat": "png", **params}
    simulator.add_task(task_id, duration=0, outcome="success", params=params, image_script=script)
    return task_at(
        simulator,
        task_id,
        path=f"/images/{task_id}.png",
        origin=f"{simulator.base_url}/origins/{task_id}.png",
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def now():
    return asyncio.get_running_loop().time()


async def error_of(awaitable, kind=KontextError):
    with pytest.raises(kind) as caught:
        await awaitable
    return caught.value


async def refusal_of(awaitable):
    error = await error_of(awaitable, DownloadError)
    assert type(error) is DownloadError
    return error


# One image


@pytest.mark.parametrize(("kind", "ending"), [("png", ".png"), ("jpeg", ".jpg")])
async def test_an_image_is_saved_into_a_folder(kind, ending, simulator, client, tmp_path):
    """The folder is created; the file has the task's name and the ending of its kind."""
    task = task_in(simulator, "task12345", outputFormat=kind)
    path = await download(client, task, tmp_path / "a" / "b")
    assert path == tmp_path / "a" / "b" / f"task12345{ending}"
    assert files.image_kind(path.read_bytes()) == kind
    assert names(path.parent) == [path.name]


async def test_the_result_of_a_wait_can_be_saved(simulator, client, tmp_path):
    """The whole way from an id to a file works."""
    simulator.add_task("t", duration=0, params={"outputFormat": "png"})
    path = await download(client, await client.wait_for_result("t"), str(tmp_path))
    assert path == tmp_path / "t.png"


async def test_a_path_with_a_suffix_is_the_file(simulator, client, tmp_path):
    """It is named as given, in a folder that is created; an existing folder is still a folder."""
    task = task_in(simulator)
    path = await download(client, task, tmp_path / "a" / "boat.jpeg")
    assert path == tmp_path / "a" / "boat.jpeg"
    assert path.read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "v1.0").mkdir()
    assert await download(client, task, tmp_path / "v1.0") == tmp_path / "v1.0" / "t.png"


async def test_a_relative_path_is_relative_to_the_working_folder(
    simulator, client, tmp_path, monkeypatch
):
    """This includes a bare file name."""
    monkeypatch.chdir(tmp_path)
    await download(client, task_in(simulator), "boat.png")
    await download(client, task_in(simulator, "u"), ".")
    assert names(tmp_path) == ["boat.png", "u.png"]


@pytest.mark.parametrize("target", ["", "t.png"])
async def test_an_existing_file_is_replaced_only_with_overwrite(
    target, simulator, client, tmp_path
):
    """No request is sent: the folder is read once, so a restarted batch has no traffic."""
    task = task_in(simulator)
    (tmp_path / "t.png").write_bytes(b"old")
    error = await refusal_of(download(client, task, tmp_path / target))
    assert "'t.png' already" in str(error)
    assert (error.task_id, error.retryable) == ("t", False)
    assert not simulator.requests
    assert (tmp_path / "t.png").read_bytes() == b"old"
    await download(client, task, tmp_path / target, overwrite=True)
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"
    assert names(tmp_path) == ["t.png"]


@pytest.mark.parametrize(
    "task_id",
    ["../../x", "..", "CON", "nul.txt", "x" * 300, "Ж" * 300, "\ud800", "a\0b", "/etc/passwd", ""],
    ids=ascii,
)
async def test_a_hostile_id_names_a_file_in_the_folder(task_id, tmp_path):
    """Nothing is written outside of the folder."""
    folder = tmp_path / "a" / "b"
    async with raw_server(IMAGE) as server, client_of(server) as client:
        path = await download(client, task_at(server, task_id), folder)
    assert [*tmp_path.rglob("*.png")] == [path] == [*folder.iterdir()]
    assert path.parent == folder


@pytest.mark.parametrize("folder", ["file", "file/below"])
async def test_a_folder_that_cannot_be_created_is_an_error(folder, simulator, client, tmp_path):
    """It is raised before any request."""
    (tmp_path / "file").write_bytes(b"")
    error = await refusal_of(download(client, task_in(simulator), tmp_path / folder))
    assert (error.task_id, error.retryable, error.http_status) == (None, False, None)
    assert not simulator.requests


@virtual_time
async def test_a_file_that_cannot_be_written_is_not_fetched_again(simulator, client, tmp_path):
    """The host is not at fault; here the folder is removed meanwhile."""
    task = task_in(simulator)
    async with ImageSaver(client, tmp_path / "a") as saver:
        (tmp_path / "a").rmdir()
        error = await refusal_of(saver.save(task))
    assert "No such file" in str(error)
    assert (error.task_id, error.retryable, len(simulator.requests)) == ("t", False, 1)


async def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    """The write fails within a long image; here the kernel limits files to 1 MiB."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with raw_server(http(LARGE)) as server, client_of(server) as client:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
        try:
            error = await refusal_of(download(client, task_at(server), tmp_path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "File too large" in str(error)
        assert str(tmp_path)[:20] in str(error)
        assert (error.retryable, len(server.heads)) == (False, 1)
    assert names(tmp_path) == []


async def test_a_long_image_is_saved_in_blocks(tmp_path):
    """It is written in blocks, and its size and checksum are of all of them."""
    async with (
        raw_server(http(LARGE)) as server,
        client_of(server) as client,
        ImageSaver(client, tmp_path) as saver,
    ):
        saved = await saver.save(task_at(server))
    assert saved.path.read_bytes() == LARGE
    digest = hashlib.sha256(LARGE).hexdigest()
    assert (saved.size, saved.sha256, saved.kind) == (len(LARGE), digest, "png")


# What hosts do

AT_ONCE = [
    *["image", "wrong_type", "other_type", "no_type", "gzip", "chunked", "slow", "closed_after"],
    "redirect",
]
FINAL = {
    "html_410": "did not return an image",
    "huge": "larger than 52428800 bytes",
    "huge_chunked": "larger than 52428800 bytes",
    "redirect_loopback": "localhost is refused",
    "redirect_file": "not http(s): file:",
    "redirect_host": "images.invalid is plain http",
    "redirect_private": "169.254.169.254 is plain http",
}
AGAIN = sorted(IMAGE_STEPS.keys() - {*AT_ONCE, *FINAL})


@virtual_time
@pytest.mark.parametrize("step", AT_ONCE)
async def test_unusual_responses_are_accepted(step, simulator, client, tmp_path):
    """The type is missing or wrong; the body is compressed, chunked, slow, or redirected."""
    path = await download(client, task_in(simulator, "t", step), tmp_path)
    assert path.read_bytes() == make_image('{"prompt": "a boat"}', "png", 0)
    assert len(simulator.requests) == 1 + (step == "redirect")


@virtual_time
@pytest.mark.parametrize("step", AGAIN)
async def test_transient_failures_are_retried(step, simulator, client, tmp_path):
    """Host trouble, silence and wrong bodies may pass."""
    task = task_in(simulator, "t", step, step)
    path = await download(client, task, tmp_path, timeout=None)
    assert path.read_bytes() == make_image('{"prompt": "a boat"}', "png", 0)
    assert names(tmp_path) == ["t.png"]
    assert len(simulator.requests) == 3


@virtual_time
async def test_host_trouble_does_not_count_as_a_bad_response(simulator, client, tmp_path):
    """Only responses about the image count toward the limit of three."""
    script = ["reset", "html_500", "truncated", "empty", "html_as_image"]
    path = await download(client, task_in(simulator, "t", *script), tmp_path)
    assert path.read_bytes() == make_image('{"prompt": "a boat"}', "png", 0)
    assert len(simulator.requests) == 6


@pytest.mark.parametrize("step", FINAL)
async def test_permanent_failures_are_not_retried(step, simulator, client, tmp_path):
    """The image is gone, too large, or behind a redirect that is not allowed."""
    error = await refusal_of(download(client, task_in(simulator, "t", step), tmp_path))
    assert FINAL[step] in str(error)
    assert error.retryable is False
    assert names(tmp_path) == []
    assert len(simulator.requests) == 1


@virtual_time
@pytest.mark.parametrize(
    ("step", "said", "status"),
    [
        ("html_as_image", "the response is not an image", 200),
        ("html_200", "the response is not an image", 200),
        ("empty", "it is empty", 200),
        ("cut_short", "the png is broken", 200),
    ],
)
async def test_a_bad_response_is_retried_up_to_three_attempts(
    step, said, status, simulator, client, tmp_path
):
    """The error has the reason, and no file is left."""
    task = task_in(simulator, "t", *[step] * 5)
    error = await refusal_of(download(client, task, tmp_path, timeout=None))
    assert said in str(error)
    assert f"(HTTP {status})" in str(error)
    assert (error.http_status, error.retryable, error.task_id) == (status, True, "t")
    assert names(tmp_path) == []
    assert len(simulator.requests) == 3


@virtual_time
@pytest.mark.parametrize("progressive", [False, True])
async def test_a_jpeg_cut_short_is_not_saved(progressive, tmp_path):
    """Its length is as announced, so only a decoder notices."""
    out = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(out, "jpeg", progressive=progressive)
    async with raw_server(http(out.getvalue()[:-200])) as server, client_of(server) as client:
        error = await refusal_of(download(client, task_at(server), tmp_path, timeout=None))
    assert "the jpeg is broken" in str(error)
    assert names(tmp_path) == []


@virtual_time
async def test_without_pillow_only_beginning_and_end_are_checked(
    simulator, client, tmp_path, monkeypatch
):
    """A page and half an image are refused, and are fetched again."""
    monkeypatch.setattr(files, "_HAS_PILLOW", False)
    script = ["cut_short", "html_as_image"]
    path = await download(client, task_in(simulator, "t", *script), tmp_path)
    assert path.read_bytes() == make_image('{"prompt": "a boat"}', "png", 0)
    half = task_in(simulator, "u", *["cut_short"] * 3)
    assert "its end is missing" in str(await refusal_of(download(client, half, tmp_path)))
    assert names(tmp_path) == ["t.png"]


@virtual_time
async def test_without_pillow_half_an_image_of_unknown_length_is_not_saved(tmp_path, monkeypatch):
    """A connection that closes early looks like the end of such a body."""
    monkeypatch.setattr(files, "_HAS_PILLOW", False)
    answer = [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + LARGE[:-40], None]
    async with raw_server(answer) as server, client_of(server) as client:
        error = await refusal_of(download(client, task_at(server), tmp_path))
        assert len(server.heads) == 3
    assert (error.retryable, "the png is broken" in str(error)) == (True, True)
    assert names(tmp_path) == []


@virtual_time
@pytest.mark.parametrize(
    "announced",
    [
        *["image/jpg", "image/png", "IMAGE/JPEG; a=b", "image/*", "image/gif", "*/*"],
        *["application/octet-stream", "binary/octet-stream", "text/html; charset=utf-8", "?"],
    ],
)
async def test_an_image_is_saved_as_what_it_is(announced, tmp_path):
    """One request is enough, whatever type the host announces."""
    jpeg = make_image("{}", "jpeg", 0)
    answer = http(jpeg, f"Content-Type: {announced}")
    async with raw_server(answer) as server, client_of(server) as client:
        path = await download(client, task_at(server), tmp_path)
        assert len(server.heads) == 1
    assert path.name == "t.jpg"
    assert path.read_bytes() == jpeg


@virtual_time
async def test_a_body_longer_than_announced_is_what_was_announced(tmp_path):
    """The rest is ignored."""
    async with raw_server([IMAGE, 0.01, b"x" * 5000]) as server, client_of(server) as client:
        path = await download(client, task_at(server), tmp_path)
        assert path.read_bytes() == PNG


@virtual_time
@pytest.mark.parametrize("extra", [5, 5000])
async def test_a_body_that_does_not_fit_what_was_announced_is_not_saved(extra, tmp_path):
    """Data beyond the announced length arrives with the image, so neither can be trusted."""
    async with raw_server(IMAGE + b"x" * extra) as server, client_of(server) as client:
        error = await refusal_of(download(client, task_at(server), tmp_path, timeout=5))
    assert error.retryable
    assert names(tmp_path) == []


@virtual_time
async def test_a_body_shorter_than_announced_is_never_whole(tmp_path):
    """It is retried until the deadline, even if a complete image is in it."""
    answer = [b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + PNG, None]
    async with raw_server(answer) as server, client_of(server) as client:
        error = await refusal_of(download(client, task_at(server), tmp_path))
        assert len(server.heads) > 5
    assert "ClientPayloadError" in str(error)
    assert error.retryable
    assert names(tmp_path) == []
    assert 90 < now() <= 120


@virtual_time
async def test_a_host_in_trouble_is_retried_until_the_deadline(simulator, client, tmp_path):
    """The pauses grow, and none goes beyond the deadline."""
    task = task_in(simulator, "t", *["html_503"] * 99)
    error = await refusal_of(download(client, task, tmp_path, timeout=60))
    assert (error.http_status, error.retryable) == (503, True)
    assert 8 <= len(simulator.requests) <= 14
    assert 40 < now() <= 60


@virtual_time
async def test_without_a_deadline_a_host_is_waited_for(simulator, client, tmp_path):
    """Here the trouble lasts ten minutes."""
    task = task_in(simulator, "t", *["html_503"] * 60)
    await download(client, task, tmp_path, timeout=None)
    assert simulator.requests[-1].time > 400


@virtual_time
async def test_a_host_may_say_when_to_retry(simulator, client, tmp_path):
    """Retry-After is honoured; if it goes beyond the deadline, the save ends at once."""
    step = steps.http(503, headers={"Retry-After": "40"})
    await download(client, task_in(simulator, "t", step), tmp_path)
    assert simulator.requests[-1].time - simulator.requests[0].time == pytest.approx(40, abs=1)
    error = await refusal_of(download(client, task_in(simulator, "u", step), tmp_path, timeout=30))
    assert error.retry_after == 40
    assert len(simulator.requests) == 3


@virtual_time
@pytest.mark.parametrize(
    "answer",
    [[99.0], [b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + PNG, 99.0]],
    ids=["silent", "stalls"],
)
async def test_the_deadline_is_over_everything(answer, tmp_path):
    """It covers headers and body."""
    async with raw_server(answer) as server, client_of(server) as client:
        error = await refusal_of(download(client, task_at(server), tmp_path, timeout=7))
    assert "no answer in time" in str(error)
    assert now() == pytest.approx(7, abs=0.1)


INTERIM = b"HTTP/1.1 103 Early Hints\r\n\r\n"
HEAD = f"HTTP/1.1 200 OK\r\nContent-Length: {len(PNG)}\r\n\r\n".encode()


@virtual_time
@pytest.mark.parametrize(
    "answer",
    [[999.0], [INTERIM, 999.0], [HEAD[:9], 999.0], [HEAD, 999.0], [HEAD, PNG[:9], 999.0]],
    ids=["nothing", "interim", "half a head", "head", "half a body"],
)
@pytest.mark.parametrize("timeout", [None, 40])
async def test_a_host_that_falls_silent_is_asked_again(answer, timeout, tmp_path):
    """After 30 seconds."""
    async with raw_server(iter([answer, IMAGE])) as server, client_of(server) as client:
        path = await download(client, task_at(server), tmp_path, timeout=timeout)
        assert len(server.heads) == 2
    assert path.read_bytes() == PNG
    assert now() == pytest.approx(30, abs=1)


@virtual_time
@pytest.mark.parametrize(
    "answer",
    [[999.0], [HEAD[:9], 999.0], [HEAD, 999.0], [HEAD, PNG[:9], 999.0]],
    ids=["nothing", "half a head", "head", "half a body"],
)
async def test_with_a_session_of_ones_own_a_silent_host_is_asked_again_too(answer, tmp_path):
    """After 30 seconds as well."""
    async with raw_server(iter([answer, IMAGE])) as server, client_of(server) as client:
        async with aiohttp.ClientSession() as session:
            await download(client, task_at(server), tmp_path, timeout=None, session=session)
        assert len(server.heads) == 2
    assert now() == pytest.approx(30, abs=1)


@virtual_time
async def test_a_host_is_not_silent_while_a_session_waits_for_its_other_requests(tmp_path):
    """Here it has one connection, and each image takes 45 seconds."""
    answer = [25.0, HEAD, 20.0, PNG]
    async with (
        raw_server(answer) as server,
        client_of(server) as client,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session,
        ImageSaver(client, tmp_path, timeout=None, session=session) as saver,
    ):
        await asyncio.gather(*(saver.save(task_at(server, task_id)) for task_id in "tuv"))
        assert len(server.heads) == 3


@virtual_time
async def test_a_host_that_redirects_slowly_is_not_silent(tmp_path):
    """Each response has 30 seconds."""
    redirect = [29.0, b"HTTP/1.1 302 Found\r\nLocation: /y\r\nContent-Length: 0\r\n\r\n"]
    answers = [redirect, redirect, [29.0, IMAGE]]
    async with raw_server(iter(answers)) as server, client_of(server) as client:
        await download(client, task_at(server), tmp_path, timeout=None)
        assert len(server.heads) == 3


@pytest.mark.parametrize("max_bytes", [len(PNG), len(PNG) - 1])
async def test_what_arrived_while_the_loop_stood_still_was_heard(max_bytes, monkeypatch, tmp_path):
    """Such as in a process that was stopped for a while. Nothing is looked at that has ended."""
    monkeypatch.setattr(fetching, "_MAX_SILENCE", 0.2)
    requests = []

    async def serve(reader, writer):
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + PNG[:9])
        await asyncio.sleep(0.05)
        writer.write(PNG[9:])
        time.sleep(0.4)  # noqa: ASYNC251  # the loop stands still
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        server = types.SimpleNamespace(base_url=f"http://127.0.0.1:{port}")
        async with (
            client_of(server) as client,
            ImageSaver(client, tmp_path, max_bytes=max_bytes, timeout=None) as saver,
        ):
            with contextlib.suppress(DownloadError):
                await saver.save(task_at(server))
            await asyncio.sleep(0)
            assert not saver._downloads._attempts
    assert len(requests) == 1
    assert len(names(tmp_path)) == (max_bytes == len(PNG))


@virtual_time
async def test_a_host_that_sends_slowly_is_not_silent(tmp_path):
    """However long it takes in all: here 29 seconds for the head, and for each piece."""
    pieces = [HEAD, *(PNG[at : at + 10] for at in range(0, len(PNG), 10))]
    answer = [part for piece in pieces for part in (29.0, piece)]
    async with raw_server(answer) as server, client_of(server) as client:
        await download(client, task_at(server), tmp_path, timeout=None)
        assert len(server.heads) == 1
    assert now() == pytest.approx(29 * len(pieces), abs=1)


@virtual_time
async def test_a_host_is_not_silent_while_the_disk_is_slow(monkeypatch, tmp_path):
    """Nothing is read from it meanwhile. It has 30 seconds from then on."""
    write = downloads.run_in_thread

    async def slow(function, *args):
        if function.__name__ == "write":
            await asyncio.sleep(100)
        return await write(function, *args)

    monkeypatch.setattr(downloads, "run_in_thread", slow)
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(LARGE)}\r\n\r\n".encode()
    begun = head + LARGE[:-9]
    answers = [[begun, 29.0, LARGE[-9:]], [begun, 999.0], http(LARGE)]
    async with raw_server(iter(answers)) as server, client_of(server) as client:
        for seconds, name in ((100, "a"), (230, "b")):
            began = now()
            await download(client, task_at(server, name), tmp_path, timeout=None)
            assert now() - began == pytest.approx(seconds, abs=2)
    assert names(tmp_path) == ["a.png", "b.png"]


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("spare", [0, -1])
@pytest.mark.parametrize("data", [PNG, LARGE], ids=["short", "long"])
async def test_the_limit_of_size_is_exact(announced, spare, data, tmp_path):
    """It holds with and without an announced length, at any block."""
    head = f"Content-Length: {len(data)}" if announced else "Connection: close"
    answer = [f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + data, None]
    async with raw_server(answer) as server, client_of(server) as client:
        saving = download(client, task_at(server), tmp_path, max_bytes=len(data) + spare)
        if spare == 0:
            assert (await saving).read_bytes() == data
            return
        error = await refusal_of(saving)
    assert f"larger than {len(data) - 1} bytes" in str(error)
    assert (error.retryable, len(server.heads)) == (False, 1)
    assert names(tmp_path) == []


@virtual_time
async def test_an_image_announced_as_too_large_is_not_waited_for(tmp_path):
    """The headers of the response are enough."""
    answer = [b"HTTP/1.1 200 OK\r\nContent-Length: 52428801\r\n\r\n", 99.0]
    async with raw_server(answer) as server, client_of(server) as client:
        error = await refusal_of(download(client, task_at(server), tmp_path))
        assert len(server.heads) == 1
    assert "larger than 52428800 bytes" in str(error)
    assert now() < 1


async def test_the_limit_counts_what_a_compressed_body_becomes(tmp_path):
    """A small body that decompresses to a large one is stopped on the way."""

    bomb = gzip.compress(PNG + bytes(8 * MIB))
    answer = http(bomb, "Content-Encoding: gzip")
    assert len(bomb) < 10_000
    async with raw_server(answer) as server, client_of(server) as client:
        error = await refusal_of(download(client, task_at(server), tmp_path, max_bytes=MIB))
    assert "larger than" in str(error)
    assert names(tmp_path) == []


# Not there yet


@virtual_time
@pytest.mark.parametrize("status", [403, 404])
async def test_an_image_may_appear_later_than_its_task_ends(status, simulator, client, tmp_path):
    """It is asked for within the whole timeout, with growing pauses."""
    task = task_in(simulator, "t", *[steps.http(status)] * 7)
    path = await download(client, task, tmp_path)
    assert path.read_bytes() == make_image('{"prompt": "a boat"}', "png", 0)
    assert 20 < now() < 120
    error = await refusal_of(
        download(client, task_in(simulator, "u", *["html_404"] * 99), tmp_path)
    )
    assert (error.http_status, error.retryable) == (404, True)
    assert len([r for r in simulator.requests if r.task_id == "u"]) <= 20


@virtual_time
@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize(("timeout", "age"), [(60, 70), (120, 130), (None, 130), (120, 9999)])
async def test_a_missing_image_that_is_not_new_is_not_waited_for(status, timeout, age, tmp_path):
    """Three attempts are enough once it is as old as the timeout."""
    age = timedelta(seconds=age)
    async with raw_server(http(status=status)) as server, client_of(server) as client:
        await refusal_of(download(client, task_at(server, age=age), tmp_path, timeout=timeout))
        assert len(server.heads) == 3
    assert now() < 3


@virtual_time
async def test_a_missing_image_is_waited_for_while_it_is_new(tmp_path):
    """Here 50 of 60 seconds have passed since the task's end."""
    age = timedelta(seconds=50)
    async with raw_server(http(status=404)) as server, client_of(server) as client:
        await refusal_of(download(client, task_at(server, age=age), tmp_path, timeout=60))
        assert len(server.heads) > 4
    assert 10 < now() < 60


@virtual_time
async def test_without_a_timeout_a_missing_image_is_waited_for_two_minutes(tmp_path):
    """It has to end."""
    async with raw_server(http(status=404)) as server, client_of(server) as client:
        await refusal_of(download(client, task_at(server), tmp_path, timeout=None))
    assert 120 < now() < 180


# Gone


@virtual_time
@pytest.mark.parametrize("status", [403, 404, 410])
async def test_an_expired_image_is_an_error_of_its_own(status, tmp_path):
    """After 14 days one response is enough."""
    async with raw_server(http(status=status)) as server, client_of(server) as client:
        saving = download(client, task_at(server, age=14 * DAY), tmp_path)
        error = await error_of(saving, ResultExpiredError)
        assert len(server.heads) == 1
    assert (error.http_status, error.retryable, error.task_id) == (status, False, "t")
    assert "has deleted it" in str(error)


@virtual_time
@pytest.mark.parametrize(
    ("status", "age"), [(403, 13.9), (404, 13.9), (410, 13.9), (500, 15), (401, 15), (200, 15)]
)
async def test_an_image_that_has_not_expired_is_a_failed_download(status, age, tmp_path):
    """Before that time, or with another status, it is a failed download."""
    async with raw_server(http(status=status)) as server, client_of(server) as client:
        saving = download(client, task_at(server, age=age * DAY), tmp_path)
        assert (await refusal_of(saving)).http_status == status


@virtual_time
async def test_without_a_time_of_completion_nothing_is_known_to_have_expired(tmp_path):
    """A record may lack the time."""
    async with raw_server(http(status=404)) as server, client_of(server) as client:
        task = CompletedTask(task_id="t", result_image_url=server.base_url)
        await refusal_of(download(client, task, tmp_path))


@virtual_time
async def test_an_expired_image_that_still_exists_is_saved(tmp_path):
    """The expiry alone does not prevent a request."""
    async with raw_server(IMAGE) as server, client_of(server) as client:
        assert (await download(client, task_at(server, age=99 * DAY), tmp_path)).exists()


@virtual_time
@pytest.mark.parametrize("step", ["html_404", "html_as_image", "html_503"])
async def test_the_origin_is_used_only_with_use_origin(step, simulator, client, tmp_path):
    """The result's URL is tried first, and any failure of it leads to the origin."""
    task = task_in(simulator, "t", step, step)  # and then the image, from either place
    await refusal_of(download(client, task, tmp_path, timeout=0.7))
    task = task_in(simulator, "u", step, step)
    path = await download(client, task, tmp_path, use_origin=True, timeout=0.7)
    assert path.name == "u.png"
    folders = [request.path.split("/")[1] for request in simulator.requests]
    assert folders == ["images"] * 4 + ["origins"]


@virtual_time
@pytest.mark.parametrize("origin", [None, ""])
async def test_a_task_may_have_no_origin(origin, tmp_path):
    """Then the error is the result's."""
    async with raw_server(http(status=410)) as server, client_of(server) as client:
        await refusal_of(
            download(client, task_at(server, origin=origin), tmp_path, use_origin=True)
        )
        assert len(server.heads) == 1


@virtual_time
@pytest.mark.parametrize("gone", [403, 404, 410])
async def test_a_missing_origin_has_expired(gone, simulator, client, tmp_path):
    """The origin expires after 10 minutes; if both are gone the image has expired."""
    task = task_in(simulator, "t", "html_410", steps.http(gone), "image")
    error = await error_of(download(client, task, tmp_path, use_origin=True), ResultExpiredError)
    assert error.http_status == gone
    assert error.__cause__.http_status == 410
    assert len(simulator.requests) == 2


@virtual_time
async def test_a_result_in_trouble_has_not_expired_with_its_origin(simulator, client, tmp_path):
    """A retry may succeed, so the result's error is raised, caused by the origin's."""
    script = ["html_503", steps.http(410)]
    task = task_in(simulator, "t", *script)
    error = await refusal_of(download(client, task, tmp_path, use_origin=True, timeout=0.2))
    assert (error.http_status, error.retryable) == (503, True)
    assert isinstance(error.__cause__, ResultExpiredError)


# The key


def shown(error):
    """Return all texts of an error, its causes included."""
    texts = [repr(error), str(error), *traceback.format_exception(error)]
    return "\n".join([*texts, pickle.dumps(error).decode("latin-1"), repr(vars(error))])


@virtual_time
async def test_image_hosts_never_get_the_key(tmp_path, caplog):
    """This includes the API's own origin, redirects, and origin URLs."""
    caplog.set_level("DEBUG")
    async with raw_server(http(b"", status=404)) as last:
        redirect = http(b"", f"Location: {last.base_url}/there", status=302)
        async with raw_server(redirect) as api, client_of(api) as client:
            task = task_at(api, origin=f"{last.base_url}/origin")
            saving = download(client, task, tmp_path, use_origin=True, allow_private=True)
            error = await error_of(saving, ResultExpiredError)
    heads = "".join([*api.heads, *last.heads]).lower()
    assert 3 < len(api.heads) == len(last.heads) - 1
    for word in (KEY, "authorization", "bearer", "cookie"):
        assert word not in heads
    assert KEY not in shown(error) + caplog.text


@virtual_time
@pytest.mark.parametrize("step", sorted({*IMAGE_STEPS} - {"huge", "huge_chunked"}))
async def test_the_key_is_in_no_request_and_no_error(step, simulator, client, tmp_path):
    """The simulator notes each request with an Authorization header."""
    task = task_in(simulator, "t", *[step] * 99)
    saving = download(client, task, tmp_path, timeout=20)
    [error] = await asyncio.gather(saving, return_exceptions=True)
    assert isinstance(error, DownloadError) is (step not in AT_ONCE or step == "redirect")
    assert not isinstance(error, DownloadError) or KEY not in shown(error)
    assert simulator.requests
    assert not any(request.sent_authorization for request in simulator.requests)


# Cancellation


async def cancelled_at(coroutine, nth, times):
    """Cancel a coroutine at its nth wait and the following ones; return the number of its waits."""
    return await _cancelling(coroutine, nth, times)


@types.coroutine
def _cancelling(coroutine, nth, times):
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    waits, error = 0, None
    while True:
        try:
            waiting = coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration:
            return waits
        waits += 1
        if nth <= waits < nth + times:
            loop.call_soon(task.cancel)
        try:
            yield waiting
            error = None
        except BaseException as exc:  # noqa: BLE001  # it is thrown into the coroutine
            error = exc


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("data", [PNG, LARGE], ids=["short", "long"])
async def test_a_download_cancelled_anywhere_leaves_nothing(data, times, tmp_path):
    """No temporary file, task or connection remains."""
    tasks = asyncio.all_tasks()
    answer = [http(data)[:-9], 0.001, data[-9:]]
    async with raw_server(answer) as server, client_of(server) as client:
        for nth in itertools.count(1):
            folder = tmp_path / str(nth)
            saving = download(client, task_at(server), folder, allow_private=True)
            run = asyncio.create_task(cancelled_at(saving, nth, times))
            await asyncio.wait([run])
            for path in folder.iterdir() if folder.exists() else ():
                assert (path.name, path.read_bytes()) == ("t.png", data)
            if not run.cancelled():
                break
    assert run.result() < nth
    assert nth > 5
    assert names(folder) == ["t.png"]
    for _ in range(20):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == tasks
    del run, saving
    gc.collect()  # a session that is left open would warn


@virtual_time
async def test_a_cancellation_ends_a_pause(simulator, client, tmp_path):
    """A save that waits for its next attempt ends at once."""
    task = task_in(simulator, "t", *["html_503"] * 99)
    async with ImageSaver(client, tmp_path) as saver:
        begun = now()
        run = asyncio.create_task(saver.save(task))
        await asyncio.sleep(50)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert now() == begun + 50
    assert len(simulator.requests) > 5


# The saver


@pytest.mark.parametrize(
    "options",
    [
        *[{"max_bytes": value} for value in (0, -1, True, 1.5, "9", None)],
        *[{"max_concurrency": value} for value in (0, -1, False, 2.0, None)],
        *[{"timeout": value} for value in (0, -1, float("nan"), "9")],
        *[{"folder": value} for value in ("a\0b", "\ud800")],
    ],
    ids=ascii,
)
def test_an_invalid_argument_is_refused(options, tmp_path):
    """This is before the folder is created; the error names the argument."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        ImageSaver(KontextClient(KEY), **{"folder": tmp_path, **options})


async def test_what_cannot_be_saved_is_refused(client, tmp_path):
    """Records, ids and invalid names are refused."""
    async with raw_server(IMAGE) as server, ImageSaver(client_of(server), tmp_path) as saver:
        with pytest.raises(ConfigurationError, match="not str"):
            await saver.save("t")
        for name in ("", ".", "..", "a/b", "/a", "../a", "a/", "a\0b", "\ud800"):
            with pytest.raises(ConfigurationError, match="name"):
                await saver.save(task_at(server), name=name)
        assert not server.connections
    assert names(tmp_path) == []


async def test_an_invalid_path_is_refused(client, tmp_path):
    """This holds for a file and for a folder."""
    async with raw_server(IMAGE) as server:
        for path in ("a\0b", "a\0b.png", "\ud800", "\ud800.png"):
            with pytest.raises(ConfigurationError, match="cannot be the name of a file"):
                await download(client, task_at(server), tmp_path / path)
    assert names(tmp_path) == []


async def test_a_saver_saves_only_while_it_is_open(tmp_path):
    """Saving outside, and opening twice at once, are errors; it can be opened again later."""
    async with raw_server(IMAGE) as server, client_of(server) as client:
        saver = ImageSaver(client, tmp_path)
        await error_of(saver.save(task_at(server)), ClientStateError)
        async with saver:
            with pytest.raises(ClientStateError, match="open already"):
                await saver.__aenter__()
            await saver.save(task_at(server))
        await error_of(saver.save(task_at(server, "u")), ClientStateError)
        async with saver:
            await saver.save(task_at(server, "u"))
    assert names(tmp_path) == ["t.png", "u.png"]


async def begun(path):
    async with asyncio.timeout(10):
        while not names(path):  # noqa: ASYNC110  # the file system has no events
            await asyncio.sleep(0.001)


BEGINNING = f"HTTP/1.1 200 OK\r\nContent-Length: {9 * MIB}\r\n\r\n".encode() + LARGE


@pytest.mark.parametrize("pause", [0, 0.02])
async def test_a_save_left_behind_ends_with_its_saver(pause, tmp_path):
    """Its temporary file is removed; a save that waits for a permit ends too."""
    async with raw_server([BEGINNING, 60.0]) as server, client_of(server) as client:
        async with ImageSaver(client, tmp_path, max_concurrency=1, timeout=None) as saver:
            tasks = [task_at(server, task_id) for task_id in "tu"]
            saves = [asyncio.create_task(saver.save(task)) for task in tasks]
            await begun(tmp_path)
            await asyncio.sleep(pause)
        assert all(save.done() for save in saves)
        for save in saves:
            assert "closed before the image" in str(await error_of(save, ClientStateError))
        assert len(server.heads) == 1
    assert names(tmp_path) == []


@virtual_time
async def test_closing_ends_a_pause(tmp_path):
    """The next attempt would come after it."""
    async with raw_server(http(status=503)) as server, client_of(server) as client:
        async with ImageSaver(client, tmp_path, timeout=None) as saver:
            save = asyncio.create_task(saver.save(task_at(server)))
            await asyncio.sleep(100)
            requests, closed_at = len(server.heads), now()
        assert now() == pytest.approx(closed_at, abs=0.1)
        await error_of(save, ClientStateError)
        assert len(server.heads) == requests


async def test_closing_waits_for_all_images_that_are_being_finished(monkeypatch, tmp_path):
    """They are saved."""
    finishing, disks = threading.Semaphore(0), {"t": threading.Event(), "u": threading.Event()}
    complete = files.PartialImage.complete

    def complete_slowly(image, data):
        finishing.release()
        assert disks[image.target.name].wait(10)
        complete(image, data)

    monkeypatch.setattr(files.PartialImage, "complete", complete_slowly)
    monkeypatch.setattr(files, "_HAS_PILLOW", True)
    async with raw_server(IMAGE) as server, client_of(server) as client:
        saver = ImageSaver(client, tmp_path, max_concurrency=2)
        await saver.__aenter__()
        saves = [asyncio.create_task(saver.save(task_at(server, task_id))) for task_id in disks]
        for _ in saves:  # each image is decoded in a thread of its own
            assert await asyncio.to_thread(finishing.acquire, timeout=10)
        closing = asyncio.create_task(saver.__aexit__(None, None, None))
        disks["u"].set()
        await saves[1]
        await asyncio.sleep(0.02)
        assert not closing.done()
        disks["t"].set()
        await closing
        assert all(save.done() for save in saves)
        assert [(await save).path.name for save in saves] == names(tmp_path)


async def test_a_closing_that_is_cancelled_still_closes(tmp_path):
    """The saves under way still clean up."""
    async with raw_server([BEGINNING, 60.0]) as server, client_of(server) as client:
        saver = ImageSaver(client, tmp_path)
        await saver.__aenter__()
        save = asyncio.create_task(saver.save(task_at(server)))
        await begun(tmp_path)
        closing = asyncio.create_task(saver.__aexit__(None, None, None))
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await error_of(save, ClientStateError)
    assert names(tmp_path) == []


async def test_a_saver_that_is_closed_has_no_threads(tmp_path):
    """It has some while it is open."""
    before = set(threading.enumerate())
    async with raw_server(IMAGE) as server, client_of(server) as client:
        async with ImageSaver(client, tmp_path) as saver:
            await asyncio.gather(*(saver.save(task_at(server, f"t{n}")) for n in range(8)))
            own = {t for t in set(threading.enumerate()) - before if t.name == "kontext-async"}
            assert own
        for thread in own:
            await asyncio.to_thread(thread.join, 10)
            assert not thread.is_alive()


async def test_a_save_is_ended_once(monkeypatch, tmp_path):
    """By its deadline, and not again by the closing of its saver, while a thread writes."""
    writing, disk = threading.Event(), threading.Event()
    write = files.PartialImage.write

    def slow_write(image, data):
        writing.set()
        assert disk.wait(10)
        write(image, data)

    monkeypatch.setattr(files.PartialImage, "write", slow_write)
    async with raw_server([BEGINNING, 60.0]) as server, client_of(server) as client:
        saver = ImageSaver(client, tmp_path, timeout=0.05)
        await saver.__aenter__()
        save = asyncio.create_task(saver.save(task_at(server)))
        assert await asyncio.to_thread(writing.wait, 10)
        await asyncio.sleep(0.1)
        closing = asyncio.create_task(saver.__aexit__(None, None, None))
        await asyncio.sleep(0)
        disk.set()
        await error_of(save, ClientStateError)
        assert save.cancelling() == 0
        await closing
    assert names(tmp_path) == []


@virtual_time
async def test_nothing_is_kept_of_broken_bodies(tmp_path):
    """Here one image is still being received while others break off."""
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {MIB}\r\n\r\n".encode()
    broken = [head + LARGE[: MIB - 9], None]
    async with raw_server([BEGINNING, 999.0]) as slow, raw_server(broken) as server:
        async with client_of(server) as client:
            saver = ImageSaver(client, tmp_path, allow_private=True, timeout=None)
            async with saver:
                save = asyncio.create_task(saver.save(task_at(slow, "slow")))
                await asyncio.sleep(1)
                tracemalloc.start()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(200):
                        await saver.save(task_at(server))
                grown, _ = tracemalloc.get_traced_memory()
                tracemalloc.stop()
            await error_of(save, ClientStateError)
        assert len(server.heads) > 10
        assert grown < 3 * MIB


async def test_saves_of_one_task_at_once_make_one_file(tmp_path):
    """All others raise; with overwrite=True none does."""
    async with raw_server(IMAGE) as server, client_of(server) as client:
        for overwrite in (False, True):
            async with ImageSaver(client, tmp_path / "a", overwrite=overwrite) as saver:
                saves = [saver.save(task_at(server)) for _ in range(8)]
                results = await asyncio.gather(*saves, return_exceptions=True)
            saved = [result for result in results if isinstance(result, SavedImage)]
            assert len(saved) == (8 if overwrite else 1)
            assert names(tmp_path / "a") == ["t.png"]


async def test_an_image_saved_before_is_not_fetched(tmp_path):
    """The saver also knows the files that it has saved itself."""
    async with (
        raw_server(IMAGE) as server,
        client_of(server) as client,
        ImageSaver(client, tmp_path) as saver,
    ):
        await saver.save(task_at(server))
        await refusal_of(saver.save(task_at(server)))
        assert len(server.heads) == 1


async def test_another_saver_of_the_folder_is_not_overwritten(tmp_path):
    """Its file is found when the temporary file is renamed."""
    async with (
        raw_server(IMAGE) as server,
        client_of(server) as client,
        ImageSaver(client, tmp_path) as one,
        ImageSaver(client, tmp_path) as other,
    ):
        await one.save(task_at(server))
        assert "already" in str(await refusal_of(other.save(task_at(server))))
    assert names(tmp_path) == ["t.png"]


@virtual_time
async def test_max_concurrency_images_are_saved_at_a_time(client, tmp_path):
    """The number of permits is exact."""
    async with Simulator(latency=1.0) as slow:
        tasks = [task_in(slow, f"t{n}") for n in range(12)]
        async with ImageSaver(client_of(slow), tmp_path, max_concurrency=4) as saver:
            await asyncio.gather(*(saver.save(task) for task in tasks))
        assert slow.max_in_flight == 4
    assert len(names(tmp_path)) == 12


async def test_a_saved_image_is_found_after_a_restart(tmp_path):
    """Incomplete files, and files written since the saver was opened, are not found."""
    async with raw_server(IMAGE) as server, client_of(server) as client:
        async with ImageSaver(client, tmp_path) as saver:
            saved = await saver.save(task_at(server))
            assert await saver.find("u") is None
        (tmp_path / "v.png").write_bytes(PNG[:-30])
        async with ImageSaver(client, tmp_path) as saver:
            (tmp_path / "w.png").write_bytes(PNG)
            assert await saver.find("t") == saved
            assert await saver.find("v") is None
            assert await saver.find("w") is None
            (tmp_path / "t.png").unlink()
            assert await saver.find("t") is None


async def test_a_sweep_removes_what_a_killed_process_left(client, tmp_path):
    """And nothing else."""
    for name in (".t.png.0123456789ab.part", "t.png", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    async with ImageSaver(client, tmp_path) as saver:
        await saver.sweep()
    assert names(tmp_path) == [".hidden", "t.png"]


async def test_a_whole_image_that_is_not_the_recorded_one_is_fetched_again(
    simulator, client, tmp_path
):
    """The ledger's checksum decides, although the file is an image under the task's name."""
    task_in(simulator, "t")

    async def run():
        async with (
            Ledger(tmp_path / "kontext.sqlite3") as ledger,
            ledger.as_completed(client, ["t"]) as outcomes,
            ImageSaver(client, tmp_path, overwrite=True) as saver,
            ledger.save_outcomes(outcomes, saver) as saves,
        ):
            [(_, saved)] = [pair async for pair in saves]
        return saved

    def images():
        return [r.path for r in simulator.requests if r.path.startswith("/images/")]

    first = await run()
    whole = first.path.read_bytes()
    first.path.write_bytes(plain_png(3, 3, b"xyz"))
    async with ImageSaver(client, tmp_path) as saver:
        assert (await saver.find("t")).sha256 != first.sha256
    assert await run() == first
    assert (first.path.read_bytes(), len(images())) == (whole, 2)
    assert await run() == first
    assert len(images()) == 2


# A batch


class Source:
    """Outcomes as a batch gives them; ``reads`` counts those that were asked for."""

    def __init__(self, outcomes, *, then=None):
        self._outcomes = iter(outcomes)
        self._then = then
        self.reads = 0
        self.cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        self.reads += 1
        for outcome in self._outcomes:
            return outcome
        if isinstance(self._then, BaseException):
            raise self._then
        if self._then is None:
            raise StopAsyncIteration
        try:
            await asyncio.sleep(self._then)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


def outcome_of(task):
    return ResultOutcome(task_id=task.task_id, result=task)


def finished(simulator, *ids, script=()):
    return [outcome_of(task_in(simulator, task_id, *script)) for task_id in ids]


FAILED = ErrorOutcome(
    task_id="f",
    error=GenerationFailedError(task_id="f", status=TaskStatus.GENERATE_FAILED),
)


async def turns(count=50):
    for _ in range(count):
        await asyncio.sleep(0)


def our_tasks():
    codes = [(task, task.get_coro().cr_code.co_filename) for task in asyncio.all_tasks()]
    return [task for task, file in codes if "results" in file]


async def later(stream):
    """Assert that no pair arrives within a second."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 1)


async def test_a_batch_is_saved_while_it_still_runs(tmp_path):
    """One image is on disk before the other is generated; a failed task has no image."""
    seen = {}

    def until_the_first_is_saved():
        while "first" not in seen:
            yield "generating"
        yield "success"

    async with Simulator() as simulator, client_of(simulator) as client:
        simulator.add_task("first", duration=0, outcome="success")
        simulator.add_task("failed", duration=0, outcome="failure")
        simulator.add_task("last", script=until_the_first_is_saved())
        ids = ["last", "failed", "first"]
        async with (
            client.as_completed(ids, wait=wait_fixed(0.01)) as outcomes,
            ImageSaver(client, tmp_path) as saver,
            save_outcomes(outcomes, saver) as saves,
        ):
            async for outcome, saved in saves:
                seen[outcome.task_id] = saved
                if saved is not None:
                    assert saved.path.exists()
    assert list(seen)[-1] == "last"
    assert seen["failed"] is None
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["first", "last"]


@virtual_time
async def test_an_image_that_cannot_be_saved_does_not_affect_others(simulator, client, tmp_path):
    """Its error is yielded with its outcome."""
    outcomes = finished(simulator, "a", "b") + finished(simulator, "x", script=["html_410"])
    async with ImageSaver(client, tmp_path) as saver:
        stream = save_outcomes(Source(outcomes), saver)
        pairs = {outcome.task_id: saved async for outcome, saved in stream}
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert isinstance(pairs.pop("x"), DownloadError)
    assert {task_id: saved.path.name for task_id, saved in pairs.items()} == {
        "a": "a.png",
        "b": "b.png",
    }


@virtual_time
async def test_an_empty_batch_ends(client, tmp_path):
    """A second read ends too."""
    async with ImageSaver(client, tmp_path) as saver, save_outcomes(Source([]), saver) as saves:
        assert [pair async for pair in saves] == []
        assert [pair async for pair in saves] == []


@virtual_time
async def test_the_source_is_read_no_faster_than_images_are_saved(client, tmp_path):
    """With a slow consumer the source is not read on."""
    async with Simulator(latency=1.0) as slow:
        source = Source(finished(slow, *(f"t{n}" for n in range(30))))
        async with (
            ImageSaver(client_of(slow), tmp_path, max_concurrency=2) as saver,
            save_outcomes(source, saver) as saves,
        ):
            for taken in range(1, 10):
                await anext(saves)
                await asyncio.sleep(100)
                assert source.reads <= taken + 4
                assert len(names(tmp_path)) <= taken + 4
        assert slow.max_in_flight <= 2


@virtual_time
@pytest.mark.parametrize("how", ["end", "error", "aclose"])
async def test_leaving_early_ends_what_is_under_way(how, simulator, client, tmp_path):
    """The read, the saves and the stream end."""
    stalled = finished(simulator, "a", "b", script=["stall"] * 9)
    source = Source([*stalled, FAILED], then=500)
    async with ImageSaver(client, tmp_path) as saver:
        stream = save_outcomes(source, saver)
        with pytest.raises(LookupError) if how == "error" else contextlib.nullcontext():
            async with stream:
                assert await anext(stream) == (FAILED, None)
                await later(stream)
                assert len(our_tasks()) == 3
                if how == "error":
                    raise LookupError
                if how == "aclose":
                    await stream.aclose()
                    await stream.aclose()
                    assert not our_tasks()
        assert not our_tasks()
        assert source.cancelled
        assert now() < 10
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert names(tmp_path) == []


@virtual_time
async def test_closing_from_elsewhere_ends_the_one_who_waits(client, tmp_path):
    """The reader sees the end of the stream, not a cancellation."""
    async with ImageSaver(client, tmp_path) as saver:
        stream = save_outcomes(Source([], then=500), saver)
        waiting = asyncio.create_task(anext(stream, "ended"))
        await turns()
        async with asyncio.timeout(1):
            await stream.aclose()
            assert await waiting == "ended"


@virtual_time
@pytest.mark.parametrize("saves", [0, 1])
async def test_an_exception_of_the_source_reaches_the_caller(saves, simulator, client, tmp_path):
    """It ends the saves under way, and the stream."""
    slow = finished(simulator, *["s"] * saves, script=["stall"] * 9)
    async with ImageSaver(client, tmp_path) as saver:
        stream = save_outcomes(Source(slow, then=LookupError("a bad source")), saver)
        with pytest.raises(LookupError, match="a bad source"):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert now() < 1


@virtual_time
async def test_a_programming_error_reaches_the_caller(client, tmp_path):
    """It is not turned into a failed download."""
    source = Source([ResultOutcome(task_id="t", result="t")])
    async with ImageSaver(client, tmp_path) as saver, save_outcomes(source, saver) as saves:
        await error_of(anext(saves), ConfigurationError)


@virtual_time
async def test_a_cancelled_reader_may_read_again(simulator, client, tmp_path):
    """The next read has the outcome."""
    outcomes = finished(simulator, "a", script=[steps.http(503, headers={"Retry-After": "10"})])
    async with ImageSaver(client, tmp_path) as saver, save_outcomes(Source(outcomes), saver) as s:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(s), 1)
        outcome, saved = await anext(s)
    assert (outcome.task_id, saved.path.name) == ("a", "a.png")


@virtual_time
@pytest.mark.parametrize("action", ["always", "error"])
async def test_a_stream_dropped_unfinished_warns_and_ends_its_saves(
    action, simulator, client, tmp_path, monkeypatch
):
    """This holds where warnings are errors, too."""
    unraisable = []
    monkeypatch.setattr("sys.unraisablehook", lambda seen: unraisable.append(seen.exc_value))
    source = Source([*finished(simulator, "a", script=["stall"] * 9), FAILED], then=500)
    async with ImageSaver(client, tmp_path) as saver:
        stream = save_outcomes(source, saver)
        assert await anext(stream) == (FAILED, None)
        await later(stream)
        assert len(our_tasks()) == 2
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter(action)
            del stream
            gc.collect()
        await turns()
        assert source.cancelled
        assert not our_tasks()
    texts = [str(warning.message) for warning in caught] + [str(error) for error in unraisable]
    assert [text for text in texts if "dropped before its end" in text] == texts
    assert len(texts) == 1


async def test_a_consumer_that_waits_ends_when_another_closes_the_stream(client, tmp_path):
    """Nothing more comes; after `abort` the consumer gets the error instead."""
    async with ImageSaver(client, tmp_path) as saver:
        for error in (None, LookupError("aborted")):
            stream = save_outcomes(Source([], then=500), saver)
            waiting = asyncio.create_task(anext(stream, None))
            await asyncio.sleep(0.01)
            await (stream.abort(error) if error else stream.aclose())
            (ended,) = await asyncio.gather(waiting, return_exceptions=True)
            assert ended is error


def test_a_stream_dropped_after_its_loop_only_warns(tmp_path):
    """Its tasks ended with the loop."""

    async def main():
        async with ImageSaver(KontextClient(KEY), tmp_path) as saver:
            stream = save_outcomes(Source([], then=500), saver)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.01)
        return stream

    streams = [asyncio.run(main())]
    with pytest.warns(ResourceWarning, match="dropped before its end") as caught:
        streams.clear()
    assert len(caught) == 1


@virtual_time
async def test_a_stream_not_begun_or_at_its_end_may_be_dropped(simulator, client, tmp_path):
    """Nothing is under way."""
    async with ImageSaver(client, tmp_path) as saver:
        save_outcomes(Source([], then=500), saver)
        stream = save_outcomes(Source(finished(simulator, "a")), saver)
        assert len([pair async for pair in stream]) == 1
        del stream
        gc.collect()
