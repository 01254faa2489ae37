"""Answers of the API from tests/samples, and what `wire.decode` makes of them."""

from __future__ import annotations

import html
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kontext_async import wire
from kontext_async.errors import KontextError
from kontext_async.models import TaskRecord
from kontext_async.wire import ApiKey

SAMPLES = Path(__file__).parent / "samples"
TASK = "task12345"
KEY = "sk-marker/0123456789abcdef"
PROMPT = "A lighthouse in a storm, oil on canvas"
ORIGIN = "https://files.example.com/origin/task12345.jpg"
RESULT = "https://files.example.com/result/task12345.jpg"
CREATED = datetime(2024, 3, 20, 10, 25, 0, tzinfo=UTC)
COMPLETED = datetime(2024, 3, 20, 10, 25, 14, tzinfo=UTC)
NOW = 1_710_930_330.0


def sample(name):
    return next(SAMPLES.glob(f"{name}.*")).read_bytes()


def success(**data):
    """Return a valid reply with some of its data replaced."""
    reply = json.loads(sample("success"))
    reply["data"].update(data)
    return reply


def decode(body, status=200, headers=None, *, task_id=TASK, api_key=KEY, now=NOW):
    api_key = ApiKey(api_key)
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return wire.decode(status, headers or {}, body, task_id=task_id, api_key=api_key, now=now)


def refusal(body, status=200, headers=None, kind=KontextError, **options):
    with pytest.raises(kind) as caught:
        decode(body, status, headers, **options)
    return caught.value


def outcome_of(body, status=200, headers=None, **options):
    """Return the record, or the error that came instead."""
    try:
        return decode(body, status, headers, **options)
    except KontextError as error:
        return error


def leaks(value, key):
    """Return True if the key is in anything a user can read, in any spelling a parser undoes."""
    if isinstance(value, TaskRecord):
        seen = [value.param_json, value.error_message, value.result_image_url]
        text = " ".join(map(str, [*seen, value.origin_image_url, value.params, value]))
    else:
        text = f"{value} {value!r} {value.args} {vars(value)}"
    for _ in range(3):
        if key in text:
            return True
        text = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)
        text = html.unescape(re.sub(r"\\+(.)", r"\1", text))
    return key in text
