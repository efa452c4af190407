from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from env_pool.config import EnvironmentsConfig, RewardConfig, TasksConfig
from env_pool.environment import Environment
from env_pool.registry import BUNDLED, TaskSource, load_environment


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_environment_loads_under_its_own_name(name: str) -> None:
    found = load_environment(name)
    assert issubclass(found, Environment)
    assert found.name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shopp", "bundled are shop, reasoning_gym.*Did you mean 'shop'"),
        ("nowhere.at_all:Thing", "there is no module 'nowhere'"),
        ("pool_fixtures:Countr", "has no 'Countr'. Did you mean 'Counter'"),
        ("pool_fixtures:Flaky", "not a subclass of env_pool.environment.Environment"),
    ],
)
def test_a_wrong_environment_is_named_with_what_would_be_right(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_environment(name)


def test_tasks_are_a_pure_function_of_seed_split_and_index() -> None:
    config = TasksConfig(environment="pool_fixtures:Counter", options={"most": 1000})
    first = TaskSource.from_config(config, "train", seed=1)
    again = TaskSource.from_config(config, "train", seed=1)
    other = TaskSource.from_config(config, "train", seed=2)
    assert [first.task(i) for i in (5, 1)] == [again.task(i) for i in (5, 1)]
    assert [first.task(i).payload for i in range(9)] != [other.task(i).payload for i in range(9)]
    assert first.task(0).environment == "pool_fixtures:Counter"


def test_the_held_out_set_is_the_same_for_every_seed() -> None:
    config = TasksConfig(environment="pool_fixtures:Counter")
    sets = [[TaskSource.from_config(config, "held_out", seed).task(i) for i in range(5)] for seed in (1, 2)]
    assert sets[0] == sets[1]


def test_an_option_that_does_not_exist_is_named() -> None:
    config = TasksConfig(environment="pool_fixtures:Counter", options={"mots": 5})
    with pytest.raises(ValueError, match=r"tasks.options.mots.*Did you mean 'most'"):
        TaskSource.from_config(config, "train", 0).task(0)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (TasksConfig(held_out=-1), "tasks.held_out"),
        (TasksConfig(sampler="best"), "tasks.sampler"),
        (EnvironmentsConfig(actors=0), "environments.actors"),
        (EnvironmentsConfig(step_timeout_s=0), "environments.step_timeout_s"),
        (EnvironmentsConfig(noise={"typo": 0.1}), "environments.noise.typo"),
        (EnvironmentsConfig(noise={"error": 0.7, "timeout": 0.7}), "add up to 1.4"),
        (RewardConfig(kind="judge"), "kind must be 'rule'"),
        (RewardConfig(timeout_s=0), "timeout_s"),
    ],
)
def test_wrong_settings_are_named(config: TasksConfig | EnvironmentsConfig | RewardConfig, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        config.validate()


@pytest.mark.parametrize("part", [TasksConfig, EnvironmentsConfig, RewardConfig])
def test_the_defaults_are_valid_structured_configuration(part: type) -> None:
    OmegaConf.to_object(OmegaConf.structured(part)).validate()  # type: ignore[union-attr]
