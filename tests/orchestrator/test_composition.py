"""Files and overrides compose left to right; whatever is wrong is named with its place and its remedy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.composition import Composed, ConfigError, compose, locate, packaged_names


@dataclass
class Branch:
    kind: str = "rule"
    weight: float = 1.0


@dataclass
class Part:
    steps: int = 4
    rate: float = 0.5
    path: str | None = "somewhere"
    on: bool = True
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Whole:
    seed: int = 0
    token_budget: int = 8
    part: Part = field(default_factory=Part)
    branches: list[Branch] = field(default_factory=lambda: [Branch()])


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def composed(paths: list[str], *overrides: str) -> Composed[Whole]:
    return compose(Whole, paths, overrides)


def refused(paths: list[str], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(Whole, paths, overrides)
    return str(caught.value)


def test_defaults_then_files_left_to_right_then_overrides(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "seed: 1\npart: {steps: 10, rate: 0.1}\n")
    first = write(tmp_path / "first.yaml", "defaults: [base.yaml]\nseed: 2\n")
    second = write(tmp_path / "second.yaml", "part: {steps: 20}\n")
    config = composed([first, second], "part.rate=1e-3").config
    assert (config.seed, config.part.steps, config.part.rate) == (2, 20, 0.001)


def test_overrides_reach_lists_nested_mappings_and_null() -> None:
    config = composed([], "branches.0.weight=2", "part.args.a.b=[1, x]", "part.path=null", "part.on=false").config
    assert config.branches == [Branch(weight=2.0)]
    assert config.part.args == {"a": {"b": [1, "x"]}}
    assert config.part.path is None
    assert config.part.on is False
    assert composed([], "branches=[{kind: judge, weight: 3}, {kind: rule}]").config.branches == [
        Branch("judge", 3.0),
        Branch(),
    ]
    assert composed([], "branches[0].weight=2").config.branches == [Branch(weight=2.0)]


def test_every_key_knows_the_line_or_override_it_came_from(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "seed: 1\npart:\n  steps: 10\n  rate: 0.1\n")
    origins = composed([path], "part.rate=0.2").origins
    assert origins["part.steps"].where == f"{path}:3"
    assert origins["part.rate"].where == "override 'part.rate=0.2'"
    assert origins["part.rate"].layer > origins["part.steps"].layer


def test_unknown_key_names_file_line_and_nearest_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "seed: 1\npart:\n  stepz: 10\n")
    message = refused([path])
    assert f"{path}:3" in message
    assert "'part.stepz'" in message
    assert "'part.steps'" in message


def test_unknown_override_key_names_the_place_where_such_a_key_exists() -> None:
    message = refused([], "steps=3")
    assert "'steps'" in message
    assert "'part.steps'" in message


def test_unknown_key_without_a_neighbour_lists_the_valid_ones() -> None:
    assert "part has: steps, rate, path, on, args" in refused([], "part.zzzzzz=3")


def test_key_below_a_single_value_is_refused() -> None:
    assert "part.steps is a single value (int)" in refused([], "part.steps.more=3")


@pytest.mark.parametrize(
    "override", ["part.steps=many", "part.steps=1.5", "seed=null", "part=3", "branches=3", "branches.7.weight=1"]
)
def test_wrong_type_names_the_key_and_the_override(override: str) -> None:
    message = refused([], override)
    assert override in message
    assert override.split("=")[0].split(".")[0] in message


def test_wrong_type_in_a_file_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "seed: 1\npart:\n  steps: many\n")
    message = refused([path])
    assert f"{path}:3: part.steps" in message
    assert "many" in message


def test_missing_file_names_packaged_configs() -> None:
    message = refused(["nowhere.yaml"])
    assert "'nowhere.yaml' does not exist" in message
    assert "packaged configs" in message


def test_bare_names_mean_packaged_configs() -> None:
    assert packaged_names()
    for name in packaged_names():
        assert locate(name).is_file()


def test_misspelt_packaged_name_suggests_the_right_one() -> None:
    assert "did you mean 'quickstart'?" in refused(["quikstart"])


def test_bad_yaml_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "seed: 1\npart: {steps: 3\n")
    message = refused([path])
    assert "not valid YAML" in message
    assert message.startswith(f"{path}:")


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just text\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    assert str(path) in refused([path])


def test_duplicate_key_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "seed: 1\nseed: 2\n")
    assert "seed" in refused([path])


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert composed([write(tmp_path / "a.yaml", "# nothing\n")]).config == Whole()


def test_cycle_of_defaults_is_named(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "defaults: [b.yaml]\n")
    write(tmp_path / "b.yaml", "defaults: [a.yaml]\n")
    assert "a.yaml -> b.yaml -> a.yaml" in refused([first])


def test_missing_default_names_the_file_that_asks_for_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "seed: 1\ndefaults: [gone.yaml]\n")
    message = refused([path])
    assert f"{path}:2" in message
    assert "gone.yaml" in message


@pytest.mark.parametrize("override", ["part.steps", "=3", ""])
def test_override_without_key_or_equals_shows_the_form(override: str) -> None:
    assert "write key.path=value" in refused([], override)


def test_override_with_bad_yaml_is_named() -> None:
    assert "part.args=[1" in refused([], "part.args=[1")


def test_environment_references_are_resolved_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_TEST_KEY", "hidden")
    result = composed([], "part.args.api_key=${oc.env:MILLRACE_TEST_KEY}", "part.path=${part.args.api_key}")
    assert result.config.part.args == {"api_key": "hidden"}
    assert result.references["part.args.api_key"] == "${oc.env:MILLRACE_TEST_KEY}"


def test_missing_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MILLRACE_TEST_KEY", raising=False)
    message = refused([], "part.path=${oc.env:MILLRACE_TEST_KEY}")
    assert "MILLRACE_TEST_KEY" in message
    assert "part.path" in message
