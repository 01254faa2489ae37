"""The state that wait strategies read, and the schedule that learns."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import statistics
from bisect import bisect_right

import pytest
import tenacity
from benchmarks import schedule_efficiency as bench
from hypothesis import given
from hypothesis import strategies as st
from tenacity import wait_fixed

from kontext_async import ConfigurationError
from kontext_async.models import TaskRecord, TaskStatus
from kontext_async.schedule import DurationModel, PollState, wait_learned

RECORD = TaskRecord(task_id="a", status=TaskStatus.GENERATING)


def state_after(attempt=3, *, age=10.0, error=None, failures=0):
    state = PollState(100.0)
    record = None if error else RECORD
    state.update(now=107.0, attempt=attempt, age=age, record=record, error=error, failures=failures)
    return state


def taught(durations, **settings):
    """Return a model that has seen tasks of these durations, one after another."""
    model = DurationModel(**settings)
    for k, duration in enumerate(durations):
        age = model.next_age(0.0)
        while age < duration:
            model.observe(str(k), age)
            age = model.next_age(age)
        model.observe(str(k), age, duration)
    return model


class TestPollState:
    @pytest.mark.parametrize(
        ("wait", "low", "high"),
        [
            (tenacity.wait_fixed(2), 2, 2),
            (tenacity.wait_none(), 0, 0),
            (tenacity.wait_random(1, 2), 1, 2),
            (tenacity.wait_exponential(), 4, 4),
            (tenacity.wait_random_exponential(), 0, 4),
            (tenacity.wait_full_jitter(), 0, 4),
            (tenacity.wait_exponential_jitter(), 4, 5),
            (tenacity.wait_incrementing(1, 2), 5, 5),
            (tenacity.wait_chain(wait_fixed(1), wait_fixed(2), wait_fixed(3)), 3, 3),
            (tenacity.wait_combine(wait_fixed(1), wait_fixed(2)), 3, 3),
            (wait_fixed(1) + wait_fixed(5), 6, 6),
            (tenacity.wait_exception(lambda error: float(str(error))), 9, 9),
            (lambda state: state.seconds_since_start + state.idle_for, 7, 7),
            (lambda state: state.outcome.exception() and len(state.get_fn_name()), 1, 20),
        ],
    )
    def test_every_strategy_of_tenacity_works_on_it(self, wait, low, high):
        """The state has all that tenacity's strategies read, with the driver's times."""
        assert low <= wait(state_after(error=OSError("9"), failures=1)) <= high

    def test_it_has_every_attribute_of_tenacitys_own_state(self):
        """Strategies of users find every attribute that they would find in tenacity."""
        theirs = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
        ours = PollState(0.0)
        assert set(vars(theirs)) - {"outcome"} <= set(vars(ours))
        for name in ("args", "attempt_number", "fn", "idle_for", "kwargs", "upcoming_sleep"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert "none yet" in repr(PollState(0.0))

    def test_the_outcome_of_a_good_poll_is_its_record(self):
        """A strategy that asks for the outcome gets a future of the last record."""
        outcome = state_after().outcome
        assert not outcome.failed
        assert outcome.result() is RECORD
        assert outcome.attempt_number == 3

    def test_the_outcome_of_a_failed_poll_is_its_error(self):
        """A strategy that asks for the outcome gets a future of the last error."""
        error = OSError("broken")
        outcome = state_after(error=error).outcome
        assert outcome.failed
        assert outcome.exception() is error

    def test_the_outcome_is_made_once_and_only_when_asked_for(self):
        """No future is built for a poll unless a strategy reads it."""
        state = state_after()
        assert state._outcome is None
        assert state.outcome is state.outcome
        state.update(now=108.0, attempt=4, age=11.0, error=OSError())
        assert state.outcome.failed

    def test_before_the_first_poll_there_is_no_outcome(self):
        """A new state has neither an outcome nor a time since the start."""
        assert PollState(0.0).outcome is None
        assert PollState(0.0).seconds_since_start is None
        assert PollState(0.0).age == 0.0

    def test_a_strategy_may_set_the_outcome(self):
        """The outcome can be written, as in tenacity's own state."""
        state = state_after()
        state.outcome = tenacity.Future.construct(3, "mine", has_exception=False)
        assert state.outcome.result() == "mine"

    def test_tenacity_may_reset_it(self):
        """The changes that tenacity makes to its state between two attempts work on this one."""
        state = state_after()
        state.prepare_for_next_attempt()
        assert state.outcome is None
        assert state.attempt_number == 4


class TestLearning:
    def test_a_fresh_model_polls_early(self):
        """Before anything is known, tasks may take 2 s or 180 s."""
        assert 2.0 < DurationModel().next_age(0.0) < 4.0

    @pytest.mark.parametrize("duration", [3.0, 12.0, 40.0])
    def test_the_first_poll_comes_when_the_first_tasks_end(self, duration):
        """Tasks of about the same duration are first polled at about that age."""
        rng = random.Random(1)
        model = taught(duration * rng.uniform(0.9, 1.1) for _ in range(200))
        assert duration * 0.85 < model.next_age(0.0) < duration * 1.15

    def test_tasks_still_running_count(self):
        """The model learns that many tasks run for long before any of them ends."""
        model = DurationModel()
        for k in range(100):
            model.observe(str(k), 25.0)
        assert model.next_age(0.0) > 25.0

    def test_the_first_tasks_to_finish_do_not_mislead(self):
        """Of tasks that began together the shortest end first; those still running count too."""
        model = DurationModel()
        for k in range(1000):
            model.observe(str(k), 10.0, 9.5) if k % 50 == 0 else model.observe(str(k), 10.0)
        alone = taught([9.5] * 20)
        assert model.next_age(0.0) > alone.next_age(0.0) + 1.0

    def test_expensive_requests_are_fewer(self):
        """`cost_per_request` sets the balance between lag and requests."""
        durations = [random.Random(k).lognormvariate(2.5, 0.5) for k in range(200)]
        gaps = []
        for cost in (0.3, 1.0, 3.0):
            model = taught(durations, cost_per_request=cost)
            gaps.append(model.next_age(12.0) - 12.0)
        assert gaps[0] < gaps[1] < gaps[2]

    def test_where_nothing_is_known_it_polls_every_15_seconds(self):
        """A task older than all known ones is polled at a steady rate."""
        model = taught([12.0] * 50)
        assert model.next_age(1000.0) == 1015.0
        assert model.next_age(5000.0) == pytest.approx(5015.0)

    def test_the_curve_reaches_to_the_longest_task_and_back(self):
        """The curve grows with tasks that take long, and shrinks when they are forgotten."""
        model = taught([400.0] * 40)
        assert 385.0 < model.next_age(350.0) < 415.0
        for k in range(2000):
            model.observe(str(k), 12.0, 10.0)
        assert model.next_age(350.0) == pytest.approx(365.0)

    def test_a_forgotten_task_leaves_no_trace(self):
        """A wait that gives up frees the memory of its task."""
        model = DurationModel()
        model.observe("a", 5.0)
        assert "running=1" in repr(model)
        model.forget("a")
        model.forget("a")
        assert repr(model) == "<DurationModel cost_per_request=1 finished=0 running=0>"

    def test_a_finished_task_is_no_longer_kept(self):
        """Only running tasks take memory."""
        model = taught([5.0] * 30)
        assert repr(model) == "<DurationModel cost_per_request=1 finished=30 running=0>"

    def test_two_waits_for_one_task_count_its_time_once(self):
        """Polls at an age already known, and ages that go back, add nothing."""
        once, twice = DurationModel(), DurationModel()
        for age in (3.0, 8.0, 13.0):
            once.observe("a", age)
            for seen in (age, age, age - 1.0):
                twice.observe("a", seen)
        assert once.to_json() == twice.to_json()

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -1.0])
    def test_a_number_that_is_not_a_time_is_ignored(self, number):
        """A value from a broken clock changes nothing."""
        model, untouched = DurationModel(), DurationModel().to_json()
        model.observe("a", number)
        model.observe("a", 5.0, number)
        assert model.to_json() == untouched

    @pytest.mark.parametrize("duration", [0.0, 3600.0, 1e9])
    def test_durations_at_the_ends_of_the_scale_are_accepted(self, duration):
        """Tasks may take no time, or longer than the curve covers."""
        model = DurationModel()
        for k in range(300):
            model.observe(str(k), duration)
            model.observe(str(k), duration + 1.0, duration)
        assert 0.25 <= model.next_age(0.0) <= 120.0

    @pytest.mark.parametrize("cost", [0.0, -1.0, math.nan, math.inf])
    def test_a_cost_that_is_not_positive_and_finite_is_refused(self, cost):
        """The error names the argument."""
        with pytest.raises(ConfigurationError, match="cost_per_request must be a positive"):
            DurationModel(cost_per_request=cost)


STEPS = {0.25: 10, 0.5: 20, 1: 60, 2: 120, 5: 300, 10: 600, 30: 1200, 60: 3600}
EDGES = [0.0]
for step, until in STEPS.items():
    while EDGES[-1] < until:
        EDGES.append(EDGES[-1] + step)
BINS = len(EDGES) - 1


def saved(ended, reached, finished=0):
    """Return the saved text of a model with these counts in its bins."""
    state = {"version": 2, "finished": finished, "ended": ended, "reached": reached}
    return json.dumps(state)


def bins(model):
    """Return the counts of all bins."""
    state = json.loads(model.to_json())
    return [state[name] + [0.0] * (BINS - len(state[name])) for name in ("ended", "reached")]


def polled(model, until=200.0):
    """Return the ages up to ``until`` at which the model polls a task."""
    ages = [0.0]
    while ages[-1] < until:
        ages.append(model.next_age(ages[-1]))
    return ages[1:]


class TestCounts:
    def test_a_task_that_ends_counts_in_its_bin_and_as_having_reached_all_before(self):
        """One task of 1.1 s: its end is in the fifth bin, and everything fades by 1/300."""
        model = DurationModel()
        model.observe("a", 1.5, 1.1)
        ended, reached = bins(model)
        fade = 299 / 300
        assert ended[:6] == pytest.approx([0, 0, 0, 0, fade, 0], rel=1e-5)
        assert reached[:6] == pytest.approx([fade] * 5 + [0], rel=1e-5)

    def test_a_whole_second_ends_its_bin(self):
        """So a poll at that second sees the tasks that end there."""
        model = DurationModel()
        model.observe("a", 5.5, 5.0)
        assert EDGES[bins(model)[0].index(max(bins(model)[0])) + 1] == 5.0

    def test_a_task_seen_to_run_cannot_have_ended_before(self):
        """Where the service's clock says so, its whole seconds are to blame."""
        model = DurationModel()
        model.observe("a", 5.0)
        model.observe("a", 6.0, 4.0)
        ended, reached = bins(model)
        assert EDGES[ended.index(max(ended))] == 5.0
        assert reached[:21] == pytest.approx([299 / 300] * 21, rel=1e-5)

    def test_a_running_task_counts_in_the_bins_whose_ends_it_has_reached(self):
        """Two polls of a running task add up to its time, and no end."""
        model = DurationModel()
        model.observe("a", 0.4)
        assert bins(model)[1][:2] == [1.0, 0.0]
        model.observe("a", 1.1)
        ended, reached = bins(model)
        assert not any(ended)
        assert reached[:6] == pytest.approx([1, 1, 1, 1, 0, 0], rel=1e-5)

    def test_a_poll_within_a_bin_does_not_count_there(self):
        """It would see the tasks that have ended, and none that reached the end of the bin."""
        model = DurationModel()
        model.observe("a", 4.9, 4.8)
        ended, reached = bins(model)
        assert not any(ended)
        assert reached[18:20] == [1.0, 0.0]

    def test_a_second_poll_within_a_bin_counts_there(self):
        """However frequent the polls are, the end of a task is counted."""
        model = DurationModel()
        model.observe("a", 4.8)
        model.observe("a", 4.9, 4.85)
        assert bins(model)[0][19] == pytest.approx(1.0, rel=0.01)

    def test_many_ends_between_two_plans_keep_their_ratio(self):
        """A thousand tasks are polled at once, and a quarter of them have ended."""
        model = DurationModel()
        for k in range(1000):
            model.observe(str(k), 6.0, 5.0 if k % 4 == 0 else None)
        ended, reached = bins(model)
        assert ended[19] / reached[19] == pytest.approx(0.25, rel=1e-5)

    def test_a_bin_forgets_a_hundredth_with_each_task_that_passes_through(self):
        """Passing tasks scale both counts; those that reached it level off at 100."""
        model = DurationModel.from_json(saved([1.0] * BINS, [0.0] * BINS))
        for k in range(50):
            model.observe(str(k), EDGES[20] + 0.001)
        ended, reached = bins(model)
        left = 0.99**50
        assert ended[5:20] == pytest.approx([left] * 15, rel=1e-5)
        assert reached[5:20] == pytest.approx([100 * (1 - left)] * 15, rel=1e-5)

    def test_all_bins_fade_with_each_task_that_ends(self):
        """Bins that tasks no longer reach forget as well, by 1/300 a task."""
        model = DurationModel.from_json(saved([1.0] * BINS, [5.0] * BINS))
        for k in range(30):
            model.observe(str(k), 1.0, 0.1)
        ended, reached = bins(model)
        fade = (299 / 300) ** 30
        assert ended[1:] == pytest.approx([fade] * (BINS - 1), rel=1e-5)
        assert reached[1:] == pytest.approx([5.0 * fade] * (BINS - 1), rel=1e-5)

    def test_a_task_beyond_the_last_bin_reaches_the_end_of_all_and_ends_in_none(self):
        """The curve covers an hour."""
        model = DurationModel()
        model.observe("a", 9000.0, EDGES[-1] + 1.0)
        ended, reached = bins(model)
        assert not any(ended)
        assert reached == pytest.approx([1.0] * BINS, rel=1e-5)


def model_of(draw, *, cost=1.0, sample=4000):
    """Return a model that knows a distribution well, and its durations."""
    rng = random.Random(5)
    durations = sorted(draw(rng) for _ in range(sample))
    below = [bisect_right(durations, edge) for edge in EDGES]
    ended = [(b - a) * 100 / max(1, sample - a) for a, b in itertools.pairwise(below)]
    text = saved(ended, [100.0] * BINS)
    return DurationModel.from_json(text, cost_per_request=cost), durations


class TestPlan:
    @pytest.mark.parametrize("shape", [k for k in bench.SHAPES if "shift" not in k])
    def test_a_known_distribution_costs_the_optimum(self, shape):
        """The programme is exact to the width of the bins."""
        model, durations = model_of(bench.SHAPES[shape][0])
        exact = wait_learned(model, jitter=wait_fixed(1.0), scout=wait_fixed(1.0))
        _, best = TestEfficiency.plan(shape)
        starts = [0.0] * len(durations)
        spent, _ = bench.simulate(exact, durations, starts)
        ideal, _ = bench.simulate(best, durations, starts)
        everyone = range(len(durations))
        assert bench.mean_cost(spent, everyone) <= 1.04 * bench.mean_cost(ideal, everyone)

    def test_no_mode_is_passed_over(self):
        """Half the tasks take 5 s and half 45 s: a poll follows each, and none is between."""
        model, _ = model_of(bench.TWO_MODES)
        ages = polled(model, 40.0)
        assert 5.0 <= ages[0] <= 6.5
        assert not [age for age in ages if 8.0 < age < 38.0]

    @pytest.mark.parametrize(("known", "tasks"), [(0.0, 1), (4.0, 5), (100.0, 20)])
    def test_it_is_made_anew_the_sooner_the_fewer_tasks_were_seen_at_an_age(self, known, tasks):
        """Tasks that end change the next age only when the plan is made again."""
        model = DurationModel.from_json(saved([0.0] * BINS, [known] * BINS))
        before, ended = model.revision, 0
        while model.revision == before:
            model.observe(str(ended), 3.0, 2.0)
            ended += 1
        assert ended == tasks

    def test_running_tasks_make_it_anew_ten_times_as_late(self):
        """They are the many, and each shows little."""
        model = DurationModel()
        before, polls = model.revision, 0
        while model.revision == before:
            model.observe(str(polls), 2.0)
            polls += 1
        assert polls == pytest.approx(10, abs=1)

    def test_the_trend_goes_on_where_nothing_is_known(self):
        """Tasks that end faster and faster up to 10 s are expected to go on ending after it."""
        rising = [0.2 * k for k in range(20)]
        trend = DurationModel.from_json(saved([0.0] * 20 + rising, [20.0] * 40))
        flat = DurationModel.from_json(saved([0.0] * 40, [20.0] * 40))
        assert trend.next_age(10.0) < 12.5
        assert flat.next_age(10.0) > 15.0

    def test_a_task_polled_just_before_many_end_is_polled_again_soon(self):
        """It may be one of those that end at 6 s; the others run for 30 s more."""
        model = DurationModel()
        for k in range(100):
            model.observe(str(k), 40.0, 6.0 if k % 2 else 36.0)
        assert model.next_age(6.01) > 30.0
        assert model.next_age(5.9) == pytest.approx(6.15)

    def test_a_step_is_a_quarter_of_a_second_at_least(self):
        """However cheap a request is."""
        text = saved([1.0] * BINS, [20.0] * BINS)
        model = DurationModel.from_json(text, cost_per_request=1e-6)
        assert model.next_age(5.0, 0.5) == pytest.approx(5.25)

    def test_the_polls_of_a_fresh_model_are_those_of_the_prior(self):
        """They are pinned, so that the prior does not change unnoticed."""
        expected = [3.0, 6.5, 11.5, 19.5, 30.0, 42.0, 54.0, 66.0, 78.0, 90.0, 102.0, 114.0]
        assert polled(DurationModel(), 110.0) == pytest.approx(expected, abs=0.001)

    def test_most_of_a_large_batch_waits_for_what_a_few_scouts_see(self):
        """Where 16 tasks run and few were so old, scouts are wanted; elsewhere they are not."""
        model = DurationModel()
        for k in range(15):
            model.observe(str(k), 0.0)
        assert not model.scout_share(0.25, 4.0)
        model.observe("15", 0.0)
        assert model.scout_share(0.25, 4.0) == 0.125
        assert model.scout_share(0.25, 1e6) == 0.125
        assert not model.scout_share(4.0, 4.0)
        for k in range(1000):
            model.observe(f"running{k}", 0.0)
        assert model.scout_share(0.25, 4.0) == pytest.approx(50 * 1.5 / 1016)
        for k in range(40):
            model.observe(f"ended{k}", 20.0, 12.0)
        model.next_age(0.0)
        assert not model.scout_share(0.25, 5.0)
        assert model.scout_share(0.25, 30.0)

    def test_the_revision_changes_with_the_plan(self):
        """Planned polls move when the plan does, and not for every task that ends."""
        model, revisions = DurationModel(), set()
        for k in range(2000):
            model.observe(str(k), 12.0, 10.0)
            revisions.add(model.revision)
        assert 100 <= len(revisions) < 130


times = st.floats(0.0, 4000.0)
numbers = st.floats()
observations = st.lists(
    st.tuples(st.sampled_from("abc"), times | numbers, st.none() | times | numbers), max_size=60
)
costs = st.floats(min_value=0.0, exclude_min=True, allow_infinity=False, allow_nan=False)


class TestProperties:
    @given(observations, costs, times, numbers)
    def test_the_next_poll_is_within_the_bounds(self, seen, cost, age, step):
        """The next poll is 0.25 s to 120 s away, whatever was learned and whatever the jitter."""
        model = DurationModel(cost_per_request=cost)
        for observation in seen:
            model.observe(*observation)
        assert 0.25 - 1e-9 <= model.next_age(age, step) - age <= 120.0 + 1e-9

    @given(observations, times, times)
    def test_an_older_task_is_not_polled_earlier(self, seen, one, other):
        """The next age grows with the age."""
        model = DurationModel()
        for observation in seen:
            model.observe(*observation)
        first, second = sorted([one, other])
        assert model.next_age(first) <= model.next_age(second) + 1e-6

    @given(observations)
    def test_saving_and_loading_keeps_all_that_was_learned(self, seen):
        """A loaded model saves the same text and polls at the same ages."""
        model = DurationModel()
        for observation in seen:
            model.observe(*observation)
        loaded = DurationModel.from_json(model.to_json())
        again = DurationModel.from_json(loaded.to_json())
        assert loaded.to_json() == model.to_json()
        assert [again.next_age(t) for t in range(60)] == [loaded.next_age(t) for t in range(60)]

    @given(st.text() | st.recursive(st.none() | numbers | st.text(), st.lists).map(json.dumps))
    def test_any_other_text_is_refused(self, text):
        """Loading gives a model or `ConfigurationError`."""
        with pytest.raises(ConfigurationError):
            DurationModel.from_json(text)


class TestSaving:
    def test_a_new_process_starts_where_the_last_one_ended(self):
        """A loaded model knows all durations at once; the cost is the new process's own."""
        rng = random.Random(2)
        model = taught(rng.gauss(40.0, 4.0) for _ in range(200))
        loaded = DurationModel.from_json(model.to_json(), cost_per_request=2.0)
        assert loaded.next_age(0.0) == pytest.approx(model.next_age(0.0), rel=0.1)
        assert repr(loaded) == "<DurationModel cost_per_request=2 finished=200 running=0>"

    def change(self, **parts):
        return json.dumps(json.loads(DurationModel().to_json()) | parts)

    def test_the_cost_is_not_saved(self):
        """A loaded model has the default cost unless it is given another."""
        text = DurationModel(cost_per_request=3.0).to_json()
        assert DurationModel.from_json(text).cost_per_request == 1.0

    @pytest.mark.parametrize(("ended", "tasks"), [(600.0, 200.0), (600.1, 0.0), (0.0, 200.1)])
    def test_counts_are_bounded_by_twice_what_a_bin_remembers(self, ended, tasks):
        """At most 600 tasks ended, and 200 reached."""
        text = saved([ended] * BINS, [tasks] * BINS)
        if (ended, tasks) == (600.0, 200.0):
            assert bins(DurationModel.from_json(text))[0] == [600.0] * BINS
        else:
            with pytest.raises(ConfigurationError, match="is out of range"):
                DurationModel.from_json(text)

    def test_the_text_is_bounded(self):
        """A text longer than any saved model is not parsed."""
        longest = self.change(more="").ljust(65_536)
        assert DurationModel.from_json(longest).to_json() == DurationModel().to_json()
        with pytest.raises(ConfigurationError, match="not a JSON object, or too long"):
            DurationModel.from_json(longest + " ")
        with pytest.raises(ConfigurationError, match="not a JSON object, or too long"):
            DurationModel.from_json(self.change(more="x" * 100_000))

    @pytest.mark.parametrize("version", [0, 1, "2", None, [2]])
    def test_another_version_is_refused(self, version):
        """Numbers of another version would mean something else."""
        with pytest.raises(ConfigurationError, match="of version 2"):
            DurationModel.from_json(self.change(version=version))

    @pytest.mark.parametrize("name", ["ended", "reached"])
    @pytest.mark.parametrize("bins", [None, {}, "text", [0.0] * (BINS + 1)])
    def test_missing_numbers_are_refused(self, name, bins):
        """Each list has at most a number for each bin."""
        with pytest.raises(ConfigurationError, match=f"'{name}' has the wrong length"):
            DurationModel.from_json(self.change(**{name: bins}))

    @pytest.mark.parametrize("number", [-1, 1e300, math.nan, math.inf, "1", None, True, [1]])
    @pytest.mark.parametrize("name", ["ended", "reached", "finished"])
    def test_numbers_out_of_range_are_refused(self, name, number):
        """A number that no model saves is refused."""
        value = number if name == "finished" else [number] * BINS
        with pytest.raises(ConfigurationError, match=f"'{name}' is out of range"):
            DurationModel.from_json(self.change(**{name: value}))


class TestMerging:
    def test_a_new_model_takes_over_what_another_knows(self):
        """It polls as the other does from then on, at its own cost."""
        known = DurationModel.from_json(taught([40.0] * 30).to_json())
        new = DurationModel(cost_per_request=known.cost_per_request)
        new.merge(known)
        assert new.to_json() == known.to_json()
        assert [new.next_age(t) for t in range(60)] == [known.next_age(t) for t in range(60)]

    def test_two_models_have_the_ratio_of_both_and_the_evidence_of_the_better_informed(self):
        """A bin that 30 and 10 of 100 tasks ended in has 20 of 100; 5 of 20 more make it 21 %."""
        model = DurationModel.from_json(saved([30.0, 30.0, 7.0], [100.0, 100.0, 70.0], 9))
        model.merge(DurationModel.from_json(saved([10.0, 5.0], [100.0, 20.0], 7)))
        ended, reached = bins(model)
        assert ended[:4] == pytest.approx([20.0, 35.0 / 1.2, 7.0, 0.0], rel=1e-5)
        assert reached[:4] == [100.0, 100.0, 70.0, 0.0]
        assert json.loads(model.to_json())["finished"] == 9

    @given(observations)
    def test_a_model_merged_with_its_copy_stays_as_it_is(self, seen):
        """So workers may merge again and again, and claim no more than they know."""
        model = DurationModel()
        for observation in seen:
            model.observe(*observation)
        before = bins(model)
        model.merge(DurationModel.from_json(model.to_json()))
        for bin_before, bin_after in zip(before, bins(model), strict=True):
            assert bin_after == pytest.approx(bin_before, rel=1e-4)


class TestWaitLearned:
    exact = wait_fixed(1.0)

    def strategy(self, model=None):
        return wait_learned(model or DurationModel(), jitter=self.exact, spread=self.exact)

    def test_it_waits_until_the_models_next_age(self):
        """The delay leads from the task's age to the age of the next poll."""
        model = DurationModel()
        assert self.strategy(model)(state_after(age=10.0)) == model.next_age(10.0) - 10.0

    def test_it_composes_with_tenacitys_strategies(self):
        """It adds to any other strategy."""
        wait = self.strategy()
        assert (wait + wait_fixed(2.0))(state_after()) == pytest.approx(wait(state_after()) + 2.0)

    def test_the_jitter_multiplies_the_delay(self):
        """Half the delay is an earlier poll."""
        model = DurationModel()
        wait = wait_learned(model, jitter=wait_fixed(0.5))
        assert wait(state_after(age=10.0)) == model.next_age(10.0, 0.5) - 10.0

    def test_tasks_begun_together_are_not_polled_together(self):
        """By default the delay varies by two per cent."""
        model = DurationModel()
        wait = wait_learned(model)
        delays = [wait(state_after(age=10.0)) for _ in range(50)]
        assert len(set(delays)) > 40
        assert min(delays) >= model.next_age(10.0) - 10.0
        assert max(delays) <= model.next_age(10.0, 1.02) - 10.0

    def test_after_a_failed_poll_it_backs_off_from_one_second(self):
        """The failed poll may have missed the task's end, so the next one comes soon."""
        model = taught([55.0] * 100)
        delays = [
            self.strategy(model)(state_after(age=1.0, error=OSError(), failures=n))
            for n in (1, 2, 3, 8, 1000)
        ]
        assert delays == pytest.approx([1.0, 1.4, 1.96, 8.0, 8.0])

    def test_a_failed_poll_never_makes_the_delay_longer(self):
        """Where the curve polls earlier than the backoff, the curve decides."""
        model = taught([12.0 + k / 100 for k in range(200)], cost_per_request=0.05)
        calm = self.strategy(model)(state_after(age=12.0))
        assert calm < 8.0
        assert self.strategy(model)(state_after(age=12.0, error=OSError(), failures=9)) == calm

    def test_the_backoff_is_spread(self):
        """By default the backoff varies by twenty per cent."""
        wait = wait_learned(taught([55.0] * 100))
        delays = [wait(state_after(age=1.0, error=OSError(), failures=1)) for _ in range(50)]
        assert len(set(delays)) > 40
        assert 0.8 <= min(delays) <= max(delays) <= 1.2

    def test_scouts_are_polled_before_the_planned_age(self):
        """They are those with the smallest values, spread evenly over the root of the age."""
        model = DurationModel()
        for k in range(1000):
            model.observe(str(k), 0.0)
        state = state_after(age=1.0)
        planned = model.next_age(1.0)
        share = model.scout_share(1.25, planned)
        scouts = [
            wait_learned(model, jitter=self.exact, scout=wait_fixed(place * share))
            for place in (0.0, 0.5, 1.0)
        ]
        half = ((math.sqrt(1.25) + math.sqrt(planned)) / 2) ** 2
        delays = [scout(state) for scout in scouts]
        assert delays == pytest.approx([0.25, half - 1.0, planned - 1.0])

    def test_a_poll_that_moves_sends_no_scouts_to_where_they_are(self):
        """Scouts were chosen up to the age for which it was planned."""
        model = DurationModel()
        for k in range(1000):
            model.observe(str(k), 0.0)
        eager = wait_learned(model, jitter=self.exact, scout=wait_fixed(0.0))
        planned = model.next_age(1.0)
        state = state_after(age=1.0)
        assert eager(state) == pytest.approx(0.25)
        assert eager.delay_again(state, planned - 1.0) == pytest.approx(planned - 2.0)
        assert eager.delay_again(state, planned + 1.0) == planned - 1.0

    @pytest.mark.parametrize(
        ("age", "expected"), [(5.76, 6.0), (5.99, 6.0), (6.0, 6.0), (6.009, 6.009), (6.02, 7.0)]
    )
    def test_a_poll_that_should_have_been_before_now_waits_for_a_whole_second(self, age, expected):
        """Unless one has just passed, by no more than a timer may be late."""
        assert wait_learned.overdue_age(age) == expected

    def test_in_a_plain_tenacity_loop_the_age_is_the_time_since_its_start(self):
        """The strategy also serves retries of other things."""
        slept = []
        model = DurationModel()
        retrying = tenacity.Retrying(
            wait=self.strategy(model),
            stop=tenacity.stop_after_attempt(2),
            sleep=slept.append,
            retry=tenacity.retry_if_result(lambda value: value is None),
            retry_error_callback=lambda state: None,
        )
        retrying(lambda: None)
        assert slept == [pytest.approx(model.next_age(0.0), abs=0.1)]


class TestEfficiency:
    """A reduced form of the benchmark `schedule_efficiency`."""

    @staticmethod
    @functools.cache
    def plan(*shape):
        """Return durations and their optimum, by a shape of the benchmark or a median and sigma."""
        draw = bench.SHAPES[shape[0]][-1] if len(shape) == 1 else bench.lognormal(*shape)
        return draw, bench.Planned(bench.optimum(draw, sample=4000))

    def ratio(self, *shape, at_once, tasks=2000, seeds=(7, 8)):
        draw, plan = self.plan(*shape)
        ratios = []
        for seed in seeds:
            rng = random.Random(seed)
            durations = [draw(rng) for _ in range(tasks)]
            starts = [0.0 if at_once else float(k) for k in range(tasks)]
            spent, _ = bench.learned(durations, starts, seed=seed)
            best, _ = bench.simulate(plan, durations, starts)
            everyone = range(tasks)
            ratios.append(bench.mean_cost(spent, everyone) / bench.mean_cost(best, everyone))
        return statistics.fmean(ratios)

    @pytest.mark.parametrize("shape", [k for k in bench.SHAPES if "shift" not in k])
    def test_it_comes_near_the_optimum_from_a_fresh_start(self, shape):
        """J over all tasks, learning included, against a schedule that knows the durations."""
        bars = {"mixed": 1.07, "Pareto": 1.08, "150 s": 1.08, "stragglers": 1.10}
        bars |= {"two modes, whole seconds": 1.10, "three modes, whole seconds": 1.10}
        assert self.ratio(shape, at_once=False) <= bars.get(shape, 1.06)

    @pytest.mark.parametrize("shape", [k for k in bench.SHAPES if "shift" not in k])
    def test_a_large_batch_begun_at_once_learns_from_its_first_tasks(self, shape):
        """Scouts, and polls that move: within a quarter of a schedule that knows the durations."""
        assert self.ratio(shape, at_once=True, seeds=range(7, 11)) <= 1.25

    @pytest.mark.parametrize("shape", [k for k in bench.SHAPES if "shift" not in k])
    def test_a_large_batch_begun_at_once_costs_less_than_with_a_backoff(self, shape):
        """Also where the tasks are of several kinds, or all alike."""
        durations, starts = bench.case(shape, "all at once", 1000, 7)
        spent, _ = bench.learned(durations, starts, seed=7)
        backoff, _ = bench.simulate(bench.Exponential(7), durations, starts)
        assert bench.mean_cost(spent, range(1000)) < bench.mean_cost(backoff, range(1000))

    @pytest.mark.parametrize(("median", "sigma"), bench.FRESH)
    def test_a_fresh_model_costs_no_more_than_a_backoff(self, median, sigma):
        """For one task and for twelve, from the shortest tasks to the longest."""
        [row] = bench.run_fresh(cases=[(median, sigma)], waits=240)
        assert max(row["1"], row["12"]) <= 1.0

    @pytest.mark.parametrize("shape", ["shift up", "shift down"])
    def test_it_follows_when_durations_change(self, shape):
        """Once 200 tasks of a new kind have ended, it is near that kind's optimum."""
        _, plan = self.plan(shape)
        durations, starts = bench.case(shape, "one a second", 1600, 7)
        spent, order = bench.learned(durations, starts)
        best, _ = bench.simulate(plan, durations, starts)
        late = [k for k in order if k >= 800][bench.SETTLED :]
        assert bench.mean_cost(spent, late) <= 1.12 * bench.mean_cost(best, late)

    def test_the_benchmark_compares_all_schedules(self):
        """The learned schedule's row is better than the backoff's."""
        rows = bench.compare("tight", "one a second", tasks=300, seeds=(7,))
        by_name = {row["schedule"]: row for row in rows}
        assert by_name["learned"]["ratio"] < by_name["exponential"]["ratio"]
        assert by_name["optimum"]["ratio"] == 1.0
