"""The comparison of simulated with real runs: a tiny real run, and what is made of the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.simulator_validation import Pair, render_pairs, simulator


def pair(step: float = 100.0, lag: float = 1.0) -> Pair:
    return Pair("swe", "async", 4, 100.0, step, 1.0, lag, 10.0, 0.1)


@pytest.mark.parametrize(("step", "lag", "agrees"), [(109, 1.09, True), (111, 1.0, False), (100, 0.89, False)])
def test_agreement_is_ten_percent_in_both(step: float, lag: float, agrees: bool) -> None:
    assert pair(step, lag).agrees is agrees


def test_lags_next_to_nothing_agree() -> None:
    assert Pair("swe", "sync", 3, 100.0, 100.0, 0.0, 0.04, 1.0, 0.1).agrees


def test_the_table_marks_what_differs() -> None:
    table = render_pairs([pair(), pair(step=150.0)])
    assert table.row_count == 2
    assert list(table.columns[-1].cells) == ["", "differs"]


@pytest.mark.slow
def test_a_tiny_real_run_is_near_its_simulation(tmp_path: Path) -> None:
    out = tmp_path / "pairs.json"
    arguments = ["--suite", "reason", "--modes", "async", "--accelerators", "8", "--steps", "2"]
    result = CliRunner().invoke(simulator, [*arguments, "--dir", str(tmp_path / "runs"), "--json", str(out)])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(out.read_text())["results"]
    assert row["real_step_s"] > 0
    assert abs(row["step_error"]) < 0.5
    again = CliRunner().invoke(
        simulator, ["--suite", "reason", "--modes", "async", "--runs", str(tmp_path / "runs"), "--json", str(out)]
    )
    assert again.exit_code == 0, again.output
    (reused,) = json.loads(out.read_text())["results"]
    assert reused["real_step_s"] == row["real_step_s"]
    assert reused["simulated_step_s"] == pytest.approx(row["simulated_step_s"])


def test_missing_runs_are_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(simulator, ["--suite", "swe", "--modes", "sync", "--runs", str(tmp_path)])
    assert result.exit_code == 1
    assert "holds no finished run of swe, sync" in result.output
