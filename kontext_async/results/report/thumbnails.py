"""Small pictures of the images, where Pillow (extra ``images``) is there to make them."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["make_thumbnails", "write_whole"]

_FOLDER = "thumbnails"
# Twice what a card is wide, for dense screens.
_BOX = (480, 480)
# A few KiB can announce gigapixels. The service's images have one or two million.
_MAX_PIXELS = 50_000_000
# Pillow knows dozens of formats, some by running other programs; results come in these.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
# What decoders raise for damaged files, beside OSError; `Warning` where warnings are errors.
_DECODING = (SyntaxError, ValueError, IndexError, EOFError, struct.error, zlib.error, Warning)
_WORKERS = min(4, os.cpu_count() or 1)  # each may hold a decoded image


def make_thumbnails(folder: Path, images: Sequence[Path]) -> list[Path | None]:
    """The thumbnail of each image; None where it cannot be made, for all of them without Pillow.

    One that is newer than its image is kept.
    """
    if not images or importlib.util.find_spec("PIL") is None:
        return [None] * len(images)
    with ThreadPoolExecutor(_WORKERS) as pool:
        return list(pool.map(functools.partial(_thumbnail, folder), images))


def _thumbnail(folder: Path, image: Path) -> Path | None:
    # Named by a digest: short and harmless whatever the image is called.
    name = hashlib.sha256(os.fsencode(image.relative_to(folder))).hexdigest()[:32]
    target = folder / _FOLDER / f"{name}.jpg"
    try:
        if not _is_newer(target, image):
            target.parent.mkdir(exist_ok=True)
            write_whole(target, [_reduced(image)])
    except (OSError, *_DECODING):  # no image, or no room: the page shows the file itself
        return None
    return target


def _is_newer(target: Path, image: Path) -> bool:
    return target.is_file() and target.stat().st_mtime_ns >= image.stat().st_mtime_ns


def _reduced(path: Path) -> bytes:
    """A JPEG within the box, of the pixels alone: no metadata comes along."""
    from PIL import Image  # noqa: PLC0415  # an extra

    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError("too many pixels")
            image.draft("RGB", _BOX)
            pixels = image.convert("RGBA")
    except Image.DecompressionBombError as exc:
        raise ValueError("too many pixels") from exc
    pixels.thumbnail(_BOX)
    flat = Image.new("RGB", pixels.size, "white")
    flat.paste(pixels, mask=pixels)
    out = io.BytesIO()
    flat.save(out, "JPEG", quality=82, optimize=True)
    return out.getvalue()


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file so that its name has the old contents or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            file.writelines(parts)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
