"""A ledger across runs: known tasks are not polled again, saved images not fetched again."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import sqlite3
import tempfile
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import attrs
import pytest
from client_world import KEY, error_of, make_client
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ledger_world import (
    AT_ONCE,
    assert_nothing_left,
    collected,
    entries,
    errors,
    fill_disk,
    free_disk,
    run,
    states,
)

from kontext_async import (
    ClientStateError,
    ConfigurationError,
    GenerationFailedError,
    TaskNotFoundError,
    WaitTimeoutError,
)
from kontext_async.results import DownloadError, ImageSaver, Ledger, LedgerError, SavedImage
from kontext_async.simulator import Simulator
from kontext_async.simulator.steps import failed, refused, success


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
async def client(simulator, path):
    async with make_client(simulator) as client:
        yield client
        await assert_nothing_left(path.parent, client)


def polled(simulator):
    """Return the ids of all polls so far."""
    return [r.task_id for r in simulator.requests if r.path.endswith("record-info")]


def fetched(simulator):
    """Return the ids of all images requested so far."""
    return [r.task_id for r in simulator.requests if not r.path.endswith("record-info")]


def alter(path, sql):
    """Change a closed ledger as the library does not."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(sql)
        connection.commit()


# One run after another


async def test_a_run_continues_where_the_last_one_stopped(client, simulator, path):
    """Done and failed tasks have outcomes without a request; the others are polled again."""
    simulator.add_task("done", duration=0)
    simulator.add_task("bad", script=["failed_flagged"])
    simulator.add_task("shaky", duration=0, script=["http_500"])
    simulator.add_task("slow", duration=0, script=["generating"])
    simulator.add_task("late", duration=0, script=["not_found"])
    ids = ["done", "bad", "shaky", "slow", "late"]
    first = await run(path, client, ids, **AT_ONCE)
    assert states(path) == {
        "done": "done",
        "bad": "failed",
        "shaky": "unfinished",
        "slow": "unfinished",
        "late": "error",
    }
    again = await run(path, client, ids, **AT_ONCE)
    assert again["done"] == first["done"]
    assert again["bad"].error.__reduce__() == first["bad"].error.__reduce__()
    assert entries(path)["shaky"].error_type is None
    assert states(path) == {**dict.fromkeys(ids, "done"), "bad": "failed"}
    assert sorted(polled(simulator)) == sorted([*ids, "shaky", "slow", "late"])
    assert {name: entry.attempts for name, entry in entries(path).items()} == {
        "done": 1,
        "bad": 1,
        "shaky": 2,
        "slow": 2,
        "late": 2,
    }


async def test_a_failed_generation_is_polled_again_only_on_request(client, simulator, path):
    """A task that is done is not, even then."""
    simulator.add_task("bad", script=["failed"], duration=0)
    simulator.add_task("done", duration=0)
    await run(path, client, ["bad", "done"])
    await run(path, client, ["bad", "done"])
    assert polled(simulator).count("bad") == 1
    await run(path, client, ["bad", "done"], retry_failed=True)
    assert polled(simulator).count("bad") == 2
    assert polled(simulator).count("done") == 1


@pytest.mark.parametrize("reopened", [False, True])
async def test_a_failed_generation_that_is_polled_again_is_not_failed_any_more(
    client, simulator, path, reopened
):
    """In the same session too, and if that try does not end."""
    simulator.add_task("bad", script=["failed_flagged", "http_500", "success"])
    async with Ledger(path) as ledger:
        await collected(ledger, client, ["bad"])
        again = await collected(ledger, client, ["bad"], retry_failed=True, **AT_ONCE)
        assert not isinstance(again["bad"].error, GenerationFailedError)
        if reopened:
            await ledger.aclose()
            await ledger.__aenter__()
        found = await collected(ledger, client, ["bad"], **AT_ONCE)
        assert found["bad"].unwrap()
    assert entries(path)["bad"].error_code is None


async def test_a_ledger_may_be_opened_again(client, simulator, path):
    """It then has the present content of the file."""
    simulator.add_task("done", duration=0)
    simulator.add_task("bad", script=["failed", "http_500", "success"])
    ledger = Ledger(path)
    async with ledger:
        await collected(ledger, client, ["bad"])
    await run(path, client, ["done", "bad"], retry_failed=True, **AT_ONCE)
    async with ledger:
        found = await collected(ledger, client, ["done", "bad"])
        assert found["bad"].unwrap()
        assert "it is open already" in str(await error_of(ledger.__aenter__(), ClientStateError))
    assert polled(simulator).count("done") == 1


# Ids


@pytest.mark.parametrize("steps", [30, 50, 80])
async def test_leaving_by_an_anyio_scope_leaves_the_file_free(client, simulator, path, steps):
    """Such a scope cancels each await until it is left; the next run opens the file at once."""
    ids = [simulator.add_task(duration=3600.0) for _ in range(20)]
    streams = []
    with anyio.CancelScope() as scope:
        async with asyncio.TaskGroup() as group:

            async def leave():
                for _ in range(steps):
                    await asyncio.sleep(0.001)
                scope.cancel()

            group.create_task(leave())
            async with Ledger(path) as ledger:
                streams.append(ledger.as_completed(client, ids))
                await anext(streams[0])
    async with Ledger(path):
        assert scope.cancelled_caught
    for stream in streams:
        await stream.aclose()


async def test_ids_may_be_added_before_they_are_waited_for(client, simulator, path):
    """In their order; those that are known stay as they are."""
    simulator.add_task("b", duration=0)
    before = datetime.now(UTC)
    async with Ledger(path) as ledger:
        await ledger.add(iter(["c", "b", "c"]))
        await collected(ledger, client, ["b"])
        await ledger.add(["a", "b"])
        await ledger.add([])
    assert list(states(path).items()) == [("c", "waiting"), ("b", "done"), ("a", "waiting")]
    found = entries(path)
    assert (found["c"].attempts, found["b"].attempts) == (0, 1)
    assert before - timedelta(seconds=1) < found["b"].created_at < found["b"].updated_at
    assert found["a"].created_at == found["a"].updated_at < datetime.now(UTC) + timedelta(seconds=1)


@pytest.mark.parametrize("task_ids", ["task12345", b"ab", None, ["a", 5], ["a", ""], ["\ud800"]])
async def test_an_invalid_id_is_not_added(path, task_ids):
    """Nor are the ids beside it."""
    async with Ledger(path) as ledger:
        await error_of(ledger.add(task_ids), ConfigurationError)
    assert states(path) == {}


async def test_ids_and_messages_may_be_anything(client, simulator, path):
    """The file and the next run have them unchanged."""
    ids = ["5", "a/b?c=d&e#%25", "'; DROP TABLE tasks; --", '"', "🦊", "ü" * 300, "e\u0301", "\xe9"]
    message = "half \ud800, none \0, bell \x07, 🦊 '; DROP TABLE tasks; --"
    params = json.dumps({"prompt": message})
    for task_id in ids:
        simulator.add_task(task_id, script=[success(paramJson=params + "\udfff")])
    simulator.add_task("bad", script=[failed(10**9 - 1, message, paramJson=message)])
    async with Ledger(path) as ledger:
        await ledger.add(ids)
        first = await collected(ledger, client, [*ids, "bad"], **AT_ONCE)
        again = await collected(ledger, client, [*ids, "bad"])
    assert list(entries(path)) == [*ids, "bad"]
    for task_id in ids:
        assert again[task_id].unwrap() == first[task_id].unwrap()
        assert entries(path)[task_id].record.param_json == first[task_id].result.param_json
    bad = entries(path)["bad"]
    said = first["bad"].error.error_message
    assert "none \0, bell \x07, 🦊 '; DROP" in said
    assert (bad.error_code, bad.error_message) == (10**9 - 1, said)
    assert again["bad"].error.error_message == said


# Reading


async def test_reading_says_what_is_wrong(path):
    """There is no ledger, the file is not one, or an entry is unreadable."""
    with pytest.raises(LedgerError, match="it does not exist"):
        next(Ledger.read(path))
    path.write_text("nothing of ours")
    with pytest.raises(LedgerError, match="it is not a ledger"):
        list(Ledger.read(path))
    path.unlink()
    async with Ledger(path) as ledger:
        await ledger.add(["a", "b"])
    alter(path, "UPDATE tasks SET updated_at = 'soon' WHERE task_id = 'b'")
    reading = Ledger.read(path)
    assert next(reading).task_id == "a"
    with pytest.raises(LedgerError, match="task 'b' is unreadable"):
        next(reading)


async def test_a_reader_that_stops_early_closes_the_file(path):
    """Closing the iterator is enough."""
    async with Ledger(path) as ledger:
        await ledger.add(["a", "b"])
    reading = Ledger.read(str(path))
    assert next(reading).task_id == "a"
    reading.close()
    await assert_nothing_left(path.parent)


async def test_an_unreadable_entry_ends_the_batch_that_needs_it(client, simulator, path):
    """With an error that names it."""
    simulator.add_task("done", duration=0)
    await run(path, client, ["done"])
    alter(path, "UPDATE tasks SET record = NULL")
    assert "task 'done' is unreadable" in str(
        await error_of(run(path, client, ["done"]), LedgerError)
    )


async def test_an_entry_that_is_not_found_again_ends_the_batch(client, simulator, path):
    """A damaged index hides it, which the check at the opening does not see."""
    simulator.add_task("done", duration=0)
    async with Ledger(path) as ledger:
        await collected(ledger, client, ["done"])
        await ledger._store.run("DELETE FROM tasks")
        error = await error_of(collected(ledger, client, ["done"]), LedgerError)
    assert "task 'done' is unreadable" in str(error)


async def test_flipped_bytes_are_named_or_harmless(path):
    """A file that a bad disk has damaged can be read, or a `LedgerError` says why not."""
    async with Ledger(path) as ledger:
        await ledger.add(f"t\N{LATIN SMALL LETTER A WITH DIAERESIS}sk-{n}" for n in range(200))
    whole = path.read_bytes()
    refused = 0
    for seed in range(300):
        choice = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(choice.choice([1, 3, 30])):
            damaged[choice.randrange(len(damaged))] = choice.randrange(256)
        path.write_bytes(damaged)
        try:
            list(Ledger.read(path))
            async with Ledger(path):
                pass
        except LedgerError:
            refused += 1
    assert 0 < refused < 300


async def test_a_ledger_without_its_table_is_refused(path):
    """And closed again."""
    async with Ledger(path):
        pass
    alter(path, "DROP TABLE tasks")
    assert "no such table" in str(await error_of(Ledger(path).__aenter__(), LedgerError))
    await assert_nothing_left(path.parent)


# Images


async def save(path, client, task_ids, **options):
    """Run a batch that saves, and return each image or error."""
    async with (
        Ledger(path) as ledger,
        ImageSaver(client, path.parent / "images", **options) as saver,
        ledger.as_completed(client, task_ids) as outcomes,
        ledger.save_outcomes(outcomes, saver) as saves,
    ):
        return {outcome.task_id: saved async for outcome, saved in saves}


@pytest.fixture
def one(simulator):
    return simulator.add_task("one", duration=0)


async def test_a_saved_image_is_recorded_and_not_fetched_again(client, simulator, path, one):
    """Its path is relative to the ledger's folder; the next run has the same answer."""
    simulator.add_task("bad", script=["failed"])
    first = await save(path, client, [one, "bad"])
    entry = entries(path)[one]
    assert entry.saved_path == first[one].path.relative_to(path.parent).as_posix()
    assert (entry.sha256, entry.size) == (first[one].sha256, first[one].size)
    assert await save(path, client, [one, "bad"]) == first == {**first, "bad": None}
    assert fetched(simulator) == [one]


async def test_a_recorded_address_that_went_stale_is_replaced(client, simulator, path):
    """The API is asked once more, the image is saved, and the new address is recorded."""
    task_id = simulator.add_task(duration=0.0, outcome="success", age=900.0)
    await run(path, client, [task_id])
    stale = f"{simulator.base_url}/images/gone-{task_id}.png"
    fresh = entries(path)[task_id].record.result_image_url
    alter(path, f"UPDATE tasks SET record = replace(record, '{fresh}', '{stale}')")
    before = simulator.polls(task_id)
    saved = await save(path, client, [task_id])
    assert isinstance(saved[task_id], SavedImage)
    assert simulator.polls(task_id) == before + 1
    assert entries(path)[task_id].record.result_image_url == fresh


@pytest.mark.parametrize("answer", ["same", "refused"])
async def test_an_image_that_is_gone_for_good_is_its_outcome(answer, client, simulator, path):
    """If the API has no other address, or does not answer, the first error stands."""
    script = ["success", "code_500"] if answer == "refused" else []
    task_id = simulator.add_task(
        duration=0.0, outcome="success", age=900.0, script=script, image_script=["html_404"] * 9
    )
    await run(path, client, [task_id])
    saved = await save(path, client, [task_id])
    assert isinstance(saved[task_id], DownloadError)
    assert saved[task_id].http_status == 404


async def test_a_folder_may_have_any_bytes_in_its_name(client, simulator, path, one):
    """Text that is not UTF-8 is recorded as it is, and found again."""
    folder = path.parent / os.fsdecode(b"images-\xff")
    for _ in range(2):
        async with (
            Ledger(path) as ledger,
            ImageSaver(client, folder) as saver,
            ledger.as_completed(client, [one]) as outcomes,
            ledger.save_outcomes(outcomes, saver) as saves,
        ):
            (saved,) = [saved async for _, saved in saves]
        assert saved.path.parent == folder
    assert len(fetched(simulator)) == 1
    assert entries(path)[one].saved_path == f"{folder.name}/{saved.path.name}"


async def test_the_folder_may_be_moved(client, simulator, path, one):
    """With the ledger and the images in it."""
    await save(path, client, [one])
    moved = path.parent.rename(path.parent.with_name("moved"))
    found = await save(moved / path.name, client, [one])
    assert found[one].path.is_relative_to(moved)
    assert fetched(simulator) == [one]
    moved.rename(path.parent)


@pytest.mark.parametrize("change", [Path.unlink, lambda file: file.write_bytes(b"other")])
async def test_an_image_that_has_changed_is_fetched_again(client, simulator, path, one, change):
    """By a saver that may overwrite."""
    first = await save(path, client, [one])
    change(first[one].path)
    assert await save(path, client, [one], overwrite=True) == first
    assert fetched(simulator) == [one, one]


async def test_a_changed_image_is_not_overwritten_without_overwrite(client, simulator, path, one):
    """That is an error, which is recorded."""
    first = await save(path, client, [one])
    first[one].path.write_bytes(b"other")
    assert isinstance((await save(path, client, [one]))[one], DownloadError)
    assert first[one].path.read_bytes() == b"other"
    entry = entries(path)[one]
    assert (entry.state, entry.error_type) == ("done", "DownloadError")


async def test_an_image_saved_but_not_recorded_is_found(client, simulator, path, one):
    """As a run leaves it that was killed in between."""
    first = await save(path, client, [one])
    alter(path, "UPDATE tasks SET saved_path = NULL, sha256 = NULL, size = NULL, kind = NULL")
    assert await save(path, client, [one]) == first
    assert entries(path)[one].sha256 == first[one].sha256
    assert fetched(simulator) == [one]


async def test_an_image_that_could_not_be_saved_is_tried_again(client, path, one):
    """The reason is recorded until then."""
    assert isinstance((await save(path, client, [one], max_bytes=9))[one], DownloadError)
    entry = entries(path)[one]
    assert (entry.state, entry.error_type, entry.saved_path) == ("done", "DownloadError", None)
    assert isinstance((await save(path, client, [one]))[one], SavedImage)
    entry = entries(path)[one]
    assert (entry.error_type, entry.error_message) == (None, "")
    assert entry.saved_path


async def test_images_may_be_recorded_by_hand(client, path, one):
    """Saved or not."""
    saved = SavedImage(path=path.parent / "sub" / "a.png", size=7, sha256="ab12", kind="png")
    async with Ledger(path) as ledger:
        await collected(ledger, client, [one])
        await ledger.record_save_failed(one, DownloadError("gone", task_id=one, http_status=404))
        assert entries(path)[one].error_message == "gone"
        await ledger.record_saved(one, saved)
    entry = entries(path)[one]
    assert (entry.saved_path, entry.sha256, entry.size) == ("sub/a.png", "ab12", 7)
    assert entry.error_type is None


@pytest.mark.parametrize(
    ("image", "saved_path"),
    [("a.png", "a.png"), ("sub/a.png", "sub/a.png"), ("../other/a.png", "../other/a.png")],
)
async def test_a_path_in_the_working_folder_is_relative_to_the_ledger(
    client, path, one, monkeypatch, image, saved_path
):
    """Wherever the image is, it is found from the ledger."""
    monkeypatch.chdir(path.parent)
    async with Ledger(path) as ledger:
        await collected(ledger, client, [one])
        await ledger.record_saved(
            one, SavedImage(path=Path(image), size=7, sha256="ab12", kind="png")
        )
    assert entries(path)[one].saved_path == saved_path


async def test_a_failed_generation_has_no_image_to_record(client, simulator, path):
    """Its own reason and its outcome remain."""
    simulator.add_task("bad", script=["failed_flagged"])
    saved = SavedImage(path=path.parent / "a.png", size=7, sha256="ab12", kind="png")
    async with Ledger(path) as ledger:
        await collected(ledger, client, ["bad"])
        await ledger.record_save_failed("bad", DownloadError("gone"))
        await ledger.record_saved("bad", saved)
        again = await collected(ledger, client, ["bad"])
    assert again["bad"].error.error_code == entries(path)["bad"].error_code == 400
    assert entries(path)["bad"].saved_path is None


async def test_an_image_that_cannot_be_recorded_raises(client, path, simulator):
    """From the next save, or from the closing of the ledger."""
    ids = [simulator.add_task(f"{n}", duration=0) for n in range(3)]
    async with ImageSaver(client, path.parent / "images") as saver:
        ledger = await Ledger(path).__aenter__()
        outcomes = await collected(ledger, client, ids)

        async def again(task_id):
            yield outcomes[task_id]

        async def save_one(task_id):
            async with ledger.save_outcomes(again(task_id), saver) as saves:
                return [saved async for _, saved in saves]

        ledger._store._connections[0].execute("PRAGMA query_only = ON")
        assert isinstance((await save_one("0"))[0], SavedImage)
        await asyncio.sleep(0.05)
        assert "readonly" in str(await error_of(save_one("1"), LedgerError))
        await save_one("2")
        assert "readonly" in str(await error_of(ledger.aclose(), LedgerError))


# Disk full, and the key


async def test_after_a_full_disk_a_ledger_continues(client, simulator, path):
    """Entries from before are readable in the meantime."""
    ids = [simulator.add_task(f"{n}", duration=0, params={"prompt": "p" * 9000}) for n in range(9)]
    async with Ledger(path) as ledger:
        await collected(ledger, client, ids[:2])
        fill_disk(ledger._store)
        error = await error_of(collected(ledger, client, ids), LedgerError)
        assert "the disk is full; what was recorded before is safe" in str(error)
        assert {states(path)[name] for name in ids[:2]} == {"done"}
        free_disk(ledger._store)
        assert sorted(await collected(ledger, client, ids)) == ids
    assert states(path) == dict.fromkeys(ids, "done")
    assert [polled(simulator).count(name) for name in ids[:2]] == [1, 1]


async def test_the_key_is_in_no_file(client, simulator, path):
    """Neither while the ledger is open nor afterwards, though every answer echoes it."""
    prompt = json.dumps({"prompt": f"Bearer {KEY}"})
    simulator.add_task("done", script=[success(paramJson=prompt)])
    simulator.add_task("bad", script=[failed(400, f"no: {KEY}", paramJson=prompt)])
    simulator.add_task("poor", script=[refused(402, f"no credits for {KEY}")])
    simulator.add_task("odd", script=[(200, {"Content-Type": "text/html"}, KEY.encode())])
    simulator.add_task("slow", duration=math.inf, params={"prompt": KEY})
    simulator.add_task("who", script=[refused(401, f"{KEY} is unknown")])
    ids = ["done", "bad", "poor", "odd", "slow", "who"]
    async with Ledger(path) as ledger:
        for task_id in ids:
            await collected(ledger, client, [task_id], **AT_ONCE)
        await ledger.record_save_failed("done", DownloadError("gone"))
        found = entries(path)
        assert found["bad"].error_message.startswith("no: ")
        assert found["poor"].error_message.startswith("no credits for ")
        content = [file.read_bytes() for file in path.parent.iterdir()]
        assert any(b"no credits for" in part for part in content)
    content += [file.read_bytes() for file in path.parent.iterdir()]
    assert not any(KEY.encode() in part for part in content)


# Any batch, stopped anywhere


# The answers to a task's polls, and the errors that its outcomes may have.
KINDS = {
    "done": (["success"], {type(None)}),
    "bad": (["failed"], {GenerationFailedError}),
    "slow": (["generating", "generating", "success"], {type(None), WaitTimeoutError}),
    "endless": (["generating"] * 9, {WaitTimeoutError}),
    "shaky": (["http_500", "success"], None),
    "unknown": (["not_found"] * 9, {TaskNotFoundError}),
}


@attrs.frozen
class Story:
    """Some tasks, and runs over them that each stop after a number of outcomes."""

    kinds: list[str]
    stops: list[int]
    room: int
    time: float | None

    @property
    def ids(self):
        return [f"{kind}-{n}" for n, kind in enumerate(self.kinds)]


STORIES = st.builds(
    Story,
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=7),
    stops=st.lists(st.integers(0, 7), max_size=2),
    room=st.integers(1, 4),
    time=st.sampled_from([None, None, 0.0]),
)


async def run_story(story, path):
    async with Simulator() as simulator, make_client(simulator) as client:
        for task_id, kind in zip(story.ids, story.kinds, strict=True):
            simulator.add_task(task_id, script=KINDS[kind][0])
        given = [*story.ids, *story.ids, " "]
        keywords = {"max_in_flight": story.room, **AT_ONCE}
        for stop in story.stops:
            ended = ended_by(path)
            before = len(simulator.requests)
            limit = story.time
            async with (
                Ledger(path) as ledger,
                ledger.as_completed(client, given, batch_timeout=limit, **keywords) as outcomes,
            ):
                taken = 0
                async for _ in outcomes:
                    taken += 1
                    if taken > stop:
                        break
            assert not ended & set(polled(simulator)[before:])
            assert ended <= ended_by(path)
            await assert_nothing_left(path.parent, client)
        ended = ended_by(path)
        before = len(simulator.requests)
        found = await run(path, client, given, **keywords)
        assert sorted(polled(simulator)[before:]) == sorted(set(story.ids) - ended)
        assert sorted(found) == sorted({*story.ids, " "})
        for task_id, kind in zip(story.ids, story.kinds, strict=True):
            assert KINDS[kind][1] is None or type(found[task_id].error) in KINDS[kind][1]
        done = {
            name
            for name, kind in errors(found).items()
            if kind in {type(None), GenerationFailedError}
        }
        assert ended_by(path) == done
        assert set(states(path)) == set(story.ids)


def ended_by(path):
    """Return the ids that are done or have failed by a ledger."""
    if not path.exists():
        return set()
    return {name for name, state in states(path).items() if state in {"done", "failed"}}


@settings(max_examples=15)
@given(STORIES)
@example(Story(sorted(KINDS), [0, 3], 2, None))
@example(Story(["done"] * 7, [6, 2], 1, 0.0))
def test_wherever_a_run_stops_the_next_one_has_each_id_once(story):
    """Each id has one outcome, and tasks that are done or have failed are not polled again."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run_story(story, Path(folder) / "ledger.sqlite3"))
