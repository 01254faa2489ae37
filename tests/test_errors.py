"""Errors tell what happened and survive every way out of a process."""

from __future__ import annotations

import copy
import pickle

import pytest

from kontext_async import errors
from kontext_async.errors import (
    ApiError,
    AuthenticationError,
    ClientStateError,
    ConfigurationError,
    GenerationFailedError,
    Handling,
    InvalidRequestError,
    KontextError,
    MaintenanceError,
    RateLimitedError,
    ResponseFormatError,
    ServerError,
    SubmissionUnknownError,
    TaskNotFoundError,
    TransportError,
    WaitTimeoutError,
)
from kontext_async.models import TaskRecord, TaskStatus
from kontext_async.results import DownloadError

RECORD = TaskRecord(
    task_id="task1",
    status=TaskStatus.GENERATE_FAILED,
    param_json='{"prompt": "a lighthouse in a storm"}',
    error_code=400,
    error_message="flagged",
)
API_ERRORS = [
    ApiError,
    AuthenticationError,
    InvalidRequestError,
    MaintenanceError,
    RateLimitedError,
    ServerError,
    TaskNotFoundError,
]
EXAMPLES = [
    KontextError("something"),
    ConfigurationError("no API key"),
    ClientStateError("the client is closed"),
    *(
        kind("No.", code=418, http_status=200, retry_after=2.5, task_id="task1")
        for kind in API_ERRORS
    ),
    GenerationFailedError(
        task_id="task1",
        status=TaskStatus.GENERATE_FAILED,
        error_code=400,
        error_message="flagged",
        record=RECORD,
    ),
    ResponseFormatError("no JSON", task_id="task1", http_status=200, excerpt="<html>"),
    TransportError("connection reset", task_id="task1", retryable=False),
    SubmissionUnknownError("reset", code=500, http_status=200, token="token"),
    WaitTimeoutError(
        task_id="task1",
        elapsed=600.04,
        polls=40,
        last_record=RECORD,
        last_error=TransportError("connection reset", task_id="task1"),
    ),
]


def same(twin, error):
    """Equality of errors, those within errors included."""
    if not isinstance(error, KontextError):
        return twin == error
    return (
        type(twin) is type(error)
        and twin.args == error.args
        and str(twin) == str(error)
        and vars(twin).keys() == vars(error).keys()
        and all(same(vars(twin)[name], value) for name, value in vars(error).items())
    )


def bare(code, kind=ApiError):
    """An answer without an envelope, as a gateway gives it."""
    return kind("No", code=code, http_status=code, from_gateway=True)


def test_every_public_error_is_among_the_examples():
    assert {type(error).__name__ for error in EXAMPLES} == set(errors.__all__) - {"Handling"}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
class TestEveryError:
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_it_pickles(self, error, protocol):
        twin = pickle.loads(pickle.dumps(error, protocol))
        assert same(twin, error)
        assert same(pickle.loads(pickle.dumps(twin, protocol)), error)

    def test_it_copies(self, error):
        assert same(copy.copy(error), error)
        assert same(copy.deepcopy(error), error)

    def test_its_notes_travel_with_it(self, error):
        noted = copy.copy(error)
        noted.add_note("seen on Monday")
        assert pickle.loads(pickle.dumps(noted)).__notes__ == ["seen on Monday"]

    def test_it_can_be_raised_and_caught_by_its_root(self, error):
        with pytest.raises(KontextError) as caught:
            raise error
        assert caught.value is error

    def test_it_speaks_one_printable_line_and_keeps_prompts_private(self, error):
        for shown in (str(error), repr(error)):
            assert shown
            assert shown.isprintable()
            assert "lighthouse" not in shown

    def test_it_names_the_task_where_it_knows_it(self, error):
        assert (getattr(error, "task_id", None) == "task1") == ("task1" in str(error))


def test_errors_are_caught_by_the_builtin_names_users_expect():
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(ClientStateError, RuntimeError)
    assert issubclass(WaitTimeoutError, TimeoutError)


@pytest.mark.parametrize("kind", API_ERRORS)
def test_answers_of_the_api_share_a_class(kind):
    assert issubclass(kind, ApiError)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ApiError("Gone", code=410), "code 410: Gone"),
        (ApiError("", code=418, task_id="t"), "task t: code 418: no message"),
        (ApiError("No", code=418, http_status=418), "code 418: No"),
        (ApiError("No", code=418, http_status=200), "code 418 (HTTP 200): No"),
        (
            ApiError("Insufficient", code=402),
            "code 402: Insufficient; the account has no credits left",
        ),
        (
            ApiError("Not Found", code=404, http_status=404),
            "code 404: Not Found; nothing is served at this address: check base_url",
        ),
        (AuthenticationError("No", code=401), "code 401: No; check the API key"),
        (
            TaskNotFoundError("Not Found", code=404),
            (
                "code 404: Not Found; check the task id and that the key is of the account "
                "that made the task"
            ),
        ),
        (RateLimitedError("Slow", code=429, retry_after=2), "code 429: Slow; retry after 2 s"),
        (
            GenerationFailedError(task_id="t", status=TaskStatus.CREATE_TASK_FAILED),
            "task t: CREATE_TASK_FAILED (no error code): no message",
        ),
        (
            GenerationFailedError(
                task_id="t",
                status=TaskStatus.GENERATE_FAILED,
                error_code=400,
                error_message="flagged",
            ),
            "task t: GENERATE_FAILED (error 400): flagged",
        ),
        (ResponseFormatError("larger than 5 bytes"), "unreadable answer: larger than 5 bytes"),
        (
            ResponseFormatError("no JSON", task_id="t", http_status=200, excerpt="<html>"),
            "task t: unreadable answer (HTTP 200): no JSON; it begins: <html>",
        ),
        (TransportError("connection reset"), "connection reset"),
        (TransportError("connection reset", task_id="t"), "task t: connection reset"),
        (
            WaitTimeoutError(task_id="t", elapsed=1.25, polls=1),
            (
                "task t: not finished after 1.2 s and 1 poll; it may still finish and be paid for: "
                "wait for the same id again"
            ),
        ),
        (
            WaitTimeoutError(
                task_id="t", elapsed=600, polls=40, last_error=TransportError("reset")
            ),
            (
                "task t: not finished after 600.0 s and 40 polls (last error: reset); "
                "it may still finish and be paid for: wait for the same id again"
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_text_says_what_happened_and_what_to_do(error, text):
    assert str(error) == text


@pytest.mark.parametrize(
    ("error", "handling"),
    [
        (ApiError("No", code=429), Handling.BACK_OFF),
        (ApiError("No", code=455), Handling.BACK_OFF),
        (ApiError("No", code=503, retry_after=5.0), Handling.BACK_OFF),
        (ServerError("No", code=503), Handling.RETRY),
        (ServerError("No", code=500, retry_after=5.0), Handling.RETRY),
        (ServerError("No", code=505), Handling.RAISE),
        (ApiError("No", code=399), Handling.RETRY),
        (ApiError("No", code=400), Handling.RAISE),
        (ApiError("No", code=402), Handling.RAISE),
        (ApiError("No", code=403), Handling.RAISE),
        (ApiError("No", code=408), Handling.RETRY),
        (ApiError("No", code=409), Handling.RAISE),
        (ApiError("No", code=451), Handling.RAISE),
        (ApiError("No", code=499), Handling.RAISE),
        (ApiError("No", code=500), Handling.RETRY),
        (ApiError("No", code=1000), Handling.RETRY),
        (bare(302), Handling.RAISE),
        (bare(400), Handling.RETRY),
        (bare(402), Handling.RAISE),
        (bare(403), Handling.RETRY),
        (bare(404), Handling.RAISE),
        (bare(408), Handling.RETRY),
        (bare(409), Handling.RETRY),
        (bare(425), Handling.RETRY),
        (bare(429), Handling.BACK_OFF),
        (bare(499), Handling.RETRY),
        (bare(502), Handling.RETRY),
        (bare(505), Handling.RAISE),
        (bare(401, AuthenticationError), Handling.RAISE),
        (bare(422, InvalidRequestError), Handling.RAISE),
        (AuthenticationError("No", code=401), Handling.RAISE),
        (InvalidRequestError("No", code=422), Handling.RAISE),
        (TaskNotFoundError("No", code=422), Handling.RETRY_NOT_FOUND),
        (SubmissionUnknownError("reset"), Handling.RAISE),
        (TransportError("reset"), Handling.RETRY),
        (TransportError("redirect", retryable=False), Handling.RAISE),
        (ResponseFormatError("no flag"), Handling.RETRY),
        (ConfigurationError("no key"), Handling.RAISE),
        (DownloadError("reset"), Handling.RETRY),
        (DownloadError("too large", retryable=False), Handling.RAISE),
    ],
)
def test_each_error_says_how_a_wait_handles_it(error, handling):
    assert error.handling is handling
    assert error.retryable is (handling is not Handling.RAISE)


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        (KontextError, ""),
        (AuthenticationError, "API key refused"),
        (TaskNotFoundError, "Task unknown"),
        (InvalidRequestError, "Invalid request"),
        (RateLimitedError, "Rate limited"),
        (MaintenanceError, "Maintenance"),
        (ServerError, "Server error"),
        (GenerationFailedError, "Generation failed"),
        (ResponseFormatError, "Unreadable answer"),
        (TransportError, "Network trouble"),
        (WaitTimeoutError, "Not finished in time"),
    ],
)
def test_each_kind_of_error_has_a_title(kind, title):
    assert kind.title == title


def test_errors_made_of_keywords_have_their_subject_in_args_and_their_record():
    failed = GenerationFailedError(
        task_id="t", status=TaskStatus.GENERATE_FAILED, error_message="flagged", record=RECORD
    )
    assert failed.args == ("flagged",)
    assert failed.record is RECORD
    late = WaitTimeoutError(task_id="t", elapsed=1.0, polls=1, last_record=RECORD)
    assert late.args == ("t",)
    assert late.last_record is RECORD


def test_a_timeout_can_be_retried_by_the_caller():
    error = WaitTimeoutError(task_id="t", elapsed=1.0, polls=1)
    assert (error.handling, error.retryable) == (Handling.RAISE, True)


def test_an_error_can_be_repeated_for_another_task():
    error = ApiError("No", code=500, http_status=502, task_id="a")
    other = error.for_task("b", http_status=None)
    assert (type(other), str(other)) == (ApiError, "task b: code 500: No")
    assert (error.task_id, error.http_status) == ("a", 502)


@pytest.mark.parametrize(
    ("msg", "shown"),
    [
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 199 + "…"),
        ("a" + " " * 398 + "b", "a b"),
        ("a" + " " * 399 + "b", "a"),
    ],
)
def test_a_message_shows_200_characters_of_the_first_400(msg, shown):
    assert str(ApiError(msg, code=500)) == f"code 500: {shown}"


def test_text_from_outside_is_cut_and_made_harmless():
    shown = str(ApiError("a\x1b[2J\r\nb\0\u202ec" + "x" * 5000, code=500, task_id="\ud800" * 900))
    assert shown.isprintable()
    assert "a [2J b c" in shown
    assert "…" in shown
    assert len(shown) < 450


@pytest.mark.parametrize(
    ("code", "message", "told"),
    [
        (
            500,
            "out of\nmemory",
            "and 3 polls, while the service reported error 500: out of memory;",
        ),
        (None, "queued", "and 3 polls, while the service reported: queued;"),
        (501, "", "and 3 polls, while the service reported error 501: no message;"),
        (None, "", "and 3 polls;"),
    ],
)
def test_a_timeout_names_what_the_service_said_of_the_running_task(code, message, told):
    record = TaskRecord(
        task_id="t",
        status=TaskStatus.GENERATING,
        param_json=None,
        create_time=None,
        complete_time=None,
        origin_image_url=None,
        result_image_url=None,
        error_code=code,
        error_message=message,
    )
    error = WaitTimeoutError(task_id="t", elapsed=9.0, polls=3, last_record=record)
    assert told in str(error)
    assert error.last_record is record
