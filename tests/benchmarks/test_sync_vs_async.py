"""`millrace bench sync-vs-async`: its clusters, its formulas on made-up evidence, its curves, and a small real campaign."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.simulator_validation import simulator
from benchmarks.sync_vs_async import learning, measure
from benchmarks.sync_vs_async.campaign import Campaign, SuiteResult
from benchmarks.sync_vs_async.clusters import (
    CLUSTERS,
    MODES,
    Split,
    config_of,
    learner_alone,
    mode_settings,
    overrides_of,
    rollout_alone,
    unmeasured,
)
from benchmarks.sync_vs_async.command import sync_vs_async
from benchmarks.sync_vs_async.curves import Curve, Race, curve_of, median_ratio
from benchmarks.sync_vs_async.display import learning_figure, learning_table, suite_table, suites_figure
from benchmarks.sync_vs_async.evidence import Evidence, Generation, Sample, Step, sample_of
from benchmarks.sync_vs_async.faults import EngineKiller
from benchmarks.sync_vs_async.learning import LearningResult, LearningSettings, Threads
from benchmarks.sync_vs_async.processes import BenchError, CpuSample, FinishedRun, read_summary, train
from benchmarks.sync_vs_async.slow_shop import SlowShopEnvironment, tool_seconds
from benchmarks.sync_vs_async.work import UnitCosts
from experience.records import Trajectory, Turn
from orchestrator.config import validate

COSTS = UnitCosts(sampled_s=0.01, context_s=0.001, trained_s=0.02)


@pytest.mark.parametrize("suite", sorted(CLUSTERS))
def test_every_run_of_every_suite_has_a_valid_configuration(suite: str) -> None:
    cluster = CLUSTERS[suite]
    split = Split(32, 32)
    runs = {mode: mode_settings(cluster, mode, split, 3) for mode in MODES}
    runs |= {"w": rollout_alone(cluster, split, 3), "tau": learner_alone(cluster, split, 3)}
    for name, settings in runs.items():
        config = config_of(overrides_of(settings))
        validate(config)
        assert config.seed == 3, name
        assert config.tasks.options["suite"] == suite
    sync, asynchronous = (config_of(overrides_of(runs[mode])) for mode in ("sync", "async"))
    everything = cluster.replicas * sync.engines.synthetic.accelerators
    assert everything == sync.learner.synthetic.accelerators == cluster.accelerators
    shared = cluster.replicas * asynchronous.engines.synthetic.accelerators
    assert shared + asynchronous.learner.synthetic.accelerators == cluster.accelerators
    assert sync.engines.synthetic.slots == asynchronous.engines.synthetic.slots
    assert sync.rollout.concurrency == cluster.batch
    assert cluster.batch >= cluster.accelerators * cluster.slots, "the synchronous batch must fill all slots"


@pytest.mark.slow
def test_each_role_alone_takes_what_the_cost_model_says(tmp_path: Path) -> None:
    cluster = CLUSTERS["reason"].sized(8)
    roles = Campaign(cluster, 0, tmp_path, lambda text: None, (), 120.0).calibrate()
    assert roles.rollout.ratio == pytest.approx(1.0, abs=0.3)
    assert roles.learner.ratio == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("mode", MODES)
def test_the_steps_of_a_mode_leave_something_to_measure(mode: str) -> None:
    for cluster in CLUSTERS.values():
        skip, leave = unmeasured(cluster, mode)
        steps = mode_settings(cluster, mode, Split(32, 32), 0)["run.steps"]
        assert isinstance(steps, int)
        assert steps - skip - leave >= 2, cluster.suite


def test_a_smaller_cluster_keeps_the_proportions() -> None:
    small = CLUSTERS["swe"].sized(16)
    assert small.accelerators == 16
    assert small.batch == CLUSTERS["swe"].batch // 4
    assert small.in_flight == CLUSTERS["swe"].in_flight // 4


def sample(group: str, began: float, ended: float, sampled: int, context: int, version: int) -> Sample:
    return Sample(group, sampled + context, {version: sampled}, (Generation(began, ended, sampled, context),))


def test_a_trajectory_becomes_its_turns_tokens_and_versions() -> None:
    turns = [
        Turn(start=0, end=3, role="prompt"),
        Turn(start=3, end=5, role="model", began_at=1.0, ended_at=2.0),
        Turn(start=5, end=6, role="observation"),
        Turn(start=6, end=7, role="model", began_at=3.0, ended_at=4.0),
    ]
    versions = np.array([-1, -1, -1, 0, 0, -1, 1], np.int32)
    made = sample_of(
        Trajectory(
            trajectory_id="t",
            episode_id="e",
            group_id="g",
            task_id="k",
            tokens=np.zeros(7, np.int32),
            trainable=versions >= 0,
            logprobs=np.zeros(7, np.float32),
            versions=versions,
            turns=turns,
        )
    )
    assert made == Sample("g", 7, {0: 2, 1: 1}, (Generation(1.0, 2.0, 2, 3), Generation(3.0, 4.0, 1, 1)))
    assert (made.sampled, made.context) == (3, 4)


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0.01, 10), st.floats(0, 20))
def test_work_in_adjoining_intervals_adds_up(began: float, cut: float, length: float, end: float) -> None:
    one = Generation(began, began + length, 100, 50)
    low, high = min(cut, end), max(cut, end)
    parts = COSTS.generated_s([one], 0.0, low) + COSTS.generated_s([one], low, high)
    assert parts == pytest.approx(COSTS.generated_s([one], 0.0, high), abs=1e-6)
    assert COSTS.generated_s([one], 0.0, 100.0) == pytest.approx(COSTS.rollout_s([sample("g", 0, 1, 100, 50, 0)]))


def sync_evidence() -> Evidence:
    """Four steps of 10 s: a rollout of 6 s (two samples a step, one finishing after 3 s), then training."""
    steps = []
    for number in range(4):
        at = 10.0 * number
        group = f"g{number}"
        samples = (
            sample(group, at, at + 3.0, 300, 0, number),
            sample(group, at, at + 6.0, 600, 0, number),
        )
        steps.append(Step(number, at + 10.0, {"lengths/ks": 0.1}, samples))
    return Evidence(steps, [one for step in steps for one in step.samples])


ROLES = measure.Roles(measure.RoleCost(1.0, 1.0), measure.RoleCost(1.0, 1.0))


def test_a_synchronous_run_meets_its_own_formula() -> None:
    window = measure.window_of(sync_evidence(), COSTS, 1, 0)
    assert window.step_s == pytest.approx(10.0)
    assert window.makespan_s == pytest.approx(6.0)
    calibration = measure.calibration_of(window, ROLES, accelerators=2, time_scale=5.0)
    # 900 tokens a step: 9 accelerator-seconds of rollout, 18 of training, on 2 accelerators, 5 modelled seconds each.
    assert calibration.ideal_step_s(2) == pytest.approx(5.0 * (9.0 + 18.0) / 2)
    sync = measure.synchronous_of(window, calibration, overhead_s=0.0, time_scale=5.0)
    assert sync.phi == pytest.approx(6.0 / 4.5)
    assert sync.formula_s == pytest.approx(5.0 * (6.0 + 9.0))
    assert sync.error == pytest.approx(50.0 / 75.0 - 1)
    assert sync.speedup_bound == pytest.approx(sync.formula_s / calibration.ideal_step_s(2))
    row = measure.row_of("sync", window, calibration, sync, {"tokens": {"generated": 100}}, 5.0, 0)
    assert row.speedup == pytest.approx(1.0)
    assert row.lag.largest == 0
    assert row.ks == pytest.approx(0.1)


def test_tokens_beyond_the_bound_are_masked_and_lower_what_is_useful() -> None:
    old = sample("g", 0.0, 1.0, 100, 0, 0)
    young = sample("h", 8.0, 9.0, 300, 0, 3)
    steps = [Step(2, 5.0, {}, (young,)), Step(3, 10.0, {}, (old, young)), Step(4, 15.0, {}, (young,))]
    evidence = Evidence(steps, [old, young])
    window = measure.window_of(evidence, COSTS, 1, 0)
    calibration = measure.calibration_of(window, ROLES, 1, 1.0)
    summary = {"tokens": {"generated": 1000, "wasted": 100}, "idle": {"pacing": 0.25, "weight_stall": 0.05}}
    row = measure.row_of("async", window, calibration, None, summary, 1.0, max_lag=2)
    assert row.masked == pytest.approx(100 / 700)
    assert row.lag.largest <= 2
    assert row.waste == pytest.approx(0.1)
    assert row.useful_efficiency == pytest.approx(row.efficiency * (600 / 700) * 0.9)
    assert row.exposed_sync == 0.05


def test_idle_shares_are_those_of_the_window() -> None:
    # Training began at 0. Until 10 s a quarter of the time was lost to stragglers; until 30 s a half: so 62.5 % in between.
    told = [{"time/step_s": 10.0, "idle/straggler": 0.25}, {"idle/straggler": 0.4}, {"idle/straggler": 0.5}]
    steps = [Step(n, 10.0 * (n + 1), metrics, (sample("g", 0.0, 1.0, 10, 0, 0),)) for n, metrics in enumerate(told)]
    window = measure.window_of(Evidence(steps, list(steps[0].samples)), COSTS, 1, 0)
    assert measure.idle_shares(window) == {"straggler": pytest.approx(0.625)}


def test_dropped_groups_are_no_useful_work() -> None:
    evidence = sync_evidence()
    evidence.samples.append(sample("dropped", 10.0, 20.0, 10_000, 0, 1))
    with_it = measure.window_of(evidence, COSTS, 1, 0)
    assert with_it.rollout_s == pytest.approx(measure.window_of(sync_evidence(), COSTS, 1, 0).rollout_s)


def test_calibration_finds_what_the_cost_model_says() -> None:
    # Two accelerators, always busy: 100 tokens of 0.01 s take each of them one second.
    samples = [sample(f"g{i}", float(i), i + 1.0, 100, 0, 0) for i in range(10) for _ in range(2)]
    waits = [5.0 if i == 5 else 0.0 for i in range(10)]  # the sixth step waited for groups: that is not training
    steps = [
        Step(i, i + 1.0 + sum(waits[: i + 1]), {"time/wait_s": waits[i]}, (samples[2 * i], samples[2 * i + 1]))
        for i in range(10)
    ]
    waiting = [Generation(0.0, 10.0, 0, 0)] * 2
    samples.append(Sample("w", 1, {}, tuple(waiting)))
    cost = measure.calibrate_rollout(Evidence(steps, samples), COSTS, 2, 1, time_scale=3.0)
    assert cost.measured_s == pytest.approx(3.0 * 20 / 21)
    assert cost.ratio == pytest.approx(1.0)
    learner = measure.calibrate_learner(Evidence(steps, samples), COSTS, 4, time_scale=3.0)
    assert learner.analytic_s == pytest.approx(3.0 * 2.0)
    assert learner.measured_s == pytest.approx(3.0 * 4 * 1.0 / 2)


def test_too_few_steps_are_refused_with_what_is_missing() -> None:
    with pytest.raises(BenchError, match=r"4 steps leave 1 in the steady state .* give more --steps"):
        measure.window_of(sync_evidence(), COSTS, 1, 2)


def test_cpu_shares_are_those_of_the_interval() -> None:
    cores = os.cpu_count() or 1
    samples = [CpuSample(float(t), run_s=0.5 * t * cores, machine_s=0.75 * t * cores) for t in range(10)]
    run = FinishedRun(Path("r"), 9.0, {}, samples)
    assert run.cpu_share(2.0, 6.0) == pytest.approx((0.5, 0.75))
    assert run.cpu_share(100.0, 200.0) == pytest.approx((0.5, 0.75))
    assert FinishedRun(Path("r"), 9.0, {}, []).cpu_share(0.0, 1.0) == (0.0, 0.0)


def test_a_run_that_fails_is_an_error_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"(?s)bad ended with status \d.*no_such_key"):
        train("quickstart", ["run.no_such_key=1"], tmp_path / "bad", 60.0)
    with pytest.raises(BenchError, match="did not come to its end"):
        read_summary(tmp_path)


# --- training for real ------------------------------------------------------------------------------------------------


def lines(step_s: float, pause_s: float = 0.0) -> list[dict[str, Any]]:
    """A metrics file of 20 steps, each better by 0.03; the evaluation before them takes ``pause_s``, in which nothing happens."""
    made: list[dict[str, Any]] = [{"step": 0, "time": 100.0 + pause_s, "eval/success": 0.2}]
    now = 100.0 + pause_s
    for step in range(1, 21):
        now += step_s
        took = step_s if step > 1 else step_s + pause_s
        made.append(
            {
                "step": step,
                "time": now,
                "time/step_s": took,
                "time/wait_s": step_s / 2,
                "episodes/rewarded": 8.0,
                "reward/mean": 0.2 + 0.03 * step,
            }
        )
    return [*made, {"step": 20, "time": now + pause_s, "eval/success": 0.8}]


def test_a_curve_leaves_out_start_up_and_the_pauses_of_evaluations() -> None:
    written = lines(2.0, pause_s=7.0)
    paused = curve_of(written, evaluation_pauses=True)
    assert paused.seconds == pytest.approx([2.0 * step for step in range(1, 21)])
    assert paused.steps == list(range(1, 21))
    assert paused.reward == pytest.approx([0.2 + 0.03 * step for step in range(1, 21)])
    assert paused.final == pytest.approx(0.2 + 0.03 * 15.5)
    assert curve_of(written, evaluation_pauses=False).seconds[-1] == pytest.approx(47.0)
    with pytest.raises(ValueError, match="0 steps, none of them with a reward"):
        curve_of([], evaluation_pauses=True)


def test_the_race_is_decided_where_the_smoothed_curve_crosses() -> None:
    sync = Curve([0.0, 50.0, 100.0], [0, 5, 10], [0.0, 0.6, 0.6])
    fast = Curve([0.0, 10.0, 20.0, 30.0], [0, 5, 10, 15], [0.0, 0.6, 0.6, 0.6])
    assert sync.final == pytest.approx(0.4)
    race = Race(0, sync, fast)
    assert race.ratio == pytest.approx(0.2)
    never = Race(1, sync, Curve([0.0, 1.0], [0, 1], [0.0, 0.1]))
    assert never.ratio is None
    assert median_ratio([race, never, race]) == pytest.approx(0.2)
    assert median_ratio([never, never, race]) is None


def test_sync_is_tuned_first_and_both_modes_start_from_one_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, str]] = []

    def fake(config: str, overrides: list[str], directory: Path, timeout_s: float) -> FinishedRun:
        given = dict(option.split("=", 1) for option in overrides)
        calls.append(given)
        step_s = {"1": 3.0, "2": 2.0}[given["engines.threads"]] if given["mode"] == "sync" else 1.0
        directory.mkdir(parents=True)
        written = [json.dumps(line) for line in lines(step_s)]
        (directory / "metrics.jsonl").write_text("\n".join(written) + "\n")
        tokens = {"generated": 10, "masked": 1, "wasted": 0}
        accounts = {"engine-0": {"decode": 100.0, "prefill": 60.0, "idle": 9.0}, "learner-0": {"train": 80.0}}
        facts = {"steps": 20, "success_after": 0.8, "lag_mean": 1.0, "lag_max": 2, "tokens": tokens}
        facts["accounting"] = accounts
        return FinishedRun(directory, 1.0, facts, [])

    monkeypatch.setattr(learning, "train", fake)
    settings = LearningSettings(steps=20, delay_scale=100.0)
    result = learning.race_all(settings, [0, 1], tmp_path, lambda text: None)
    assert result.sync_threads == Threads(2, 2)
    assert [race.ratio for race in result.races] == [pytest.approx(0.5)] * 2
    races = calls[len(learning.SYNC_CHOICES) :]
    assert [call["mode"] for call in races] == ["sync", "async"] * 2
    assert [call["run.steps"] for call in races] == ["20", "26"] * 2
    assert "model.path" not in races[0]
    assert Path(races[1]["model.path"]) == tmp_path / "swe-tools-by-100" / "sync-0" / "model"
    same = ("tasks.environment", "tasks.options.delay_scale", "tasks.held_out", "run.eval_every", "seed")
    assert all(races[0][key] == races[1][key] for key in same)
    assert result.to_dict()["ratio_median"] == pytest.approx(0.5)
    # 20 steps of 8 episodes took 160 core-seconds of rollout and 80 of training: w = 1 s, tau = 0.5 s.
    cores = os.cpu_count() or 1
    sync, asynchronous = result.rows[:2]
    assert sync["rho"] == pytest.approx(2 / 3)
    assert asynchronous["E"] == pytest.approx(8 * 1.5 / cores / 1.0)
    assert asynchronous["S"] == pytest.approx(2.0)
    assert sync["S"] == pytest.approx(1.0)


def test_slow_tools_follow_the_law_and_depend_on_the_attempt_alone() -> None:
    times = sorted(tool_seconds(f"task\n{number}") for number in range(2000))
    assert times[1000] == pytest.approx(math.exp(-1.2), rel=0.25)
    assert times[-1] <= 600.0
    assert tool_seconds("task\n1") == tool_seconds("task\n1")
    task = SlowShopEnvironment.make_task(0, 0, "train", {"delay_scale": 50})
    assert task.payload["delay_scale"] == 50.0
    with pytest.raises(ValueError, match=r"tasks\.options\.delay_scale must be a positive number, got 0"):
        SlowShopEnvironment.make_task(0, 0, "train", {"delay_scale": 0})


async def test_a_slow_shop_answers_as_the_shop_does() -> None:
    task = SlowShopEnvironment.make_task(0, 0, "train", {"delay_scale": 1e6})
    environment = SlowShopEnvironment()
    environment.reset(task)
    result = await environment.step("no such thing to say but an answer")
    assert result.done
    assert SlowShopEnvironment.verify(task, environment.outcome()).reward == 0.0


def test_tables_and_figures_hold_what_was_measured(tmp_path: Path) -> None:
    window = measure.window_of(sync_evidence(), COSTS, 1, 0)
    calibration = measure.calibration_of(window, ROLES, 2, 1.0)
    sync = measure.synchronous_of(window, calibration, 0.0, 1.0)
    row = measure.row_of("sync", window, calibration, sync, {"idle": {"straggler": 0.4}}, 1.0, 0)
    extra = {"cpu_share": 0.5, "kills": 2, "ledger": {"live": 0}}
    result = SuiteResult(
        CLUSTERS["swe"], 7, ROLES, Split(40, 24), 0.99, [measure.Result(row, calibration, extra)], sync
    )
    race = Race(5, Curve([0.0, 4.0], [0, 4], [0.1, 0.5]), Curve([0.0, 1.0], [0, 4], [0.1, 0.6]))
    learned = LearningResult(LearningSettings(delay_scale=200.0), Threads(1, 2), {"1,2": 0.5}, [race])
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(suite_table(result))
    console.print(learning_table(learned))
    text = console.export_text()
    for expected in ("40 roll out", "straggler 40.0%", "2 engines killed", "seed 5: 0.2", "swe tools / 200"):
        assert expected in text
    for name, figure in (("suites", suites_figure([result])), ("learning", learning_figure([learned]))):
        figure.savefig(tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000


def test_the_killer_ends_one_of_several_engines_and_never_the_last(tmp_path: Path) -> None:
    script = "import subprocess, sys, time\n"
    script += "sleep = [sys.executable, '-c', 'import time; time.sleep(60)', 'ray::EngineActor']\n"
    script += "children = [subprocess.Popen(sleep) for _ in range(2)]\nprint('up', flush=True)\n"
    script += "import os\nos.wait()\nprint('one', flush=True)\ntime.sleep(1.5)\n"
    script += "print(sum(child.poll() is None for child in children), flush=True)\n[c.kill() for c in children]\n"
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        killer, ended = EngineKiller(0.3), threading.Event()
        thread = threading.Thread(target=killer.watch, args=(parent.pid, tmp_path, ended))
        thread.start()
        assert parent.stdout.readline() == "one\n"
        alive = parent.stdout.readline().strip()
        ended.set()
        thread.join(10)
    assert alive == "1"
    assert len(killer.killed_at) == 1


# --- for real, small --------------------------------------------------------------------------------------------------


def test_a_small_campaign_keeps_its_promises(tmp_path: Path) -> None:
    target, figure = tmp_path / "out.json", tmp_path / "out.svg"
    arguments = [
        "--suite",
        "reason",
        "--accelerators",
        "8",
        "--steps",
        "2",
        "--modes",
        "sync,async",
        "--time-scale",
        "200",
    ]
    arguments += ["--dir", str(tmp_path / "runs"), "--json", str(target), "--figure", str(figure), "--timeout", "120"]
    result = CliRunner().invoke(sync_vs_async, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(target.read_text())
    assert document["bench"] == "sync-vs-async"
    (suite,) = document["results"]
    keys = "mode step_s E E_useful S S_max phi rho lag_mean lag_p50 lag_p99 lag_max waste masked ks prefix_hit exposed_sync idle"
    for row in suite["rows"]:
        assert set(keys.split()) <= set(row)
        assert 0 < row["E"] <= 1.05
        assert row["lag_max"] <= (0 if row["mode"] == "sync" else 8)
        groups = row["ledger"]
        assert groups["dispatched"] == groups["trained"] + sum(groups["dropped"].values()) + groups["live"]
        assert sum(row["idle"].values()) <= 1.0 + 1e-6
    assert [row["mode"] for row in suite["rows"]] == ["sync", "async"]
    assert figure.stat().st_size > 1000
    pairs = tmp_path / "pairs.json"
    arguments = ["--suite", "reason", "--modes", "sync,async", "--runs", str(tmp_path / "runs"), "--json", str(pairs)]
    compared = CliRunner().invoke(simulator, arguments)
    assert compared.exit_code == 0, compared.output
    for row, pair in zip(suite["rows"], json.loads(pairs.read_text())["results"], strict=True):
        assert pair["mode"] == row["mode"]
        assert min(pair["real_step_s"], pair["simulated_step_s"]) > 0
        assert pair["real_lag"] <= row["lag_max"]


def test_wrong_choices_are_named(tmp_path: Path) -> None:
    unknown = CliRunner().invoke(sync_vs_async, ["--suite", "nothing", "--dir", str(tmp_path)])
    assert unknown.exit_code == 1
    assert "there is no such suite" in unknown.output
    modes = CliRunner().invoke(sync_vs_async, ["--modes", "sometimes"])
    assert modes.exit_code == 2
    assert "give some of sync, one_step, async" in modes.output
