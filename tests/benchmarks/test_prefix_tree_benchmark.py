from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.prefix_tree import BREAK_EVEN, Load, fit, overhead, prefix_tree

SMALL = ["--hidden", "128", "--layers", "1", "--repeats", "2"]


def test_the_prefix_tree_benchmark_compares_equal_passes(tmp_path: Path) -> None:
    asked = [*SMALL, "--prefix", "64", "--groups", "2", "--group-size", "8", "--json", str(tmp_path / "p.json")]
    result = CliRunner().invoke(prefix_tree, asked)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "p.json").read_text())
    (row,) = written["results"]["loads"]
    # The last token of a continuation is only a target: 64 + 8 x 15 against 8 x 79 tokens a group.
    assert (row["tokens"], row["computed_tokens"]) == (2 * 8 * 79, 2 * (64 + 8 * 15))
    assert row["token_ratio"] == pytest.approx(3.43, abs=0.01)
    assert row["loss_difference"] < 1e-5
    assert row["gradient_difference"] < 1e-5
    # By processor time, which other processes hardly touch; passes this small are far from the bar.
    assert row["cpu_speed_up"] > 1.2
    assert row["of_token_ratio"] == pytest.approx(row["speed_up"] / row["token_ratio"], abs=2e-3)
    assert "of ratio" in result.output


def test_what_sharing_costs_is_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.prefix_tree.BREAK_EVEN", BREAK_EVEN[:2])
    result = CliRunner().invoke(prefix_tree, [*SMALL, "--break-even", "--json", str(tmp_path / "b.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "b.json").read_text())["results"]
    assert [row["prefix"] for row in found["loads"]] == [4, 16]
    assert found["overhead_tokens"] == [round(overhead(row), 2) for row in found["loads"]]
    assert set(found["sharing"]) == {"call", "reader"}
    assert "for each reader" in " ".join(result.output.split())


def test_the_fit_finds_the_costs_that_were_put_in() -> None:
    rows = []
    for load in BREAK_EVEN:
        members, readers = load.groups * load.group_size, load.group_size * load.continuation
        tokens = members * (load.prefix + load.continuation)
        computed = load.groups * (load.prefix + readers)
        costs = load.groups * (20.0 + 0.1 * readers)
        rows.append(
            {
                **vars(load),
                "tokens": tokens,
                "computed_tokens": computed,
                "cpu_seconds": 1e-4 * tokens,
                "shared_cpu_seconds": 1e-4 * (computed + costs),
            }
        )
    assert fit(rows) == pytest.approx({"call": 20.0, "reader": 0.1}, abs=1e-2)


def test_samples_of_a_group_share_their_prompt_alone() -> None:
    first, second = Load(1, 2, 8, 3).samples(100, seed=0)
    assert (first.inputs[:8] == second.inputs[:8]).all()
    assert first.positions.tolist() == [7, 8, 9]
    assert len(first.inputs) == 10


def test_an_odd_width_is_refused() -> None:
    result = CliRunner().invoke(prefix_tree, ["--hidden", "200"])
    assert result.exit_code == 2
    assert "200 is no multiple of 128" in result.output
