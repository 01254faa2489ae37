"""Tasks, and the records the API gives of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

import attrs

from kontext_async.models import TaskStatus
from kontext_async.simulator.clock import Clock, iso_time
from kontext_async.simulator.replies import Reply, envelope

__all__ = [
    "Durations",
    "Failure",
    "Look",
    "Step",
    "Task",
    "image_urls",
    "lognormal",
    "record_of",
]


@attrs.frozen
class Failure:
    """How a task fails: the record's ``errorCode``, ``errorMessage`` and ``successFlag``."""

    error_code: int = 501
    message: str = "The image could not be generated."
    status: Literal[TaskStatus.CREATE_TASK_FAILED, TaskStatus.GENERATE_FAILED] = (
        TaskStatus.GENERATE_FAILED
    )


# The reasons the provider documents.
DRAWN_FAILURES = (
    Failure(400, "The prompt was flagged as violating the content policies."),
    Failure(500, "Internal error, please try again later."),
    Failure(501),
    Failure(500, "The task could not be created.", TaskStatus.CREATE_TASK_FAILED),
)

# Seconds a task takes: always as many, or drawn.
Durations: TypeAlias = float | Callable[[random.Random], float]


def lognormal(median: float, sigma: float) -> Callable[[random.Random], float]:
    """Durations around ``median`` seconds; two thirds lie within a factor of e to the ``sigma``."""
    return lambda draw: median * draw.lognormvariate(0.0, sigma)


# Exhausted, so that all can share it.
_NO_STEPS: Iterator[Step] = iter(())


@attrs.define(eq=False, weakref_slot=False)
class Task:
    """A task as the service knows it. Times are in seconds since the simulator's start.

    ``duration`` None means that the task ends with the first look its script leaves alone.
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
        """Whether the task is done or has failed."""
        return self.duration is not None and now >= self.created + self.duration

    def succeeded_at(self, now: float) -> float | None:
        """When the task was done; None where it is not, or has failed."""
        if self.duration is None or self.failure or not self.has_ended(now):
            return None
        return self.created + self.duration

    def end(self, now: float, failure: Failure | None) -> None:
        """End the task, now where it still runs, with an image or a failure."""
        if not self.has_ended(now):
            self.duration = now - self.created
        self.failure = failure


@attrs.frozen
class Look:
    """A request about a task, as a step of a script sees it.

    ``now`` is in seconds since the simulator's start, ``url`` the whole address asked for.
    ``plain()`` is what would be answered without the step.
    """

    task: Task
    now: float
    clock: Clock
    base_url: str
    url: str
    plain: Callable[[], Reply]

    def record(self) -> dict[str, Any]:
        """The task's record as it stands."""
        return record_of(self.task, self.now, self.clock, self.base_url)

    def answer(self, **fields: Any) -> Reply:
        """The task's record as it stands, with some of its fields replaced."""
        return envelope({**self.record(), **fields})


# One step of a script: it makes the answer to one look.
Step: TypeAlias = Callable[[Look], Reply]


def image_urls(task: Task, base_url: str) -> dict[str, str]:
    """The ``response`` of a task that has succeeded."""
    ending = "jpg" if task.image_type == "jpeg" else "png"
    name = f"{quote(task.task_id, safe='')}.{ending}"
    return {
        "originImageUrl": f"{base_url}/origins/{name}",
        "resultImageUrl": f"{base_url}/images/{name}",
    }


# What a record says while the task runs.
UNFINISHED: Mapping[str, Any] = {
    "completeTime": None,
    "response": None,
    "successFlag": 0,
    "errorCode": None,
    "errorMessage": None,
}


def record_of(task: Task, now: float, clock: Clock, base_url: str) -> dict[str, Any]:
    """The record of a task, field by field as on the provider's page."""
    record: dict[str, Any] = {
        "taskId": task.task_id,
        "paramJson": task.param_json,
        **UNFINISHED,
        "createTime": iso_time(clock.unix(task.created)),
    }
    if task.duration is not None and task.has_ended(now):
        record["completeTime"] = iso_time(clock.unix(task.created + task.duration))
        record |= _ending(task, base_url)
    return record


def _ending(task: Task, base_url: str) -> Mapping[str, Any]:
    if task.failure:
        return {
            "successFlag": int(task.failure.status),
            "errorCode": task.failure.error_code,
            "errorMessage": task.failure.message,
        }
    return {"successFlag": 1, "response": image_urls(task, base_url), "errorMessage": ""}
