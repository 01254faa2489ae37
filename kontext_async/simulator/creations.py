"""The steps of a script for the requests that create tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from kontext_async.simulator import replies
from kontext_async.simulator.replies import Delivery, Reply, envelope, http, refused
from kontext_async.simulator.steps import STEPS
from kontext_async.simulator.tasks import Step, StepRequest

__all__ = ["CREATION_STEPS", "LOST_ANSWERS"]


def _made(reply: Reply) -> Step:
    """Create the task, and reply with something else."""

    def step(request: StepRequest) -> Reply:
        request.default_reply()
        return reply

    return step


def _cut(*, after_id: bool) -> Step:
    """Create the task, and close the connection just before or just after its id."""

    def step(request: StepRequest) -> Reply:
        reply = request.default_reply()
        before, task_id, _ = reply.body.partition(f'"{request.task.task_id}"'.encode())
        body = before + task_id if after_id else before

        async def deliver(connection: replies.Connection, whole: Reply) -> bool:
            await connection.send(connection.head(whole, f"Content-Length: {len(reply.body)}"))
            await connection.send(whole.body)
            return False

        return attrs.evolve(reply, body=body, delivery=deliver)

    return step


def _unanswered(delivery: Delivery) -> Step:
    return _made(Reply(status=0, delivery=delivery))


# The task is created, and its id does not arrive.
_LOST: Mapping[str, Step] = {
    "made_reset": _unanswered(replies.reset),
    "made_closed": _unanswered(replies.close),
    "made_stall": _unanswered(replies.stall),
    "made_http_502": _made(http(502)),
    "made_code_500": _made(refused(500)),
    "made_truncated": _cut(after_id=False),
    "made_no_id": _made(envelope(None)),
}

CREATION_STEPS: Mapping[str, Step] = {
    **STEPS,
    **_LOST,
    "made_truncated_after_id": _cut(after_id=True),
}

# A stall would take as long as a client waits.
LOST_ANSWERS: Sequence[str] = tuple(name for name in _LOST if name != "made_stall")
