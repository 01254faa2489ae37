"""Images on disk: fetched, checked, and named after their tasks."""

from kontext_async.results.images.files import SavedImage
from kontext_async.results.images.saver import ImageSaver, download
from kontext_async.results.images.saves import save_outcomes

__all__ = ["ImageSaver", "SavedImage", "download", "save_outcomes"]
