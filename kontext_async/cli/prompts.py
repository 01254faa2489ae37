"""Prompts as the command takes them: arguments and lines, all checked before anything is paid."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from kontext_async.cli.input import fail_on, read_lines
from kontext_async.cli.output import fail
from kontext_async.errors import ConfigurationError
from kontext_async.results import KeyedRequest, Ledger
from kontext_async.wire import ImageRequest


def read_requests(
    prompts: Iterable[str], source: str | None, defaults: Mapping[str, Any]
) -> list[KeyedRequest]:
    """Return the requests of all prompts; exit if there is none, or if one cannot be sent.

    A line is a prompt, or a JSON object with the API's field names and perhaps ``key``.
    ``defaults`` are the fields of all that do not have them.
    """
    problems: list[str] = []
    found: list[KeyedRequest] = []
    arguments = [(f"argument {number}", text) for number, text in enumerate(prompts, 1)]
    for place, text in (*arguments, *(read_lines(source) if source is not None else ())):
        try:
            found.append(_parse(text, defaults))
            Ledger.keys_of(found[-1:])
        except ConfigurationError as error:
            problems.append(f"{place}: {error}")
    fail_on(problems)
    if not found:
        place = "standard input" if source == "-" else source
        fail(
            f"no prompts in {place}"
            if place is not None
            else "no prompts: give them as arguments, or in a file with --from"
        )
    return found


def _parse(text: str, defaults: Mapping[str, Any]) -> KeyedRequest:
    fields: dict[str, Any] = {"prompt": text}
    if text.startswith("{"):
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError("not a JSON object") from error
    key = fields.pop("key", None)
    request = ImageRequest.from_json({**defaults, **fields})
    return request if key is None else (key, request)
