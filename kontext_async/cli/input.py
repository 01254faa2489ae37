"""Input of the command: task ids and the API key."""

from __future__ import annotations

import asyncio
import codecs
import csv
import json
import os
import re
import sys
import threading
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

from kontext_async.cli.output import fail
from kontext_async.errors import ConfigurationError
from kontext_async.wire import check_task_id

_MAX_PROBLEMS_SHOWN = 10
_CHUNK = 64 * 1024  # bytes read at once
_MAX_DOCUMENT = 64 * 1024 * 1024  # bytes of one JSON document over several lines

_DELIMITERS = re.compile(r"[,;\t]")
# Names of a column of ids, without their case and punctuation.
_ID_COLUMNS = frozenset({"taskid", "id"})


class Problem(NamedTuple):
    """A place in the input, and the reason why no id can be read there."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


_Item: TypeAlias = str | Problem


class IdParser:
    """Task ids from text that comes in pieces.

    A line holds an id, a quoted id, or JSON: an object with ``taskId``, an answer with
    ``data.taskId``, or an array of these. JSON may go over several lines. If the first line names
    columns, the rest is CSV. Blank lines, and lines that begin with ``#``, are skipped.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._number = 0  # of the last line
        self._delimiter: str | None = None
        self._column = 0
        self._is_first = True
        self._kept = ""  # the beginning of a CSV row or a JSON document
        self._kept_from = 0
        self._rest = ""  # of the last piece, without its line's end

    def feed(self, text: str, *, final: bool = False) -> Iterator[_Item]:
        """Yield an id, or a problem, for each that the text so far holds."""
        lines = (self._rest + text).split("\n")
        self._rest = "" if final else lines.pop()
        for line in lines:
            self._number += 1
            yield from self._line(line)
        while final and self._kept:
            yield from self._refuse("it is cut off: a bracket or a quote is not closed")

    def _line(self, line: str) -> Iterator[_Item]:
        if self._kept:
            self._kept += "\n" + line
        else:
            # A row of CSV may begin with empty cells, and a tab separates some.
            self._kept = line.strip(" \r" if self._delimiter else None)
            self._kept_from = self._number
            if not self._kept or self._kept.startswith("#"):
                self._kept = ""
                return
        if self._delimiter is None and self._kept[0] in "[{":
            yield from self._json()
        elif self._delimiter is not None or not self._is_quoted_id():
            yield from self._row()
        else:
            yield from self._take(self._kept[1:-1])

    def _is_quoted_id(self) -> bool:
        text = self._kept
        return len(text) > 2 and text[0] == text[-1] == '"' and text.count('"') == 2

    def _json(self) -> Iterator[_Item]:
        try:
            value = json.loads(self._kept)
        except RecursionError:
            yield from self._refuse("not JSON that can be read")
        except ValueError as error:
            is_cut = isinstance(error, json.JSONDecodeError) and error.pos >= len(
                self._kept.rstrip()
            )
            if not is_cut or len(self._kept) > _MAX_DOCUMENT:
                yield from self._refuse(f"not JSON: {error}")
        else:
            yield from self._values(value)

    def _values(self, value: object) -> Iterator[_Item]:
        """Yield the ids of a JSON value."""
        self._kept, self._is_first = "", False
        values = cast("list[object]", value) if isinstance(value, list) else [value]
        for one in values:
            if _has_no_task(one):
                continue
            try:
                yield check_task_id(_id_in(one))
            except ConfigurationError as error:
                yield self._problem(str(error))

    def _row(self) -> Iterator[_Item]:
        """Yield the id of a line of text, which is a CSV row if the first line was a header."""
        if self._delimiter is None:
            separators = _DELIMITERS.findall(self._kept)
            if self._is_first and (separators or _is_id_column(self._kept)):
                yield from self._header(separators[0] if separators else ",")
            elif separators:
                yield from self._refuse(
                    "several columns: give the first line their names, one of them taskId"
                )
            else:
                yield from self._take(self._kept)
        elif self._kept.count('"') % 2 == 0:  # otherwise a quoted cell goes on in the next line
            (cells,) = csv.reader([self._kept], delimiter=self._delimiter)
            yield from self._take(cells[self._column] if self._column < len(cells) else "")

    def _header(self, delimiter: str) -> Iterator[_Item]:
        (names,) = csv.reader([self._kept], delimiter=delimiter)
        columns = [number for number, name in enumerate(names) if _is_id_column(name)]
        if not columns:
            yield from self._refuse(
                "several columns, and none of them is called taskId: name the columns in this line"
            )
            return
        self._delimiter, self._column = delimiter, columns[0]
        self._kept, self._is_first = "", False

    def _take(self, text: str) -> Iterator[_Item]:
        self._kept, self._is_first = "", False
        try:
            yield check_task_id(text.strip())
        except ConfigurationError as error:
            yield self._problem(str(error))

    def _refuse(self, reason: str) -> Iterator[_Item]:
        """Yield a problem of the first line kept, and read the others by themselves."""
        _, *others = self._kept.split("\n")
        self._kept, self._is_first = "", False
        yield self._problem(reason)
        self._number -= len(others)
        for line in others:
            self._number += 1
            yield from self._line(line)

    def _problem(self, reason: str) -> Problem:
        return Problem(f"{self._name}, line {self._kept_from}", reason)


def _is_id_column(name: str) -> bool:
    return "".join(c for c in name.casefold() if c.isalnum()) in _ID_COLUMNS


def _has_no_task(value: Any) -> bool:
    """Return True for the command's own line about a request that has no task."""
    if not isinstance(value, dict):
        return False
    fields = cast("dict[str, Any]", value)
    return "key" in fields and fields.get("taskId", "") is None


def _id_in(value: object) -> object:
    """Return the id in a JSON value: a string, a result's or an answer's ``taskId``."""
    if not isinstance(value, dict):
        return value
    fields = cast("dict[str, Any]", value)
    data = fields.get("data")
    inner = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    found: object = fields.get("taskId", inner.get("taskId"))
    if found is None:
        raise ConfigurationError("a JSON object without taskId")
    return found


class _Decoder:
    """Text from bytes that come in pieces, in UTF-8, or in UTF-16 with a byte order mark."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin = b""
        self._decoder: codecs.IncrementalDecoder | None = None

    def decode(self, data: bytes, *, final: bool = False) -> str:
        if self._decoder is None:
            self._begin += data
            if len(self._begin) < len(codecs.BOM_UTF16) and not final:
                return ""
            is_utf16 = self._begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            self._decoder = codecs.getincrementaldecoder("utf-16" if is_utf16 else "utf-8-sig")()
            data, self._begin = self._begin, b""
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError:
            fail(f"cannot read {self._name}: it is not text in UTF-8")
        if "\0" in text:
            fail(f"cannot read {self._name}: it is not text in UTF-8, or UTF-16 with its mark")
        return text


def distinct_ids(given: Iterable[str], source: str | None) -> list[str]:
    """Return each id once, in order; exit if there is none, or if one is not a valid id."""
    items: list[_Item] = []
    for number, text in enumerate(given, 1):
        items += _argument(number, text)
    if source is not None:
        decoder, parser = _Decoder(source), IdParser(source)
        items += parser.feed(decoder.decode(_read(Path(source)), final=True), final=True)
    fail_on([str(item) for item in items if isinstance(item, Problem)])
    if not items:
        fail(
            f"no task ids in {source}"
            if source is not None
            else "no task ids: give them as arguments, or in a file with --from"
        )
    return list(dict.fromkeys(item for item in items if isinstance(item, str)))


def fail_on(problems: Sequence[str]) -> None:
    """Exit if there are problems with the input; name the first of them."""
    if problems:
        shown = list(problems[:_MAX_PROBLEMS_SHOWN])
        if more := len(problems) - len(shown):
            shown.append(f"and {more} more")
        fail("\n".join(shown))


def read_lines(source: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of a file, or of standard input, that are not blank or comments.

    Each comes with its place.
    """
    name = "standard input" if source == "-" else source
    data = sys.stdin.buffer.read() if source == "-" else _read(Path(source))
    for number, line in enumerate(_Decoder(name).decode(data, final=True).split("\n"), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield f"{name}, line {number}", text


def _argument(number: int, text: str) -> Iterator[_Item]:
    for item in IdParser("").feed(text, final=True):
        yield item if isinstance(item, str) else Problem(f"argument {number}", item.reason)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")


async def ids_from_stdin() -> AsyncGenerator[list[_Item]]:
    """Yield ids and problems from standard input while it is still being written."""
    name = "standard input"
    decoder, parser = _Decoder(name), IdParser(name)
    while data := await _next_chunk():
        if items := list(parser.feed(decoder.decode(data))):
            yield items
    if items := list(parser.feed(decoder.decode(b"", final=True), final=True)):
        yield items


async def _next_chunk() -> bytes:
    """Read in a thread that may be left behind: nothing can interrupt it while nobody writes."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[bytes] = loop.create_future()

    def deliver(data: bytes | OSError) -> None:
        if answer.cancelled():
            return
        if isinstance(data, OSError):
            answer.set_exception(data)
        else:
            answer.set_result(data)

    def read() -> None:
        stream: Any = sys.stdin.buffer
        data: bytes | OSError
        try:
            # Without the buffer's lock, which the interpreter wants when it exits.
            data = getattr(stream, "raw", stream).read(_CHUNK) or b""
        except OSError as error:
            data = error
        try:
            loop.call_soon_threadsafe(deliver, data)
        except RuntimeError:  # the loop is closed
            return

    threading.Thread(target=read, name="kontext-stdin", daemon=True).start()
    try:
        return await answer
    except OSError as error:
        fail(f"cannot read standard input: {error.strerror}")


def read_key(path: Path | None) -> str:
    """Return the API key, from the file or from the environment."""
    if path is not None:
        return _Decoder(str(path)).decode(_read(path), final=True)
    return os.environ.get("APIKLEY_API_KEY") or fail(
        "no API key: set APIKLEY_API_KEY, or name a file that holds it with --api-key-file\n"
        "To try it without a key: kontext demo, or kontext simulate for an API on this machine"
    )
