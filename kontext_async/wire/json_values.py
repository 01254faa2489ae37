"""JSON values, read leniently, and their kinds by exact type: True is not 1."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeGuard

__all__ = ["integer", "is_array", "is_object", "kind_of", "parse"]

_KINDS: Final[Mapping[type, str]] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Return True for an object."""
    return type(value) is dict


def is_array(value: object) -> TypeGuard[list[Any]]:
    """Return True for an array."""
    return type(value) is list


def kind_of(value: object) -> str:
    """Name the kind of a value, for messages: the value itself may be private."""
    return _KINDS[type(value)]


def integer(value: object) -> int | None:
    """Return the integer in a number or in ASCII digits, if below 10⁹; None for anything else."""
    if type(value) is str and len(value) <= 9 and value.isascii() and value.isdigit():
        return int(value)
    return value if type(value) is int and -(10**9) < value < 10**9 else None


_MAX_DIGITS: Final = 4000  # of an integer; Python converts 4300 by default
_MAX_DEPTH: Final = 64  # of arrays and objects within each other
# Characters of a text that is read a second time: below 0.2 s of CPU time for the worst of texts.
_MAX_REREAD: Final = 256 * 1024
# A string, also one that is cut off, so that a search takes linear time; or a bracket.
_TOKEN: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[{\]}]', re.DOTALL)


def parse(text: str) -> Any:
    """Parse a JSON text; what Python cannot hold of it reads as null.

    That is an integer of too many digits, and an array or object nested too deeply: in one field,
    it must not veto the others. Raises ValueError if the text is not JSON, or has such
    a value and more than 256 Ki characters.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError):
        if len(text) > _MAX_REREAD:
            raise ValueError("a number or nesting beyond all measure") from None
        return json.loads("".join(_shallow(text)), parse_int=_int)


def _int(digits: str) -> int | None:
    return int(digits) if len(digits) <= _MAX_DIGITS else None


def _shallow(text: str) -> Iterator[str]:
    """Yield the pieces of a JSON text, with null for what is nested too deeply."""
    depth = kept = 0
    for token in _TOKEN.finditer(text):
        if token[0] in ("[", "{"):
            depth += 1
            if depth == _MAX_DEPTH + 1:
                yield f"{text[kept : token.start()]}null"
        elif token[0] in ("]", "}"):
            depth -= 1
            if depth == _MAX_DEPTH:
                kept = token.end()
    if depth <= _MAX_DEPTH:
        yield text[kept:]
