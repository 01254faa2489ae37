"""PNG files made byte by byte, with the standard library alone."""

from __future__ import annotations

import struct
import zlib

_GREY, _RGB = 0, 2


def plain_png(width, height, colour):
    """Return a PNG of one colour (three bytes)."""
    return _png(width, height, _RGB, (b"\0" + colour * width) * height)


def decompression_bomb(side):
    """Return a PNG of a few hundred bytes that claims to have that many pixels a side."""
    return _png(side, side, _GREY, bytes(10_000))


def _png(width, height, colour_type, rows):
    header = _chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, colour_type, 0, 0, 0))
    data = _chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + data + _chunk(b"IEND", b"")


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
