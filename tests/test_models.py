"""The records and completed tasks that a client returns."""

from __future__ import annotations

import copy
import pickle
from datetime import UTC, datetime, timedelta, timezone

import attrs
import pytest

from kontext_async.models import CompletedTask, TaskRecord, TaskStatus

CREATED = datetime(2024, 3, 20, 10, 25, 0, tzinfo=UTC)
COMPLETED = datetime(2024, 3, 20, 10, 25, 14, tzinfo=UTC)
PARAMS = '{"prompt": "a lighthouse in a storm", "aspectRatio": "16:9"}'


def record(**fields):
    return TaskRecord(**{"task_id": "task1", "status": TaskStatus.GENERATING, **fields})


def completed(**fields):
    return CompletedTask(
        **{"task_id": "task1", "result_image_url": "https://x/r.png", **fields},
    )


FULL = [
    record(
        status=TaskStatus.GENERATE_FAILED,
        param_json=PARAMS,
        create_time=CREATED,
        complete_time=COMPLETED,
        origin_image_url="https://x/o.png",
        result_image_url="https://x/r.png",
        error_code=400,
        error_message="flagged",
    ),
    completed(
        param_json=PARAMS,
        create_time=CREATED,
        complete_time=COMPLETED,
        origin_image_url="https://x/o.png",
    ),
]


@pytest.mark.parametrize("task", FULL, ids=lambda task: type(task).__name__)
class TestEveryModel:
    def test_it_pickles_and_copies(self, task):
        assert pickle.loads(pickle.dumps(task)) == task
        assert copy.deepcopy(task) == task
        assert hash(copy.copy(task)) == hash(task)

    def test_its_fields_cannot_be_set(self, task):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            task.task_id = "task2"
        with pytest.raises(AttributeError):
            task.progress = 0.5

    def test_its_repr_keeps_the_prompt_private(self, task):
        for shown in (repr(task), str(task), f"{task}"):
            assert "task1" in shown
            assert "https://x/r.png" in shown
            assert "lighthouse" not in shown
            assert "param" not in shown

    def test_its_duration_is_the_services_own(self, task):
        assert task.duration == timedelta(seconds=14)

    def test_its_parameters_are_parsed(self, task):
        assert task.params == {"prompt": "a lighthouse in a storm", "aspectRatio": "16:9"}


def test_a_completed_task_has_all_of_its_record():
    done = CompletedTask.of(attrs.evolve(FULL[0], status=TaskStatus.SUCCESS))
    assert done == FULL[1]


def test_a_record_without_a_result_cannot_be_completed():
    with pytest.raises(ValueError, match="no result_image_url"):
        CompletedTask.of(record(status=TaskStatus.SUCCESS))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (TaskRecord, {"task_id": "task1", "status": TaskStatus.SUCCESS}),
        (CompletedTask, {"task_id": "task1", "result_image_url": "https://x/r.png"}),
    ],
)
def test_models_take_keywords_only(kind, fields):
    for name, value in fields.items():
        others = {n: v for n, v in fields.items() if n != name}
        with pytest.raises(TypeError):
            kind(value, **others)


@pytest.mark.parametrize(
    ("flag", "name", "phase"),
    [
        (0, "GENERATING", "generating"),
        (1, "SUCCESS", "ready"),
        (2, "CREATE_TASK_FAILED", "failed"),
        (3, "GENERATE_FAILED", "failed"),
    ],
)
def test_the_status_table_is_the_providers(flag, name, phase):
    status = TaskStatus(flag)
    assert (status, status.name, status.phase) == (flag, name, phase)
    assert status.meaning.endswith(".")
    assert pickle.loads(pickle.dumps(status)) is copy.deepcopy(status) is status


def test_there_are_four_statuses():
    assert [int(status) for status in TaskStatus] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="4 is not a valid TaskStatus"):
        TaskStatus(4)


@pytest.mark.parametrize(
    "param_json",
    [None, "", "no JSON", '{"prompt": "cut', "[1]", '"text"', "null", "1", "[" * 100_000],
    ids=lambda text: repr(text)[:20],
)
def test_parameters_that_are_not_a_json_object_are_empty(param_json):
    assert record(param_json=param_json).params == {}


def test_parameters_keep_every_kind_of_value():
    text = '{"a": [1, 2.5, true, null, {"b": "\u00e9\\u00e9\\ud83d\\ude00"}]}'
    assert record(param_json=text).params == {"a": [1, 2.5, True, None, {"b": "éé😀"}]}


def test_half_a_character_in_the_parameters_becomes_a_question_mark():
    assert record(param_json='{"a\\udc00": "\\ud83d"}').params == {"a?": "?"}
    assert record(param_json='{"a": "\ud83d"}').params == {"a": "?"}


@pytest.mark.parametrize("times", [{}, {"create_time": CREATED}, {"complete_time": COMPLETED}])
def test_a_duration_needs_both_times(times):
    assert record(**times).duration is None


def test_a_task_that_ends_before_it_begins_has_no_duration():
    assert record(create_time=COMPLETED, complete_time=CREATED).duration is None
    assert record(create_time=CREATED, complete_time=CREATED).duration == timedelta(0)


def test_a_duration_takes_zones_into_account():
    east = timezone(timedelta(hours=8))
    task = record(create_time=CREATED.astimezone(east), complete_time=COMPLETED)
    assert task.duration == timedelta(seconds=14)


def test_files_expire_after_14_days_and_10_minutes():
    task = completed(complete_time=COMPLETED)
    assert task.expires_at == datetime(2024, 4, 3, 10, 25, 14, tzinfo=UTC)
    assert task.origin_expires_at == datetime(2024, 3, 20, 10, 35, 14, tzinfo=UTC)


def test_without_a_completion_time_the_expiry_is_unknown():
    assert completed().expires_at is None
    assert completed().origin_expires_at is None
