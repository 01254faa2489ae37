"""Each benchmark in a tiny form, so that they run when they are wanted."""

from __future__ import annotations

import asyncio
import importlib.util

import pytest
from benchmarks import (
    cpu,
    discovery,
    fast_server,
    ledger_cost,
    saving,
    scale,
    schedule_efficiency,
    schedule_prior,
    soak,
)

from kontext_async import TaskOutcome, WaitTimeoutError

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="plots need matplotlib"
)
PEERS = {"httpx + tenacity": "httpx", "openai": "openai", "fal-client": "fal_client"}


def test_the_cost_of_a_wait_is_a_ratio_to_the_bare_loop_in_the_same_run():
    rows = cpu.run(names=("kontext-async", "bare aiohttp"), rounds=2, waits=5, concurrencies=(2,))
    assert [(row["client"], row["looks"]) for row in rows] == [
        ("kontext-async", 1),
        ("bare aiohttp", 1),
        ("kontext-async", 3),
        ("bare aiohttp", 3),
    ]
    assert [row["ratio"] for row in rows[1::2]] == [1.0, 1.0]
    assert all(row["ratio"] > 0 for row in rows)
    assert cpu.table(rows).count("\n") == 5


@pytest.mark.parametrize(("peer", "package"), PEERS.items())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_peer_gets_its_answer_from_the_fast_server(peer, package):
    pytest.importorskip(package)
    rows = cpu.run(names=("bare aiohttp", peer), rounds=1, waits=1, concurrencies=(1,))
    assert [row["client"] for row in rows if row["looks"] == 3] == ["bare aiohttp", peer]


def test_the_simulator_sees_less_refused_of_the_client_than_of_gather():
    case = discovery.Case(requests=10, period=1, kind="window", windows=16)
    rows = {row["way"]: row for row in discovery.run([case])}
    assert rows["kontext-async"]["answered"] > 0.5
    assert rows["kontext-async"]["refused"] < 0.07
    assert rows["gather"]["refused"] > 0.5
    assert rows["kontext-async, told"]["refusals"] == 0
    assert all(row["asked_to_the_end"] for row in rows.values())
    assert discovery.table(rows.values()).count("\n") == 4


def test_a_limit_that_is_no_window_is_not_told():
    case = discovery.Case(requests=5, period=1, kind="bucket", windows=2)
    assert {row["way"] for row in discovery.run([case])} == {"kontext-async", "gather"}


def test_a_narrow_limit_lets_every_task_meet_its_deadline():
    """A hundredth of the work that the benchmark does."""
    result = discovery.run_deadlines(tasks=50)
    assert (result["results"], result["refusals"]) == (50, 0)


def test_waiting_tasks_are_weighed_and_timed():
    [row] = scale.run(counts=(200,), names=("kontext-async",))
    assert row["looked_at_s"] > 0
    assert row["left_s"] > 0
    assert row["longest_callback_s"] > 0
    assert scale.table([row]).count("\n") == 2
    [row] = scale.run_wide(counts=(200,))
    assert row["looked_at_cpu_s"] > 0
    assert scale.wide_table([row]).count("\n") == 2


async def test_the_plain_loop_looks_at_every_task_and_leaves_nothing_behind():
    looked = asyncio.Semaphore(0)
    with fast_server.serving() as base_url:
        way = scale.WAYS["a plain loop each"](base_url, ["never-1", "never-2"], looked.release)
        async with asyncio.timeout(10), way:
            await looked.acquire()
            await looked.acquire()


def test_every_task_of_a_bad_day_is_accounted_for():
    result = soak.run(tasks=300, fault_rate=0.05)
    assert result["accounted_for"] == result["right"] == result["tasks"] == 300
    assert result["failed_looks"]
    assert soak.table(result).count("\n") == 2


def test_a_wrong_outcome_is_seen_to_be_wrong():
    fate = soak.Fate(duration=12.0, failure=None, straggler=False)
    error = WaitTimeoutError(task_id="task-1", elapsed=600.0, polls=9)
    lost = TaskOutcome(task_id="task-1", error=error)
    assert not soak.is_right(lost, fate, "http://127.0.0.1")


def test_the_schedules_are_compared():
    rows = schedule_efficiency.compare("tight", "one a second", tasks=20, seeds=(1,))
    assert [row["schedule"] for row in rows][::2] == ["exponential", "learned"]


def test_other_durations_are_ratios_to_their_optimum():
    rows = schedule_efficiency.run_lognormals(medians=(6, 60), sigmas=(0.8,), tasks=20, seeds=(1,))
    assert [row["median_s"] for row in rows] == [6, 60]
    assert all(row["one a second"] > 0 and row["all at once"] > 0 for row in rows)
    assert schedule_efficiency.lognormals_table(rows).count("\n") == 3


def test_fresh_models_are_compared_with_the_backoff():
    [row] = schedule_efficiency.run_fresh(cases=[(12, 0.2)], waits=12)
    assert 0 < row["1"] < 1.2
    assert 0 < row["12"] < 1.2


def test_the_prior_hedges_against_every_median():
    worst, prior = schedule_prior.run([(2, 0.4), (100, 0.4)], rounds=3, sample=20)
    assert 0 < worst < 2
    assert all(rate > 0 for rate in schedule_prior.hazards(prior).values())


def test_saving_is_a_ratio_to_the_bare_loop_in_the_same_run():
    rows = saving.run(images=3, image_bytes=5_000, rounds=1)
    assert [row["way"] for row in rows] == list(saving.WAYS)
    assert (rows[0]["cpu"]["ratio"], rows[0]["speed"]["ratio"]) == (1.0, 1.0)
    assert saving.table(rows).count("\n") == 4


def test_what_a_ledger_adds_is_a_ratio_to_what_sqlite_takes_alone():
    rows = ledger_cost.run(tasks=100, rounds=1)
    assert [row["recorded"] for row in rows] == ["outcomes", "outcomes and images"]
    assert all(row["us_with"] > row["us_without"] and row["us_sqlite"] > 0 for row in rows)
    assert ledger_cost.table(rows).count("\n") == 3


@needs_matplotlib
def test_the_plots_are_drawn(tmp_path):
    rows = cpu.run(names=("kontext-async", "bare aiohttp"), rounds=1, waits=2, concurrencies=(1,))
    cpu.plot(rows, tmp_path / "cpu.png")
    discovery.plot(tmp_path / "discovery.png", windows=3)
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_fast_server_ends_with_its_block():
    import urllib.error
    import urllib.request

    with fast_server.serving() as base_url:
        assert urllib.request.urlopen(f"{base_url}/v1/videos/done-1").headers["Date"]
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(base_url, timeout=1)
