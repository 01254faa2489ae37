"""An asyncio client that creates Flux Kontext image-generation tasks and waits for them."""

from kontext_async._version import __version__
from kontext_async.batch import Journal
from kontext_async.client import KontextClient
from kontext_async.creation import SubmittedTask
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
from kontext_async.models import CompletedTask, TaskRecord, TaskStatus
from kontext_async.outcomes import ErrorOutcome, ResultOutcome, TaskOutcome
from kontext_async.pacing import ClientStats, RateLimit
from kontext_async.polling import PollEvent
from kontext_async.schedule import DurationModel, PollState, wait_learned
from kontext_async.streams import Stream
from kontext_async.wire import ImageRequest

__all__ = [
    "ApiError",
    "AuthenticationError",
    "ClientStateError",
    "ClientStats",
    "CompletedTask",
    "ConfigurationError",
    "DurationModel",
    "ErrorOutcome",
    "GenerationFailedError",
    "Handling",
    "ImageRequest",
    "InvalidRequestError",
    "Journal",
    "KontextClient",
    "KontextError",
    "MaintenanceError",
    "PollEvent",
    "PollState",
    "RateLimit",
    "RateLimitedError",
    "ResponseFormatError",
    "ResultOutcome",
    "ServerError",
    "Stream",
    "SubmissionUnknownError",
    "SubmittedTask",
    "TaskNotFoundError",
    "TaskOutcome",
    "TaskRecord",
    "TaskStatus",
    "TransportError",
    "WaitTimeoutError",
    "__version__",
    "wait_learned",
]
