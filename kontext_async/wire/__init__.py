"""The API's HTTP contract as pure functions: requests to send, and answers to read."""

from kontext_async.wire.creations import (
    CREATION_POLICY,
    GENERATE,
    LOST,
    NOT_SENT,
    UNTRUSTED,
    Action,
    Creation,
    CreationRule,
    ImageRequest,
    Verdict,
    read_creation,
    rule_of,
)
from kontext_async.wire.credits import CREDITS, read_credits
from kontext_async.wire.envelope import MAX_BODY, retry_after
from kontext_async.wire.records import (
    RECORD_INFO,
    check_task_id,
    decode,
    foreign_task_id,
    server_age,
)
from kontext_async.wire.redaction import ApiKey

__all__ = [
    "CREATION_POLICY",
    "CREDITS",
    "GENERATE",
    "LOST",
    "MAX_BODY",
    "NOT_SENT",
    "RECORD_INFO",
    "UNTRUSTED",
    "Action",
    "ApiKey",
    "Creation",
    "CreationRule",
    "ImageRequest",
    "Verdict",
    "check_task_id",
    "decode",
    "foreign_task_id",
    "read_creation",
    "read_credits",
    "retry_after",
    "rule_of",
    "server_age",
]
