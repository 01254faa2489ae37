"""Task ids as people have them: lines, tables, saved answers, and streams that go on."""

from __future__ import annotations

import codecs
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_async.cli.input import IdParser, Problem, distinct_ids

ANSWER = {"code": 200, "msg": "success", "data": {"taskId": "a"}}


def parsed(text, size=None):
    """Return ids, and the numbers and reasons of problems, read in pieces of a size."""
    parser = IdParser("file")
    pieces = [text] if size is None else [text[n : n + size] for n in range(0, len(text), size)]
    items = [item for piece in pieces for item in parser.feed(piece)]
    return [str(item) for item in (*items, *parser.feed("", final=True))]


@pytest.mark.parametrize("size", [None, 1, 7])
@pytest.mark.parametrize(
    "text",
    [
        "a\nb\n",
        "a\r\n\r\n# comment\r\n  b",
        '"a"\n"b"\n',
        '{"taskId": "a"}\n{"taskId": "b", "outcome": "success"}\n',
        json.dumps(ANSWER) + '\n{"data": {"taskId": "b"}, "code": 200}\n',
        json.dumps(ANSWER, indent=2) + "\nb\n",
        '["a", "b"]\n',
        '["a",\n "b"]\n',
        json.dumps([ANSWER, {"taskId": "b"}], indent=4),
        "taskId\na\nb\n",
        "Task ID\na\nb\n",
        "prompt,task_id\nfox,a\ncat,b\n",
        'id;prompt\na;"fox; red"\n"b";cat\n',
        "n\ttask-id\n1\ta\n2\tb\n",
        'task_id,prompt\na,"two\nlines, and a ""quote"""\nb,x\n',
        "task_id,prompt\n\na,x\n# note,y\nb,z\n",
    ],
)
def test_ids_are_read_from_what_people_have(text, size):
    """Lines, quoted cells, tables with a header, results, saved answers and arrays."""
    assert parsed(text, size) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("a,b\nc\n", ["line 1: several columns, and none of them is called taskId", "c"]),
        ("a\nb,c\n", ["a", "line 2: several columns: give the first line their names"]),
        ("a\nb\tc\n", ["a", "line 2: several columns"]),
        ("task_id,n\n,1\nb,2\n", ["line 2: a task id must not be blank", "b"]),
        ("n,task_id\n1\nb,b\n", ["line 2: a task id must not be blank", "b"]),
        ('task_id,n\na,"open\nb,2\n', ["line 2: it is cut off", "b"]),
        ("[1, null]\n", ["line 1: a task id must be a str, not int", "line 1: "]),
        ('{"data": []}\n', ["line 1: a JSON object without taskId"]),
        ('{"taskId": "a"\n{"taskId": "b"}\n', ["line 1: not JSON", "b"]),
        ('["a",\n', ["line 1: it is cut off"]),
        ("[" * 100_000, ["line 1: not JSON that can be read"]),
    ],
)
def test_what_is_not_an_id_is_named_by_its_line(text, problems):
    """It is never sent as an id, and the lines after it are read."""
    found = parsed(text)
    assert len(found) == len(problems)
    for item, expected in zip(found, problems, strict=True):
        assert item.removeprefix("file, ").startswith(expected)


@given(st.text(alphabet='ab,;"\t\n[]{}:# '), st.integers(1, 5))
def test_pieces_make_no_difference(text, size):
    """However a stream is cut, it gives the same ids and problems."""
    assert parsed(text, size) == parsed(text)


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
    ],
)
def test_files_of_windows_are_read(encoding, mark, tmp_path):
    """Notepad and PowerShell write a byte order mark, or UTF-16 with one."""
    file = tmp_path / "ids.txt"
    file.write_bytes(mark + "a\r\nb\r\n".encode(encoding))
    assert distinct_ids([], str(file)) == ["a", "b"]


def test_a_problem_has_its_place():
    """It reads as a message."""
    assert str(Problem("ids.txt, line 2", "no")) == "ids.txt, line 2: no"
