"""`millrace bench routing`: its books, what the router reaches on `swe`, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.routing.closed_loop import Case, ClosedLoop, Measured
from benchmarks.routing.command import POLICIES, AdaptiveSettings, routing, run_adaptive
from benchmarks.routing.engines import IdealEngines, ModelledEngines
from benchmarks.routing.loads import Loads
from rollout_workers.engines.synthetic.config import SyntheticEngineConfig
from rollout_workers.engines.synthetic.cost_model import CostModel


def measure(policy: str = "prefix-aware", **values: object) -> Measured:
    settings = {"suite": "swe", "engines": 4, "episodes": 128, "warm_up_s": 1200.0, "measured_s": 1800.0} | values
    case = Case(policy=POLICIES[policy], **settings)  # type: ignore[arg-type]
    return ClosedLoop(case, IdealEngines()).run()


@pytest.mark.parametrize("workers", [1, 4])
def test_a_runs_router_keeps_the_kv_and_the_balance_on_swe(workers: int) -> None:
    measured = measure(workers=workers, engines=8, episodes=256)
    assert measured.turns > 5000
    assert measured.affinity >= 0.99
    assert measured.imbalance["sessions"].moment <= 1.1


@pytest.mark.parametrize(("workers", "seed"), [(1, 0), (4, 0), (4, 1), (4, 2)])
def test_sessions_in_balance_are_requests_in_balance_in_the_long_run(workers: int, seed: int) -> None:
    """Two hours: the sessions of half an hour are too few for their requests to average out, wherever they are placed."""
    measured = measure(workers=workers, seed=seed, engines=8, episodes=256, measured_s=7200.0)
    assert measured.imbalance["sessions"].moment <= 1.1
    assert measured.imbalance["requests"].whole <= 1.1


def test_without_stickiness_nearly_all_is_computed_again() -> None:
    measured = measure("least requests")
    assert measured.affinity < 0.6
    assert measured.moved > measured.turns / 2


def test_going_where_the_group_is_finds_more_and_keeps_the_balance() -> None:
    aware, unaware = measure(suite="reason"), measure("sticky, by sessions", suite="reason")
    assert aware.affinity > unaware.affinity
    assert aware.imbalance["sessions"].moment <= 1.1


def test_one_engine_has_everything_and_the_same_seed_is_the_same_run() -> None:
    alone = measure(engines=1, episodes=16)
    assert (alone.affinity, alone.moved) == (1.0, 0)
    assert alone.imbalance["tokens"].moment == 1.0
    assert measure() == measure()
    assert measure() != measure(seed=1)


def test_episodes_in_flight_are_those_of_the_case() -> None:
    assert measure(episodes=61, workers=3).in_flight == pytest.approx(61, abs=0.5)


def test_loads_are_integrals_over_time() -> None:
    loads = Loads(2, 0.0)
    loads.change(0, 0.0, sessions=1, tokens=10)
    loads.change(1, 30.0, sessions=2, requests=1, tokens=10)
    loads.pass_to(90.0)
    loads.change(0, 90.0, sessions=2)
    loads.pass_to(119.9)
    assert len(loads.averages) == 1
    assert loads.averages[0].tolist() == [[1.0, 1.0], [0.0, 0.5], [10.0, 5.0]]
    with pytest.raises(ValueError, match="1 windows of 60 s"):
        loads.imbalance()
    loads.pass_to(600.0)
    imbalance = loads.imbalance()["sessions"]
    assert loads.averages[1].tolist()[0] == [2.0, 2.0]
    assert loads.now[0].tolist() == [3.0, 2.0]
    assert [imbalance.ten_minutes, imbalance.whole] == pytest.approx([2 * (1 + 2 + 8 * 3) / (27 + 19)] * 2)
    assert imbalance.moment == pytest.approx((4 / 3 + 9 * 1.2) / 10)


def test_modelled_engines_find_the_kv_that_the_router_left_there() -> None:
    cost = CostModel.from_config(SyntheticEngineConfig(time_scale=1.0, token_scale=1.0, kv_tokens=100_000_000))
    case = Case(suite="swe", engines=2, episodes=16, warm_up_s=600.0, measured_s=1200.0)
    engines = ModelledEngines(cost, 2)
    measured = ClosedLoop(case, engines).run()
    assert measured.cached == pytest.approx(measured.reused, rel=0.02)
    assert engines.evicted_sessions == 0


def test_adaptive_concurrency_does_as_well_as_the_best_fixed_number() -> None:
    """On the mean of some seeds: near the edge of the KV a single one goes up and down by a third."""
    rows = []
    for seed in range(3):
        rows += run_adaptive(AdaptiveSettings(engines=2, episodes=(8, 24, 64), minutes=120.0, seed=seed))["results"]
    fixed: dict[int, list[float]] = {}
    for row in rows:
        if not row["adaptive"]:
            fixed.setdefault(row["episodes"], []).append(row["tokens_per_s"])
    means = {episodes: float(np.mean(rates)) for episodes, rates in fixed.items()}
    adaptive = [row for row in rows if row["adaptive"]]
    assert means[24] > means[64]  # too much is worse: otherwise there is nothing to find
    assert float(np.mean([row["tokens_per_s"] for row in adaptive])) >= 0.95 * max(means.values())
    assert all(row["in_flight"] < 64 for row in adaptive)


def test_the_command_writes_what_it_shows(tmp_path: Path) -> None:
    arguments = ["--engines", "2", "--workers", "1,2", "--episodes", "8", "--minutes", "10"]
    written = ["--json", str(tmp_path / "r.json"), "--figure", str(tmp_path / "r.svg")]
    result = CliRunner().invoke(routing, [*arguments, *written], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "r.json").read_text())
    assert len(document["results"]) == len(POLICIES) * 3  # two workers: with and without being told
    assert f"{document['results'][-1]['affinity']:.2%}" in result.output
    assert (tmp_path / "r.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suites", "sew"], "there is no 'sew'"),
        (["--engines", "four"], "--engines 'four'"),
        (["--minutes", "5"], "at least 10"),
        (["--policies", "best"], "there is no 'best'"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(routing, arguments)
    assert result.exit_code == 2
    assert message in result.output
