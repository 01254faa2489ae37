"""The Flux Kontext task API as a local HTTP server, for tests and demonstrations.

It uses only this library's models, so a defect elsewhere in the library cannot hide itself here.
"""

from kontext_async.simulator.callbacks import SentCallback
from kontext_async.simulator.creations import CREATION_STEPS
from kontext_async.simulator.images import IMAGE_STEPS
from kontext_async.simulator.limits import FixedWindow, Limit, SlidingWindow, TokenBucket
from kontext_async.simulator.log import LoggedRequest
from kontext_async.simulator.replies import Reply
from kontext_async.simulator.server import Simulator
from kontext_async.simulator.steps import FAULTS, STEPS, StepLike
from kontext_async.simulator.tasks import Durations, Failure, Step, StepRequest, lognormal

__all__ = [
    "CREATION_STEPS",
    "FAULTS",
    "IMAGE_STEPS",
    "STEPS",
    "Durations",
    "Failure",
    "FixedWindow",
    "Limit",
    "LoggedRequest",
    "Reply",
    "SentCallback",
    "Simulator",
    "SlidingWindow",
    "Step",
    "StepLike",
    "StepRequest",
    "TokenBucket",
    "lognormal",
]
