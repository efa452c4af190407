"""The simulated run: closed forms where there are any, invariants of the decision classes where not."""

from __future__ import annotations

import math

import pytest

from experience.accounting import Cause
from orchestrator.config import Config, ConfigError, load
from orchestrator.simulator.cluster import Cluster, in_mode
from orchestrator.simulator.events import EventLoop, SimulationStalled
from orchestrator.simulator.simulate import calibration_of, simulate, simulate_mode
from orchestrator.simulator.simulation import Simulation, SimulationOptions

SMALL = [
    "engines.replicas=2",
    "engines.synthetic.accelerators=3",
    "learner.synthetic.accelerators=2",
    "rollout.groups_per_update=4",
    "rollout.group_size=4",
    "rollout.concurrency=96",
    "staleness.target_lag=2",
    "run.steps=6",
]


def configured(suite: str, *overrides: str) -> Config:
    return load(["synthetic"], [f"tasks.options.suite={suite}", *SMALL, *overrides])


def test_a_learner_that_costs_more_than_all_else_sets_the_pace() -> None:
    config = configured("reason", "learner.synthetic.seconds_per_token=1.0", "learner.synthetic.step_overhead_s=7")
    outcome = simulate_mode(config)
    scale = config.engines.synthetic.token_scale
    expected = outcome.window.context * scale * 1.0 / 2 / outcome.window.steps + 7
    assert outcome.step_s == pytest.approx(expected, rel=1e-6)
    assert outcome.window.learner[Cause.TRAIN] == pytest.approx(sum(outcome.window.learner.values()))


def test_a_synchronous_step_is_rollout_then_training_then_weights() -> None:
    config = in_mode(configured("reason"), "sync", calibration_of(configured("reason")))
    outcome = simulate_mode(config, skip=0)
    cluster, window = Cluster.of(config), outcome.window
    training = window.context * cluster.seconds_per_token / cluster.learner_accelerators
    assert window.at == pytest.approx(sum(window.makespans) + training + sum(window.overheads), rel=1e-6)
    assert set(window.lags) == {0}
    assert window.masked == 0


@pytest.mark.parametrize("suite", ["reason", "fault", "burst"])
@pytest.mark.parametrize("mode", ["sync", "one_step", "async"])
def test_ledger_and_seconds_add_up(suite: str, mode: str) -> None:
    base = configured(suite, "run.steps=4", "rollout.max_episode_tokens=8192")
    simulation = Simulation(in_mode(base, mode, calibration_of(base)), SimulationOptions(engine_kill_every_s=500.0))
    simulation.run()
    simulation.queue.ledger.check()
    accounts = simulation.snapshot()
    gone = math.isclose(
        sum(accounts.rollout.values()), accounts.at * simulation.cluster.rollout_accelerators, rel_tol=1e-6
    )
    assert gone, accounts.rollout
    bound = simulation.config.staleness.max_lag
    assert max(accounts.lags) <= bound
    assert accounts.steps == 4


def test_the_same_seed_gives_the_same_run() -> None:
    first, second = (simulate(configured("reason"), ["async"]).rows[0].to_dict() for _ in range(2))
    assert first == second
    assert first != simulate(configured("reason", "seed=1"), ["async"]).rows[0].to_dict()


def test_little_s_law_holds() -> None:
    learner_bound = ["learner.synthetic.seconds_per_token=1.0", "staleness.target_lag=3", "run.steps=10"]
    outcome = simulate_mode(configured("reason", *learner_bound))
    lags = outcome.window.lags
    mean = sum(lag * tokens for lag, tokens in lags.items()) / sum(lags.values())
    assert mean == pytest.approx(3.0, abs=0.05)


def test_a_lost_engine_costs_time_and_no_episode() -> None:
    calm = simulate_mode(configured("reason"), SimulationOptions())
    simulation = Simulation(configured("reason"), SimulationOptions(engine_kill_every_s=40.0, engine_restart_s=30.0))
    simulation.run()
    assert simulation.queue.ledger.returned == 0
    assert simulation.engines.continued > 0  # type: ignore[union-attr]
    assert simulation.snapshot().rollout[Cause.FAILURE] > 0
    assert simulation.loop.now > calm.window.at


def test_mean_field_agrees_with_the_exact_simulation() -> None:
    config = configured("swe", "rollout.groups_per_update=16", "rollout.concurrency=256", "run.steps=5")
    for mode in ("sync", "async"):
        in_it = in_mode(config, mode, calibration_of(config))
        exact, mean = (simulate_mode(in_it, SimulationOptions(mean_field=kind)) for kind in (False, True))
        assert mean.step_s == pytest.approx(exact.step_s, rel=0.1)
        assert mean.events < exact.events / 5


def test_what_cannot_be_simulated_is_named() -> None:
    with pytest.raises(ConfigError, match="only a modelled cluster can be simulated"):
        simulate(load(["quickstart"]))
    with pytest.raises(ConfigError, match="plays scripted workloads"):
        simulate(configured("swe", "tasks.environment=shop", "rollout.loop=tool_agent"))
    with pytest.raises(ConfigError, match="cannot be lost in mean field"):
        simulate(configured("fault"), options=SimulationOptions(mean_field=True, engine_kill_every_s=100.0))


def test_a_run_without_events_says_what_it_waits_for() -> None:
    with pytest.raises(SimulationStalled, match=r"after 0\.0 s; a group"):
        EventLoop().run(lambda: False, lambda: "a group")
