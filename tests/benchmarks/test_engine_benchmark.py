from __future__ import annotations

import json
from pathlib import Path

from benchmarks.engine import Workload, run


def test_the_result_holds_every_contender_on_the_same_tokens(tmp_path: Path) -> None:
    workloads = (Workload("uniform", 3, (4, 4), (5, 5)), Workload("ragged", 4, (2, 9), (3, 8)))
    result = run(str(tmp_path / "engine.json"), repeats=1, workloads=workloads)
    assert json.loads((tmp_path / "engine.json").read_text()).keys() == result.keys()
    assert result.keys() == {"bench", "machine", "versions", "seeds", "settings", "results"}
    assert [row["tokens"] for row in result["results"]] == [12, sum(workloads[1].lengths(0))]
    for row in result["results"]:
        assert row["tokens_per_s"].keys() == {"torch engine", "model.generate", "transformers CB"}
        assert row["ratio_to_generate"]["model.generate"] == 1
        assert min(row["tokens_per_s"].values()) > 0


def test_lengths_and_prompts_come_from_the_seed_and_stay_in_range() -> None:
    workload = Workload("ragged", 50, (8, 128), (3, 9))
    assert workload.lengths(1) == workload.lengths(1) != workload.lengths(2)
    assert min(workload.lengths(0)) >= 8
    assert max(workload.lengths(0)) <= 128
    prompts = workload.prompts(0, 256)
    assert {len(prompt) for prompt in prompts} == set(range(3, 10))
