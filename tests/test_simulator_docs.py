"""The simulator's page agrees with the simulator."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from kontext_async.simulator import (
    CREATION_STEPS,
    FAULTS,
    IMAGE_STEPS,
    STEPS,
    Simulator,
    StepRequest,
)
from kontext_async.simulator.clock import Clock
from kontext_async.simulator.replies import Reply
from kontext_async.simulator.tasks import Task

PAGE = (Path(__file__).parent.parent / "docs" / "simulator.md").read_text(encoding="utf-8")
_, RECORDS, CREATIONS, IMAGES = re.split(r"\(steps-[a-z-]+\)=", PAGE)
ROW = re.compile(r"^\| `(\w+)`( ⏹)?( ✱)? \|", re.MULTILINE)


def rows(text):
    return {name: (bool(ends), bool(fault)) for name, ends, fault in ROW.findall(text)}


def test_every_step_has_its_row():
    assert list(rows(RECORDS)) == list(dict.fromkeys(rows(RECORDS)))
    assert set(rows(RECORDS)) == set(STEPS)


def test_the_faults_are_marked():
    assert {name for name, (_, fault) in rows(RECORDS).items() if fault} == set(FAULTS)


@pytest.mark.parametrize("name", STEPS)
def test_the_steps_that_end_a_task_are_marked(name):
    task = Task("t", 0.0, None, None, "{}", "png")
    STEPS[name](StepRequest(task, 5.0, Clock(), "http://x", "http://x/", Reply))
    assert task.has_ended(5.0) is rows(RECORDS)[name][0]


def test_every_image_step_has_its_row_in_one_of_the_tables():
    own = set(rows(IMAGES))
    assert own <= set(IMAGE_STEPS)
    assert set(IMAGE_STEPS) - own <= set(rows(RECORDS))


def test_every_step_of_a_request_to_generate_has_its_row():
    assert set(rows(CREATIONS)) == set(CREATION_STEPS) - set(STEPS)


def test_every_parameter_has_its_row_with_its_default():
    shown = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", PAGE, re.MULTILINE))
    parameters = inspect.signature(Simulator).parameters
    assert list(shown) == list(parameters)
    named = {"durations": "lognormal(12.0, 0.3)", "faults": "FAULTS", "log_limit": "10_000"}
    defaults = {name: repr(parameter.default) for name, parameter in parameters.items()}
    assert shown == defaults | named
    assert parameters["log_limit"].default == int(named["log_limit"])
    assert parameters["faults"].default is FAULTS
