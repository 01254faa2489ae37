"""The tasks that a simulator knows, and the random numbers that shape them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from kontext_async.simulator.images import IMAGE_STEPS, image_type
from kontext_async.simulator.steps import StepLike, as_script
from kontext_async.simulator.tasks import DOCUMENTED_FAILURES, Durations, Failure, Step, Task

__all__ = ["KeyedRandom", "Outcome", "TaskStore"]

# How a task ends; None: drawn.
Outcome: TypeAlias = Literal["success", "failure"] | Failure | None

_PARAM_JSON = json.dumps(
    {"prompt": "A lighthouse at dusk", "aspectRatio": "16:9", "outputFormat": "png"}
)


class KeyedRandom:
    """Random numbers that depend on a seed and a key, and not on the order of requests."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._random = random.Random()  # noqa: S311  # not for secrets

    def seeded(self, key: str) -> random.Random:
        """Return the generator for a key, valid until the next call."""
        self._random.seed(f"{self._seed}/{key}")
        return self._random

    def step(self, key: str, rate: float, steps: Sequence[Step]) -> Step | None:
        """Choose one of ``steps`` with the probability ``rate`` (0 to 1); otherwise None."""
        if not rate or not steps:
            return None
        draw = self.seeded(key)
        return draw.choice(steps) if draw.random() < rate else None


class TaskStore:
    """All tasks by id. What is not given for a task is drawn."""

    def __init__(self, *, durations: Durations, failure_rate: float, seed: int) -> None:
        self._durations = durations
        self._failure_rate = failure_rate
        self._random = KeyedRandom(seed)
        self._ids = random.Random(seed)  # noqa: S311  # not for secrets
        self._tasks: dict[str, Task] = {}

    def get(self, task_id: str) -> Task | None:
        """Return the task with that id; None for an unknown one."""
        return self._tasks.get(task_id)

    def __getitem__(self, task_id: str) -> Task:
        return self._tasks[task_id]

    def new_id(self) -> str:
        """Return an id like the API's."""
        return f"fluxkontext_{self._ids.getrandbits(128):032x}"

    def add(self, task: Task) -> Task:
        """Add a task; ValueError where its id is in use."""
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
        """Make a task, drawing what is not given, without adding it."""
        task = self._drawn(task_id, created)
        if duration is not None or script:
            task.duration = duration
        if outcome is not None:
            task.failure = self._failure(task_id, outcome)
        if params is not None:
            task.param_json = json.dumps(params)
            task.image_type = image_type(params.get("outputFormat") or "jpeg")
        if script:
            task.script = as_script(script)
        if image_script:
            task.image_script = as_script(image_script, IMAGE_STEPS)
        return task

    def _drawn(self, task_id: str, created: float) -> Task:
        draw = self._random.seeded(task_id)
        fails = draw.random() < self._failure_rate
        failure = draw.choice(DOCUMENTED_FAILURES) if fails else None
        duration = self._durations(draw) if callable(self._durations) else self._durations
        return Task(task_id, created, duration, failure, _PARAM_JSON, "png")

    def _failure(self, task_id: str, outcome: Outcome) -> Failure | None:
        if outcome == "failure":
            return self._random.seeded(task_id).choice(DOCUMENTED_FAILURES)
        return outcome if isinstance(outcome, Failure) else None
