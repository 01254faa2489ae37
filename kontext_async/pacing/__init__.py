"""The request budget of one client: rate limits, pauses, and the queue for permits."""

from kontext_async.pacing.budget import ClientStats, PlannedPoll, RequestBudget
from kontext_async.pacing.limits import RateLimit, SlidingWindow

__all__ = ["ClientStats", "PlannedPoll", "RateLimit", "RequestBudget", "SlidingWindow"]
