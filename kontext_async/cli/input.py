"""What the command is given: task ids and the key."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from kontext_async.cli.output import fail
from kontext_async.errors import ConfigurationError
from kontext_async.wire import check_task_id

# So many bad ids are named; more would only scroll by.
_NAMED = 10


def distinct_ids(given: Iterable[str], source: str | None) -> list[str]:
    """Each id once, in order; ends the command where there is none, or one is no id."""
    problems: list[str] = []
    ids: dict[str, None] = {}
    for place, text in (*_arguments(given), *_lines(source)):
        try:
            ids[check_task_id(_bare(text))] = None
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        more = [f"and {len(problems) - _NAMED} more"] if len(problems) > _NAMED else []
        fail("\n".join(problems[:_NAMED] + more))
    if not ids:
        fail("no task ids: name some, or give a file of them with --from")
    return list(ids)


def _arguments(given: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((f"argument {number}", text) for number, text in enumerate(given, 1))


def _lines(source: str | None) -> Iterator[tuple[str, str]]:
    """The lines that hold something, each with its place."""
    if source is None:
        return
    name = "standard input" if source == "-" else source
    for number, line in enumerate(_text(source).split("\n"), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield f"{name}, line {number}", text


def _text(source: str) -> str:
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        fail(f"cannot read {source}: {error.strerror}")
    except UnicodeDecodeError:
        fail(f"cannot read {source}: it is not text in UTF-8")


def _bare(text: str) -> object:
    """The id in a line: the line itself, or ``taskId`` where it is a JSON object."""
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
    """The API key, from the file or from the environment."""
    if path is None:
        return os.environ.get("APIKLEY_API_KEY") or fail(
            "no API key: set APIKLEY_API_KEY, or name a file that holds it with --api-key-file"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        fail(f"cannot read the key from {path}")
