"""Tasks, their records, and the requests about them that a script answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

import attrs

from kontext_async.models import TaskStatus
from kontext_async.simulator.clock import Clock
from kontext_async.simulator.replies import Reply, envelope

__all__ = [
    "DOCUMENTED_FAILURES",
    "UNFINISHED",
    "Durations",
    "Failure",
    "Step",
    "StepRequest",
    "Task",
    "lognormal",
    "record_of",
]


@attrs.frozen
class Failure:
    """A failure of a task: the record's ``errorCode``, ``errorMessage`` and ``successFlag``."""

    error_code: int = 501
    message: str = "The image could not be generated."
    status: Literal[TaskStatus.CREATE_TASK_FAILED, TaskStatus.GENERATE_FAILED] = (
        TaskStatus.GENERATE_FAILED
    )


DOCUMENTED_FAILURES = (
    Failure(400, "The prompt was flagged as violating the content policies."),
    Failure(500, "Internal error, please try again later."),
    Failure(501),
    Failure(500, "The task could not be created.", TaskStatus.CREATE_TASK_FAILED),
)

# Seconds that tasks take: one number for all, or a function that draws one for each.
Durations: TypeAlias = float | Callable[[random.Random], float]


def lognormal(median: float, sigma: float) -> Callable[[random.Random], float]:
    """Return a function that draws log-normal durations in seconds.

    About two thirds of them lie between ``median / e**sigma`` and ``median * e**sigma``.
    """
    return lambda draw: median * draw.lognormvariate(0.0, sigma)


# Exhausted, so all tasks can share it.
_NO_STEPS: Iterator[Step] = iter(())


@attrs.define(eq=False, weakref_slot=False)
class Task:
    """A task as the service knows it. Times are in seconds since the simulator's start.

    A task whose ``duration`` is None ends with the first poll after its script.
    """

    task_id: str
    created: float
    duration: float | None
    failure: Failure | None
    param_json: str
    image_type: Literal["png", "jpeg"]
    script: Iterator[Step] = _NO_STEPS
    image_script: Iterator[Step] = _NO_STEPS
    polls: int = 0
    downloads: int = 0

    def has_ended(self, now: float) -> bool:
        """Return True once the task has succeeded or failed."""
        return self.duration is not None and now >= self.created + self.duration

    def succeeded_at(self, now: float) -> float | None:
        """Return the time of the task's success; None while it runs and if it failed."""
        if self.duration is None or self.failure or not self.has_ended(now):
            return None
        return self.created + self.duration

    def end(self, now: float, failure: Failure | None) -> None:
        """Make the task a success or a failure, and end it now if it is still running."""
        if not self.has_ended(now):
            self.duration = now - self.created
        self.failure = failure


@attrs.frozen
class StepRequest:
    """A request about a task, as a step of a script sees it.

    - ``now``: seconds since the simulator's start.
    - ``url``: the full URL of the request.
    - ``default_reply()``: the reply that the step replaces.
    """

    task: Task
    now: float
    clock: Clock
    base_url: str
    url: str
    default_reply: Callable[[], Reply]

    def record(self) -> dict[str, Any]:
        """Return the task's record as it is now."""
        return record_of(self.task, self.now, self.clock, self.base_url)

    def record_reply(self, **fields: Any) -> Reply:
        """Reply with the task's record as it is now, some of its ``fields`` replaced."""
        return envelope({**self.record(), **fields})


# One step of a script: it makes the reply to one request.
Step: TypeAlias = Callable[[StepRequest], Reply]


# The fields of a record that stay so while the task runs.
UNFINISHED: Mapping[str, Any] = {
    "completeTime": None,
    "response": None,
    "successFlag": 0,
    "errorCode": None,
    "errorMessage": None,
}


def record_of(task: Task, now: float, clock: Clock, base_url: str) -> dict[str, Any]:
    """Return the record of a task, with the fields of the provider's page."""
    record: dict[str, Any] = {
        "taskId": task.task_id,
        "paramJson": task.param_json,
        **UNFINISHED,
        "createTime": clock.iso(task.created),
    }
    if task.duration is None or not task.has_ended(now):
        return record
    record["completeTime"] = clock.iso(task.created + task.duration)
    if task.failure:
        record["successFlag"] = int(task.failure.status)
        record["errorCode"] = task.failure.error_code
        record["errorMessage"] = task.failure.message
    else:
        record |= {"successFlag": 1, "response": _urls(task, base_url), "errorMessage": ""}
    return record


def _urls(task: Task, base_url: str) -> dict[str, str]:
    suffix = "jpg" if task.image_type == "jpeg" else "png"
    name = f"{quote(task.task_id, safe='')}.{suffix}"
    return {
        "originImageUrl": f"{base_url}/origins/{name}",
        "resultImageUrl": f"{base_url}/images/{name}",
    }
