"""Images on disk: fetched, checked, and named after their tasks."""

from kontext_async.results.images.files import SavedImage
from kontext_async.results.images.saver import ImageSaver, SaveStream, download, save_outcomes

__all__ = ["ImageSaver", "SaveStream", "SavedImage", "download", "save_outcomes"]
