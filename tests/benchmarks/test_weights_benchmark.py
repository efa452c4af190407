from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.weights.changes import ChangesPlan, measure_changes
from benchmarks.weights.command import BARS, PARTS, bars, weights

DOCUMENTED = (Path(__file__).resolve().parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")


def test_every_transport_moves_the_weights_beside_its_references(tmp_path: Path) -> None:
    asked = ["--mb", "8", "--repeats", "1", "--bucket-mb", "2", "--parts", "transports"]
    result = CliRunner().invoke(weights, [*asked, "--json", str(tmp_path / "w.json")])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "w.json").read_text())["results"]
    assert written["transports"]["bytes"] >= 8 << 20
    assert set(written["transports"]["ways"]) == {
        "shared_memory", "shared_memory, checksums", "collective", "relay", "disk",
    }  # fmt: skip
    for row in written["transports"]["ways"].values():
        assert min(row["prepare_gb_per_s"], row["fetch_gb_per_s"], row["raw_gloo_gb_per_s"]) > 0
        assert row["of_memcpy"]["least"] <= row["of_memcpy"]["median"] <= row["of_memcpy"]["most"]
    assert [bar["name"] for bar in written["bars"]] == ["shared_memory of memcpy", "collective of raw gloo"]
    assert "of raw gloo" in result.output


def test_changes_of_real_updates_are_bit_exact_and_small() -> None:
    found = measure_changes(ChangesPlan(steps=12, warm_up=3, hidden=64, layers=1))
    assert found["versions_not_bit_exact"] == 0
    assert found["snapshots"] == 1
    assert found["change_bytes_mean"] * 20 < found["version_bytes"]


@pytest.mark.slow
def test_the_others_hold_the_version_soon_after_a_receiver_is_killed(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        weights, ["--mb", "64", "--parts", "kill", "--json", str(tmp_path / "w.json"), "--check"]
    )
    assert result.exit_code == 0, result.output
    kills = json.loads((tmp_path / "w.json").read_text())["results"]["kill"]
    assert len(kills) == 3
    assert all(kill["hold_the_version"] and kill["restarted"] == 0 for kill in kills.values())


def test_a_bar_that_is_missed_is_told() -> None:
    delta = {"fewer": 30.0, "versions_not_bit_exact": 0}
    assert [bar["met"] for bar in bars({"delta": delta})] == [True]
    assert [bar["met"] for bar in bars({"delta": delta | {"versions_not_bit_exact": 1}})] == [False]
    kill = {"seconds": 1.0, "hold_the_version": True, "restarted": 0}
    assert [bar["met"] for bar in bars({"kill": {"a": kill, "b": kill | {"seconds": BARS["kill: seconds"] + 1}}})] == [
        False
    ]
    assert [bar["met"] for bar in bars({"kill": {"a": kill | {"restarted": 1}}})] == [False]


def test_an_unknown_part_is_refused_and_documented_ones_exist() -> None:
    refused = CliRunner().invoke(weights, ["--parts", "speed"])
    assert refused.exit_code == 2
    assert "choose from transports, delta, kill, stall" in refused.output
    for part in PARTS:
        assert f"--parts {part}" in DOCUMENTED or part in ("transports", "stall")
