"""The images that a simulator makes, and the ways their download can fail."""

from __future__ import annotations

import asyncio
import gzip
import io
import itertools
import zlib
from types import SimpleNamespace

import aiohttp
import pytest
from PIL import Image

from kontext_async.simulator import IMAGE_STEPS, Simulator, images
from kontext_async.simulator.pictures import landscape

pytestmark = pytest.mark.virtual_time

DAY = 24 * 3600.0
MIB = 1024 * 1024


@pytest.fixture
def no_pillow(monkeypatch):
    """Pretend that the extra is not installed."""
    monkeypatch.setattr(images, "_HAS_PILLOW", False)
    images._drawn.cache_clear()
    yield
    images._drawn.cache_clear()


@pytest.fixture
async def session(simulator):
    async with aiohttp.ClientSession(simulator.base_url, auto_decompress=False) as session:
        yield session


async def fetch(session, path="/images/t.png", **headers):
    async with session.get(path, allow_redirects=False, headers=headers) as response:
        return SimpleNamespace(
            status=response.status, headers=response.headers, body=await response.read()
        )


def decoded(body):
    """Decode the whole image; a broken one raises."""
    image = Image.open(io.BytesIO(body))
    image.load()
    return image


@pytest.mark.parametrize("size", [0, 100, 50_000, 300_000])
@pytest.mark.parametrize("kind", ["png", "jpeg"])
async def test_an_image_has_the_format_and_size_requested(kind, size):
    async with Simulator(image_bytes=size) as simulator, aiohttp.ClientSession() as session:
        params = {"prompt": "a boat", "outputFormat": kind, "aspectRatio": "3:4"}
        simulator.add_task("t", duration=0, params=params)
        got = await fetch(session, f"{simulator.base_url}/images/t.{kind}")
    assert got.status == 200
    assert got.headers["Content-Type"] == f"image/{kind}"
    assert int(got.headers["Content-Length"]) == len(got.body) >= size
    image = decoded(got.body)
    assert (image.format, image.size) == (kind.upper(), (240, 320))


async def test_the_prompt_is_on_the_image():
    plain, written, other = (
        images.make_image(f'{{"prompt": "{prompt}"}}', "png", 0) for prompt in ("", "a boat", "a b")
    )
    landscapes = [landscape(320, 180, zlib.crc32(prompt)).pixels for prompt in (b"", b"a boat")]
    assert decoded(plain).tobytes() == landscapes[0]
    assert decoded(written).tobytes() != landscapes[1]
    assert written != other


def test_each_prompt_has_a_picture_of_its_own():
    """A landscape: many colours, and the same each time."""
    pictures = [landscape(64, 48, seed) for seed in range(5)]
    assert len({picture.pixels for picture in pictures}) == 5
    assert pictures[3] == landscape(64, 48, 3)
    for picture in pictures:
        image = Image.frombytes("RGB", (picture.width, picture.height), picture.pixels)
        assert len(image.getcolors(100_000)) > 50


@pytest.mark.parametrize("prompt", ["кот", "\\ud800", "long " * 500, "x" * 3000, "<b>\\n", "☃"])
async def test_any_prompt_can_be_written(prompt):
    for kind in ("png", "jpeg"):
        decoded(images.make_image(f'{{"prompt": "{prompt}", "aspectRatio": 5}}', kind, 0))


async def test_without_pillow_every_image_is_a_png(no_pillow):
    async with Simulator(image_bytes=5000) as simulator, aiohttp.ClientSession() as session:
        params = {"prompt": "\ud800 a boat", "outputFormat": "jpeg", "aspectRatio": "1:1"}
        simulator.add_task("t", duration=0, params=params)
        got = await fetch(session, f"{simulator.base_url}/images/t.png")
    assert got.headers["Content-Type"] == "image/png"
    image = decoded(got.body)
    assert (image.format, image.size) == ("PNG", (256, 256))
    assert image.tobytes() == landscape(256, 256, zlib.crc32(b"? a boat")).pixels
    assert len(got.body) >= 5000


async def test_the_default_format_is_jpeg(simulator, session):
    simulator.add_task("t", duration=0, params={"prompt": "a"})
    assert (await fetch(session)).headers["Content-Type"] == "image/jpeg"


@pytest.mark.parametrize("folder", ["images", "origins"])
@pytest.mark.parametrize(
    ("task", "status"),
    [
        ({"duration": 0}, 200),
        ({"duration": 10}, 404),
        ({"duration": 0, "outcome": "failure"}, 404),
        ({"script": ["generating"]}, 404),
    ],
)
async def test_there_is_an_image_once_a_task_has_succeeded(
    simulator, session, folder, task, status
):
    simulator.add_task("t", **task)
    assert (await fetch(session, f"/{folder}/t.png")).status == status


async def test_the_image_of_an_unknown_task_is_not_found(session):
    for path in ("/images/nobody.png", "/images/", "/images", "/origins/t"):
        assert (await fetch(session, path)).status == 404


@pytest.mark.parametrize(("folder", "lifetime"), [("images", 14 * DAY), ("origins", 600.0)])
async def test_images_expire(simulator, session, folder, lifetime):
    simulator.add_task("t", duration=20.0)
    await asyncio.sleep(20 + lifetime - 1)
    assert (await fetch(session, f"/{folder}/t.png")).status == 200
    await asyncio.sleep(1)
    assert (await fetch(session, f"/{folder}/t.png")).status == 404


async def test_the_image_of_an_old_task_has_expired(simulator, session):
    simulator.add_task("t", duration=20.0, age=15 * DAY)
    assert (await fetch(session)).status == 404


async def test_images_need_no_key_and_a_key_sent_for_one_shows_in_the_log(simulator, session):
    simulator.add_task("t", duration=0)
    await fetch(session)
    await fetch(session, Authorization="Bearer leaked")
    assert [logged.status for logged in simulator.requests] == [200, 200]
    assert [logged.sent_authorization for logged in simulator.requests] == [False, True]
    assert {logged.task_id for logged in simulator.requests} == {"t"}


async def test_downloads_have_a_script_of_their_own(simulator, session):
    simulator.add_task("t", duration=0, image_script=["html_503", "empty_200", "image"])
    got = [await fetch(session) for _ in range(4)]
    assert [(one.status, bool(one.body)) for one in got] == [
        *[(503, True), (200, False)],
        *[(200, True), (200, True)],
    ]


def test_a_misspelt_image_step_is_refused():
    with pytest.raises(ValueError, match="'cut_short'"):
        Simulator().add_task(image_script=["cutshort"])
    with pytest.raises(ValueError, match="no step"):
        Simulator().add_task(image_script=["generating"])


REPLIES = {
    "image": (200, "image/png", b"\x89PNG"),
    "empty": (200, "image/png", b""),
    "html_as_image": (200, "image/png", b"<!doctype html>"),
    "wrong_type": (200, "application/octet-stream", b"\x89PNG"),
    "other_type": (200, "image/webp", b"\x89PNG"),
    "no_type": (200, None, b"\x89PNG"),
    "html_200": (200, "text/html; charset=utf-8", b"<html>"),
    "html_403": (403, "text/html; charset=utf-8", b"<html>"),
    "html_404": (404, "text/html; charset=utf-8", b"<html>"),
    "html_410": (410, "text/html; charset=utf-8", b"<html>"),
    "chunked": (200, "image/png", b"\x89PNG"),
    "slow": (200, "image/png", b"\x89PNG"),
    "closed_after": (200, "image/png", b"\x89PNG"),
}


@pytest.mark.parametrize("name", REPLIES)
async def test_an_image_step_replies_as_its_name_says(simulator, session, name):
    simulator.add_task("t", duration=0, outcome="success", image_script=[name])
    got = await fetch(session)
    status, kind, begins = REPLIES[name]
    assert (got.status, got.headers.get("Content-Type")) == (status, kind)
    assert got.body.startswith(begins)
    assert bool(got.body) is bool(begins)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
async def test_a_file_cut_short_is_whole_for_http_and_broken_for_a_decoder(
    simulator, session, kind
):
    params = {"prompt": "a boat", "outputFormat": kind}
    simulator.add_task("t", duration=0, params=params, image_script=["cut_short"])
    cut, whole = (await fetch(session)).body, (await fetch(session)).body
    assert whole.startswith(cut)
    decoded(whole)
    with pytest.raises(OSError, match=r"truncated|Truncated|broken"):
        decoded(cut)


async def test_an_image_may_be_compressed_in_transit(simulator, session):
    simulator.add_task("t", duration=0, image_script=["gzip"])
    got = await fetch(session)
    assert got.headers["Content-Encoding"] == "gzip"
    decoded(gzip.decompress(got.body))


@pytest.mark.parametrize(("name", "announced"), [("huge", True), ("huge_chunked", False)])
async def test_an_image_may_be_huge(simulator, session, name, announced):
    simulator.add_task("t", duration=0, image_script=[name])
    async with session.get("/images/t.png") as response:
        assert (response.content_length == 64 * MIB) is announced
        size = 0
        async for piece in response.content.iter_any():
            size += len(piece)
    assert size == 64 * MIB


async def test_a_huge_image_stops_when_the_client_leaves(simulator, session):
    simulator.add_task("t", duration=0, image_script=["huge_chunked"])
    async with session.get("/images/t.png") as response:
        await response.content.readexactly(1000)
    assert (await fetch(session)).status == 200


@pytest.mark.parametrize("name", ["reset_mid_body", "truncated"])
async def test_a_download_may_break(simulator, session, name):
    simulator.add_task("t", duration=0, image_script=[name])
    with pytest.raises(aiohttp.ClientPayloadError):
        await fetch(session)


@pytest.mark.parametrize(
    ("name", "location"),
    [
        ("redirect_file", "file:///etc/passwd"),
        ("redirect_host", "http://images.invalid/result.png"),
        ("redirect_private", "http://169.254.169.254/latest/meta-data"),
    ],
)
async def test_an_image_may_redirect_to_a_forbidden_address(simulator, session, name, location):
    simulator.add_task("t", duration=0, image_script=[name])
    got = await fetch(session)
    assert (got.status, got.headers["Location"]) == (302, location)


async def test_an_image_may_redirect_to_this_server_under_another_name(simulator, session):
    simulator.add_task("t", duration=0, image_script=["redirect_loopback"])
    location = (await fetch(session)).headers["Location"]
    assert location == simulator.base_url.replace("127.0.0.1", "localhost") + "/images/t.png"


async def test_an_image_may_redirect_to_itself_once_or_for_ever(simulator, session):
    simulator.add_task("once", duration=0, image_script=["redirect"])
    simulator.add_task("ever", duration=0, image_script=itertools.repeat("redirect"))
    async with session.get("/images/once.png") as response:
        assert (response.status, len(response.history)) == (200, 1)
    with pytest.raises(aiohttp.TooManyRedirects):
        await session.get("/images/ever.png")


async def test_downloads_meet_random_faults_too():
    faults = ["html_503", "not_visible"]
    async with Simulator(fault_rate=0.5, faults=faults) as simulator:
        simulator.add_task("t", duration=0)
        async with aiohttp.ClientSession(simulator.base_url) as session:
            statuses = [(await fetch(session)).status for _ in range(50)]
    assert set(statuses) == {200, 503}


def test_image_steps_are_not_those_of_records():
    assert "generating" not in IMAGE_STEPS
