"""Drawn landscapes: a sky, a sun or a moon, and hills, from a seed and the standard library alone.

A picture is drawn by columns, as slices of prepared gradients, and then turned into rows: bytes
are copied in long runs, and no pixel is computed by itself.
"""

from __future__ import annotations

import colorsys
import itertools
import math
import random
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Picture", "landscape"]

_HILLS = 4  # ridges behind each other
_HALO = ((2.2, 0.10), (1.6, 0.16), (1.25, 0.22), (1.0, 1.0))  # radii of the sun, and its opacity

_Colour = tuple[float, float, float]  # red, green and blue, 0 to 255


class Picture(NamedTuple):
    """A picture of ``width`` by ``height`` pixels, three bytes each, row by row."""

    width: int
    height: int
    pixels: bytes


class _Sun(NamedTuple):
    x: float
    y: float
    radius: float
    colour: _Colour


def landscape(width: int, height: int, seed: int) -> Picture:
    """Draw a landscape; the same seed and size give the same picture."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    hue = draw.uniform(0.5, 0.8)  # from cyan to violet
    zenith = _colour(hue, draw.uniform(0.45, 0.8), draw.uniform(0.25, 0.75))
    horizon = _colour(draw.uniform(0.9, 1.15), draw.uniform(0.25, 0.55), 1.0)  # pink to yellow
    ground = _colour(draw.uniform(0.35, 0.85), draw.uniform(0.4, 0.7), 0.16)
    sun = _Sun(
        draw.uniform(0.15, 0.85) * width,
        draw.uniform(0.2, 0.5) * height,
        draw.uniform(0.07, 0.14) * min(width, height),
        _colour(draw.uniform(0.05, 0.16), draw.uniform(0.0, 0.5), 1.0),
    )
    ridges = [_ridge(draw, n, width, height) for n in range(_HILLS)]
    # Nearer hills are darker; the air lightens the far ones towards the horizon's colour.
    shades = [_mix(horizon, ground, (n + 1) / _HILLS) for n in range(_HILLS)]
    cuts = _cuts(ridges, height)
    planes: list[bytes] = []
    for c in range(3):
        sky = _gradient(zenith[c], horizon[c], height)
        hills = [_gradient(shade[c] * 1.15, shade[c] * 0.7, height) for shade in shades]
        skies = _skies(sky, width, sun, sun.colour[c])
        planes.append(b"".join(map(_column, skies, cuts, itertools.repeat(hills))))
    return Picture(width, height, b"".join(_rows(planes, width, height)))


def _colour(hue: float, saturation: float, value: float) -> _Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return 255 * red, 255 * green, 255 * blue


def _mix(one: _Colour, other: _Colour, share: float) -> _Colour:
    red, green, blue = (a + (b - a) * share for a, b in zip(one, other, strict=True))
    return red, green, blue


def _gradient(first: float, last: float, length: int) -> bytes:
    step = (last - first) / length
    return bytes(min(255, max(0, round(first + step * n))) for n in range(length))


def _ridge(draw: random.Random, n: int, width: int, height: int) -> list[int]:
    """Return the height of a ridge at each column, in pixels from the top."""
    base = (0.5 + 0.13 * n) * height
    waves = [
        (draw.uniform(0.5, 1.2) * factor * (1 + n / 2), draw.random() * math.tau, 0.09 / factor)
        for factor in (1, 2.3, 5.1)
    ]
    return [
        min(
            height,
            max(
                1,
                round(
                    base
                    + height
                    * sum(
                        size * math.sin(math.tau * often * x / width + start)
                        for often, start, size in waves
                    )
                ),
            ),
        )
        for x in range(width)
    ]


def _cuts(ridges: list[list[int]], height: int) -> list[list[int]]:
    """Return the top of the visible part of each ridge in each column, and the height."""
    return [
        list(itertools.accumulate((height, *reversed(tops)), min))[::-1]
        for tops in zip(*ridges, strict=True)
    ]


def _skies(sky: bytes, width: int, sun: _Sun, colour: float) -> Iterator[bytes]:
    """Return the sky at each column, with the sun, in one of the three colours."""
    tables = [
        bytes(round(value + (colour - value) * opacity) for value in range(256))
        for _, opacity in _HALO
    ]
    for x in range(width):
        column = sky
        for (size, _), table in zip(_HALO, tables, strict=True):
            half = (size * sun.radius) ** 2 - (x - sun.x) ** 2
            if half > 0:
                top, end = max(0, round(sun.y - half**0.5)), round(sun.y + half**0.5)
                column = column[:top] + column[top:end].translate(table) + column[end:]
        yield column


def _column(sky: bytes, cuts: list[int], hills: list[bytes]) -> bytes:
    """Join the sky and the visible parts of the hills, each shaded from its top."""
    spans = zip(hills, itertools.pairwise(cuts), strict=True)
    return sky[: cuts[0]] + b"".join(hill[: end - top] for hill, (top, end) in spans)


def _rows(planes: list[bytes], width: int, height: int) -> Iterator[bytes]:
    for y in range(height):
        row = bytearray(3 * width)
        for colour, plane in enumerate(planes):
            row[colour::3] = plane[y::height]
        yield bytes(row)
