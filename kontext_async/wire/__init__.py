"""The API's HTTP contract as pure functions: requests to send, and answers to read."""

from kontext_async.wire.envelope import MAX_BODY, retry_after
from kontext_async.wire.records import RECORD_INFO, check_task_id, decode, server_age

__all__ = ["MAX_BODY", "RECORD_INFO", "check_task_id", "decode", "retry_after", "server_age"]
