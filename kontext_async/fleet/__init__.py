"""Many workers on one key: tasks and their outcomes in PostgreSQL (extra ``fleet``)."""

try:
    from kontext_async.fleet.errors import FleetError
    from kontext_async.fleet.fleet import Fleet
    from kontext_async.fleet.status import FleetStatus, WorkerStatus
except ModuleNotFoundError as exc:
    if exc.name not in {"procrastinate", "psycopg", "psycopg_pool"}:
        raise
    raise ModuleNotFoundError(
        "a fleet needs its extra: pip install 'kontext-async[fleet]'", name=exc.name
    ) from exc

__all__ = ["Fleet", "FleetError", "FleetStatus", "WorkerStatus"]
