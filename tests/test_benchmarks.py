"""Each benchmark in a tiny form, so that they run when they are wanted."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re

import pytest
from benchmarks import (
    aims,
    cpu,
    discovery,
    fast_server,
    ledger_cost,
    page,
    saving,
    scale,
    schedule_efficiency,
    schedule_prior,
    soak,
)

from kontext_async import ErrorOutcome, WaitTimeoutError

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="plots need matplotlib"
)
PEERS = {"httpx + tenacity": "httpx", "openai": "openai", "fal-client": "fal_client"}


def test_the_cost_of_a_wait_is_a_ratio_to_the_bare_loop_in_the_same_run():
    rows = cpu.run(names=("kontext-async", "bare aiohttp"), rounds=2, waits=5, concurrencies=(2,))
    assert [(row["client"], row["polls"]) for row in rows] == [
        ("kontext-async", 1),
        ("bare aiohttp", 1),
        ("kontext-async", 3),
        ("bare aiohttp", 3),
    ]
    assert [row["ratio"] for row in rows[1::2]] == [1.0, 1.0]
    assert all(row["ratio"] > 0 for row in rows)
    assert cpu.table(rows).count("\n") == 3


async def test_a_wait_of_ours_can_use_a_session_of_the_users():
    with fast_server.serving() as base_url:
        async with cpu.CONTESTANTS["kontext-async, your session"](base_url) as wait:
            assert (await wait("done-1")).task_id == "done-1"


@pytest.mark.parametrize(("peer", "package"), PEERS.items())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_peer_gets_its_answer_from_the_fast_server(peer, package):
    pytest.importorskip(package)
    rows = cpu.run(names=("bare aiohttp", peer), rounds=1, waits=1, concurrencies=(1,))
    assert [row["client"] for row in rows if row["polls"] == 3] == ["bare aiohttp", peer]


def test_the_simulator_sees_less_refused_of_the_client_than_of_gather():
    case = discovery.Case(requests=10, period=1, kind="window", windows=16)
    rows = {row["way"]: row for row in discovery.run([case])}
    assert rows["kontext-async"]["answered"] > 0.5
    assert rows["kontext-async"]["refused"] < 0.07
    assert rows["gather"]["refused"] > 0.5
    assert rows["kontext-async, told"]["refusals"] == 0
    assert all(row["asked_to_the_end"] for row in rows.values())
    assert discovery.table(rows.values()).count("\n") == 2


def test_a_limit_that_is_no_window_is_not_told():
    case = discovery.Case(requests=5, period=1, kind="bucket", windows=2)
    assert {row["way"] for row in discovery.run([case])} == {"kontext-async", "gather"}


@pytest.mark.parametrize(("apart", "seconds"), [(0.0, 60), (30.0, 150)])
def test_clients_that_share_a_limit_are_counted_each(apart, seconds):
    sharing = discovery.Sharing(5, 1, "bucket", clients=2, apart=apart)
    assert sharing.case().windows - seconds in (0, 1)
    [row] = discovery.run_sharing([sharing], phases=[0.3])
    assert 0.9 < row["answered"] < 1.1
    assert 0.0 < row["refused"] < 0.2
    assert 0.0 < row["fairness"] < 1.0
    assert 0.0 < row["least"] < 1.0
    assert 0.0 < row["late"] < 2.0
    assert discovery.sharing_table([row]).count("\n") == 2


def test_a_narrow_limit_lets_every_task_meet_its_deadline():
    """A hundredth of the work that the benchmark does."""
    result = discovery.run_deadlines(tasks=50)
    assert (result["results"], result["refusals"]) == (50, 0)
    assert discovery.deadlines_table(result).count("\n") == 2


def test_the_requests_of_each_second_are_counted():
    for row in discovery.by_second(requests=10, windows=3):
        assert len(row["answered"]) == len(row["refused"]) == 3
        assert row["answered"][0] == 10 < row["answered"][0] + row["refused"][0]


def test_waiting_tasks_are_weighed_and_timed():
    [row] = scale.run(counts=(200,), names=("kontext-async",), rounds=1)
    assert row["polled_s"] > 0
    assert row["cancelled_s"] > 0
    assert row["longest_callback_s"] > 0
    assert scale.table([row]).count("\n") == 2
    [row] = scale.run_wide(counts=(200,), rounds=1)
    assert row["polls"] >= 200
    assert 0 < scale.us_per_poll(row) < 1e6 * row["polled_cpu_s"]
    assert scale.wide_table([row]).count("\n") == 2


async def test_the_plain_loop_polls_every_task_and_leaves_nothing_behind():
    polls: asyncio.Queue[int] = asyncio.Queue()
    with fast_server.serving() as base_url:
        way = scale.WAYS["a plain loop each"](base_url, ["never-1", "never-2"], polls.put_nowait)
        async with asyncio.timeout(10), way:
            assert [await polls.get() for _ in range(2)] == [1, 1]


def test_every_task_of_a_bad_day_is_accounted_for():
    result = soak.run(tasks=300, fault_rate=0.05)
    assert result["accounted_for"] == result["right"] == result["tasks"] == 300
    assert result["failed_polls"]
    assert soak.table(result).count("\n") == 2


def test_a_wrong_outcome_is_seen_to_be_wrong():
    fate = soak.Scripted(duration=12.0, failure=None, straggler=False)
    error = WaitTimeoutError(task_id="task-1", elapsed=600.0, polls=9)
    lost = ErrorOutcome(task_id="task-1", error=error)
    assert not soak.is_right(lost, fate, "http://127.0.0.1")


def test_the_schedules_are_compared():
    rows = schedule_efficiency.compare("tight", "one a second", tasks=20, seeds=(1,))
    assert [row["schedule"] for row in rows][::2] == ["exponential", "learned"]
    rows += schedule_efficiency.compare("tight", "all at once", tasks=20, seeds=(1,))
    assert schedule_efficiency.table(rows).count("\n") == 2


def test_the_ages_of_polls_are_beside_those_at_which_tasks_end():
    rows = schedule_efficiency.by_age(tasks=50)
    assert [row["shape"] for row in rows] == ["tight", "mixed", "wide"]
    assert sum(rows[0]["ended"]) == 50
    assert rows[0]["polls"].keys() == {"exponential", "optimum", "learned"}


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
    assert [row["way"] for row in rows] == 2 * list(saving.WAYS)
    assert rows[-1]["cores"] == 1
    assert (rows[0]["cpu"]["ratio"], rows[0]["speed"]["ratio"]) == (1.0, 1.0)
    assert saving.table(rows).count("\n") == 7


def test_what_a_ledger_adds_is_a_ratio_to_what_sqlite_takes_alone():
    rows = ledger_cost.run(tasks=100, rounds=1)
    assert [row["recorded"] for row in rows] == 2 * ["outcomes", "outcomes and images"]
    assert all(row["us_with"] > row["us_without"] and row["us_sqlite"] > 0 for row in rows)
    assert ledger_cost.table(rows).count("\n") == 5


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(0.98, "reached"), (1.04, "**in part**"), (1.2, "**not reached**")]
)
def test_an_aim_is_reached_if_every_measurement_is_within_bounds(ratio, verdict):
    [*_, within] = aims._aim("a wait", "{:.2f} alone, {:.2f} with 64", ratio, ratio - 0.1, most=1)
    assert aims._verdict(within) == verdict


def test_the_places_of_a_page_are_filled_each_time_anew():
    text = "One\n<!-- from the run: cpu -->\n<!-- end -->\nTwo\n"
    once = page.filled(text, {"cpu": "| 1 |"})
    assert once == "One\n<!-- from the run: cpu -->\n\n| 1 |\n\n<!-- end -->\nTwo\n"
    assert page.filled(once, {"cpu": "| 1 |"}) == once
    with pytest.raises(KeyError):
        page.filled(text, {})


def test_the_documentation_has_all_tables_as_the_results_beside_it_make_them():
    parts = page.parts(json.loads((page.DOCS / page.RESULTS).read_text(encoding="utf-8")))
    places = set()
    for name in page.PAGES:
        text = (page.DOCS / name).read_text(encoding="utf-8")
        assert page.filled(text, parts) == text
        places.update(re.findall(r"<!-- from the run: (\w+) -->", text))
    assert places == parts.keys()


@needs_matplotlib
def test_every_plot_is_drawn_for_light_and_dark_pages_and_again_the_same(tmp_path):
    from benchmarks import plots

    results = {
        "cpu": cpu.run(names=("bare aiohttp",), rounds=1, waits=2, concurrencies=(1, 2)),
        "seconds": discovery.by_second(requests=5, windows=3),
        "ages": schedule_efficiency.by_age(tasks=50),
    }
    drawn = []
    for _ in range(2):
        plots.draw(results, tmp_path)
        drawn.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert drawn[0] == drawn[1]
    assert drawn[0].keys() == {f"{name}-{t}.svg" for name in plots.PLOTS for t in plots.THEMES}


def test_the_fast_server_ends_with_its_block():
    import urllib.error
    import urllib.request

    with fast_server.serving() as base_url:
        assert urllib.request.urlopen(f"{base_url}/v1/videos/done-1").headers["Date"]
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(base_url, timeout=1)
