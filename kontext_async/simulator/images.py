"""The images of tasks, and the steps of a script for their downloads."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import struct
import textwrap
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import attrs

from kontext_async.simulator import replies
from kontext_async.simulator.pictures import Picture, landscape
from kontext_async.simulator.replies import Reply
from kontext_async.simulator.steps import GATEWAY, TRANSPORT, http, redirect_to_localhost, sent
from kontext_async.simulator.tasks import Step, StepRequest

__all__ = ["IMAGE_STEPS", "image_type", "make_image"]

_SIZES = {
    "21:9": (336, 144),
    "16:9": (320, 180),
    "4:3": (320, 240),
    "1:1": (256, 256),
    "3:4": (240, 320),
    "9:16": (180, 320),
}
_HAS_PILLOW = importlib.util.find_spec("PIL") is not None


def image_type(output_format: str) -> Literal["png", "jpeg"]:
    """Return the format of the image for an ``outputFormat``: without Pillow, always PNG."""
    return "jpeg" if output_format == "jpeg" and _HAS_PILLOW else "png"


def make_image(param_json: str, kind: Literal["png", "jpeg"], size: int) -> bytes:
    """Make a request's image, at least ``size`` bytes long; with Pillow it has the prompt on it."""
    params = json.loads(param_json)
    image = _drawn(str(params.get("prompt", "")), str(params.get("aspectRatio")), kind)
    missing = size - len(image)
    if missing <= 0:
        return image
    return _padded_png(image, missing) if kind == "png" else _padded_jpeg(image, missing)


@functools.lru_cache(maxsize=256)
def _drawn(prompt: str, ratio: str, kind: Literal["png", "jpeg"]) -> bytes:
    width, height = _SIZES.get(ratio, _SIZES["16:9"])
    picture = landscape(width, height, zlib.crc32(prompt.encode("utf-8", "replace")))
    return _with_prompt(picture, prompt, kind) if _HAS_PILLOW else _png(picture)


def _png(picture: Picture) -> bytes:
    header = struct.pack(">2I5B", picture.width, picture.height, 8, 2, 0, 0, 0)
    size = 3 * picture.width
    rows = (picture.pixels[start : start + size] for start in range(0, size * picture.height, size))
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _with_prompt(picture: Picture, prompt: str, kind: str) -> bytes:
    # On the loop: it takes a few milliseconds, and virtual time would jump during a thread's work.
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415  # an extra

    width, height = picture.width, picture.height
    image = Image.frombytes("RGB", (width, height), picture.pixels)
    text = "\n".join(textwrap.wrap(prompt, width // 8, max_lines=height // 16, placeholder=" …"))
    text = text.encode("latin-1", "replace").decode("latin-1")
    font = ImageFont.load_default()
    draw = ImageDraw.Draw(image)
    draw.multiline_text((10, 10), text, "white", font, stroke_width=1, stroke_fill="black")
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def _padded_png(image: bytes, missing: int) -> bytes:
    """Add a private chunk, which decoders skip, before IEND."""
    return image[:-12] + _chunk(b"kpAd", bytes(missing)) + image[-12:]


def _padded_jpeg(image: bytes, missing: int) -> bytes:
    """Add comment segments, which decoders skip, after SOI."""
    return image[:2] + b"".join(_comments(missing)) + image[2:]


def _comments(missing: int) -> Iterator[bytes]:
    for start in range(0, missing, 65533):
        data = bytes(min(65533, missing - start))
        yield b"\xff\xfe" + struct.pack(">H", len(data) + 2) + data


def _image(**changes: Any) -> Step:
    """Reply with the image, some parts of the reply replaced."""
    return lambda request: attrs.evolve(request.default_reply(), **changes)


def _cut(request: StepRequest) -> Reply:
    """Reply with nine tenths of the file, and a Content-Length that fits."""
    whole = request.default_reply()
    return attrs.evolve(whole, body=whole.body[: len(whole.body) * 9 // 10])


def _redirect(location: str) -> Reply:
    return Reply(302, {"Location": location})


_HUGE = 64 * 1024 * 1024

IMAGE_STEPS: Mapping[str, Step] = {
    **GATEWAY,
    **TRANSPORT,
    "image": _image(),
    "empty": _image(body=b""),
    "html_as_image": _image(body=b"<!doctype html><title>Sign in</title>"),
    "wrong_type": _image(headers={"Content-Type": "application/octet-stream"}),
    "other_type": _image(headers={"Content-Type": "image/webp"}),
    "no_type": _image(headers={}),
    "cut_short": _cut,
    "gzip": lambda request: replies.gzipped(request.default_reply()),
    "huge": sent(replies.filled(_HUGE)),
    "huge_chunked": sent(replies.chunked(_HUGE)),
    "html_410": http(410),
    "redirect": lambda request: _redirect(request.url),
    "redirect_loopback": redirect_to_localhost,
    "redirect_file": _redirect("file:///etc/passwd"),
    "redirect_host": _redirect("http://images.invalid/result.png"),
    "redirect_private": _redirect("http://169.254.169.254/latest/meta-data"),
}
