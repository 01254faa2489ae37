"""What the simulator remembers of the requests it was sent."""

from __future__ import annotations

import attrs

__all__ = ["LoggedRequest"]


@attrs.define
class LoggedRequest:
    """One request and what it was answered. Of a key it holds no more than whether it came.

    ``time`` is in seconds since the simulator's start. ``task_id`` is None where the request
    named none. ``status`` is the HTTP status, 0 where no HTTP answer was sent; ``code`` the
    envelope's code, None where the answer was no envelope.
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
