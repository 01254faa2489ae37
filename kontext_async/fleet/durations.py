"""The task durations that all workers have learned, as one model in the database."""

from __future__ import annotations

import logging
from typing import Final

from kontext_async.errors import ConfigurationError
from kontext_async.fleet.database import Database, Row
from kontext_async.schedule import DurationModel

__all__ = ["SharedDurations"]

_log = logging.getLogger("kontext_async")

_MERGE_LOCK: Final = 0x4B6E747B  # also where there is no row yet

_READ = "SELECT model FROM kontext_durations"
_WRITE = """
    INSERT INTO kontext_durations (model) VALUES (%s)
    ON CONFLICT (only_row) DO UPDATE SET model = excluded.model, updated_at = now()
"""


class SharedDurations:
    """Merges one client's model with the model of all workers."""

    def __init__(self, database: Database, model: DurationModel) -> None:
        self._database = database
        self._model = model
        self._seen = ""  # the client's model when it was last merged, as JSON

    async def load(self) -> None:
        """Merge what the others know into the client's model."""
        known = _model_of(await self._database.fetch(_READ))
        if known is not None:
            self._model.merge(known)
            self._seen = self._model.to_json()

    async def save(self) -> None:
        """Merge the client's model into that of all, if it has learned anything."""
        learned = self._model.to_json()
        if learned == self._seen:
            return
        async with self._database.connection() as connection, connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_MERGE_LOCK,))
            found = await connection.execute(_READ)
            merged = _model_of(await found.fetchall()) or DurationModel()
            merged.merge(self._model)
            await connection.execute(_WRITE, (merged.to_json(),))
        self._seen = learned


def _model_of(rows: list[Row]) -> DurationModel | None:
    """Return the stored model, None if there is none that this release can read."""
    for (text,) in rows:
        try:
            return DurationModel.from_json(text)
        except ConfigurationError as exc:
            _log.info("the durations in the database are ignored: %s", exc)
    return None
