"""What docs/learner.md says of settings and presets is what there is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import click
import pytest

from benchmarks.cli import bench
from learner.mixing_config import CriticConfig, ReplayConfig, SftConfig
from learner.objectives import config as objective
from learner.objectives.presets import PRESETS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "learner.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_described(name: str) -> None:
    assert f"`{name}`" in TEXT.split("### Presets")[1]


def test_every_setting_of_the_objective_is_named() -> None:
    missing = [field.name for field in fields(objective.ObjectiveConfig) if field.name not in TEXT]
    assert missing == ["correction_cap", "correction_low", "correction_high", "constant_length"]


@pytest.mark.parametrize("choices", ["ADVANTAGES", "RATIOS", "SURROGATES", "CORRECTIONS", "AGGREGATIONS"])
def test_every_choice_is_named(choices: str) -> None:
    assert [name for name in getattr(objective, choices) if f"`{name}`" not in TEXT] == []


@pytest.mark.parametrize("kind", [CriticConfig, SftConfig, ReplayConfig])
def test_every_setting_of_the_parts_is_named(kind: type) -> None:
    assert [field.name for field in fields(kind) if f"`{field.name}`" not in TEXT] == []


@pytest.mark.parametrize("arguments", re.findall(r"^    millrace (bench .*?)(?: +#.*)?$", TEXT, re.MULTILINE))
def test_every_shown_benchmark_is_one_that_the_command_line_takes(arguments: str) -> None:
    names = arguments.split()[1:]
    command = bench.get_command(click.Context(bench), names[0])
    assert command is not None
    command.make_context(names[0], names[1:])
