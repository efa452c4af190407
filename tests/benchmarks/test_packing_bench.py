from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.cli import bench
from benchmarks.packing import in_turn


def test_swe_lengths_are_packed_evenly_over_ranks(tmp_path: Path) -> None:
    """At most 5 % padding and 5 % imbalance, in the worst step of each number of ranks."""
    out = tmp_path / "packing.json"
    done = CliRunner().invoke(bench, ["packing", "--steps", "2", "--json", str(out)])
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["results"]
    ours = [row for row in rows if row["way"] == "balanced"]
    assert [row["ranks"] for row in ours] == [2, 4, 8, 16, 32]
    for row in ours:
        assert row["padding"] <= 0.05
        assert row["worst_imbalance"] <= 0.05
        assert row["worst_imbalance"] <= row["bound"]
    naive = [row for row in rows if row["way"] == "arrival order"]
    assert all(row["imbalance"] > 0.1 and row["padding"] > 0.05 for row in naive)


def test_handing_out_in_turn() -> None:
    assert in_turn([3, 9, 4, 1, 5], 2, 8) == [[[3, 4], [5]], [[9], [1]]]


@pytest.mark.parametrize("ranks", ["two", "0", ""])
def test_a_number_of_ranks_that_is_none(ranks: str) -> None:
    done = CliRunner().invoke(bench, ["packing", "--ranks", ranks])
    assert done.exit_code == 2
    assert "ranks" in done.output
