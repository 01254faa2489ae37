"""The report: the contents of the page, its links, and its files on disk."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import itertools
import os
import random
import re
import subprocess
import sys
from datetime import UTC, datetime
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from pngs import decompression_bomb, plain_png
from report_samples import entry, failed, record, saved

from kontext_async import ConfigurationError, ImageRequest, TaskStatus
from kontext_async.results import SubmissionEntry, partial
from kontext_async.results.partial import THUMBNAILS, remove_partial_files
from kontext_async.results.report import page as report
from kontext_async.results.report.histogram import histogram
from kontext_async.results.report.page import write_report
from kontext_async.results.report.thumbnails import make_thumbnails


class Seen(html.parser.HTMLParser):
    """A page as a browser takes it apart: elements with attributes, and text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements = []
        self.text = ""
        self.parts = {}
        self._inside = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside in {"style", "script"}:
            self.parts[self._inside] = data
        else:
            self.text += f" {' '.join(data.split())}"

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def urls(self):
        found = [e.get("href") or e.get("src") for _, e in self.elements]
        return [url for url in found if url and not url.startswith(("#", "data:"))]


def seen(folder, *entries):
    text = write_report(folder, entries).read_text("utf-8")
    return Seen(text)


@pytest.fixture
def no_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)


# The page


def test_a_task_is_shown_with_prompt_model_duration_and_file(tmp_path):
    """A card shows the facts of a result, and its picture links to the file."""
    page = seen(tmp_path, saved(tmp_path, "a.png", prompt="A red fox", model="flux-kontext-max"))
    for text in ("A red fox", "flux-kontext-max", "12.5 s", "a.png", "task-1", "Done"):
        assert text in page.text
    assert {"class": "picture", "href": "a.png"} in page.all("a")


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        ("done", "Not saved"),
        ("failed", "No image"),
        ("error", "No answer"),
        ("unfinished", "Not finished"),
        ("waiting", "Not finished yet"),
    ],
)
def test_a_task_without_a_picture_says_why(state, shown, tmp_path):
    """Every state has its word in the picture's place."""
    page = seen(tmp_path, entry(state=state))
    assert shown in page.text
    assert not page.all("img")


def test_a_record_may_lack_everything(tmp_path):
    """Prompts that are not text, missing times and unreadable parameters leave gaps, not errors."""
    page = seen(
        tmp_path,
        entry("one", record=record(seconds=None, prompt=["a"], model=7)),
        entry("two", record=None),
    )
    assert page.text.count("No prompt known") == 2
    assert "No finished task has a known duration." in page.text


def test_an_empty_folder_says_so(tmp_path):
    """Without tasks there is nothing to filter and nothing to chart."""
    page = seen(tmp_path)
    assert "There are no tasks here yet." in page.text
    assert not page.all("form")


def test_the_head_counts_the_states_that_occur(tmp_path):
    """One radio button for all, and one for each state there is."""
    page = seen(tmp_path, failed("a"), failed("b"), entry("c"), entry("d", state="waiting"))
    values = [e["value"] for e in page.all("input") if e["type"] == "radio"]
    assert values == ["", "done", "failed", "waiting"]
    assert "Failed 2" in page.text
    assert "4 Tasks" in page.text or "Tasks 4" in page.text


def test_failures_are_grouped_by_code_with_their_messages(tmp_path):
    """The most frequent group comes first, and counts each of its messages."""
    page = seen(
        tmp_path,
        failed("a", code=501, message="It failed."),
        *(failed(f"b{n}") for n in range(3)),
        failed("c", message=""),
        entry("d", state="unfinished", error_type="WaitTimeoutError", error_message="too slow"),
        entry("e", state="error", error_type="ApiError", error_code=402),
        entry("f", state="error", error_type="ResponseFormatError", error_message="odd"),
    )
    titles = re.findall(r"Code 400 · Prompt flagged 4|Code 501 · Generation failed 1", page.text)
    assert [title[:8] for title in titles] == ["Code 400", "Code 501"]
    for text in ("Not finished in time 1", "Code 402 1", "Unreadable answer 1", "Show 3"):
        assert text in page.text
    assert "no message" in page.text


@pytest.mark.parametrize(
    ("kind", "code", "title"),
    [
        ("AuthenticationError", 401, "Code 401 · API key refused 1"),
        ("ResultExpiredError", None, "Image expired 1"),
        ("DownloadError", None, "Image not saved 1"),
        ("TransportError", None, "Network trouble 1"),
        ("GenerationFailedError", 500, "Code 500 · Internal error 1"),
        ("GenerationFailedError", 599, "Code 599 · Generation failed 1"),
        ("GenerationFailedError", None, "Generation failed 1"),
        ("ApiError", 402, "Code 402 1"),
        ("FutureError", 402, "Code 402 1"),
        ("FutureError", None, "FutureError 1"),
    ],
)
def test_a_group_has_the_title_of_its_error(kind, code, title, tmp_path):
    """A class without a title, or of another release, has its code or its name."""
    page = seen(tmp_path, entry(state="error", error_type=kind, error_code=code))
    assert f" {title} " in page.text
    names = [e for e in page.all("p") if e.get("class") == "kind"]
    assert len(names) == (title != f"{kind} 1")  # not twice


def test_many_different_messages_of_one_code_are_cut(tmp_path):
    """A group shows the ten most frequent messages and counts the others."""
    page = seen(tmp_path, *(failed(f"t{n}", message=f"Message {n}.") for n in range(12)))
    assert len([e for e in page.all("button") if e.get("class") == "show"]) == 10
    assert "and 2 other messages" in page.text


def test_durations_are_charted(tmp_path):
    """The bars are labelled, and the median stands beside them."""
    entries = [entry(f"t{n}", record=record(seconds=10.0 + n)) for n in range(5)]
    page = seen(tmp_path, *entries)
    assert "median 12.0 s" in page.text
    assert page.text.count(": 1") == len(page.all("rect")) == 5


def test_an_unfinished_record_has_no_duration(tmp_path):
    """A task that still generates is not on the chart."""
    generating = record(status=TaskStatus.GENERATING, seconds=None)
    assert not seen(tmp_path, entry(state="unfinished", record=generating)).all("rect")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0.0 s"), (59.96, "1 min 00 s"), (314, "5 min 14 s"), (7379, "2 h 02 min")],
)
def test_durations_are_shown_in_seconds_minutes_or_hours(seconds, shown):
    """Fractions are shown only below a minute."""
    assert report._seconds(seconds) == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (999.6, "1 KB"), (123_456, "123 KB"), (4.5e6, "4.5 MB"), (1.2e12, "1,200.0 GB")],
)
def test_sizes_are_shown_with_three_digits_and_a_unit(size, shown):
    """The unit is that of powers of 1000."""
    assert report._bytes(size) == shown


# Hostile input

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(1)>\" onload='alert(1)' {{ 7*7 }}"


def test_hostile_text_stays_text(tmp_path):
    """Prompt, model, id, message, type, file and folder never become elements or attributes."""
    folder = tmp_path / HOSTILE.replace("/", "|")
    folder.mkdir()
    page = seen(
        folder,
        entry(HOSTILE, record=record(prompt=HOSTILE, model=HOSTILE), saved_path=HOSTILE),
        failed(message=HOSTILE, error_type=HOSTILE),
    )
    harmless = entry("a", record=record(prompt="a", model="a"), saved_path="a")
    plain = seen(tmp_path, harmless, failed())
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert not [e for _, e in page.elements if {"onerror", "onload"} & e.keys()]
    assert page.text.count(HOSTILE) == 8


def test_a_lone_surrogate_does_not_stop_the_report(tmp_path):
    """JSON can spell it and UTF-8 cannot encode it, so it becomes a question mark."""
    assert "odd ? thing" in seen(tmp_path, failed(message="odd \ud800 thing")).text


@pytest.mark.parametrize(
    "name",
    [
        "a b#c?d%20&e.png",
        "javascript:alert(1).png",
        "\"><script>alert(1)'.png",
        "back\\slash.png",
        "猫 и ё.PNG",
        "line\nbreak.png",
        "..png.png",
        "sub/folder/a.png",
        os.fsdecode(b"not-utf-8-\xff.png"),
    ],
)
def test_every_file_name_is_referred_to(name, tmp_path, no_pillow):
    """The picture's address is relative, and unquoting it gives the file's own bytes."""
    (tmp_path / "out").mkdir()
    page = seen(tmp_path / "out", saved(tmp_path / "out", name))
    assert [unquote_to_bytes(url) for url in page.urls()] == [os.fsencode(name)] * 3
    assert not [url for url in page.urls() if re.search(r"[^\w%./-]", url, re.ASCII)]


@pytest.mark.parametrize(
    "saved_path",
    [
        "missing.png",
        "../outside.png",
        "out/../../outside.png",
        "leads-out.png",
        "loop.png",
        "folder.png",
        "page.html",
        "drawing.svg",
        "nul\0.png",
        "",
        f"{'x' * 300}.png",
    ],
)
def test_only_images_within_the_folder_are_referred_to(saved_path, tmp_path):
    """A path in the ledger that leads out of the folder, or not to an image, is not a link."""
    folder = tmp_path / "out"
    saved(tmp_path, "outside.png")
    (folder / "folder.png").mkdir(parents=True)
    (folder / "leads-out.png").symlink_to(tmp_path / "outside.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    for name in ("page.html", "drawing.svg"):
        (folder / name).write_text("<script>alert(1)</script>")
    page = seen(folder, entry(saved_path=saved_path))
    assert page.urls() == []
    assert ("The file is missing" if saved_path else "Not saved") in page.text


def test_an_absolute_path_elsewhere_is_not_referred_to(tmp_path):
    """The ledger's paths are relative; absolute ones are not followed."""
    outside = tmp_path / "outside.png"
    outside.write_bytes(plain_png(4, 4, b"\0\0\0"))
    (tmp_path / "out").mkdir()
    assert seen(tmp_path / "out", entry(saved_path=str(outside))).urls() == []


def test_the_policy_admits_this_style_and_script_and_nothing_else(tmp_path):
    """The digests are those of the style and script in the page; no other source is allowed."""
    page = seen(tmp_path, saved(tmp_path, "a.png"))
    (policy,) = [e["content"] for e in page.all("meta") if "http-equiv" in e]
    sources = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    for part in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.parts[part].encode()).digest()).decode()
        assert sources[f"{part}-src"] == f"'sha256-{digest}'"
    assert sources["default-src"] == sources["base-uri"] == sources["form-action"] == "'none'"
    assert not [e for _, e in page.elements if "style" in e]
    assert not re.search(r"url\(|@import|https?:", page.parts["style"] + page.parts["script"])


# On the disk


def test_the_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """An error on the way leaves the old report, and nothing beside it."""
    path = write_report(tmp_path, [])
    old = path.read_bytes()
    monkeypatch.setattr(report, "_seconds", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path, [entry(record=record())])
    assert path == tmp_path / "report.html"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_bytes() == old


def test_a_report_is_written_in_few_pieces(tmp_path, monkeypatch):
    """Each is a system call, and the template gives some 40 parts for a task."""
    writes = []

    def counted(descriptor, data, write=os.write):
        writes.append(len(data))
        return write(descriptor, data)

    monkeypatch.setattr(partial.os, "write", counted)
    path = write_report(tmp_path, [entry(f"task-{i}", record=record()) for i in range(500)])
    assert sum(writes) == path.stat().st_size
    assert len(writes) < 100


KILLED = """
import os, pathlib, sys
from kontext_async.results import write_report
from report_samples import entry, saved
folder = pathlib.Path(sys.argv[1])
os.replace = lambda *_: os._exit(9)
write_report(folder, [saved(folder, "a.png") if sys.argv[2] else entry()])
"""


@pytest.mark.parametrize(
    ("with_image", "left"),
    [("", r"\.report\.html\..*\.part"), ("yes", r"thumbnails/\.[0-9a-f]{32}\.jpg\..*\.part")],
    ids=["page", "thumbnail"],
)
def test_a_sweep_removes_what_a_killed_report_left(with_image, left, tmp_path):
    """Its page or its thumbnail, half written; the finished files stay."""
    (tmp_path / THUMBNAILS).mkdir()
    kept = {"report.html", "thumbnails/b.jpg", "other/.a.png.0123456789ab.part"}
    for name in kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(tmp_path), with_image]
    assert subprocess.run(command, env=environment, check=False).returncode == 9

    def files():
        paths = (path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
        return {path.as_posix() for path in paths} - {"a.png"}

    [part] = files() - kept
    assert re.fullmatch(left, part)
    remove_partial_files(tmp_path)
    assert files() == kept


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    """The report does not create the folder of results."""
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "missing", [])


def test_without_jinja2_the_error_names_the_extra(tmp_path, monkeypatch):
    """A report is the only thing that needs the extra `report`."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigurationError, match=r"kontext-async\[report\]"):
        write_report(tmp_path, [])


# Thumbnails


def pictured(folder, data, name="a.png"):
    """The thumbnail made of a file's bytes, or None."""
    (folder / name).write_bytes(data)
    (thumbnail,) = make_thumbnails(folder, [folder / name])
    return thumbnail


def in_png(image, **options):
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def test_cards_show_thumbnails_and_lead_to_the_images(tmp_path):
    """With Pillow the page loads small pictures; the files stay as they are."""
    page = seen(tmp_path, saved(tmp_path, "a.png"))
    (image,) = page.all("img")
    assert re.fullmatch(r"thumbnails/[0-9a-f]{32}\.jpg", image["src"])
    assert (tmp_path / image["src"]).is_file()
    assert image["loading"] == "lazy"
    assert "a.png" in page.urls()


def test_without_pillow_cards_show_the_images_themselves(tmp_path, no_pillow):
    """The page is the same without the extra, except for the thumbnails."""
    page = seen(tmp_path, saved(tmp_path, "a.png"))
    assert page.urls() == ["a.png"] * 3
    assert not (tmp_path / "thumbnails").exists()


def test_thumbnails_are_small_and_have_the_images_shape(tmp_path):
    """A large image comes down to 480 pixels on its longer side, as a JPEG."""
    with Image.open(pictured(tmp_path, in_png(Image.effect_noise((1600, 800), 60)))) as small:
        assert (small.format, small.size) == ("JPEG", (480, 240))
    assert (tmp_path / "a.png").stat().st_size > 500_000
    assert sum(p.stat().st_size for p in (tmp_path / "thumbnails").iterdir()) < 100_000


def test_thumbnails_are_counted_while_they_are_made(tmp_path):
    """The callback has the number made and that of all."""
    counted = []
    entries = [saved(tmp_path, f"{name}.png") for name in "abc"]
    write_report(tmp_path, entries, on_progress=lambda *counts: counted.append(counts))
    assert counted == [(1, 3), (2, 3), (3, 3)]


def test_a_thumbnail_has_none_of_the_images_metadata(tmp_path):
    """Comments and color profiles are dropped."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "secret " * 100)
    png = in_png(Image.new("RGB", (9, 9)), pnginfo=info, icc_profile=b"secret profile")
    assert b"secret" not in pictured(tmp_path, png).read_bytes()


def test_transparent_pixels_become_white(tmp_path):
    """A JPEG has no transparency; the color of a transparent pixel does not show."""
    thumbnail = pictured(tmp_path, in_png(Image.new("RGBA", (8, 8), (255, 0, 0, 0))))
    with Image.open(thumbnail) as small:
        assert small.getpixel((4, 4)) == (255, 255, 255)


def test_a_thumbnail_is_made_again_when_its_image_changed(tmp_path):
    """A thumbnail that is newer than its image stays as it is."""
    thumbnail = pictured(tmp_path, plain_png(8, 8, b"\xff\0\0"))
    made = thumbnail.stat().st_ino
    (again,) = make_thumbnails(tmp_path, [tmp_path / "a.png"])
    assert (again, again.stat().st_ino) == (thumbnail, made)
    os.utime(tmp_path / "a.png", ns=(thumbnail.stat().st_mtime_ns + 1,) * 2)
    (renewed,) = make_thumbnails(tmp_path, [tmp_path / "a.png"])
    assert renewed.stat().st_ino != made


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<!doctype html><script>alert(1)</script>", id="html"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", id="postscript"),
        pytest.param(plain_png(64, 64, b"abc")[:90], id="cut"),
        pytest.param(decompression_bomb(8_000), id="64 megapixels"),
        pytest.param(decompression_bomb(10_000), id="enough for a warning"),
        pytest.param(decompression_bomb(60_000), id="enough for an error"),
    ],
)
def test_a_file_that_cannot_be_decoded_has_no_thumbnail(data, tmp_path):
    """Damaged files, other kinds and decompression bombs do not stop the report or use memory."""
    assert pictured(tmp_path, data) is None
    assert not list(tmp_path.glob("thumbnails/*"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_no_damage_to_a_file_stops_the_report(kind, tmp_path):
    """Of 60 mutations of an image, each is pictured or not, and none raises."""
    out = io.BytesIO()
    Image.effect_noise((40, 30), 60).convert("RGB").save(out, kind)
    chance = random.Random(kind)
    images = []
    for number in range(60):
        data = bytearray(out.getvalue())
        for _ in range(chance.randint(1, 8)):
            place = chance.randrange(len(data) // 4 if number % 2 else len(data))
            data[place] = chance.randrange(256)
        (tmp_path / f"{number}.png").write_bytes(data)
        images.append(tmp_path / f"{number}.png")
    made = make_thumbnails(tmp_path, images)
    assert len(made) == 60
    assert all(thumbnail is None or thumbnail.is_file() for thumbnail in made)


def test_a_folder_that_takes_no_thumbnails_still_gets_its_report(tmp_path):
    """If a file is named `thumbnails`, the page shows the images themselves."""
    (tmp_path / THUMBNAILS).write_text("a file")
    assert seen(tmp_path, saved(tmp_path, "a.png")).urls() == ["a.png"] * 3


# The chart


@given(st.lists(st.floats(min_value=0, max_value=1e12), min_size=1))
def test_a_chart_holds_every_duration_within_its_frame(durations):
    """Bars stand in order, side by side, inside the frame, and count each duration once."""
    chart = histogram(durations)
    assert sum(bar.count for bar in chart.bars) == chart.count == len(durations)
    assert len(chart.bars) <= 32
    assert max(bar.height for bar in chart.bars) == 100
    places = [x for bar in chart.bars for x in (bar.left, bar.left + bar.width)]
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(places))
    assert 0 <= places[0] <= places[-1] <= 100 + 1e-6
    assert all(0 <= left <= 100 for left, _ in chart.ticks)


def test_a_rare_tail_does_not_flatten_the_chart():
    """One task of 300 s among a hundred of 20 s: one bar at the end stands for it."""
    chart = histogram([*(15.0 + n / 10 for n in range(100)), 300.0])
    assert [bar.count for bar in chart.bars if bar.end is None] == [1]
    assert chart.tail == chart.bars[-1].start == 38
    assert (chart.median, chart.longest) == (20.0, 300.0)
    assert [second for _, second in chart.ticks] == [0, 8, 16, 24, 32]


def test_whole_seconds_have_no_gaps_between_their_bars():
    """The service's times are whole seconds, so that a bar is at least one wide."""
    assert [bar.start for bar in histogram([2, 3, 4, 5, 6]).bars] == [2, 3, 4, 5, 6]
    assert [bar.start for bar in histogram([2.5, 3]).bars] == [2.5, 3]


def test_no_durations_no_chart():
    """Before the first task has finished there is no chart."""
    assert histogram([]) is None


def test_requests_without_a_task_are_shown(tmp_path):
    """Those that were refused or are uncertain, with their prompt; the others have a task."""
    now = datetime(2026, 1, 2, tzinfo=UTC)
    submissions = [
        SubmissionEntry(
            key=f"key-{state}",
            request=ImageRequest(prompt=f"prompt {state}", model="flux-kontext-max"),
            state=state,
            token="token",
            error_type="SubmissionUnknownError",
            error_message=f"message {state}",
            created_at=now,
            updated_at=now,
        )
        for state in ("planned", "submitted", "refused", "unknown", "abandoned")
    ]
    text = write_report(tmp_path, [], submissions).read_text()
    for state, label in (("refused", "Refused"), ("unknown", "Uncertain")):
        assert f"key-{state}" in text
        assert f"prompt {state}" in text
        assert f"message {state}" in text
        assert label in text
    assert "Creation uncertain" in text
    assert not [s for s in ("planned", "submitted", "abandoned") if f"key-{s}" in text]
