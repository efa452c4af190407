from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.kv import kv


def test_the_kv_benchmark_moves_every_byte_over_each_way(tmp_path: Path) -> None:
    asked = ["--tokens", "96", "--tokens", "300", "--repeats", "2", "--ring-mb", "2", "--piece-kb", "512"]
    result = CliRunner().invoke(kv, [*asked, "--json", str(tmp_path / "k.json")])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "k.json").read_text())
    assert list(written["results"]) == ["96", "300"]
    for tokens, found in written["results"].items():
        assert found["bytes"] == int(tokens) * 64 * 1024
        assert set(found["ways"]) == {"auto", "ring", "tcp", "gloo"}
        for row in found["ways"].values():
            low, high = row["of_memcpy_range"]
            assert 0 < low <= row["of_memcpy"] <= high
            assert min(row["gb_per_s"], row["memcpy_gb_per_s"], row["first_gb_per_s"]) > 0
    assert "of memcpy" in result.output
