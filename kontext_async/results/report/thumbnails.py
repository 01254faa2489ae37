"""Thumbnails of the images, made with Pillow (extra ``images``)."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kontext_async.results.images.files import DECODER_ERRORS
from kontext_async.results.partial import THUMBNAILS, write_file

__all__ = ["make_thumbnails"]

# Pixels: twice the width of a card, for screens of high density.
_BOX = (480, 480)
# A few KiB can announce gigapixels. The service's images have one or two megapixels.
_MAX_PIXELS = 50_000_000
# Pillow reads dozens of formats, some by running other programs. Results have one of these.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_WORKERS = min(4, os.cpu_count() or 1)  # each may hold a decoded image


def make_thumbnails(
    folder: Path, images: Sequence[Path], on_progress: Callable[[int, int], object] | None = None
) -> list[Path | None]:
    """Return the thumbnail of each image, or None if it cannot be made, as without Pillow.

    Thumbnails that are not older than their images are not made again.
    """
    if not images or importlib.util.find_spec("PIL") is None:
        return [None] * len(images)
    with ThreadPoolExecutor(_WORKERS) as pool:
        made: list[Path | None] = []
        for thumbnail in pool.map(functools.partial(_thumbnail, folder), images):
            made.append(thumbnail)
            if on_progress is not None:
                on_progress(len(made), len(images))
        return made


def _thumbnail(folder: Path, image: Path) -> Path | None:
    # Named by a digest: short and safe whatever the image's name.
    name = hashlib.sha256(os.fsencode(image.relative_to(folder))).hexdigest()[:32]
    target = folder / THUMBNAILS / f"{name}.jpg"
    try:
        if not _is_newer(target, image):
            target.parent.mkdir(exist_ok=True)
            write_file(target, [_reduced(image)])
    except (OSError, *DECODER_ERRORS):  # the page shows the file itself
        return None
    return target


def _is_newer(target: Path, image: Path) -> bool:
    return target.is_file() and target.stat().st_mtime_ns >= image.stat().st_mtime_ns


def _reduced(path: Path) -> bytes:
    """Return an image as a JPEG within the box, without its metadata."""
    from PIL import Image  # noqa: PLC0415  # an extra

    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError("too many pixels")
            image.draft("RGB", _BOX)
            pixels = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except Image.DecompressionBombError as exc:
        raise ValueError("too many pixels") from exc
    pixels.thumbnail(_BOX, reducing_gap=1.0)  # twice as fast as the default, and looks the same
    flat = Image.new("RGB", pixels.size, "white")
    flat.paste(pixels, mask=pixels if pixels.mode == "RGBA" else None)
    out = io.BytesIO()
    flat.save(out, "JPEG", quality=82, optimize=True)
    return out.getvalue()
