"""Tasks from plain data in files of our own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from cattrs import ClassValidationError

from kontext_async.models import TaskRecord, TaskStatus
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
FIELDS = {
    "task_id": "5",
    "status": 3,
    "param_json": "{}",
    "create_time": "2024-03-20T10:25:00.000250+08:00",
    "complete_time": "2024-03-20T10:25:00+00:00",
    "origin_image_url": "None",
    "result_image_url": None,
    "error_code": 400,
    "error_message": "flagged",
}


def test_a_record_has_its_times_from_text_and_its_status_from_a_number():
    assert converter.structure(FIELDS, TaskRecord) == RECORD


def test_a_record_needs_its_id_and_its_status():
    record = TaskRecord(task_id="a", status=TaskStatus.GENERATING)
    assert converter.structure({"task_id": "a", "status": 0}, TaskRecord) == record


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
        converter.structure(FIELDS | change, TaskRecord)


def test_a_missing_field_is_refused():
    with pytest.raises(ClassValidationError):
        converter.structure({"task_id": "a"}, TaskRecord)
