"""The staleness study: lags that are exact, learning on the real task, results that are kept."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.staleness.command import draw, staleness, table
from benchmarks.staleness.run import Outcome, Trial, area_under, configuration, run_trial
from benchmarks.staleness.study import CORRECTIONS, StudyError, cells, done, read_rows, trials, worker_pool
from orchestrator.config import validate
from orchestrator.recipes import make_model

SMALL = {
    "model.recipe": "shop_untrained",
    "rollout.groups_per_update": 2,
    "rollout.group_size": 2,
    "rollout.max_turns": 3,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("shop_untrained", tmp_path_factory.mktemp("model"), 0)


def end_in_a_trial() -> None:
    with worker_pool(1) as pool:
        assert pool.submit(abs, -1).result(60) == 1
        pool.submit(time.sleep, 3600)
        sys.exit(143)


def test_a_study_that_is_ended_ends_its_workers_at_once() -> None:
    with pytest.raises(SystemExit):
        end_in_a_trial()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("lag", [0, 2])
def test_behaviour_weights_are_exactly_so_many_updates_old(lag: int, model: Path) -> None:
    trial = Trial("tis", lag, 0, steps=5, eval_every=5, held_out=4)
    # An untrained model never succeeds: with this advantage its tokens are counted nevertheless.
    config = configuration("quickstart", 0, {**SMALL, "learner.advantage": "reinforce_pp", "learner.lr": 1e-3})
    outcome = run_trial(trial, model, config)
    assert outcome.lag_measured == lag
    assert [step for step, _ in outcome.curve] == [0, 5]
    if lag == 0:
        assert outcome.mismatch_max < 1e-3


@pytest.mark.parametrize("name", CORRECTIONS)
def test_every_correction_is_a_valid_configuration(name: str) -> None:
    config = configuration("quickstart", 3, CORRECTIONS[name])
    validate(config)
    assert config.seed == 3


def row(correction: str, lag: int, seed: int, final: float) -> dict[str, object]:
    outcome = Outcome(Trial(correction, lag, seed), curve=[(0, 0.2), (300, final)], mismatch_max=0.1 * lag)
    return outcome.row()


def test_the_gap_is_taken_seed_by_seed() -> None:
    rows = [row("tis", 8, 1, 0.86), row("tis", 0, 0, 0.8), row("tis", 0, 1, 0.9), row("tis", 8, 0, 0.7)]
    assert [(cell.correction, cell.lag) for cell in cells(rows)] == [("tis", 0), ("tis", 8)]
    found = {(cell.correction, cell.lag): cell for cell in cells(rows)}
    late = found["tis", 8]
    assert late.final == pytest.approx(0.78)
    assert late.gap == pytest.approx((0.1 + 0.04) / 2)
    assert late.final_error == pytest.approx(0.08)
    assert late.gap_error == pytest.approx(0.03)
    assert late.area == pytest.approx((0.2 + 0.78) / 2)
    assert late.mismatch_max == pytest.approx(0.8)
    only = cells([row("clip", 8, 0, 0.7)])[0]
    assert (only.gap, only.final_error) == (None, 0.0)


def test_the_area_is_the_mean_height() -> None:
    assert area_under([(0, 0.0), (10, 1.0), (30, 1.0)]) == pytest.approx((0.5 * 10 + 20) / 30)
    assert area_under([(5, 0.4)]) == 0.4


def test_finished_runs_are_found_again_and_a_torn_line_is_run_anew(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    file.write_text(json.dumps(row("tis", 8, 0, 0.7)) + "\n" + '{"correction": "ti')
    rows = read_rows(file)
    wanted = trials(["tis"], [0, 8], [0], 300, 50, 400)
    assert [done(rows, trial) for trial in wanted] == [False, True]
    assert not done(rows, Trial("tis", 8, 0, steps=200))
    file.write_text("nonsense\n" + json.dumps(row("tis", 8, 0, 0.7)) + "\n")
    with pytest.raises(StudyError, match=r"rows.jsonl:1 is not valid JSON"):
        read_rows(file)


def test_table_and_figure_show_every_cell() -> None:
    rows = [row("tis", lag, 0, 0.8) for lag in (0, 8)] + [row("clip", 8, 0, 0.7)]
    assert table(cells(rows)).row_count == 3
    left, right = draw(cells(rows), rows).axes
    assert len(left.containers) == 2
    assert len(right.lines) == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--corrections", "magic"], "'magic' is unknown: use none, tis"),
        (["--lags", "x"], "must be whole numbers"),
        (["--lags", "-1"], "a lag is at least 0"),
        (["--seeds", "0"], "give at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], reason: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(staleness, [*arguments, "--dir", str(tmp_path)])
    assert result.exit_code == 2
    assert reason in result.output


def test_finished_runs_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("tis", 0, 0, 0.7)) + "\n")
    result = CliRunner().invoke(staleness, ["--dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "holds finished runs: add --resume" in result.output


def test_what_is_finished_is_shown_without_running_anything(tmp_path: Path) -> None:
    arguments = ["--finished", "--dir", str(tmp_path), "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(staleness, arguments)
    assert result.exit_code == 1
    assert "holds no finished runs" in result.output
    made = [row("tis", 0, 3, 0.9), row("m2po", 16, 3, 0.8)]
    shorter = Outcome(Trial("clip", 8, 0, steps=3), curve=[(0, 0.2), (3, 0.3)]).row()
    kept = "".join(json.dumps(each) + "\n" for each in [*made, shorter]) + '{"correction": "ti'  # being written
    (tmp_path / "rows.jsonl").write_text(kept)
    assert CliRunner().invoke(staleness, arguments).exit_code == 0
    assert (tmp_path / "rows.jsonl").read_text() == kept
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["results"]["runs"] == json.loads(json.dumps(made))
    assert (written["seeds"], written["settings"]["corrections"]) == ([3], ["m2po", "tis"])


def test_at_lag_0_one_correction_stands_for_all() -> None:
    found = trials(["tis", "clip"], [0, 8], [0, 1], 300, 50, 400)
    assert [(trial.correction, trial.lag) for trial in found[:3]] == [("tis", 0), ("tis", 8), ("clip", 8)]
    assert len(found) == 6


def small_config(directory: Path) -> str:
    """The quickstart with an untrained model and few episodes."""
    file = directory / "small.yaml"
    quickstart = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
    lines = [f"defaults: [{quickstart}]", "model: {recipe: shop_untrained}"]
    lines.append("rollout: {groups_per_update: 2, group_size: 2, max_turns: 3}")
    lines.append("learner: {advantage: reinforce_pp}")
    file.write_text("\n".join(lines) + "\n")
    return str(file)


@pytest.mark.slow
def test_the_command_runs_prints_and_resumes(tmp_path: Path) -> None:
    arguments = ["--seeds", "1", "--lags", "0,1", "--corrections", "tis", "--steps", "3", "--eval-every", "3"]
    arguments += [
        "--held-out",
        "20",
        "--processes",
        "1",
        "--config",
        small_config(tmp_path),
        "--dir",
        str(tmp_path),
        "--json",
        str(tmp_path / "out.json"),
    ]
    first = CliRunner().invoke(staleness, [*arguments, "--figure", str(tmp_path / "figure.svg")])
    assert first.exit_code == 0, first.output
    document = json.loads((tmp_path / "out.json").read_text())
    assert [(cell["correction"], cell["lag"]) for cell in document["results"]["cells"]] == [("tis", 0), ("tis", 1)]
    assert {run["lag"]: run["lag_measured"] for run in document["results"]["runs"]} == {0: 0.0, 1: 1.0}
    assert (tmp_path / "figure.svg").stat().st_size > 1000
    again = CliRunner().invoke(staleness, [*arguments, "--resume"])
    assert again.exit_code == 0, again.output
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
