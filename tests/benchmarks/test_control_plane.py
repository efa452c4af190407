"""`millrace bench control-plane`: a small run, and its arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.cli import bench
from benchmarks.control_plane.measure import ControlPlaneError, Load, row
from benchmarks.control_plane.usage import COMMAND, RAY, Usage, role_of
from experience.vitals import DISPATCH, LOOP_LAG, SUBMIT, TURNS, ActorVitals, Histogram


def vitals(turns: int, lag_s: float) -> ActorVitals:
    found = ActorVitals()
    found.seconds = 10.0
    found.counters = {TURNS: turns}
    for name in (LOOP_LAG, SUBMIT, DISPATCH):
        histogram = Histogram()
        histogram.add(lag_s)
        found.delays[name] = histogram
    return found


def test_rates_are_of_the_window() -> None:
    window = {"worker-0": vitals(4000, 0.01), "worker-1": vitals(1000, 0.03), "controller": vitals(0, 0.002)}
    found = row(
        Load(1000, 500, 30),
        window,
        window,
        {"worker": 6.0, RAY: 1.5},
        {"worker": Usage(pss_bytes=2**30), RAY: Usage(pss_bytes=2**29)},
        30.0,
    )
    assert found["turns_per_s"] == 500
    assert found["cpu_s_per_1000_turns"] == {"worker": 0.4, RAY: 0.1, "total": 0.5}
    assert found["memory_mib"]["total"] == 1536
    assert found["memory_without_ray_mib"] == 1024
    assert 30 <= found["loop_lag_p99_max_ms"] <= 33


def test_a_window_without_turns_is_an_error() -> None:
    with pytest.raises(ControlPlaneError, match="no turn came back"):
        row(Load(8, 1, 1), {}, {"worker-0": vitals(0, 0.1)}, {}, {}, 1.0)


def test_roles() -> None:
    assert role_of(["ray::RolloutWorkerActor.run"]) == "worker"
    assert role_of(["ray::IDLE"]) == RAY
    assert role_of(["/usr/bin/raylet", "--x"]) == RAY
    assert role_of(["python", "-m", "orchestrator.cli", "train"]) == COMMAND


def test_the_time_scale_makes_the_load() -> None:
    assert Load(10_000, 500, 30).time_scale == pytest.approx(1.0, abs=0.1)
    assert Load(1_000, 500, 30).time_scale == pytest.approx(10 * Load(10_000, 500, 30).time_scale, rel=0.01)


def test_bad_counts_are_refused() -> None:
    result = CliRunner().invoke(bench, ["control-plane", "--episodes", "a,b"])
    assert result.exit_code == 2
    assert "give whole numbers" in result.output


@pytest.mark.timeout(240)
def test_smoke(tmp_path: Path) -> None:
    arguments = ["control-plane", "--episodes", "32", "--seconds", "11", "--turns-per-s", "60"]
    arguments += ["--json", str(tmp_path / "found.json"), "--figure", str(tmp_path / "found.svg")]
    result = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "found.json").read_text())
    [found] = content["results"]
    assert {"machine", "versions", "seeds"} <= content.keys()
    assert found["turns_per_s"] > 0
    assert {"worker", "engine", "environment", "learner", "queue", "reward", "controller"} <= found["memory_mib"].keys()
    assert all(math.isfinite(lag["p99"]) for lag in found["loop_lag_ms"].values())
    assert found["dispatch_ms"]["ramp"]["count"] >= 32
    assert found["cpu_s_per_1000_turns"]["worker"] > 0
    assert (tmp_path / "found.svg").stat().st_size > 1000
