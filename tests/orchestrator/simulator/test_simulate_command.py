"""`millrace simulate`: table, JSON file, published systems, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.simulator.published import SPREADS, SYSTEMS, compare_system, document_of_published

SMALL = ["engines.replicas=1", "engines.synthetic.accelerators=4", "learner.synthetic.accelerators=2"]
SMALL += ["rollout.groups_per_update=4", "rollout.group_size=4", "run.steps=3", "tasks.options.suite=reason"]
KEYS = {"mode", "step_s", "E", "E_useful", "S", "S_max", "phi", "rho", "lag_mean", "lag_p50", "lag_p99", "lag_max"}
KEYS |= {"waste", "masked", "ks", "prefix_hit", "exposed_sync", "idle"}


def test_modes_side_by_side(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["simulate", "synthetic", *SMALL, "--modes", "sync,async", "--json", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["results"]
    assert [row["mode"] for row in rows] == ["sync", "async"]
    assert all(set(row) == KEYS for row in rows)
    assert rows[0]["S"] == 1.0
    assert rows[0]["S_max"] >= rows[1]["S"] > 0
    assert sum(rows[0]["idle"].values()) < 1
    assert "6 accelerators" in result.output


def test_an_unknown_mode_is_named() -> None:
    result = CliRunner().invoke(main, ["simulate", "synthetic", "--modes", "asynk"])
    assert result.exit_code == 1
    assert "did you mean 'async'" in result.output


@pytest.mark.parametrize("name", ["verl fully_async_policy", "AReaL"])
def test_a_published_system_in_small(name: str) -> None:
    system = replace(next(s for s in SYSTEMS if s.name == name), mean_tokens=300, cap_tokens=2000)
    comparison = compare_system(system, shrink=32)
    assert set(comparison.gains) == set(SPREADS)
    assert all(gain > 1 for gain in comparison.gains.values())
    (result,) = document_of_published([comparison])["results"]
    assert result["simulated"] == comparison.simulated
    assert result["stated"]
    assert result["assumed"]
