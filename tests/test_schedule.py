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
    def test_a_fresh_model_first_polls_where_most_tasks_may_have_ended(self):
        """Before anything is known, the prior expects most tasks to take 8 to 30 seconds."""
        assert 6.0 < DurationModel().next_age(0.0) < 11.0

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
        assert 0.25 <= model.next_age(0.0) <= 60.0

    @pytest.mark.parametrize("cost", [0.0, -1.0, math.nan, math.inf])
    def test_a_cost_that_is_not_positive_and_finite_is_refused(self, cost):
        """The error names the argument."""
        with pytest.raises(ConfigurationError, match="cost_per_request must be a positive"):
            DurationModel(cost_per_request=cost)


EDGES = [5.0 * (1.05**k - 1.0) for k in range(136)]
WIDTHS = [b - a for a, b in itertools.pairwise(EDGES)]


def saved(ended, at_risk, finished=0):
    """Return the saved text of a model with these counts in its bins."""
    state = {"version": 1, "finished": finished, "ended": ended, "at_risk": at_risk}
    return json.dumps(state)


def bins(model):
    state = json.loads(model.to_json())
    return state["ended"], state["at_risk"]


def polled(model, until=200.0):
    """Return the ages up to ``until`` at which the model polls a task."""
    ages = [0.0]
    while ages[-1] < until:
        ages.append(model.next_age(ages[-1]))
    return ages[1:]


class TestCounts:
    def test_a_task_that_ends_counts_in_its_bin_and_its_time_in_all_bins_before(self):
        """One task of 1.1 s: its end is in the fifth bin, and everything fades by 1/300."""
        model = DurationModel()
        model.observe("a", 1.5, 1.1)
        ended, at_risk = bins(model)
        fade = 299 / 300
        assert ended[:6] == pytest.approx([0, 0, 0, 0, fade, 0], rel=1e-5)
        assert at_risk[:4] == pytest.approx([width * fade for width in WIDTHS[:4]], rel=1e-5)
        assert at_risk[4] == pytest.approx((1.1 - EDGES[4]) * fade, rel=1e-5)
        assert not any(at_risk[5:])

    def test_a_running_task_counts_from_the_age_at_which_it_was_last_seen(self):
        """Two polls of a running task add up to its time, and no end."""
        model = DurationModel()
        model.observe("a", 0.4)
        model.observe("a", 1.1)
        ended, at_risk = bins(model)
        assert not any(ended)
        assert at_risk[0] == pytest.approx(WIDTHS[0])
        assert at_risk[1] == pytest.approx(
            0.15 * (1 - (0.1125 / WIDTHS[1]) / 100) + 0.1125, rel=1e-5
        )
        assert at_risk[2:4] == pytest.approx(WIDTHS[2:4], rel=1e-5)
        assert at_risk[4] == pytest.approx(1.1 - EDGES[4], rel=1e-5)

    def test_time_within_a_bin_counts_in_it(self):
        """A task last seen in the first bin has spent its whole time there."""
        model = DurationModel()
        model.observe("a", 0.1)
        assert bins(model)[1][:2] == [0.1, 0.0]

    def test_observations_are_counted_after_500_at_the_latest(self):
        """Memory does not grow with polls, also where nothing asks for the next age."""
        model = DurationModel()
        for k in range(499):
            model.observe(str(k), 1.0, 2.0)
        assert len(model._pending) == 499
        model.observe("last", 1.0, 2.0)
        assert not model._pending

    def test_a_bin_forgets_a_hundredth_with_each_task_that_passes_through(self):
        """Passing tasks scale both counts; at risk they level off at 100 tasks."""
        model = DurationModel.from_json(saved([1.0] * 135, [0.0] * 135))
        for k in range(50):
            model.observe(str(k), EDGES[20] + 0.001)
        ended, at_risk = bins(model)
        left = 0.99**50
        assert ended[5:20] == pytest.approx([left] * 15, rel=1e-5)
        assert at_risk[5:20] == pytest.approx(
            [100 * w * (1 - left) for w in WIDTHS[5:20]], rel=1e-5
        )
        assert ended[21:] == pytest.approx([1.0] * 114)

    def test_all_bins_fade_with_each_task_that_ends(self):
        """Bins that tasks no longer reach forget as well, by 1/300 a task."""
        model = DurationModel.from_json(saved([1.0] * 135, [5.0] * 135))
        for k in range(30):
            model.observe(str(k), 1.0, 0.1)
        ended, at_risk = bins(model)
        fade = (299 / 300) ** 30
        assert ended[1:] == pytest.approx([fade] * 134, rel=1e-5)
        assert at_risk[1:] == pytest.approx([5.0 * fade] * 134, rel=1e-5)

    def test_the_longest_duration_counts_only_as_time(self):
        """A task beyond the last bin passes through all of them and ends in none."""
        model = DurationModel()
        model.observe("a", 9000.0, EDGES[-1])
        ended, at_risk = bins(model)
        assert not any(ended)
        assert at_risk == pytest.approx(WIDTHS, rel=1e-5)


class TestCurve:
    @pytest.mark.parametrize("cost", [0.5, 1.0, 2.0])
    @pytest.mark.parametrize("rate", [0.01, 0.03, 0.1])
    def test_at_a_constant_rate_the_steps_are_kellers(self, cost, rate):
        """A step is the square root of two costs over the rate, where the prior has gone."""
        at_risk = [20.0 * width for width in WIDTHS]
        text = saved([rate * seconds for seconds in at_risk], at_risk)
        model = DurationModel.from_json(text, cost_per_request=cost)
        step = math.sqrt(2.0 * cost / rate)
        assert model.next_age(0.0) == pytest.approx(step)
        assert model.next_age(30.0) == pytest.approx(30.0 + step)
        assert model.next_age(30.0, 0.5) == pytest.approx(30.0 + step / 2)

    @pytest.mark.parametrize(("finished", "tasks"), [(0, 2), (100, 13), (10**6, 40)])
    def test_it_is_rebuilt_after_a_tenth_of_the_finished_tasks_and_at_most_40(
        self, finished, tasks
    ):
        """Tasks that end change the next age only when the curve is rebuilt."""
        model = DurationModel.from_json(saved([0.0] * 135, [0.0] * 135, finished))
        before = model.next_age(0.0)
        ended = 0
        while model.next_age(0.0) == before and ended < 100:
            model.observe(str(ended), 3.0, 2.0)
            ended += 1
        assert ended == tasks

    def test_a_step_is_a_quarter_of_a_second_at_least(self):
        """The curve is never steeper than four polls a second, however cheap a request is."""
        at_risk = [20.0 * width for width in WIDTHS]
        text = saved([0.1 * seconds for seconds in at_risk], at_risk)
        model = DurationModel.from_json(text, cost_per_request=1e-6)
        assert model.next_age(30.0, 1.0) == pytest.approx(30.25)
        assert model.next_age(30.0, 4.0) == pytest.approx(31.0)

    def test_the_curve_reaches_one_bin_beyond_the_prior(self):
        """A task ended in the first bin after 120 s, and the bins before are known to be empty."""
        first = bisect_right(EDGES, 120.0)
        ended = [1.0 if i == first else 0.0 for i in range(135)]
        model = DurationModel.from_json(saved(ended, [20.0 * width for width in WIDTHS]))
        assert model.next_age(100.0) == pytest.approx(EDGES[first + 1])

    def test_the_polls_of_a_fresh_model_are_those_of_the_prior(self):
        """They are pinned, so that the prior does not change unnoticed."""
        expected = [8.394, 13.632, 18.380, 23.830, 29.708, 35.886, 42.439, 49.219, 56.126, 63.196]
        expected += [70.453, 77.815, 85.419, 93.237, 101.314, 109.479, 120.528, 135.528, 150.528]
        assert polled(DurationModel(), 150.0) == pytest.approx(expected, abs=0.001)

    def test_the_polls_after_a_few_tasks_are_those_of_prior_and_counts_together(self):
        """They are pinned as well: some tasks have ended, others still run."""
        model = DurationModel()
        for k in range(60):
            model.observe(str(k), 30.0 + k, None if k % 3 else 5.0 + k / 2)
            model.observe(f"running{k}", 4.0 + k / 10)
        expected = [18.319, 30.645, 59.244, 87.231, 96.749, 105.690, 114.787, 129.787]
        assert polled(model, 120.0) == pytest.approx(expected, abs=0.001)


times = st.floats(0.0, 4000.0)
numbers = st.floats()
observations = st.lists(
    st.tuples(st.sampled_from("abc"), times | numbers, st.none() | times | numbers), max_size=60
)
costs = st.floats(min_value=0.0, exclude_min=True, allow_infinity=False, allow_nan=False)


class TestProperties:
    @given(observations, costs, times, numbers)
    def test_the_next_poll_is_within_the_bounds(self, seen, cost, age, step):
        """The next poll is 0.25 s to 60 s away, whatever was learned and whatever the jitter."""
        model = DurationModel(cost_per_request=cost)
        for observation in seen:
            model.observe(*observation)
        assert 0.25 - 1e-9 <= model.next_age(age, step) - age <= 60.0 + 1e-9

    @given(observations, times, times, st.floats(0.0, 5.0))
    def test_an_older_task_is_not_polled_earlier(self, seen, one, other, step):
        """The next age grows with the age."""
        model = DurationModel()
        for observation in seen:
            model.observe(*observation)
        first, second = sorted([one, other])
        assert model.next_age(first, step) <= model.next_age(second, step) + 1e-6

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
        """At most 600 tasks ended, and 200 times its width at risk."""
        text = saved([ended] * 135, [tasks * width for width in WIDTHS])
        if (ended, tasks) == (600.0, 200.0):
            assert bins(DurationModel.from_json(text))[0] == [600.0] * 135
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

    @pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
    def test_another_version_is_refused(self, version):
        """Numbers of another version would mean something else."""
        with pytest.raises(ConfigurationError, match="of version 1"):
            DurationModel.from_json(self.change(version=version))

    @pytest.mark.parametrize("name", ["ended", "at_risk"])
    @pytest.mark.parametrize("bins", [None, {}, "text", [], [0.0] * 134])
    def test_missing_numbers_are_refused(self, name, bins):
        """Each list has a number for each bin."""
        with pytest.raises(ConfigurationError, match=f"'{name}' has the wrong length"):
            DurationModel.from_json(self.change(**{name: bins}))

    @pytest.mark.parametrize("number", [-1, 1e300, math.nan, math.inf, "1", None, True, [1]])
    @pytest.mark.parametrize("name", ["ended", "at_risk", "finished"])
    def test_numbers_out_of_range_are_refused(self, name, number):
        """A number that no model saves is refused."""
        value = number if name == "finished" else [number] * 135
        with pytest.raises(ConfigurationError, match=f"'{name}' is out of range"):
            DurationModel.from_json(self.change(**{name: value}))


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

    def test_the_jitter_multiplies_the_step(self):
        """Half a step along the curve is an earlier poll."""
        model = DurationModel()
        wait = wait_learned(model, jitter=wait_fixed(0.5))
        assert wait(state_after(age=10.0)) == model.next_age(10.0, 0.5) - 10.0

    def test_tasks_begun_together_are_not_polled_together(self):
        """By default the step varies by ten per cent."""
        model = DurationModel()
        wait = wait_learned(model)
        delays = [wait(state_after(age=10.0)) for _ in range(50)]
        assert len(set(delays)) > 40
        assert min(delays) >= model.next_age(10.0, 0.9) - 10.0
        assert max(delays) <= model.next_age(10.0, 1.1) - 10.0

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

    @pytest.mark.parametrize(
        ("shape", "at_once", "bar"),
        [
            ("tight", False, 1.06),
            ("tight", True, 1.45),
            ("mixed", False, 1.06),
            ("mixed", True, 1.08),
            ("wide", False, 1.03),
            ("wide", True, 1.07),
        ],
    )
    def test_it_comes_near_the_optimum_from_a_fresh_start(self, shape, at_once, bar):
        """J over all tasks, learning included, against a schedule that knows the durations."""
        assert self.ratio(shape, at_once=at_once) <= bar

    @pytest.mark.parametrize("median", [6, 25, 60])
    @pytest.mark.parametrize("sigma", [0.2, 0.8])
    @pytest.mark.parametrize(("at_once", "bar"), [(False, 1.12), (True, 1.6)])
    def test_it_comes_near_the_optimum_for_other_durations(self, median, sigma, at_once, bar):
        """The prior fits no duration in particular, and soon gives way to what is learned."""
        assert self.ratio(median, sigma, at_once=at_once, tasks=1500, seeds=[7]) <= bar

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
        assert "| tight | one a second | learned |" in bench.table(rows)
