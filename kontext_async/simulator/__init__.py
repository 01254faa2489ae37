"""The Flux Kontext task API on this machine, for tests and demonstrations.

It imports nothing of this library but its models, so that what is tested against it is not
tested against itself.
"""

from kontext_async.simulator.images import IMAGE_STEPS
from kontext_async.simulator.limits import BucketLimit, Limit, SlidingLimit, WindowLimit
from kontext_async.simulator.log import LoggedRequest
from kontext_async.simulator.replies import Reply
from kontext_async.simulator.server import Simulator
from kontext_async.simulator.steps import FAULTS, STEPS, StepLike
from kontext_async.simulator.tasks import Durations, Failure, Look, Step, lognormal

__all__ = [  # noqa: RUF022  # plain order, as everywhere
    "BucketLimit",
    "Durations",
    "FAULTS",
    "Failure",
    "IMAGE_STEPS",
    "Limit",
    "LoggedRequest",
    "Look",
    "Reply",
    "STEPS",
    "Simulator",
    "SlidingLimit",
    "Step",
    "StepLike",
    "WindowLimit",
    "lognormal",
]
