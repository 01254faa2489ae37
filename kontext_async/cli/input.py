"""Input of the command: task ids and the API key."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kontext_async.cli.output import fail
from kontext_async.errors import ConfigurationError
from kontext_async.wire import check_task_id

_MAX_PROBLEMS_SHOWN = 10


def distinct_ids(given: Iterable[str], source: str | None) -> list[str]:
    """Return each id once, in order; exit if there is none, or if one is not a valid id."""
    problems: list[str] = []
    ids: dict[str, None] = {}
    arguments = ((f"argument {number}", text) for number, text in enumerate(given, 1))
    for place, text in (*arguments, *_lines(source)):
        try:
            ids[check_task_id(_parse_id(text))] = None
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        shown = problems[:_MAX_PROBLEMS_SHOWN]
        if more := len(problems) - len(shown):
            shown.append(f"and {more} more")
        fail("\n".join(shown))
    if not ids:
        fail("no task ids: give them as arguments, or in a file with --from")
    return list(ids)


def _lines(source: str | None) -> Iterator[tuple[str, str]]:
    """Yield the lines that are not blank or comments, each with its place."""
    if source is None:
        return
    name = "standard input" if source == "-" else source
    read = sys.stdin.buffer.read if source == "-" else Path(source).read_bytes
    for number, line in enumerate(_read(name, read).split("\n"), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield f"{name}, line {number}", text


def _read(name: str, read: Callable[[], bytes]) -> str:
    try:
        return read().decode("utf-8-sig")
    except OSError as error:
        fail(f"cannot read {name}: {error.strerror}")
    except UnicodeDecodeError:
        fail(f"cannot read {name}: it is not text in UTF-8")


def _parse_id(text: str) -> object:
    """Return the id in a line: the line itself, or ``taskId`` of a JSON object."""
    if not text.startswith("{"):
        return text
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError("not a JSON object") from error
    if "taskId" not in fields:
        raise ConfigurationError("a JSON object without taskId")
    return fields["taskId"]


def read_key(path: Path | None) -> str:
    """Return the API key, from the file or from the environment."""
    if path is not None:
        return _read(str(path), path.read_bytes)
    return os.environ.get("APIKLEY_API_KEY") or fail(
        "no API key: set APIKLEY_API_KEY, or name a file that holds it with --api-key-file"
    )
