"""Rows of a ledger: any outcome comes back equal, and an unreadable row is an error."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kontext_async import (
    ApiError,
    AuthenticationError,
    ClientStateError,
    CompletedTask,
    ErrorOutcome,
    GenerationFailedError,
    MaintenanceError,
    RateLimitedError,
    ResponseFormatError,
    ResultOutcome,
    ServerError,
    TaskNotFoundError,
    TaskRecord,
    TaskStatus,
    TransportError,
    WaitTimeoutError,
)
from kontext_async.results import DownloadError, LedgerError
from kontext_async.results.ledger.rows import entry_of, error_text, recalled, record_text, state_of

# Lone surrogates, NUL and control characters are among them.
TEXTS = st.text(st.characters(exclude_categories=()))
TIMES = st.none() | st.datetimes(
    min_value=datetime(1, 1, 2),  # noqa: DTZ001  # hypothesis wants it so
    max_value=datetime(9999, 12, 30),  # noqa: DTZ001
    timezones=st.integers(-23, 23).map(lambda hours: timezone(timedelta(hours=hours))),
)
HOSTILE = "\ud800 \udfff \0 \x1b[31m \U0001f98a '; DROP TABLE tasks; --"
LONG = 10**4000

TASK = {
    "task_id": TEXTS,
    "param_json": st.none() | TEXTS,
    "create_time": TIMES,
    "complete_time": TIMES,
    "origin_image_url": st.none() | TEXTS,
}
COMPLETED = st.builds(CompletedTask, **TASK, result_image_url=TEXTS)
CODES = st.none() | st.integers() | st.just(LONG)
RECORDS = st.builds(
    TaskRecord,
    **TASK,
    status=st.sampled_from(TaskStatus),
    result_image_url=st.none() | TEXTS,
    error_code=CODES,
    error_message=TEXTS,
)


def stored(*values):
    """Return the values as SQLite reads them back."""
    with closing(sqlite3.connect(":memory:")) as connection:
        return connection.execute(f"SELECT {', '.join('?' * len(values))}", values).fetchone()


def texts(outcome):
    return stored(record_text(outcome), error_text(outcome.error))


def entry(task_id="task", record=None, error=None, *, created=0.0, image=(None, None, None)):
    return entry_of((task_id, "state", 1, record, error, *image, created, 3.5))


# Outcomes and records


@given(COMPLETED)
@example(CompletedTask(task_id="a", param_json=HOSTILE, result_image_url=HOSTILE))
def test_an_outcome_with_a_result_comes_back_equal(task):
    """With any texts, and to the microsecond."""
    outcome = ResultOutcome(task_id=task.task_id, result=task)
    image, again = recalled((task.task_id, "done", *texts(outcome), None, None, None, None))
    assert (image, again) == (None, outcome)


@given(RECORDS, st.booleans(), CODES, TEXTS)
@example(TaskRecord(task_id="a", status=TaskStatus.GENERATING), False, LONG, HOSTILE)
def test_a_failed_generation_comes_back_equal(record, has_record, code, message):
    """With its record, or without one if the API gave none."""
    error = GenerationFailedError(
        task_id=record.task_id,
        status=TaskStatus.CREATE_TASK_FAILED,
        error_code=code,
        error_message=message,
        record=record if has_record else None,
    )
    outcome = ErrorOutcome(task_id=record.task_id, error=error)
    row = (record.task_id, "failed", *texts(outcome), None, None, None, None)
    image, again = recalled(row)
    assert image is None
    assert (again.task_id, again.result) == (record.task_id, None)
    assert again.error.__reduce__() == error.__reduce__()


@given(RECORDS)
def test_an_entry_has_the_last_record_of_a_wait_that_timed_out(record):
    """It shows the state of the task at the last good poll."""
    error = WaitTimeoutError(task_id=record.task_id, elapsed=1.0, polls=1, last_record=record)
    text, _ = texts(ErrorOutcome(task_id=record.task_id, error=error))
    assert entry(record.task_id, text).record == record


@pytest.mark.parametrize(
    "error",
    [
        WaitTimeoutError(task_id="task", elapsed=1.0, polls=0),
        GenerationFailedError(task_id="task", status=TaskStatus.GENERATE_FAILED),
        TransportError("reset"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_outcome_may_have_no_record(error):
    """Then the row has none."""
    assert record_text(ErrorOutcome(task_id="task", error=error)) is None


def test_an_image_is_recalled_with_its_outcome():
    """Its path, its checksum, its size and its kind."""
    outcome = ResultOutcome(
        task_id="a", result=CompletedTask(task_id="a", result_image_url="https://example.com/a")
    )
    image, _ = recalled(("a", "done", *texts(outcome), "a.png", "ab12", 7, "png"))
    assert image == ("a.png", "ab12", 7, "png")


# States


TIMED_OUT = WaitTimeoutError(task_id="task", elapsed=1.0, polls=3)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "done"),
        (GenerationFailedError(task_id="task", status=TaskStatus.GENERATE_FAILED), "failed"),
        (TIMED_OUT, "unfinished"),
        (ServerError("oops", code=500), "unfinished"),
        (TransportError("reset"), "unfinished"),
        (ResponseFormatError("no JSON"), "unfinished"),
        (RateLimitedError("slowly", code=429), "unfinished"),
        (MaintenanceError("later", code=455), "unfinished"),
        (ServerError("switched off", code=505), "error"),
        (AuthenticationError("who?", code=401), "error"),
        (TaskNotFoundError("which?", code=422), "error"),
        (ApiError("no credits", code=402), "error"),
        (TransportError("redirected", retryable=False), "error"),
    ],
    ids=repr,
)
def test_the_state_says_what_to_do_about_a_task(error, state):
    """A retryable error leaves it unfinished; another one is an error."""
    assert state_of(error) == state


# Errors


@pytest.mark.parametrize(
    ("error", "kind", "code", "message"),
    [
        (AuthenticationError("who?", code=401, task_id="t"), "AuthenticationError", 401, "who?"),
        (TransportError("reset", task_id="t"), "TransportError", None, "reset"),
        (DownloadError("gone", task_id="t", http_status=404), "DownloadError", None, "gone"),
        (ClientStateError(), "ClientStateError", None, ""),
        (TIMED_OUT, "WaitTimeoutError", None, "not finished in time"),
        (
            WaitTimeoutError(
                task_id="t", elapsed=1.0, polls=1, last_error=ServerError("oops", code=500)
            ),
            "WaitTimeoutError",
            None,
            "not finished in time: oops",
        ),
        (
            GenerationFailedError(
                task_id="t",
                status=TaskStatus.GENERATE_FAILED,
                error_code=400,
                error_message=HOSTILE,
            ),
            "GenerationFailedError",
            400,
            HOSTILE,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_entry_has_an_errors_class_code_and_message(error, kind, code, message):
    """The message is without the id and the times, so that equal errors can be counted."""
    (text,) = stored(error_text(error))
    found = entry("t", error=text)
    assert (found.error_type, found.error_code, found.error_message) == (kind, code, message)


def test_no_error_is_no_text():
    """A result has no error text."""
    assert error_text(None) is None


# Entries


def test_an_entry_has_aware_times_and_the_images_path():
    """In UTC, from the seconds in the file."""
    found = entry(created=1.25, image=("a.png", "ab12", 7))
    assert found.created_at == datetime(1970, 1, 1, 0, 0, 1, 250_000, UTC)
    assert found.updated_at.tzinfo is UTC
    assert (found.saved_path, found.sha256, found.size) == ("a.png", "ab12", 7)
    assert (found.task_id, found.state, found.attempts) == ("task", "state", 1)
    assert (found.record, found.error_type, found.error_code, found.error_message) == (
        None,
        None,
        None,
        "",
    )


GOOD = {"status": 1, "create_time": None, "complete_time": None, "result_image_url": "https://x"}
BAD_RECORDS = {
    "no_json": "{",
    "no_object": "[]",
    "no_status": "{}",
    "unknown_status": json.dumps({**GOOD, "status": 7}),
    "no_time": json.dumps({**GOOD, "create_time": "yesterday"}),
    "a_number_for_a_time": json.dumps({**GOOD, "complete_time": 5}),
    "unknown_field": json.dumps({**GOOD, "colour": "red"}),
}


@pytest.mark.parametrize(
    ("state", "record", "error"),
    [
        *(("done", record, None) for record in BAD_RECORDS.values()),
        *(("failed", None, error) for error in ("{", "[]", "5")),
    ],
)
def test_an_unreadable_record_or_error_is_named_by_its_task(state, record, error):
    """It is a `LedgerError`, for readers as for a batch."""
    with pytest.raises(LedgerError, match="task 'mine' is unreadable"):
        entry("mine", record, error)
    with pytest.raises(LedgerError, match="task 'mine' is unreadable"):
        recalled(("mine", state, record, error, None, None, None, None))


@pytest.mark.parametrize("created", ["soon", None, 1e15, 1e300, float("inf")])
def test_an_unreadable_time_is_an_error(created):
    """Also one outside the calendar."""
    with pytest.raises(LedgerError, match="unreadable"):
        entry(created=created)


@pytest.mark.parametrize(
    ("state", "record"),
    [("done", None), ("done", json.dumps({**GOOD, "result_image_url": None})), ("failed", None)],
)
def test_a_state_without_its_url_or_reason_is_an_error(state, record):
    """A task that is done has a URL, and one that has failed a reason."""
    with pytest.raises(LedgerError, match="unreadable"):
        recalled(("mine", state, record, None, None, None, None, None))
