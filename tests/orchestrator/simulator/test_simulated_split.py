"""Simulated engines that prefill and that decode: conservation, what a split does in closed form, roles by load."""

from __future__ import annotations

import math

import pytest

from experience.accounting import Cause
from orchestrator.config import Config, ConfigError, load
from orchestrator.simulator.simulate import simulate
from orchestrator.simulator.simulation import Simulation, SimulationOptions
from orchestrator.simulator.split_engines import SplitEngines
from rollout_workers.engines.protocol import EngineRole

SMALL = [
    "engines.replicas=1",
    "engines.synthetic.accelerators=1",
    "engines.synthetic.prefill_chunk_tokens=512",
    "learner.synthetic.accelerators=2",
    "learner.synthetic.seconds_per_token=0",
    "rollout.groups_per_update=4",
    "rollout.group_size=4",
    "rollout.concurrency=64",
    "engines.handoff.min_tokens=0",
    "staleness.target_lag=3",
    "run.steps=4",
]


def configured(suite: str, prefill: int, decode: int, *overrides: str) -> Config:
    split = [f"engines.prefill={prefill}", f"engines.decode={decode}"]
    return load(["synthetic"], [f"tasks.options.suite={suite}", *SMALL, *split, *overrides])


def simulated(config: Config, **options: float) -> tuple[Simulation, SplitEngines]:
    simulation = Simulation(config, SimulationOptions(record=True, **options))  # type: ignore[arg-type]
    simulation.run()
    assert isinstance(simulation.engines, SplitEngines)
    return simulation, simulation.engines


@pytest.mark.parametrize("suite", ["reason", "swe", "fault"])
@pytest.mark.parametrize("kv", ["keep", "recompute"])
def test_ledger_tokens_and_seconds_add_up(suite: str, kv: str) -> None:
    simulation, engines = simulated(configured(suite, 2, 3, f"weights.kv={kv}"), engine_kill_every_s=400.0)
    simulation.queue.ledger.check()
    accounts = simulation.snapshot()
    assert accounts.steps == 4
    elapsed = accounts.at * simulation.cluster.rollout_accelerators
    assert math.isclose(sum(accounts.rollout.values()), elapsed, rel_tol=1e-6), accounts.rollout
    assert engines.counts.handed_over > 0
    recorded = simulation.recorded[-1]
    assert len(recorded) == 2
    assert recorded[0].first_token.count > 0
    assert 0 < recorded[1].use.busy_s < recorded[1].use.seconds
    for _, state in zip(range(3), simulation.recorded, strict=False):
        assert state[0].inter_token.count <= recorded[0].inter_token.count


def test_prefill_engines_make_no_tokens_and_decode_engines_get_kv() -> None:
    simulation, engines = simulated(configured("reason", 1, 3))
    computed = 0
    for name in engines.names:
        for unit in engines._replicas[name].units:
            seconds = unit.seconds(simulation.loop.now)
            if engines.role(name) is EngineRole.PREFILL:
                assert unit.generated_tokens == 0
                assert Cause.DECODE not in seconds
                computed += unit.prefilled_tokens
            else:
                assert unit.generated_tokens > 0
                assert unit.received_tokens > 0
    assert computed > 0


def test_kv_that_travels_slowly_is_waited_for() -> None:
    _, fast = simulated(configured("reason", 1, 3))
    _, slow = simulated(configured("reason", 1, 3, "engines.synthetic.kv_gb_per_s=0.1"))
    assert slow.counts.handed_over > 0
    each = slow.counts.moved_tokens / slow.counts.handed_over
    token_s = slow._cluster.cost.kv_token_s
    computed_s = each / slow._cluster.cost.prefill_rate
    assert slow.counts.exposed_s / slow.counts.handed_over >= each * token_s - computed_s
    assert slow.counts.exposed_s > 50 * fast.counts.exposed_s


def test_decoding_alone_has_fewer_slow_steps() -> None:
    """What the split is for, with chunks that take longer than reading the weights (8,192 tokens on these accelerators)."""
    overrides = ["engines.synthetic.slots=16", "rollout.concurrency=48", "engines.synthetic.prefill_chunk_tokens=16384"]
    split, _ = simulated(configured("swe", 1, 3, *overrides))
    config = configured("swe", 1, 3, *overrides, "engines.prefill=0", "engines.decode=0", "engines.replicas=4")
    mixed = Simulation(config, SimulationOptions(record=True))
    mixed.run()
    cost = mixed.cluster.cost
    assert cost.prefill_chunk / cost.prefill_rate > cost.half_concurrency / cost.decode_peak
    of_split, of_mixed = split.recorded[-1][0].inter_token, mixed.recorded[-1][0].inter_token
    assert of_split.quantile(0.99) / of_split.quantile(0.5) < of_mixed.quantile(0.99) / of_mixed.quantile(0.5)


def test_roles_by_load_move_engines_to_where_the_work_is() -> None:
    policy = ["engines.roles=auto", "engines.role_policy.window_s=20", "engines.role_policy.min_residence_s=20"]
    policy += ["engines.role_policy.cool_down_s=10", "run.steps=20"]
    moving, engines = simulated(configured("reason", 5, 1, *policy))
    assert engines.counts.flips
    roles = [engines.role(name) for name in engines.names]
    assert roles.count(EngineRole.PREFILL) == 1, "prompts of 500 tokens for answers of 4,000 need no more"
    fixed, best = (simulated(configured("reason", m, 6 - m, "run.steps=20"))[0].loop.now for m in (5, 1))
    assert moving.loop.now < 0.8 * fixed
    assert moving.loop.now < 1.2 * best


def test_the_same_seed_gives_the_same_run() -> None:
    ends = [simulated(configured("swe", 1, 2, "run.steps=2"))[0].loop.now for _ in range(2)]
    assert ends[0] == ends[1]


def test_a_split_is_simulated_in_its_own_mode() -> None:
    with pytest.raises(ConfigError, match="a split is simulated in the mode of its configuration"):
        simulate(configured("reason", 1, 2), ["sync"])
    with pytest.raises(ConfigError, match="one pool in mean field"):
        simulate(configured("reason", 1, 2), options=SimulationOptions(mean_field=True))
    (row,) = simulate(configured("reason", 1, 2, "run.steps=2")).rows
    assert row.step_s > 0
