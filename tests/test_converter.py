"""Tasks as plain data for files of our own."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from cattrs import ClassValidationError

from kontext_async.models import CompletedTask, TaskRecord, TaskStatus
from kontext_async.results.ledger.converter import converter

CREATED = datetime(2024, 3, 20, 10, 25, 0, 250, tzinfo=timezone(timedelta(hours=8)))
RECORD = TaskRecord(
    task_id="5",
    status=TaskStatus.GENERATE_FAILED,
    param_json="{}",
    create_time=CREATED,
    complete_time=datetime(2024, 3, 20, 10, 25, tzinfo=UTC),
    origin_image_url="None",
    error_code=400,
    error_message="flagged",
)


@pytest.mark.parametrize(
    "task",
    [
        RECORD,
        TaskRecord(task_id="a", status=TaskStatus.GENERATING),
        CompletedTask(task_id="a", result_image_url="https://x/r.png", create_time=CREATED),
    ],
)
def test_a_task_survives_json(task):
    text = json.dumps(converter.unstructure(task))
    assert converter.structure(json.loads(text), type(task)) == task


def test_plain_data_has_times_as_text_and_the_status_as_its_number():
    fields = converter.unstructure(RECORD)
    assert fields["create_time"] == "2024-03-20T10:25:00.000250+08:00"
    assert type(fields["status"]) is int
    assert fields["status"] == 3
    assert fields["result_image_url"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"task_id": 5},
        {"task_id": None},
        {"status": 7},
        {"status": "3"},
        {"status": True},
        {"status": 1.0},
        {"status": None},
        {"param_json": {}},
        {"create_time": 5},
        {"create_time": "yesterday"},
        {"origin_image_url": 5},
        {"result_image_url": []},
        {"error_code": "5"},
        {"error_code": True},
        {"error_code": 5.0},
        {"error_message": None},
        {"colour": "red"},
    ],
)
def test_what_the_library_did_not_write_is_refused(change):
    with pytest.raises(ClassValidationError):
        converter.structure(converter.unstructure(RECORD) | change, TaskRecord)


def test_a_missing_field_is_refused():
    with pytest.raises(ClassValidationError):
        converter.structure({"task_id": "a"}, TaskRecord)
