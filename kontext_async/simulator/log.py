"""The simulator's log of the requests it received."""

from __future__ import annotations

import attrs

__all__ = ["LoggedRequest"]


@attrs.define
class LoggedRequest:
    """A request and the reply to it. The API key itself is not kept.

    - ``time``: seconds since the simulator's start.
    - ``task_id``: None where the request named no task.
    - ``status``: the HTTP status; 0 where no HTTP reply was sent.
    - ``code``: the envelope's code; None where the reply had no envelope.
    """

    time: float
    method: str
    path: str
    user_agent: str
    sent_authorization: bool
    key_accepted: bool
    task_id: str | None = None
    status: int = 0
    code: int | None = None
