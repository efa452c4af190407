"""`millrace bench learn`: what it reads, how it sums up, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks.learn import Bar, LearnError, SeedResult, learn, read_result, report, run_group, summarise, train_seed
from orchestrator.evaluation import Evaluation


def evaluation(step: int, easy: tuple[int, int], hard: tuple[int, int]) -> dict[str, Any]:
    parts = {"1": easy, "5": hard}
    entries = {key: {"n": n, "success": successes / n} for key, (successes, n) in parts.items()}
    successes, tasks = easy[0] + hard[0], easy[1] + hard[1]
    return {
        "step": step,
        "tasks": tasks,
        "success": successes / tasks,
        "by_difficulty": entries,
        "by_domain": {"look_up": entries["1"], "refund": entries["5"]},
    }


def write_run(directory: Path, evaluations: list[dict[str, Any]], status: str = "finished") -> Path:
    (directory / "eval").mkdir(parents=True)
    summary = {"status": status, "steps": 9, "startup_s": 12.5, "lag_mean": 1.25, "lag_max": 2, "versions": {}}
    (directory / "summary.json").write_text(json.dumps(summary))
    for one in evaluations:
        (directory / "eval" / f"step-{one['step']:06d}.json").write_text(json.dumps(one))
    return directory


def two_seeds(tmp_path: Path) -> list[SeedResult]:
    first = [evaluation(0, (4, 10), (0, 10)), evaluation(5, (1, 10), (1, 10)), evaluation(9, (10, 10), (8, 10))]
    second = [evaluation(0, (6, 10), (2, 10)), evaluation(9, (9, 10), (5, 10))]
    runs = [write_run(tmp_path / "0", first), write_run(tmp_path / "1", second)]
    return [read_result(run, seed, 100.0 + seed) for seed, run in enumerate(runs)]


def test_first_and_last_evaluation_are_compared_and_pooled_over_seeds(tmp_path: Path) -> None:
    summary = summarise(two_seeds(tmp_path), Bar())
    assert summary["mean"] == pytest.approx({"start": 0.3, "end": 0.8, "rise": 0.5, "wall_s": 100.5, "startup_s": 12.5})
    assert summary["by_difficulty"] == {
        "1": {"n": 20, "start": 0.5, "end": pytest.approx(0.95)},
        "5": {"n": 20, "start": pytest.approx(0.1), "end": pytest.approx(0.65)},
    }
    assert list(summary["by_domain"]) == ["look_up", "refund"]
    assert summary["missed"] == []


@pytest.mark.parametrize(
    ("bar", "missed"),
    [
        (Bar(rise=0.6), "rise 0.500 < 0.6"),
        (Bar(end=0.81), "end 0.800 < 0.81"),
        (Bar(wall_s=100.0), "wall_s 101.0 > 100.0"),
        (Bar(startup_s=12.0), "startup_s 12.5 > 12.0"),
    ],
)
def test_a_missed_bar_is_named(tmp_path: Path, bar: Bar, missed: str) -> None:
    assert summarise(two_seeds(tmp_path), bar)["missed"] == [missed]


def test_the_report_shows_seeds_depths_and_kinds(tmp_path: Path) -> None:
    results = two_seeds(tmp_path)
    console = Console(record=True, width=100)
    report(results, summarise(results, Bar(end=0.9)), console)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "0 0.200 0.900 0.700 9 100 12.5 1.25 2" in lines
    assert "mean 0.300 0.800 0.500 100 12.5" in lines
    assert "5 20 0.10 0.65 +0.55" in lines
    assert "look_up 20 0.50 0.95 +0.45" in lines
    assert "missed: end 0.800 < 0.9" in lines


def test_what_is_read_are_the_keys_that_an_evaluation_has() -> None:
    assert set(evaluation(0, (1, 1), (1, 1))) <= set(Evaluation(0, 0, [], 0).result())


def test_an_unfinished_or_damaged_run_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    one = evaluation(0, (1, 2), (1, 2))
    with pytest.raises(LearnError, match=r"summary\.json does not exist"):
        read_result(tmp_path, 0, 1.0)
    with pytest.raises(LearnError, match=r"status is 'failed'"):
        read_result(write_run(tmp_path / "failed", [one], status="failed"), 0, 1.0)
    with pytest.raises(LearnError, match=r"eval holds 1 evaluations; one before and one after"):
        read_result(write_run(tmp_path / "short", [one]), 0, 1.0)
    torn = write_run(tmp_path / "torn", [one, evaluation(9, (1, 2), (1, 2))])
    (torn / "eval" / "step-000009.json").write_text('{"step": 9, "succ')
    with pytest.raises(LearnError, match=r"step-000009\.json is not valid JSON"):
        read_result(torn, 0, 1.0)


def test_a_run_that_fails_or_never_ends_is_an_error_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(LearnError, match=r"(?s)seed 0 ended with status \d.*no_such_key"):
        train_seed("quickstart", 0, tmp_path, ("run.no_such_key=1",), 120.0)
    with pytest.raises(LearnError, match=r"seed 1 did not end within 0 s; its output is in .*seed-1\.log"):
        train_seed("quickstart", 1, tmp_path, ("run.no_such_key=1",), 0.01)


def test_a_time_out_ends_what_the_run_had_started_too(tmp_path: Path) -> None:
    noted = tmp_path / "child"
    script = "import subprocess; p = subprocess.Popen(['sleep', '60']); "
    script += f"open({str(noted)!r}, 'w').write(str(p.pid)); p.wait()"
    for timeout_s in (2.0, 8.0, 30.0):  # the first is enough unless the machine is busy
        with pytest.raises(subprocess.TimeoutExpired):
            run_group([sys.executable, "-c", script], tmp_path / "log", timeout_s)
        if noted.exists() and noted.read_text():
            break
    child = int(noted.read_text())
    try:
        alive = psutil.wait_procs([psutil.Process(child)], timeout=30)[1]
    except psutil.NoSuchProcess:
        alive = []
    assert not alive, f"process {child} outlived its run"


def test_no_seeds_is_refused() -> None:
    result = CliRunner().invoke(learn, ["--seeds", "0"])
    assert result.exit_code == 2
    assert "give at least 1" in result.output


@pytest.mark.slow
def test_a_smoke_run_goes_through_and_a_missed_bar_is_status_one(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    arguments = ["--seeds", "1", "--config", "smoke", "--dir", str(tmp_path / "runs"), "--json", str(target), "--check"]
    result = CliRunner().invoke(learn, arguments)
    assert result.exit_code == 1, result.output
    document = json.loads(target.read_text())
    assert document["bench"] == "learn"
    assert document["seeds"] == [0]
    assert document["results"]["runs"][0]["summary"]["steps"] == 4
    assert document["results"]["runs"][0]["end"]["tasks"] == 16
    assert sys.version.split()[0] == document["versions"]["python"]
