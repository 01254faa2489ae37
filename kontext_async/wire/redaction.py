"""Keep the API key and the task's parameters out of whatever is shown of an answer."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from typing import Any, Final

from kontext_async.wire.json_values import is_array, is_object, parse

__all__ = ["ApiKey", "excerpt", "page_text"]

_EXCERPT: Final = 200  # characters
_MAX_DEPTH: Final = 8  # of arrays and objects within each other, in an excerpt
_MAX_PAGE: Final = 4096  # characters of a page that are searched for its text
_MIN_KEY: Final = 6  # characters; a shorter key is not secret, and may be a part of every URL


def _any_spelling(word: str) -> re.Pattern[str]:
    """Match a word as JSON or HTML may write it, also in JSON within JSON, a few levels down."""
    return re.compile("".join(map(_character, word)))


def _character(c: str) -> str:
    point = ord(c)
    in_json = rf"\\{{0,8}}{re.escape(c)}|\\{{1,8}}u(?i:{point:04x})"
    in_html = rf"{re.escape(html.escape(c))}|&#(?:0{{0,4}}{point}|(?i:x0{{0,4}}{point:x}));"
    return f"(?:{in_json}|{in_html})"


class ApiKey:
    """An API key, which replaces itself by ``***`` in texts, in any spelling.

    Error reporters show the repr of a frame's variables and of their attributes. So the key is
    in neither: only functions hold it.
    """

    __slots__ = ("_is_suspect", "_replace", "reveal")

    def __init__(self, text: str) -> None:
        is_secret = len(text) >= _MIN_KEY
        # The longest part that JSON and HTML write as it is: a quick search for suspects.
        needle = max(re.split(r"""["'\\/&<>]""", text), key=len) if is_secret else "\\u"
        self.reveal: Callable[[], str] = lambda: text
        # Every answer is searched, so this must be fast. Behind "\u" may also be half a
        # character (a lone surrogate), which UTF-8 cannot hold.
        self._is_suspect: Callable[[str], bool] = lambda shown: needle in shown or "\\u" in shown
        self._replace = (_any_spelling(text) if is_secret else re.compile("(?!)")).sub

    def redact(self, text: str) -> str:
        return self._replace("***", text) if self._is_suspect(text) else text

    def load(self, text: str) -> Any:
        """Parse a JSON text; its strings come without the key and can be encoded in UTF-8.

        Raises ValueError if the text is not JSON.
        """
        value = parse(text)
        return _map_strings(value, self._clean) if self._is_suspect(text) else value

    def _clean(self, text: str) -> str:
        return self.redact(text).encode(errors="replace").decode()


def _map_strings(value: object, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if is_array(value):
        return [_map_strings(item, change) for item in value]
    if is_object(value):
        return {change(name): _map_strings(item, change) for name, item in value.items()}
    return value


def excerpt(value: object, api_key: ApiKey) -> str:
    """Return the first 200 printable characters of an answer, without the key and paramJson.

    ``value`` is the JSON value of the answer, or its text.
    """
    public = _without_params(value)
    text = public if isinstance(public, str) else json.dumps(public, ensure_ascii=False)
    shown = api_key.redact(text)[:_EXCERPT]  # redacted again: a key may be a number
    return "".join(c if c.isprintable() else " " for c in shown)


_PARAMS: Final = _any_spelling("paramJson")


def _without_params(value: object, depth: int = 0) -> object:
    """Return a JSON value without paramJson at any depth, cut to what an excerpt shows."""
    if isinstance(value, str):
        return _PARAMS.split(value[:_EXCERPT])[0]
    if is_array(value):
        return _public_items(value, depth) if depth < _MAX_DEPTH else "…"
    if is_object(value):
        return _public_members(value, depth) if depth < _MAX_DEPTH else "…"
    return value


def _public_items(items: list[Any], depth: int) -> list[object]:
    return [_without_params(item, depth + 1) for item in items[:_EXCERPT]]


def _public_members(members: dict[str, Any], depth: int) -> dict[str, object]:
    names = [name for name in members if not _PARAMS.search(name)][:_EXCERPT]
    return {name: _without_params(members[name], depth + 1) for name in names}


# Each runs to the end of the text if it is not closed, so that a search takes linear time.
_HEAD: Final = re.compile(r"<head\b.*?(?:</head\s*>|\Z)", re.IGNORECASE | re.DOTALL)
_MARKUP: Final = re.compile(
    r"<(script|style)\b.*?(?:</\1\s*>|\Z)|<!--.*?(?:-->|\Z)|<[a-z/!?].*?(?:>|\Z)",
    re.IGNORECASE | re.DOTALL,
)


def page_text(text: str) -> str:
    """Return what an HTML page shows, or its title if it shows nothing; other texts unchanged."""
    if not text.lstrip().startswith("<"):
        return text
    page = text[:_MAX_PAGE]
    return _visible(_HEAD.sub(" ", page)) or _visible(page)


def _visible(page: str) -> str:
    return " ".join(html.unescape(_MARKUP.sub(" ", page)).split())
