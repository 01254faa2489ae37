"""Kinds of JSON values, by exact type: True is not 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeGuard

__all__ = ["integer", "is_array", "is_object", "kind_of"]

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
