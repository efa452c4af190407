"""Why an engine or the learner had nothing to do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experience.accounting import Cause
from experience.slots import EMPTY, FREE, Doing
from orchestrator.accounting.accountant import Accountant
from orchestrator.accounting.attribution import Attribution, Window
from orchestrator.accounting.words import SENTENCES, idle_in_words

SECONDS = st.floats(0.0, 1.0)
WINDOWS = st.builds(
    Window,
    seconds=st.just(1.0),
    slots=st.dictionaries(st.sampled_from([*(doing.value for doing in Doing), FREE]), st.floats(0.0, 64.0)),
    empty_s=SECONDS,
    missing_slots=st.floats(0.0, 8.0),
    learner=st.dictionaries(st.sampled_from([Cause.TRAIN, Cause.SAVE, Cause.QUEUE_EMPTY]), st.floats(0.0, 0.33)),
    publishing_s=SECONDS,
    engines_lost=st.dictionaries(st.sampled_from([Cause.FAILURE, Cause.STARTUP]), st.floats(0.0, 0.5)),
)


def begun(*windows: Window) -> Attribution:
    attribution = Attribution()
    for window in windows:
        attribution.begin(window)
    return attribution


@settings(deadline=None)
@given(WINDOWS, SECONDS)
def test_explained_seconds_are_the_idle_seconds(window: Window, idle_s: float) -> None:
    attribution = begun(window)
    for explained in (attribution.engine_idle(idle_s, window), attribution.learner_wait(idle_s, window)):
        assert sum(explained.values()) == pytest.approx(idle_s)
        assert all(value > 0 for value in explained.values())


def test_engines_idle_while_all_episodes_are_in_environments() -> None:
    window = Window(1.0, {"environment": 30.0, "generating": 2.0})
    assert begun(window).engine_idle(0.5, window) == {Cause.ENVIRONMENT: pytest.approx(0.5)}


def test_where_phases_are_split_an_engine_idles_while_requests_are_in_the_other_one() -> None:
    window = Window(1.0, {"environment": 10.0, "generating": 30.0})
    split = Attribution(split=True)
    split.begin(window)
    assert split.engine_idle(0.4, window) == pytest.approx({Cause.OTHER_PHASE: 0.3, Cause.ENVIRONMENT: 0.1})


def test_in_sync_mode_engines_idle_while_the_learner_trains_are_paced() -> None:
    window = Window(1.0, {FREE: 32.0}, empty_s=1.0, learner={Cause.TRAIN: 0.8, Cause.SAVE: 0.1}, publishing_s=0.06)
    explained = begun(window).engine_idle(1.0, window)
    assert explained == pytest.approx(
        {Cause.PACING: 0.8, Cause.SAVE: 0.1, Cause.WEIGHT_STALL: 0.06, Cause.IDLE: 0.04}, abs=1e-6
    )


def test_free_slots_are_stragglers_while_the_learner_waits_and_pacing_while_it_works() -> None:
    busy = Window(1.0, {"generating": 32.0})
    tail = Window(1.0, {"generating": 2.0, FREE: 30.0}, learner={Cause.QUEUE_EMPTY: 1.0})
    behind = Window(1.0, {"generating": 2.0, FREE: 30.0}, learner={Cause.TRAIN: 1.0})
    assert set(begun(busy, tail).engine_idle(0.9, tail)) == {Cause.STRAGGLER}
    assert set(begun(busy, behind).engine_idle(0.9, behind)) == {Cause.PACING}
    assert begun(busy, tail).learner_wait(1.0, tail)[Cause.STRAGGLER] > 0.9


def test_slots_that_the_run_never_uses_are_no_stragglers() -> None:
    steady = Window(1.0, {"generating": 8.0, FREE: 56.0}, learner={Cause.QUEUE_EMPTY: 1.0})
    assert begun(steady).learner_wait(1.0, steady) == {Cause.QUEUE_EMPTY: pytest.approx(1.0)}


def test_a_learner_that_waits_with_nothing_in_flight_was_starved() -> None:
    window = Window(2.0, {FREE: 64.0}, empty_s=2.0, learner={Cause.QUEUE_EMPTY: 1.5}, publishing_s=0.5)
    attribution = begun(window)
    explained = attribution.learner_wait(1.5, window)
    assert explained == {Cause.WEIGHT_STALL: pytest.approx(0.5), Cause.IDLE: pytest.approx(1.0)}
    assert attribution.starved_s == pytest.approx(1.0)


def test_time_without_episodes_while_the_learner_trained_is_no_starvation() -> None:
    """Half a second of training (no episode may start), half a second of rollout in which the learner waits."""
    window = Window(
        1.0, {"generating": 8.0, FREE: 8.0}, empty_s=0.5, learner={Cause.QUEUE_EMPTY: 0.5, Cause.TRAIN: 0.5}
    )
    attribution = begun(window)
    attribution.learner_wait(0.5, window)
    assert attribution.starved_s == 0.0


def test_pulses_that_come_a_little_late_are_no_starvation() -> None:
    window = Window(0.5, {"generating": 4.0}, learner={Cause.QUEUE_EMPTY: 0.53})
    attribution = begun(window)
    assert attribution.learner_wait(0.53, window) == {Cause.QUEUE_EMPTY: pytest.approx(0.53)}
    assert attribution.starved_s == 0.0


def pulses(accountant: Accountant, second: int, engine: dict[Cause, float], learner: dict[Cause, float]) -> None:
    accountant.pulse("engine-0", 0, {"engine-0/0": engine, "engine-0/1": engine}, {}, 0.5 * second)
    accountant.pulse("learner-0", 0, {"learner-0": learner}, {}, 0.1 * second)
    slots = {Doing.ENVIRONMENT.value: 3.0 * second, Doing.GENERATING.value: 1.0 * second, EMPTY: 0.0}
    accountant.pulse("worker-0", 0, {"worker-0": {Cause.IDLE: float(second)}}, slots, 0.0)


def test_the_accounts_of_a_run() -> None:
    accountant = Accountant(0.0, worker_slots=4, learner_accelerators=2.0)
    for second in range(1, 11):
        pulses(
            accountant,
            second,
            {Cause.DECODE: 0.75 * second, Cause.IDLE: 0.25 * second},
            {Cause.TRAIN: 0.5 * second, Cause.QUEUE_EMPTY: 0.5 * second},
        )
        accountant.close_window(float(second), training=True)
    lanes = accountant.lanes()
    assert lanes["engine-0/0"] == {"decode": 7.5, "environment": 2.5}
    assert lanes["learner-0"] == {"environment": 3.75, "queue_empty": 1.25, "train": 5.0}
    assert accountant.idle() == {"environment": pytest.approx(12.5 / 40), "queue_empty": pytest.approx(2.5 / 40)}
    assert accountant.cpu_s() == {"engine-0": 5.0, "learner-0": 1.0, "worker-0": 0.0}


def test_a_lane_goes_on_through_the_lives_of_its_actor() -> None:
    accountant = Accountant(0.0, worker_slots=4)
    accountant.pulse("engine-0", 0, {"engine-0": {Cause.DECODE: 5.0}}, {}, 1.0)
    accountant.close_window(5.0, training=True)
    accountant.pulse("engine-0", 1, {"engine-0": {Cause.FAILURE: 1.0, Cause.DECODE: 2.0}}, {}, 0.5)
    accountant.close_window(8.0, training=True)
    assert accountant.lanes()["engine-0"] == {"decode": 7.0, "failure": 1.0}
    assert accountant.cpu_s() == {"engine-0": 1.5}


def test_accelerators_that_take_turns_are_not_idle_while_they_train() -> None:
    accountant = Accountant(0.0, worker_slots=4, learner_accelerators=2.0, time_shared=True)
    engine = {Cause.DECODE: 4.0, Cause.IDLE: 6.0}
    accountant.pulse("engine-0", 0, {"engine-0/0": engine, "engine-0/1": engine}, {}, 0.0)
    accountant.pulse("learner-0", 0, {"learner-0": {Cause.TRAIN: 5.0, Cause.QUEUE_EMPTY: 5.0}}, {}, 0.0)
    accountant.pulse("worker-0", 0, {}, {Doing.GENERATING.value: 16.0, EMPTY: 6.0}, 0.0)
    accountant.close_window(10.0, training=True)
    assert accountant.lanes()["engine-0/0"] == {"decode": 4.0, "idle": 1.0, "pacing": 5.0}
    assert accountant.idle() == {"idle": pytest.approx(0.1)}


def test_words_for_every_cause_of_idleness_and_the_largest_first() -> None:
    causes = {cause.value for cause in Cause} - {"prefill", "decode", "train"}
    assert causes == set(SENTENCES)
    lines = idle_in_words({"pacing": 0.1, "environment": 0.3, "save": 0.004}, "async", starved_s=2.0)
    assert lines[0].startswith("Engines and learner did useful work in 59.6 %")
    assert [line[:6] for line in lines[1:3]] == ["30.0 %", "10.0 %"]
    assert "2.0 s" in lines[3]
    assert len(lines) == 4
    assert "not train for long enough" in idle_in_words({})[0]
