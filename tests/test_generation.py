"""Requests in a ledger: each is paid for at most once, over any number of runs."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3

import pytest
from client_world import error_of
from ledger_world import assert_nothing_left, entries

from kontext_async import (
    ApiError,
    ClientStateError,
    ConfigurationError,
    GenerationFailedError,
    ImageRequest,
    KontextClient,
    RateLimit,
    SubmissionUnknownError,
    TransportError,
    WaitTimeoutError,
)
from kontext_async.results import ImageSaver, Ledger, LedgerError, RequestOutcome
from kontext_async.results.ledger import store as store_module
from kontext_async.results.ledger.store import Store
from kontext_async.simulator import Simulator

pytestmark = pytest.mark.virtual_time

TOKEN_URL = "https://example.com/{token}"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "kontext.sqlite3"


def make_client(simulator, **options):
    limit = RateLimit(100_000, 1.0)
    return KontextClient("key", base_url=simulator.base_url, **{"creation_limit": limit, **options})


def prompts(count):
    return [ImageRequest(prompt=f"prompt {n}") for n in range(count)]


async def run(path, simulator, requests, *, client_options=None, **keywords):
    """Run a batch as one run of a program does, and return the outcomes by key."""
    found = {}
    async with (
        make_client(simulator, **(client_options or {})) as client,
        Ledger(path) as ledger,
        ledger.generate(client, requests, **keywords) as outcomes,
    ):
        async for outcome in outcomes:
            assert outcome.key not in found
            found[outcome.key] = outcome
    return found


def states(path):
    return {entry.key: entry.state for entry in Ledger.read_submissions(path)}


def bound(path):
    return {entry.request.prompt: entry.task_id for entry in Ledger.read_submissions(path)}


def check_bound(path, simulator):
    """Each task of the ledger is of the request it is bound to, and none has two."""
    tasks = [task_id for task_id in bound(path).values() if task_id]
    assert len(set(tasks)) == len(tasks)
    for prompt, task_id in bound(path).items():
        if task_id:
            assert f'"{prompt}"' in simulator._store[task_id].param_json


async def test_each_request_becomes_a_task_and_an_outcome(path):
    """The outcome has the key, the request and the image; the ledger has the same."""
    async with Simulator(durations=5.0) as simulator:
        found = await run(path, simulator, prompts(20))
    assert {outcome.request.prompt for outcome in found.values()} == {
        f"prompt {n}" for n in range(20)
    }
    assert all(isinstance(outcome, RequestOutcome) for outcome in found.values())
    assert {outcome.unwrap().task_id for outcome in found.values()} == set(simulator.created)
    assert set(states(path).values()) == {"submitted"}
    assert {entry.state for entry in entries(path).values()} == {"done"}
    check_bound(path, simulator)


async def test_a_second_run_pays_for_nothing(path):
    """With the lines moved, one more among them; equal lines are different requests."""
    requests = [*prompts(5), ImageRequest(prompt="prompt 0")]
    async with Simulator(durations=5.0) as simulator:
        await run(path, simulator, requests)
        assert len(simulator.created) == 6
        polls = len(simulator.requests)
        again = await run(path, simulator, reversed(requests))
        assert len(simulator.requests) == polls
        assert {o.task_id for o in again.values()} == set(simulator.created)
        await run(path, simulator, [ImageRequest(prompt="new"), *requests])
        assert len(simulator.created) == 7
    assert sum(key.endswith("#2") for key in states(path)) == 1


async def test_a_key_of_ones_own_names_a_request(path):
    """The same key with other parameters is refused; a repetition is one request."""
    one, other = prompts(2)
    async with Simulator(durations=1.0) as simulator:
        found = await run(path, simulator, [("a", one), ("a", one), ("b", one)])
        assert set(found) == {"a", "b"}
        with pytest.raises(ConfigurationError, match="'a' has another request"):
            await run(path, simulator, [("a", other)])
        with pytest.raises(ConfigurationError, match="'c' has another request"):
            await run(path, simulator, [("c", one), ("c", other)])
        assert len(simulator.created) - (states(path).get("c") == "submitted") == 2


@pytest.mark.parametrize(
    "requests",
    [
        ["a prompt"],
        [("", ImageRequest(prompt="a"))],
        [("a\nb", ImageRequest(prompt="a"))],
        [("x" * 201, ImageRequest(prompt="a"))],
        [("0123#1", ImageRequest(prompt="a"))],
        [(5, ImageRequest(prompt="a"))],
        [("a", "b", "c")],
    ],
    ids=str,
)
async def test_what_is_no_request_ends_the_batch(path, requests):
    async with Simulator() as simulator:
        await error_of(run(path, simulator, requests), ConfigurationError)
        assert simulator.created == []


@pytest.mark.parametrize(
    "keywords",
    [
        {"max_running": 0},
        {"max_running": True},
        {"max_new": -1},
        {"max_new": "1"},
        {"callback_grace": -1},
        {"timeout": -1},
        {"batch_timeout": "x"},
        {"on_submitted": 5},
    ],
    ids=str,
)
async def test_a_bad_argument_is_refused_at_the_call(path, keywords):
    async with Simulator() as simulator, make_client(simulator) as client, Ledger(path) as ledger:
        with pytest.raises(ConfigurationError):
            ledger.generate(client, prompts(1), **keywords)
        for requests in (ImageRequest(prompt="a"), "a", {"prompt": "a"}, 5):
            with pytest.raises(ConfigurationError, match="requests"):
                ledger.generate(client, requests)


async def test_a_key_of_the_ledgers_own_is_paid_for_once(path):
    """Also beside the same request without a key, in either order."""
    plain = ImageRequest(prompt="a")
    [keyed] = Ledger.keys_of([plain])
    async with Simulator() as simulator:
        assert set(await run(path, simulator, [plain, keyed])) == {keyed[0]}
        assert set(await run(path, simulator, [keyed, plain])) == {keyed[0]}
        assert len(simulator.created) == 1


async def test_a_key_may_look_like_one_of_the_ledgers_own(path):
    plain = ImageRequest(prompt="a")
    [(key, _)] = Ledger.keys_of([plain])
    own = key.partition("#")[0]
    async with Simulator() as simulator:
        assert set(await run(path, simulator, [plain, (own, plain)])) == {key, own}


async def test_requests_may_come_slowly(path):
    """From a generator, which is closed however the batch ends."""
    ended = []

    async def source():
        try:
            for request in prompts(3):
                yield request
                await asyncio.sleep(10)
        finally:
            ended.append(len(simulator.created))

    async with Simulator(durations=1.0) as simulator:
        assert len(await run(path, simulator, source())) == 3
        assert ended == [3]
        async with (
            make_client(simulator) as client,
            Ledger(path) as ledger,
            ledger.generate(client, source()) as outcomes,
        ):
            await anext(outcomes)
        assert len(ended) == 2


async def test_requests_may_come_from_an_iterator_of_ones_own(path):
    class Source:
        def __init__(self):
            self.left = prompts(2)

        def __aiter__(self):
            return self

        async def __anext__(self):
            if not self.left:
                raise StopAsyncIteration
            return self.left.pop()

    async with Simulator(durations=1.0) as simulator:
        assert len(await run(path, simulator, Source())) == 2


async def test_no_more_tasks_run_than_asked_for(path):
    """The next one is created when an outcome has been taken."""
    async with Simulator(durations=30.0) as simulator:
        async with (
            make_client(simulator) as client,
            Ledger(path) as ledger,
            ledger.generate(client, prompts(20), max_running=3) as outcomes,
        ):
            await asyncio.sleep(20)
            assert len(simulator.created) == 3
            await anext(outcomes)
            await asyncio.sleep(1)
            assert len(simulator.created) == 4
        assert list(states(path).values())[:4] == ["submitted"] * 4


async def test_a_limit_leaves_the_rest_for_another_run(path):
    """They are planned, and have no outcome."""
    async with Simulator(durations=1.0) as simulator:
        assert len(await run(path, simulator, prompts(7), max_new=3)) == 3
        assert sorted(states(path).values()) == ["planned"] * 4 + ["submitted"] * 3
        assert len(await run(path, simulator, prompts(7), max_new=3)) == 6
        assert len(await run(path, simulator, prompts(7))) == 7
        assert len(simulator.created) == 7


async def test_on_submitted_has_each_new_task_at_once(path):
    seen = []
    async with Simulator(durations=5.0) as simulator:
        await run(path, simulator, prompts(3), on_submitted=seen.append)
        await run(path, simulator, prompts(3), on_submitted=seen.append)
        assert [task.task_id for task in seen] == simulator.created


async def test_an_exception_of_on_submitted_ends_the_batch_and_loses_nothing(path):
    def fail(task):
        raise LookupError(task.task_id)

    async with Simulator(durations=5.0) as simulator:
        with pytest.raises(LookupError):
            await run(path, simulator, prompts(1), on_submitted=fail)
        assert states(path) == dict.fromkeys(states(path), "submitted")
        await run(path, simulator, prompts(1))
        assert len(simulator.created) == 1


# --- refused, and uncertain ----------------------------------------------------------------------


async def test_a_refused_request_is_not_sent_again_unless_asked_for(path):
    async with Simulator(generate_script=["code_422"], durations=1.0) as simulator:
        (outcome,) = (await run(path, simulator, prompts(1))).values()
        assert (outcome.task_id, outcome.error.code) == ("", 422)
        assert set(states(path).values()) == {"refused"}
        (again,) = (await run(path, simulator, prompts(1))).values()
        assert (type(again.error), again.error.code) == (ApiError, 422)
        assert len(simulator.requests) == 1
        (done,) = (await run(path, simulator, prompts(1), retry_failed=True)).values()
        assert done.unwrap().task_id == simulator.created[0]


async def test_without_credits_a_batch_creates_no_more_and_goes_on_waiting(path):
    """The rest has the same error, and is sent by a run after the account was filled up."""
    async with Simulator(credits=2, durations=20.0) as simulator:
        found = await run(path, simulator, prompts(6))
        assert sum(outcome.result is not None for outcome in found.values()) == 2
        assert {o.error.code for o in found.values() if o.error} == {402}
        posts = [request for request in simulator.requests if request.method == "POST"]
        assert len(posts) <= 6
        assert sorted(states(path).values()) == ["planned"] * 4 + ["submitted"] * 2
        simulator._credits = None
        assert all(o.result for o in (await run(path, simulator, prompts(6))).values())
        assert len(simulator.created) == 6


async def test_one_request_after_another_none_is_sent_after_a_refused_key(path):
    async with Simulator(generate_script=["code_401"] * 9) as simulator:
        found = await run(path, simulator, prompts(6), max_running=1)
        assert {type(o.error).__name__ for o in found.values()} == {"AuthenticationError"}
        assert len(simulator.requests) == 1
        assert set(states(path).values()) == {"planned"}


async def test_a_lost_answer_stays_uncertain_over_all_runs(path):
    """The request is never sent again, and its outcome says so each time."""
    async with Simulator(generate_script=["made_reset"], durations=1.0) as simulator:
        for _ in range(3):
            (outcome,) = (await run(path, simulator, prompts(1), retry_failed=True)).values()
            assert type(outcome.error) is SubmissionUnknownError
            assert outcome.task_id == ""
            assert set(states(path).values()) == {"unknown"}
        assert len(simulator.created) == 1


async def test_ten_lost_answers_in_a_row_end_the_creation_of_tasks(path):
    """Each may have been paid for; the rest was certainly not sent."""
    async with Simulator(generate_script=["code_500"] * 99) as simulator:
        found = await run(path, simulator, prompts(15), max_running=1)
        kinds = [type(outcome.error) for outcome in found.values()]
        assert kinds == [SubmissionUnknownError] * 10 + [TransportError] * 5
        assert "last 10 requests were lost" in str(list(found.values())[-1].error)
        assert len(simulator.requests) == 10
        assert list(states(path).values())[10:] == ["planned"] * 5


async def test_a_dead_network_ends_the_creation_of_tasks_and_pays_for_nothing(path):
    simulator = Simulator()
    async with simulator:
        base_url = simulator.base_url
    async with (
        KontextClient("key", base_url=base_url) as client,
        Ledger(path) as ledger,
        ledger.generate(client, prompts(9), max_running=2) as outcomes,
    ):
        errors = [outcome.error async for outcome in outcomes]
        assert asyncio.get_running_loop().time() < 150
    assert {type(error) for error in errors} == {TransportError}
    assert len(errors) == 9
    assert set(states(path).values()) == {"planned"}


async def test_a_failed_task_is_the_outcome_and_is_not_created_again(path):
    async with Simulator(failure_rate=1.0, durations=1.0) as simulator:
        for _ in range(2):
            (outcome,) = (await run(path, simulator, prompts(1))).values()
            assert type(outcome.error) is GenerationFailedError
        assert len(simulator.created) == 1


async def test_a_task_that_takes_too_long_is_waited_for_by_the_next_run(path):
    async with Simulator(durations=100.0) as simulator:
        (late,) = (await run(path, simulator, prompts(1), timeout=5)).values()
        assert type(late.error) is WaitTimeoutError
        (done,) = (await run(path, simulator, prompts(1))).values()
        assert [done.unwrap().task_id] == [late.task_id] == simulator.created


async def test_after_the_batch_timeout_nothing_is_created(path):
    """Tasks that run end as not finished; the rest is planned."""
    async with Simulator(durations=100.0) as simulator:
        found = await run(path, simulator, prompts(9), max_running=2, batch_timeout=30)
        assert simulator.now < 32
        assert {type(o.error) for o in found.values()} == {WaitTimeoutError}
        assert len(simulator.created) == len(found) == 2


async def test_a_bad_argument_of_a_callback_ends_the_batch(path):
    """An exception of ``on_event`` reaches the caller unchanged."""

    def fail(event):
        raise LookupError(event.task_id)

    async with Simulator() as simulator:
        with pytest.raises(LookupError):
            await run(path, simulator, prompts(3), on_event=fail)


async def test_a_wait_strategy_that_is_none_ends_the_batch(path):
    async with Simulator() as simulator:
        await error_of(run(path, simulator, prompts(3), wait=lambda _: -1), ConfigurationError)


# --- interrupted ---------------------------------------------------------------------------------


async def test_a_batch_that_ends_early_keeps_the_answers_under_way(path):
    """They get some seconds; what was not sent is planned, and nothing is left running."""
    async with Simulator(latency=3.0) as simulator, make_client(simulator) as client:
        async with Ledger(path) as ledger:
            async with ledger.generate(client, prompts(4)):
                await asyncio.sleep(1)
            assert simulator.now == pytest.approx(3, abs=0.5)
        assert len(simulator.created) == 4
        assert set(states(path).values()) == {"submitted"}
        await assert_nothing_left(path.parent, client)
    check_bound(path, simulator)


async def test_a_batch_that_ends_early_does_not_wait_for_an_answer_for_ever(path):
    async with (
        Simulator(generate_script=["made_stall"] * 2) as simulator,
        make_client(simulator, creation_limit=RateLimit(1, 60.0)) as client,
    ):
        async with Ledger(path) as ledger, ledger.generate(client, prompts(2)):
            await asyncio.sleep(1)
        assert simulator.now == pytest.approx(11, abs=0.5)
        assert sorted(states(path).values()) == ["planned", "unknown"]


@pytest.mark.parametrize(
    ("step", "state", "said"), [("made_http_502", "unknown", "502"), ("code_422", "planned", "")]
)
async def test_a_bad_answer_to_a_batch_that_ends_is_kept_too(path, step, state, said):
    async with (
        Simulator(generate_script=[step], latency=3.0) as simulator,
        make_client(simulator) as client,
    ):
        async with Ledger(path) as ledger, ledger.generate(client, prompts(1)):
            await asyncio.sleep(1)
        [entry] = Ledger.read_submissions(path)
        assert entry.state == state
        assert said in entry.error_message


async def test_closing_the_ledger_ends_its_batch(path):
    async with Simulator(durations=100.0) as simulator, make_client(simulator) as client:
        ledger = Ledger(path)
        async with ledger:
            stream = ledger.generate(client, prompts(2))
            waiting = asyncio.create_task(anext(stream))
            await asyncio.sleep(5)
        with pytest.raises(ClientStateError):
            await waiting
        await assert_nothing_left(path.parent, client)


async def test_a_stream_that_is_dropped_warns_and_ends(path):
    async with Simulator(durations=100.0) as simulator, make_client(simulator) as client:
        async with Ledger(path) as ledger:
            stream = await ledger.generate(client, prompts(2)).__aenter__()
            await asyncio.sleep(5)
            with pytest.warns(ResourceWarning):
                del stream
            await asyncio.sleep(20)
        await assert_nothing_left(path.parent, client)


async def test_a_run_that_was_killed_while_sending_is_uncertain(path):
    """The ledger says so when it is opened next, and the request is not sent."""
    async with Ledger(path) as ledger:
        entry = await ledger._submissions.plan("a", prompts(1)[0], "token")
        await ledger._submissions.set(entry.key, "sending")
    async with Simulator() as simulator:
        (outcome,) = (await run(path, simulator, [("a", prompts(1)[0])])).values()
        assert "the run ended before the answer" in str(outcome.error)
        assert not simulator.requests


# --- by hand -------------------------------------------------------------------------------------


@pytest.fixture
async def uncertain(path):
    """A ledger with an uncertain request ``a`` and a good one ``b``."""
    async with Simulator(generate_script=["made_closed"], durations=1.0) as simulator:
        requests = list(zip("ab", prompts(2), strict=True))
        await run(path, simulator, requests, max_running=1)
        yield simulator, requests


async def test_an_uncertain_request_is_decided_by_hand(path, uncertain):
    """By the task that was found: the next run waits for it."""
    simulator, requests = uncertain
    async with Ledger(path) as ledger:
        entry = await ledger.resolve("a", simulator.created[0])
        assert (entry.state, entry.task_id) == ("submitted", simulator.created[0])
    found = await run(path, simulator, requests)
    assert found["a"].unwrap().task_id == simulator.created[0]
    check_bound(path, simulator)


async def test_an_uncertain_request_is_given_up_by_hand(path, uncertain):
    """It is not sent again; it may still be bound later."""
    simulator, requests = uncertain
    async with Ledger(path) as ledger:
        assert (await ledger.resolve("a", None)).state == "abandoned"
    found = await run(path, simulator, requests, retry_failed=True)
    assert "given up by hand" in str(found["a"].error)
    assert len(simulator.created) == 2
    async with Ledger(path) as ledger:
        assert (await ledger.resolve("a", simulator.created[0])).state == "submitted"


async def test_only_what_is_uncertain_can_be_decided(path, uncertain):
    simulator, _ = uncertain
    async with Ledger(path) as ledger:
        for key, task_id, says in (
            ("c", None, "no request with the key 'c'"),
            ("b", None, "not uncertain: it is submitted"),
            ("a", " ", "blank"),
            ("a", simulator.created[1], "belongs to another request"),
        ):
            with pytest.raises(ConfigurationError, match=says):
                await ledger.resolve(key, task_id)
    assert states(path) == {"a": "unknown", "b": "submitted"}


# --- called back ---------------------------------------------------------------------------------


async def test_a_callback_finds_a_lost_task_again(path):
    """Its token names the request; the task is bound when its record has the same prompt."""
    async with (
        Simulator(generate_script=["made_reset"], durations=5.0) as simulator,
        make_client(simulator, callback_url=TOKEN_URL) as client,
        Ledger(path) as ledger,
        ledger.generate(client, prompts(1)) as outcomes,
    ):
        await asyncio.sleep(5)
        (entry,) = Ledger.read_submissions(path)
        assert entry.state == "unknown"
        other = simulator.add_task(params={"prompt": "another"})
        await ledger.add_candidate("strange token", simulator.created[0])
        await ledger.add_candidate(entry.token, other)
        await ledger.add_candidate(entry.token, "no such task")
        await asyncio.sleep(5)
        assert states(path) == {entry.key: "unknown"}
        await ledger.add_candidate(entry.token, simulator.created[0])
        (outcome,) = [outcome async for outcome in outcomes]
        assert outcome.unwrap().task_id == simulator.created[0]
    check_bound(path, simulator)


async def test_a_callback_between_two_runs_counts_too(path):
    async with Simulator(generate_script=["made_reset"], durations=1.0) as simulator:
        await run(path, simulator, prompts(1))
        (entry,) = Ledger.read_submissions(path)
        async with Ledger(path) as ledger:
            await ledger.add_candidate(entry.token, simulator.created[0])
        (outcome,) = (await run(path, simulator, prompts(1))).values()
        assert outcome.result is not None
        check_bound(path, simulator)


async def test_without_a_callback_the_wait_for_it_ends(path):
    """After its grace, counted from the loss, over a restart too."""
    async with Simulator(generate_script=["made_reset"]) as simulator:
        options = {"client_options": {"callback_url": TOKEN_URL}, "callback_grace": 30}
        (outcome,) = (await run(path, simulator, prompts(1), **options)).values()
        assert type(outcome.error) is SubmissionUnknownError
        assert simulator.now == pytest.approx(30, abs=2)


async def test_a_callback_that_names_a_task_with_another_token_is_not_believed(path):
    """Two equal prompts: each has the task that was called back with its own token."""
    equal = [ImageRequest(prompt="same"), ImageRequest(prompt="same")]
    options = {"client_options": {"callback_url": TOKEN_URL}, "callback_grace": 1}
    async with Simulator(generate_script=["made_reset"] * 2, durations=1.0) as simulator:
        await run(path, simulator, equal, max_running=1, **options)
        first, second = Ledger.read_submissions(path)
        async with Ledger(path) as ledger:
            await ledger.add_candidate(first.token, simulator.created[1])
            await ledger.add_candidate(first.token, simulator.created[0])
            await ledger.add_candidate(second.token, simulator.created[1])
        await run(path, simulator, equal, **options)
        tasks = [entry.task_id for entry in Ledger.read_submissions(path)]
        assert tasks == simulator.created


async def test_a_task_without_parameters_is_not_believed_and_not_forgotten(path):
    async with Simulator(generate_script=["made_reset"], durations=1.0) as simulator:
        await run(path, simulator, prompts(1))
        (entry,) = Ledger.read_submissions(path)
        silent = simulator.add_task(script=["params_null"], params={"prompt": "prompt 0"})
        async with Ledger(path) as ledger:
            await ledger.add_candidate(entry.token, silent)
        (outcome,) = (await run(path, simulator, prompts(1))).values()
        assert outcome.error is not None
        (outcome,) = (await run(path, simulator, prompts(1))).values()
        assert outcome.unwrap().task_id == silent


# --- the file ------------------------------------------------------------------------------------


async def test_an_older_ledger_is_upgraded_and_loses_nothing(path, monkeypatch):
    """It opens with its tasks; a reader of one that was not upgraded finds no requests."""
    known = store_module._MIGRATIONS
    monkeypatch.setattr(store_module, "_MIGRATIONS", known[:1])
    store = Store(path)
    await store.open()
    await store.run("INSERT INTO tasks VALUES (1, 'old', 'waiting', 0, " + "NULL, " * 6 + "1, 1)")
    await store.aclose()
    monkeypatch.setattr(store_module, "_MIGRATIONS", known)
    assert list(Ledger.read_submissions(path)) == []
    async with Simulator(durations=1.0) as simulator:
        await run(path, simulator, prompts(2))
    assert {e.state for e in entries(path).values() if e.task_id != "old"} == {"done"}
    assert entries(path)["old"].state == "waiting"
    assert len(states(path)) == 2


async def test_an_entry_that_something_else_wrote_is_an_error_of_the_ledger(path):
    async with Ledger(path) as ledger:
        await ledger._submissions.plan("a", prompts(1)[0], "token")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE submissions SET params = '{}'")
    with pytest.raises(LedgerError, match="'a' is unreadable"):
        list(Ledger.read_submissions(path))


async def test_a_request_that_is_not_found_again_is_an_error_of_the_ledger(path):
    """A damaged index hides it."""
    async with Ledger(path) as ledger:
        await ledger._store.run(
            "CREATE TRIGGER lost AFTER INSERT ON submissions BEGIN DELETE FROM submissions; END"
        )
        with pytest.raises(LedgerError, match="request 'a' is unreadable"):
            await ledger._submissions.plan("a", prompts(1)[0], "token")


async def test_prompts_and_tokens_are_not_in_reprs(path):
    async with Simulator(durations=1.0) as simulator:
        found = await run(path, simulator, prompts(1))
    (entry,) = Ledger.read_submissions(path)
    shown = f"{found} {entry!r}"
    assert "prompt 0" not in shown
    assert entry.token not in shown


async def test_images_are_saved_from_the_outcomes(path):
    """`save_outcomes` takes them as it takes those of ids."""
    async with (
        Simulator(durations=1.0) as simulator,
        make_client(simulator) as client,
        ImageSaver(client, path.parent) as saver,
        Ledger(path) as ledger,
        ledger.generate(client, prompts(2)) as outcomes,
        ledger.save_outcomes(outcomes, saver) as saves,
    ):
        found = [(outcome, saved) async for outcome, saved in saves]
    assert {outcome.request.prompt for outcome, _ in found} == {"prompt 0", "prompt 1"}
    assert all(saved.path.exists() for _, saved in found)
