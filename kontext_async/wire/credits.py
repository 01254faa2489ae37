"""The request for the account's balance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from kontext_async.wire.envelope import read_answer
from kontext_async.wire.redaction import ApiKey

__all__ = ["CREDITS", "read_credits"]

CREDITS: Final = "/api/v1/chat/credit"
"""The path that answers with the account's balance."""


def read_credits(
    status: int, headers: Mapping[str, str], body: bytes, *, api_key: ApiKey, now: float
) -> float:
    """Return the balance in an answer, or raise the error it amounts to.

    Raises `ApiError` and its subclasses, `ResponseFormatError`, and `TransportError` for a
    redirect.
    """
    answer = read_answer(status, headers, body, task_id=None, api_key=api_key, now=now)
    if answer.code != 200:
        raise answer.refusal()
    balance = answer.data
    if type(balance) not in (int, float) or not -math.inf < balance < math.inf:
        raise answer.unreadable("data: expected a number of credits")
    return float(balance)
