from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks.engine import Workload, run
from benchmarks.engine.command import draw, engine, report
from benchmarks.engine.workloads import Arrivals, percentiles_ms
from benchmarks.output import save_figure
from rollout_workers.engines.servers.environment import ROOT

ENGINES = {"torch engine", "model.generate", "transformers CB"}


def test_the_result_holds_every_contender_on_the_same_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workloads = (Workload("uniform", 3, (4, 4), (5, 5)), Workload("ragged", 4, (2, 9), (3, 8)))
    result = run(tmp_path / "engine.json", repeats=1, latency_repeats=1, workloads=workloads)
    assert json.loads((tmp_path / "engine.json").read_text()).keys() == result.keys()
    assert result.keys() == {"bench", "machine", "versions", "seeds", "settings", "results"}
    assert [row["tokens"] for row in result["results"]] == [12, sum(workloads[1].lengths(0))]
    for row in result["results"]:
        assert row["tokens_per_s"].keys() == ENGINES
        assert row["ratio_to_generate"]["model.generate"] == 1
        assert min(row["tokens_per_s"].values()) > 0
        for key in ("first_token_ms", "inter_token_ms"):
            assert row[key].keys() == ENGINES
            assert all(0 <= found["p50"] <= found["p99"] for found in row[key].values())
        assert min(found["p50"] for found in row["first_token_ms"].values()) > 0
    assert {each["engine"] for each in result["settings"]["skipped"]} == {"vllm", "sglang"}
    report(result, Console(width=160))
    assert "between tokens" in capsys.readouterr().out
    save_figure(tmp_path / "engine.svg", draw(result))
    assert (tmp_path / "engine.svg").stat().st_size > 0


@pytest.mark.engines_slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_real_server_is_measured_beside_them(kind: str) -> None:
    if not (ROOT / f".venv-{kind}" / "READY").exists():
        pytest.skip(f"no environment for {kind}: run `make engines`")
    workload = Workload("ragged", 4, (2, 9), (3, 8))
    result = run(repeats=1, latency_repeats=1, engines=[kind], workloads=(workload,))
    (row,) = result["results"]
    assert row["tokens_per_s"].keys() == ENGINES | {kind}
    assert row["tokens_per_cpu_s"][kind] > 0
    assert row["first_token_ms"][kind]["p50"] > 0
    assert kind not in {each["engine"] for each in result["settings"]["skipped"]}


def test_an_unknown_server_is_refused_with_the_names_of_those_there_are() -> None:
    refused = CliRunner().invoke(engine, ["--engines", "vllm,llamafile"])
    assert refused.exit_code != 0
    assert "llamafile: choose from vllm, sglang" in refused.output


def test_lengths_and_prompts_come_from_the_seed_and_stay_in_range() -> None:
    workload = Workload("ragged", 50, (8, 128), (3, 9))
    assert workload.lengths(1) == workload.lengths(1) != workload.lengths(2)
    assert min(workload.lengths(0)) >= 8
    assert max(workload.lengths(0)) <= 128
    prompts = workload.prompts(0, 256)
    assert {len(prompt) for prompt in prompts} == set(range(3, 10))


def test_arrivals_count_no_token_beyond_a_requests_length() -> None:
    arrivals = Arrivals([1, 3])
    for total, seconds in ((0, 0.1), (1, 0.5), (2, 0.6), (4, 0.9)):
        arrivals.stamp(0, total, seconds)
        arrivals.stamp(1, total, seconds)
    assert arrivals.counts() == [1, 3]
    assert arrivals.first_s() == [0.5, 0.5]
    assert arrivals.gaps_s() == pytest.approx([0.1, 0.3])
    assert percentiles_ms([0.001, 0.003]) == {"p50": 2.0, "p99": 2.98}
    assert percentiles_ms([]) == {}
