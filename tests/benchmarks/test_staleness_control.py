"""Runs on the engine's own clock: the same seed gives the same run, and each policy keeps its bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.staleness.control import VARIANTS, differences, draw, staleness_control, success_at, table
from benchmarks.staleness.run import configuration
from benchmarks.staleness.ticks import TickedOutcome, TickedRun, Timing
from orchestrator.config import validate
from orchestrator.recipes import make_model

SMALL = {
    "model.recipe": "shop_untrained",
    "rollout.groups_per_update": 2,
    "rollout.group_size": 2,
    "rollout.max_turns": 3,
}
STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("shop_untrained", tmp_path_factory.mktemp("model"), 0)


def ticked(variant: str, model: Path) -> TickedOutcome:
    config = configuration("quickstart", 0, {**VARIANTS[variant], **SMALL})
    timing = Timing(tool_median=6.0, tool_sigma=1.5, update_ticks=10)
    return TickedRun(config, model, timing, seed=0, steps=STEPS, eval_every=STEPS, held_out=2).run()


@pytest.mark.parametrize("policy", ["mask_tokens", "drop_group", "wait"])
def test_each_policy_keeps_its_bound_and_the_books_balance(policy: str, model: Path) -> None:
    outcome = ticked(policy, model)
    ledger, tokens = outcome.ledger, outcome.tokens
    assert ledger["trained"] == 2 * STEPS
    assert ledger["dispatched"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["live"]
    assert 0 < max(outcome.lags) <= 2
    if policy != "mask_tokens":
        assert tokens["masked"] == 0
    if policy == "wait":
        assert ledger["dropped"] == {}
    assert [point[0] for point in outcome.curve] == [0, STEPS]
    assert outcome.curve[-1][1] > 10 * STEPS


def test_the_same_seed_gives_the_same_run(model: Path) -> None:
    first, second = ticked("adaptive", model), ticked("adaptive", model)
    assert first == second
    assert len(first.target_lags) == STEPS


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_valid_configuration(name: str) -> None:
    validate(configuration("quickstart", 0, VARIANTS[name]))


def row(variant: str, ticks: int) -> dict[str, Any]:
    curve = [(0, 0, 0, 0.2), (50, ticks, 400, 0.6)]
    keys = ("lag", "target_lag", "masked", "dropped", "waited", "length_bias")
    return {"variant": variant, "seed": 0, "final": 0.6, "ticks": ticks, "curve": curve, **dict.fromkeys(keys, 0.5)}


def test_success_is_compared_at_one_time() -> None:
    assert success_at(row("wait", 200), 100) == pytest.approx(0.4)
    assert success_at(row("wait", 200), 500) == 0.6
    rows = [row("wait", 200), row("mask_tokens", 100)]
    shown = table(rows)
    assert "at T=100" in [str(column.header) for column in shown.columns]
    assert [list(column.cells) for column in shown.columns][3] == ["0.400", "0.600"]
    assert len(draw(rows).axes[0].lines) == 2


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(staleness_control, ["--variants", "magic", "--dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "'magic' is unknown: use mask_tokens" in result.output


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
def test_the_command_runs_and_resumes(tmp_path: Path) -> None:
    arguments = ["--variants", "wait,adaptive", "--seeds", "1", "--steps", "2", "--eval-every", "2", "--held-out", "8"]
    arguments += [
        "--config",
        small_config(tmp_path),
        "--processes",
        "1",
        "--dir",
        str(tmp_path),
        "--json",
        str(tmp_path / "out.json"),
    ]
    first = CliRunner().invoke(staleness_control, arguments)
    assert first.exit_code == 0, first.output
    assert {row["variant"] for row in json.loads((tmp_path / "out.json").read_text())["results"]} == {
        "wait",
        "adaptive",
    }
    again = CliRunner().invoke(staleness_control, [*arguments, "--resume"])
    assert again.exit_code == 0, again.output
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


def test_differences_are_taken_seed_by_seed() -> None:
    def row(variant: str, seed: int, final: float) -> dict[str, object]:
        return {
            "variant": variant,
            "seed": seed,
            "ticks": 100,
            "final": final,
            "curve": [(0, 0, 0, 0.2), (50, 100, 9, final)],
        }

    rows = [row("wait", 1, 0.9), row("mask_tokens", 0, 0.7), row("mask_tokens", 1, 0.8), row("wait", 0, 0.6)]
    columns = [list(column.cells) for column in differences(rows, ["mask_tokens", "wait"]).columns]
    assert columns == [["wait"], ["2"], ["+0.000"], ["0.100"], ["+0.000"], ["0.100"]]
