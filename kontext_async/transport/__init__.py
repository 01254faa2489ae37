"""One client's requests over aiohttp."""

from __future__ import annotations

from kontext_async.transport.expiries import Deadline, Expiries
from kontext_async.transport.failures import (
    UNTRUSTED_SERVER,
    check_for_second_login,
    describe_failure,
    safe_cause,
)
from kontext_async.transport.polls import Transport
from kontext_async.transport.pooled import PooledRequests, are_requests_replaced, can_fetch
from kontext_async.transport.session import CONNECT_TIMEOUT, MAX_HEADER, request_headers

__all__ = [
    "CONNECT_TIMEOUT",
    "MAX_HEADER",
    "UNTRUSTED_SERVER",
    "Deadline",
    "Expiries",
    "PooledRequests",
    "Transport",
    "are_requests_replaced",
    "can_fetch",
    "check_for_second_login",
    "describe_failure",
    "request_headers",
    "safe_cause",
]
