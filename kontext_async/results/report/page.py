"""The HTML page about a folder of results, in that folder."""

from __future__ import annotations

import base64
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import attrs

from kontext_async import errors
from kontext_async.errors import ConfigurationError, GenerationFailedError, KontextError
from kontext_async.results import errors as results_errors
from kontext_async.results.ledger.rows import LedgerEntry
from kontext_async.results.ledger.submissions import SubmissionEntry
from kontext_async.results.partial import write_file
from kontext_async.results.report.histogram import histogram
from kontext_async.results.report.thumbnails import make_thumbnails

if TYPE_CHECKING:
    import jinja2

__all__ = ["write_report"]

_NAME = "report.html"
# Formats that browsers show as pictures. A link to others (SVG, HTML) could run a script.
_SUFFIXES = {".avif", ".gif", ".jpeg", ".jpg", ".png", ".webp"}
_LABELS = {
    "done": "Done",
    "failed": "Failed",
    "error": "Error",
    "unfinished": "Unfinished",
    "waiting": "Waiting",
    "refused": "Refused",
    "unknown": "Uncertain",
}
_NO_PICTURE = {
    "done": "Not saved",
    "failed": "No image",
    "error": "No answer",
    "unfinished": "Not finished",
    "waiting": "Not finished yet",
    "refused": "No task",
    "unknown": "Perhaps a task",
}
# The states of requests without a task that the page shows.
_REQUESTS = ("refused", "unknown")
# The error codes of failed generations (`GenerationFailedError`).
_CODES = {400: "Prompt flagged", 500: "Internal error", 501: "Generation failed"}
# An entry of the ledger has the name of the error's class.
_TITLES: dict[str, str] = {
    error.__name__: error.title
    for error in (*vars(errors).values(), *vars(results_errors).values())
    if isinstance(error, type) and issubclass(error, KontextError)
}
_MOST_MESSAGES = 10  # in a group


@attrs.frozen(kw_only=True)
class _Card:
    """A task on the page; ``image`` and ``thumbnail`` are URLs relative to the page."""

    entry: LedgerEntry
    named: str
    prompt: str
    model: str
    duration: float | None
    created: datetime | None
    image: str | None
    thumbnail: str | None
    no_picture: str


@attrs.frozen(kw_only=True)
class _Group:
    """The failures of one code and class of error, with their most frequent messages."""

    title: str
    kind: str
    count: int
    messages: Sequence[tuple[str, int]]
    others: int


def write_report(
    folder: Path,
    entries: Iterable[LedgerEntry],
    submissions: Iterable[SubmissionEntry] = (),
    *,
    on_progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Write ``report.html`` into a folder of results and return its path.

    Of the ``submissions``, it shows the requests that were refused, and those that may have been
    paid for without an answer.

    The page refers only to images in the folder. With Pillow (extra ``images``) it shows
    thumbnails, which are made in ``thumbnails/``. This takes a while for many images, so in an
    asyncio program call it in a thread; ``on_progress`` is called there with the number of
    thumbnails made and of all. Raises `ConfigurationError` without Jinja2 (extra
    ``report``), and `OSError` if the folder cannot be written.
    """
    environment = _environment()
    folder = folder.resolve()
    cards = _cards(folder, list(entries), on_progress)
    cards += [_request_card(entry) for entry in submissions if entry.state in _REQUESTS]
    page = environment.get_template("report.html.j2").stream(
        title=folder.name,
        cards=cards,
        counts=_counts(cards),
        labels=_LABELS,
        groups=_groups(card.entry for card in cards),
        chart=histogram([card.duration for card in cards if card.duration is not None]),
        size=sum(card.entry.size or 0 for card in cards if card.image),
        updated=max((card.entry.updated_at for card in cards), default=None),
        **_inline("style", "report.css"),
        **_inline("script", "report.js"),
    )
    page.enable_buffering(1000)  # parts of the template, about 40 of which make a card
    # A lone surrogate in a message becomes a question mark.
    write_file(folder / _NAME, (part.encode("utf-8", "replace") for part in page))
    return folder / _NAME


def _environment() -> jinja2.Environment:
    try:
        import jinja2  # noqa: PLC0415  # an extra
    except ImportError as exc:
        raise ConfigurationError(
            "a report needs Jinja2: pip install 'kontext-async[report]'"
        ) from exc
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kontext_async.results.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": _bytes, "percent": "{:.3f}%".format, "seconds": _seconds}
    return environment


def _inline(role: str, name: str) -> dict[str, Any]:
    """Return a part of the page, and the digest that the page's security policy allows."""
    from markupsafe import Markup  # noqa: PLC0415  # comes with Jinja2

    text = (files("kontext_async.results.report") / "templates" / name).read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {role: Markup(text), f"{role}_digest": f"sha256-{digest}"}  # noqa: S704  # our own


def _cards(
    folder: Path,
    entries: list[LedgerEntry],
    on_progress: Callable[[int, int], object] | None,
) -> list[_Card]:
    images = [_image(folder, entry.saved_path) for entry in entries]
    found = [image for image in images if image]
    thumbnails = dict(zip(found, make_thumbnails(folder, found, on_progress), strict=True))
    return [
        _card(folder, entry, image, image and thumbnails[image])
        for entry, image in zip(entries, images, strict=True)
    ]


def _image(folder: Path, saved_path: str | None) -> Path | None:
    """Return the path of the saved image, if it is an image in the folder, links followed."""
    try:
        path = (folder / (saved_path or "")).resolve()
        fits = path.suffix.lower() in _SUFFIXES and path.is_relative_to(folder) and path.is_file()
    except (OSError, RuntimeError, ValueError):  # a loop of links, an invalid name
        return None
    return path if fits else None


def _card(folder: Path, entry: LedgerEntry, image: Path | None, thumbnail: Path | None) -> _Card:
    record = entry.record
    params: Mapping[str, Any] = {} if record is None else record.params
    taken = None if record is None else record.duration
    return _Card(
        entry=entry,
        named="Task",
        prompt=_text(params.get("prompt")),
        model=_text(params.get("model")),
        duration=None if taken is None else taken.total_seconds(),
        created=None if record is None else record.create_time,
        image=_url(folder, image),
        thumbnail=_url(folder, thumbnail),
        no_picture="The file is missing" if entry.saved_path else _NO_PICTURE[entry.state],
    )


def _request_card(entry: SubmissionEntry) -> _Card:
    """Return the card of a request without a task, which is named by its key."""
    shown = LedgerEntry(
        task_id=entry.key,
        state=cast("Any", entry.state),
        attempts=0,
        error_type=entry.error_type,
        error_code=entry.error_code,
        error_message=entry.error_message,
        created_at=entry.created_at,
        updated_at=entry.updated_at,
    )
    return _Card(
        entry=shown,
        named="Request",
        prompt=entry.request.prompt,
        model=entry.request.model or "",
        duration=None,
        created=entry.created_at,
        image=None,
        thumbnail=None,
        no_picture=_NO_PICTURE[entry.state],
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _url(folder: Path, path: Path | None) -> str | None:
    return None if path is None else quote(os.fsencode(path.relative_to(folder).as_posix()))


def _counts(cards: Iterable[_Card]) -> dict[str, int]:
    """Return the number of tasks in each state that occurs, in the order of the labels."""
    counts: Counter[str] = Counter(card.entry.state for card in cards)
    return {state: counts[state] for state in _LABELS if counts[state]}


def _groups(entries: Iterable[LedgerEntry]) -> list[_Group]:
    """Return the failures by code and class of error, the most frequent first."""
    found: defaultdict[tuple[int | None, str], Counter[str]] = defaultdict(Counter)
    for entry in entries:
        if entry.error_type is not None:
            found[entry.error_code, entry.error_type][entry.error_message] += 1
    groups = [_group(code, kind, messages) for (code, kind), messages in found.items()]
    return sorted(groups, key=lambda group: -group.count)


def _title(code: int | None, kind: str) -> str | None:
    if kind == GenerationFailedError.__name__ and code in _CODES:
        return _CODES[code]
    return _TITLES.get(kind)


def _group(code: int | None, kind: str, messages: Counter[str]) -> _Group:
    number = None if code is None else f"Code {code}"
    return _Group(
        title=" · ".join(filter(None, [number, _title(code, kind)])) or kind,
        kind=kind,
        count=messages.total(),
        messages=messages.most_common(_MOST_MESSAGES),
        others=max(len(messages) - _MOST_MESSAGES, 0),
    )


def _seconds(duration: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if duration < 59.95:
        return f"{duration:.1f} s"
    minutes, seconds = divmod(round(duration), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
