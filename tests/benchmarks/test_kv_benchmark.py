from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.kv import kv


def test_the_kv_benchmark_moves_every_byte_over_each_way(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        kv,
        ["--tokens", "96", "--repeats", "2", "--ring-mb", "2", "--piece-kb", "512", "--json", str(tmp_path / "k.json")],
    )
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "k.json").read_text())
    assert written["settings"]["bytes"] == 96 * 64 * 1024
    assert set(written["results"]) == {"shared_memory", "tcp", "gloo", "memcpy"}
    assert all(row["gb_per_s"] > 0 for row in written["results"].values())
    assert written["results"]["memcpy"]["of_memcpy"] == 1.0
    assert "of memcpy" in result.output
