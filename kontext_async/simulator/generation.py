"""What ``POST …/generate`` asks of a request."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import urlsplit

__all__ = ["problem_with"]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _address(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        parts = urlsplit(value)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def _one_of(*values: str) -> Callable[[Any], bool]:
    return lambda value: value in values


def _tolerance(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 6


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_text, "a string"),
    "enableTranslation": (_flag, "a boolean"),
    "uploadCn": (_flag, "a boolean"),
    "inputImage": (_address, "a URI"),
    "aspectRatio": (
        _one_of("21:9", "16:9", "4:3", "1:1", "3:4", "9:16"),
        "one of 21:9, 16:9, 4:3, 1:1, 3:4, 9:16",
    ),
    "outputFormat": (_one_of("jpeg", "png"), "jpeg or png"),
    "promptUpsampling": (_flag, "a boolean"),
    "model": (
        _one_of("flux-kontext-pro", "flux-kontext-max"),
        "flux-kontext-pro or flux-kontext-max",
    ),
    "callBackUrl": (_address, "a URI"),
    "safetyTolerance": (_tolerance, "an integer from 0 to 6"),
    "watermark": (_text, "a string"),
}


def problem_with(params: Any) -> str | None:
    """What the API would refuse a request for, with code 422; None for a good one.

    Fields it does not know are ignored.
    """
    if not isinstance(params, dict):
        return "the body must be a JSON object"
    fields = cast("dict[str, Any]", params)
    for name, (is_valid, wanted) in _FIELDS.items():
        if name in fields and not is_valid(fields[name]):
            return f"{name} must be {wanted}"
    return _problem_with_prompt(fields) or _problem_with_edit(fields)


def _problem_with_prompt(params: Mapping[str, Any]) -> str | None:
    prompt = params.get("prompt", "")
    if not prompt.strip():
        return "prompt is required"
    if not params.get("enableTranslation", True) and not _is_latin(prompt):
        return "prompt must be in English unless enableTranslation is true"
    return None


def _problem_with_edit(params: Mapping[str, Any]) -> str | None:
    if "inputImage" in params and params.get("safetyTolerance", 2) > 2:
        return "safetyTolerance must be from 0 to 2 where inputImage is given"
    return None


def _is_latin(text: str) -> bool:
    """As near to "in English" as a simulator comes."""
    return all(unicodedata.name(c, "").startswith("LATIN") for c in text if c.isalpha())
