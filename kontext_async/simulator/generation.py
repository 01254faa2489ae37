"""Validation of the requests to ``POST …/generate``."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

__all__ = ["problem_with"]


class _Rule(NamedTuple):
    is_valid: Callable[[Any], bool]
    wanted: str


def _one_of(*values: str) -> _Rule:
    return _Rule(values.__contains__, f"one of {', '.join(values)}")


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _is_http_url(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        parts = urlsplit(value)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_STRING = _Rule(_is_string, "a string")
_BOOLEAN = _Rule(_is_boolean, "a boolean")
_URL = _Rule(_is_http_url, "an http or https URL")

_RULES: Mapping[str, _Rule] = {
    "prompt": _STRING,
    "enableTranslation": _BOOLEAN,
    "uploadCn": _BOOLEAN,
    "inputImage": _URL,
    "aspectRatio": _one_of("21:9", "16:9", "4:3", "1:1", "3:4", "9:16", "16:21"),
    "outputFormat": _one_of("jpeg", "png"),
    "promptUpsampling": _BOOLEAN,
    "model": _one_of("flux-kontext-pro", "flux-kontext-max"),
    "callBackUrl": _URL,
    "safetyTolerance": _Rule(_is_integer, "an integer"),
    "watermark": _STRING,
}


def problem_with(params: Any) -> tuple[int, str] | None:
    """Return the API's code and reason to refuse a request; None for a valid one.

    Unknown fields are ignored, and null stands for a field that is not given.
    """
    if not isinstance(params, dict):
        return 422, "the body must be a JSON object"
    given = cast("dict[str, Any]", params)
    fields = {name: value for name, value in given.items() if value is not None}
    for name, rule in _RULES.items():
        if name in fields and not rule.is_valid(fields[name]):
            return 422, f"{name} must be {rule.wanted}"
    prompt = fields.get("prompt", "")
    if not prompt.strip():
        return 422, "prompt is required"
    if not fields.get("enableTranslation", True) and not _is_latin(prompt):
        return 422, "prompt must be in English unless enableTranslation is true"
    highest = 2 if "inputImage" in fields else 6
    if not 0 <= fields.get("safetyTolerance", 2) <= highest:
        return 500, f"The security tolerance level is out of range and should be 0-{highest}."
    return None


def _is_latin(text: str) -> bool:
    """Approximate "is in English" by the script."""
    return all(unicodedata.name(c, "").startswith("LATIN") for c in text if c.isalpha())
