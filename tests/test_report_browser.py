"""The report in a real browser, opened from the disk as a user opens it."""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import re
import shutil
from datetime import timedelta
from pathlib import Path

import attrs
import pytest
from browser import CHROMIUM, Browser
from pngs import plain_png
from report_samples import entry, failed, record, saved

from kontext_async.cli.input import distinct_ids
from kontext_async.results.report.page import write_report

# The package's script alone is used; nothing of it is imported.
_PACKAGE = importlib.util.find_spec("axe_playwright_python")
AXE = None if _PACKAGE is None else Path(_PACKAGE.origin).with_name("axe.min.js")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture
async def page(browser):
    async with browser.page() as page:
        yield page


HOSTILE = "</p><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


def batch(folder):
    """A folder of six tasks: three done, two failed, one still unfinished."""
    return write_report(
        folder,
        [
            saved(folder, "fox.png", task_id="fox", prompt="A red fox in the snow"),
            saved(folder, "tram.png", task_id="tram", prompt="A tram", model="flux-kontext-max"),
            saved(folder, "a ?#%\"'.png", task_id="odd", prompt=f"Long words {'and more ' * 80}"),
            failed("flagged", record=record(prompt="A fox of another kind", seconds=3)),
            failed("broken", code=501, message="It failed."),
            entry("late", state="unfinished", error_type="WaitTimeoutError"),
        ],
    )


SHOWN = """[...document.querySelectorAll('.card:not([hidden])')]
    .map(card => card.querySelector('.id').textContent)"""
SEE = """async image => {
    image.scrollIntoView();
    await image.decode();
    return image.naturalWidth;
}"""
FOCUS = "document.activeElement"
COUNT = "document.querySelector('output').value"


async def tab_to(page, condition):
    """Press Tab until the focus is where it should be, as somebody without a mouse does."""
    for _ in range(12):
        await page.press("Tab")
        if await page.run(f"{FOCUS}.matches({condition!r})"):
            return
    raise AssertionError(f"Tab never reached {condition}")


async def test_it_shows_every_image_and_asks_for_nothing_else(page, tmp_path):
    """Each picture loads; the console is silent; every request is for a file of the folder."""
    report = batch(tmp_path)
    await page.open(report)
    assert await page.run(SHOWN) == ["fox", "tram", "odd", "flagged", "broken", "late"]
    widths = [await page.run(f"({SEE})(document.images[{n}])") for n in range(3)]
    assert widths == [64, 64, 64]
    files = [url for url in page.requests() if not url.startswith("data:")]
    assert len(files) == 4
    assert all(url.startswith(f"{tmp_path.as_uri()}/") for url in files)
    assert page.complaints() == []


async def test_every_picture_leads_to_its_file(page, tmp_path):
    """Following a link by keyboard opens the image, whatever it is called."""
    await page.open(batch(tmp_path))
    link = "[...document.querySelectorAll('a.picture')].at(-1)"
    await page.run(f"{link}.focus()")
    address = await page.run(f"{link}.href")
    page.events.clear()
    await page.press("Enter")
    await page.loaded()
    assert await page.run("location.href") == address
    assert await page.run("document.images[0].naturalWidth") == 64


async def test_search_and_states_filter_by_keyboard(page, tmp_path):
    """Words narrow the sheet as they are typed, arrow keys choose a state, and both combine."""
    await page.open(batch(tmp_path))
    assert await page.run(COUNT) == "6 of 6 tasks"
    await tab_to(page, "[name=search]")
    await page.type("FOX")
    assert await page.run(SHOWN) == ["fox", "flagged"]
    assert await page.run(COUNT) == "2 of 6 tasks"
    await page.press("Tab", "ArrowRight", "ArrowRight")
    assert await page.run(SHOWN) == ["flagged"]
    await page.press("ArrowRight")
    assert await page.run(SHOWN) == []
    assert await page.run("document.getElementById('none').hidden") is False
    await tab_to(page, "#reset")
    await page.press("Enter")
    assert await page.run(COUNT) == "6 of 6 tasks"
    assert await page.run(f"{FOCUS}.name") == "search"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("flux-kontext-max", ["tram"]),
        ("tram.png", ["tram"]),
        ("fox  snow", ["fox"]),
        ("501", ["broken"]),
        ("WaitTimeout", ["late"]),
        ("flagged", ["flagged"]),
        ("details", []),
    ],
)
async def test_search_looks_at_what_the_task_is_about(words, shown, page, tmp_path):
    """Model, file, code, message, kind of error and id are found; the page's own words are not."""
    await page.open(batch(tmp_path))
    await page.run("document.querySelector('[name=search]').focus()")
    await page.type(words)
    assert await page.run(SHOWN) == shown


async def test_a_failure_leads_to_its_tasks(page, tmp_path):
    """The button beside a message shows the tasks that ended with it."""
    await page.open(batch(tmp_path))
    await tab_to(page, ".show")
    await page.press("Enter")
    assert await page.run(SHOWN) == ["flagged"]
    assert page.complaints() == []


@pytest.mark.parametrize(
    ("order", "shown"),
    [
        ("seconds", ["flagged", "odd", "tram", "fox", "broken", "late"]),
        ("-seconds", ["fox", "tram", "odd", "flagged", "broken", "late"]),
        ("created", ["fox", "odd", "flagged", "tram", "broken", "late"]),
        ("-created", ["tram", "fox", "odd", "flagged", "broken", "late"]),
    ],
)
async def test_tasks_are_sorted_by_duration_and_by_time(order, shown, page, tmp_path):
    """Tasks whose value is unknown come last in either direction, and the batch's order returns."""
    later = record(seconds=20, prompt="tram")
    later = attrs.evolve(later, create_time=later.create_time + timedelta(seconds=2))
    entries = [
        saved(tmp_path, "fox.png", task_id="fox", seconds=30),
        attrs.evolve(saved(tmp_path, "tram.png", task_id="tram"), record=later),
        saved(tmp_path, "odd.png", task_id="odd", seconds=10),
        failed("flagged", record=record(seconds=3)),
        failed("broken"),
        entry("late", state="unfinished"),
    ]
    await page.open(write_report(tmp_path, entries))
    assert await choose(page, order) == shown
    assert await choose(page, "") == [entry.task_id for entry in entries]


async def choose(page, order):
    """Choose an order as a user does, and return the ids that are shown."""
    await page.run(f"""(() => {{
        const sort = document.querySelector('[name=sort]');
        sort.value = {order!r};
        sort.dispatchEvent(new Event('input', {{ bubbles: true }}));
    }})()""")
    return await page.run(SHOWN)


async def test_ids_are_copied(page, tmp_path):
    """One button copies a task's id; one copies the ids of the tasks shown, in their order."""
    await page.open(batch(tmp_path))
    await page.run("navigator.clipboard.writeText = async text => { window.copied = text; }")
    await page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    await page.run("document.querySelectorAll('.copy')[1].click()")
    assert await page.run("copied") == "tram"
    await page.run("document.querySelector('[name=state][value=failed]').click()")
    await tab_to(page, "#copy")
    await page.press("Enter")
    assert await page.run("copied") == "flagged\nbroken"
    assert await page.run(f"{FOCUS}.textContent") == "Copied"


async def test_the_tasks_shown_are_saved_as_a_table(page, tmp_path):
    """A row for each task shown; no cell runs in a spreadsheet, and the command reads the ids."""
    entries = [
        saved(tmp_path, "a.png", task_id="fox", prompt='=HYPERLINK("evil"), really'),
        failed("flagged", message="Not\nallowed"),
    ]
    await page.open(write_report(tmp_path, entries))
    await page.run("URL.createObjectURL = blob => { window.saved = blob; return 'blob:x'; }")
    await page.run("HTMLAnchorElement.prototype.click = function () { window.link = this; }")
    await page.run("document.getElementById('export').click()")
    assert await page.run("link.download") == "tasks.csv"
    text = await page.run("saved.text()")
    (tmp_path / "tasks.csv").write_text(text, newline="")
    assert distinct_ids([], str(tmp_path / "tasks.csv")) == ["fox", "flagged"]
    header, fox, flagged = csv.reader(io.StringIO(text, newline=""))
    assert header == ["id", "state", "prompt", "model", "seconds", "file", "error"]
    assert fox == ["fox", "done", '\'=HYPERLINK("evil"), really', "", "12.5", "a.png", ""]
    assert flagged == ["flagged", "failed", "", "", "", "", "400 Not\nallowed"]


async def test_the_way_back_from_an_image_keeps_the_filter(page, tmp_path):
    """Search, state and order are as they were."""
    await page.open(batch(tmp_path))
    await choose(page, "seconds")
    await page.run("document.querySelector('[name=search]').focus()")
    await page.type("fox")
    shown = await page.run(SHOWN)
    await page.run("document.querySelector('.card:not([hidden]) a.picture').focus()")
    page.events.clear()
    await page.press("Enter")
    await page.loaded()
    page.events.clear()
    await page.run("setTimeout(() => history.back())")
    await page.loaded()
    assert await page.run(SHOWN) == shown == ["flagged", "fox"]
    assert await page.run("document.querySelector('[name=sort]').value") == "seconds"


async def test_a_printed_page_holds_many_tasks(page, tmp_path):
    """A contact sheet of 240 tasks takes at most 12 pages, and no control is printed."""
    entries = [saved(tmp_path, f"{n}.png", task_id=f"task-{n}") for n in range(240)]
    await page.open(write_report(tmp_path, entries))
    printed = base64.b64decode((await page.call("Page.printToPDF"))["data"])
    assert 1 < len(re.findall(rb"/Type\s*/Page\b", printed)) <= 12
    await page.call("Emulation.setEmulatedMedia", media="print")
    assert await page.run("document.getElementById('filter').offsetHeight") == 0


async def test_the_focus_is_seen_wherever_it_is(page, tmp_path):
    """Each stop of the Tab key has an outline, and the first leads past the head."""
    await page.open(batch(tmp_path))
    stops = []
    for _ in range(15):
        await page.press("Tab")
        outline = "getComputedStyle({0}.type === 'radio' ? {0}.nextElementSibling : {0})"
        style = await page.run(f"{outline.format(FOCUS)}.outlineStyle")
        stops.append(await page.run(f"{FOCUS}.className || {FOCUS}.name || {FOCUS}.localName"))
        assert style == "solid", stops
    assert stops[:6] == ["skip", "show", "show", "show", "search", "state"]
    assert stops[6:9] == ["sort", "button", "button"]
    assert stops[9:12] == ["picture", "summary", "picture"]


async def test_everything_to_operate_has_a_name(page, tmp_path):
    """A screen reader finds the landmarks, and a name for each control, picture and chart."""
    await page.open(batch(tmp_path))
    nodes = (await page.call("Accessibility.getFullAXTree"))["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"]
    ]
    roles = {role for role, _ in named}
    assert {"banner", "main", "search", "contentinfo", "searchbox", "radio", "status"} <= roles
    operated = {"button", "image", "link", "radio", "search", "searchbox", "DisclosureTriangle"}
    assert not [role for role, name in named if role in operated and not name.strip()]


async def test_a_long_prompt_opens_with_its_details(page, tmp_path):
    """Three lines are shown of it; opening the details by keyboard shows the rest."""
    await page.open(batch(tmp_path))
    card = "document.querySelectorAll('.card')[2]"
    prompt = f"{card}.querySelector('.prompt')"
    clamped = f"{prompt}.scrollHeight > {prompt}.clientHeight"
    assert await page.run(clamped) is True
    await page.run(f"{card}.querySelector('summary').focus()")
    await page.press("Enter")
    assert await page.run(clamped) is False


async def test_hostile_texts_run_nothing(page, tmp_path):
    """Markup in prompt, message, id, model and file name is text that can be read."""
    folder = tmp_path / "a <b>folder"
    odd = '"><script>window.hacked = 1<!--.png'
    image = saved(folder, odd, task_id=HOSTILE, prompt=HOSTILE, model=HOSTILE)
    await page.open(write_report(folder, [image, failed(message=HOSTILE, error_type=HOSTILE)]))
    assert await page.run(f"({SEE})(document.images[0])") == 64
    assert await page.run("document.querySelector('.prompt').textContent") == HOSTILE
    assert await page.run("document.querySelector('.error').textContent") == f"400 {HOSTILE}"
    await tab_to(page, ".show")
    await page.press("Enter")
    assert await page.run(COUNT) == "2 of 2 tasks"
    assert await page.run("typeof window.hacked") == "undefined"
    assert await page.run("document.title") == "a <b>folder · results"
    assert page.complaints() == []


async def test_the_policy_stops_what_escaping_should_have(page, tmp_path):
    """A script, a handler, a style or a remote image that did get in would do nothing."""
    await page.open(batch(tmp_path))
    blocked = """new Promise(done => {
        const seen = new Set();
        addEventListener('securitypolicyviolation', event => {
            seen.add(event.effectiveDirective);
            if (seen.size === 4) done([...seen].sort());
        });
        const script = document.createElement('script');
        script.textContent = 'window.hacked = 1';
        document.body.append(script);
        document.body.insertAdjacentHTML('beforeend',
            '<p style="color: red"></p><i onclick="hacked = 1"></i>' +
            '<img src="http://127.0.0.1:9/x.png">');
        document.querySelector('i').click();
    })"""
    kinds = ["img-src", "script-src-attr", "script-src-elem", "style-src-attr"]
    assert await page.run(blocked) == kinds
    assert await page.run("typeof window.hacked") == "undefined"


CONTRASTS = """(() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const light = colour => {
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = node => {
        const colour = getComputedStyle(node).backgroundColor;
        return colour === 'rgba(0, 0, 0, 0)' ? ground(node.parentElement) : colour;
    };
    const hasText = node => [...node.childNodes].some(c => c.nodeType === 3 && c.data.trim());
    const words = [...document.querySelectorAll('body *')]
        .filter(node => node.checkVisibility() && hasText(node));
    return words.filter(node => !node.closest('svg')).map(node => {
        const both = [light(getComputedStyle(node).color), light(ground(node))];
        return [(Math.max(...both) + 0.05) / (Math.min(...both) + 0.05), node.outerHTML];
    });
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_follows_the_systems_colours_and_can_be_read_in_both(scheme, page, tmp_path):
    """Every text has a contrast of at least 4.5 to 1 with what is behind it (WCAG AA)."""
    preferred = [{"name": "prefers-color-scheme", "value": scheme}]
    await page.call("Emulation.setEmulatedMedia", features=preferred)
    await page.open(batch(tmp_path))
    ground = await page.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) > 384) == (scheme == "light")
    contrasts = await page.run(CONTRASTS)
    assert len(contrasts) > 40
    assert [words for ratio, words in contrasts if ratio < 4.5] == []


# The size of what is clicked is WCAG 2.2, which axe-core leaves out by default.
AUDIT = """(async () => {
    const rules = { 'target-size': { enabled: true } };
    const { violations } = await axe.run(document, { rules, resultTypes: ['violations'] });
    return violations.flatMap(({ id, nodes }) => nodes.map(node => `${id}: ${node.html}`));
})()"""
STATES = {
    "opened": "0",
    "details": "document.querySelectorAll('details').forEach(d => d.open = true)",
    "failed": "document.querySelector('[name=state][value=failed]').click()",
    "found": "document.querySelector('.show').click()",
    "nothing": "document.querySelector('[name=state][value=unfinished]').click()",
}


@pytest.mark.skipif(AXE is None, reason="no axe-core here: pip install axe-playwright-python")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_to_complain_of(scheme, width, page, tmp_path):
    """As opened, with all details, and with each filter; on a telephone too."""
    preferred = [{"name": "prefers-color-scheme", "value": scheme}]
    await page.call("Emulation.setEmulatedMedia", features=preferred)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    await page.call("Emulation.setDeviceMetricsOverride", **size)
    await page.open(batch(tmp_path))
    await page.run(f"{AXE.read_text(encoding='utf-8')};0")
    found = {}
    for state, change in STATES.items():
        await page.run(change)
        found[state] = await page.run(AUDIT)
    assert await page.run(COUNT) == "0 of 6 tasks"
    assert found == {state: [] for state in STATES}
    await page.open(write_report(tmp_path, []))
    await page.run(f"{AXE.read_text(encoding='utf-8')};0")
    assert await page.run(AUDIT) == []


async def test_an_empty_folder_gives_a_page_without_an_error(page, tmp_path):
    """There is nothing to filter, and the script does not mind."""
    await page.open(write_report(tmp_path, []))
    assert "There are no tasks here yet." in await page.run("document.body.innerText")
    assert page.complaints() == []


@pytest.mark.parametrize("width", [360, 1440])
async def test_nothing_is_wider_than_the_window(width, page, tmp_path):
    """Long words, names and messages wrap; on a telephone too."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    await page.call("Emulation.setDeviceMetricsOverride", **size)
    endless = "x" * 500
    report = write_report(
        tmp_path,
        [
            entry(endless, record=record(prompt=endless, model=endless), saved_path=endless),
            failed(message=endless, error_type=endless),
        ],
    )
    await page.open(report)
    await page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert await page.run("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("width", "is_low"), [(360, True), (1440, False)])
async def test_on_a_telephone_a_task_without_an_image_takes_little_room(
    width, is_low, page, tmp_path
):
    """There it is the only one in its row."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    await page.call("Emulation.setDeviceMetricsOverride", **size)
    await page.open(write_report(tmp_path, [failed()]))
    height = await page.run("document.querySelector('.picture').offsetHeight")
    assert (height < 60) is is_low


TAKEN = "performance.timing.loadEventEnd - performance.timing.navigationStart"


async def test_two_thousand_images_open_within_two_seconds(page, tmp_path):
    """Pictures load as they come into view, so that a long sheet opens like a short one."""
    image = tmp_path / "image.png"
    image.write_bytes(plain_png(320, 180, b"\x20\x80\x70"))
    entries = []
    for number in range(2000):
        name = f"task-{number}.png"
        shutil.copyfile(image, tmp_path / name)
        words = record(f"task-{number}", seconds=number % 40, prompt=f"Prompt {number} " * 20)
        entries.append(entry(f"task-{number}", record=words, saved_path=name))
    report = write_report(tmp_path, entries)
    taken = []
    for _ in range(3):  # a busy machine may need another try
        await page.open(report)
        taken.append(await page.run(TAKEN))
        if taken[-1] < 2000:
            break
    assert taken[-1] < 2000, taken
    assert 4 < len(page.requests()) < 200
    await page.run("document.querySelector('[name=search]').focus()")
    started = await page.run("performance.now()")
    await page.type("Prompt 1999")
    assert await page.run(COUNT) == "1 of 2,000 tasks"
    assert await page.run("performance.now()") - started < 2000
