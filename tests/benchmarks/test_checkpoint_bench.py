from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.cli import bench


@pytest.mark.slow
def test_the_stall_of_a_checkpoint_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "checkpoint.json"
    small = ["--layers", "1", "--hidden", "64", "--repeats", "1"]
    done = CliRunner().invoke(bench, ["checkpoint", *small, "--json", str(out)])
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())["results"]
    assert 0 < results["stall_s"] < results["asynchronous_s"]
    assert results["checkpoint_bytes"] > 3 * 4 * results["parameters"], "weights and two moments in float32"
    assert "the stall is" in done.output
