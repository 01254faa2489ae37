"""The tasks a simulator knows, and the chance that shapes them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from kontext_async.simulator.images import IMAGE_STEPS, image_type
from kontext_async.simulator.steps import StepLike, as_script
from kontext_async.simulator.tasks import DRAWN_FAILURES, Durations, Failure, Step, Task

__all__ = ["Chance", "Outcome", "TaskStore"]

# How a task ends; None: as it is drawn.
Outcome: TypeAlias = Literal["success", "failure"] | Failure | None

_PARAM_JSON = json.dumps(
    {"prompt": "A lighthouse at dusk", "aspectRatio": "16:9", "outputFormat": "png"}
)


class Chance:
    """Random numbers that depend on a seed and a name alone, not on the order of requests."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._random = random.Random()  # noqa: S311  # not for secrets

    def of(self, name: str) -> random.Random:
        """The numbers that belong to a name, good until the next call."""
        self._random.seed(f"{self._seed}/{name}")
        return self._random

    def step(self, name: str, rate: float, steps: Sequence[Step]) -> Step | None:
        """One of ``steps``, at ``rate`` (0 to 1)."""
        if not rate or not steps:
            return None
        draw = self.of(name)
        return draw.choice(steps) if draw.random() < rate else None


class TaskStore:
    """All tasks by id; what a task is not told, it draws."""

    def __init__(self, *, durations: Durations, failure_rate: float, seed: int) -> None:
        self._durations = durations
        self._failure_rate = failure_rate
        self._chance = Chance(seed)
        self._ids = random.Random(seed)  # noqa: S311  # names, not secrets
        self._tasks: dict[str, Task] = {}

    def get(self, task_id: str) -> Task | None:
        """The task of that id, where there is one."""
        return self._tasks.get(task_id)

    def __getitem__(self, task_id: str) -> Task:
        return self._tasks[task_id]

    def new_id(self) -> str:
        """An id like the API's."""
        return f"{self._ids.getrandbits(128):032x}"

    def keep(self, task: Task) -> Task:
        """Add a task; ValueError where its id is taken."""
        if self._tasks.setdefault(task.task_id, task) is not task:
            raise ValueError(f"there is a task {task.task_id!r} already")
        return task

    def make(
        self,
        task_id: str,
        created: float,
        *,
        duration: float | None = None,
        outcome: Outcome = None,
        params: Mapping[str, Any] | None = None,
        script: Iterable[StepLike] = (),
        image_script: Iterable[StepLike] = (),
    ) -> Task:
        """A task as it is described, the rest drawn; not yet added."""
        task = self._drawn(task_id, created)
        if duration is not None or script:
            task.duration = duration
        if outcome is not None:
            task.failure = self._failure(task_id, outcome)
        if params is not None:
            task.param_json = json.dumps(params)
            task.image_type = image_type(params.get("outputFormat", "jpeg"))
        if script:
            task.script = as_script(script)
        if image_script:
            task.image_script = as_script(image_script, IMAGE_STEPS)
        return task

    def _drawn(self, task_id: str, created: float) -> Task:
        draw = self._chance.of(task_id)
        fails = draw.random() < self._failure_rate
        failure = draw.choice(DRAWN_FAILURES) if fails else None
        duration = self._durations(draw) if callable(self._durations) else self._durations
        return Task(task_id, created, duration, failure, _PARAM_JSON, "png")

    def _failure(self, task_id: str, outcome: Outcome) -> Failure | None:
        if outcome == "failure":
            return self._chance.of(task_id).choice(DRAWN_FAILURES)
        return outcome if isinstance(outcome, Failure) else None
