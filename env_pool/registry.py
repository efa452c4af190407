"""Environments by name, imported when first asked for; and the stream of their tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from env_pool.config import TasksConfig
from env_pool.environment import Environment, Split
from env_pool.tools import nearest
from experience.records import Task

BUNDLED = {
    "shop": "env_pool.shop.environment:ShopEnvironment",
    "reasoning_gym": "env_pool.reasoning_gym_env:ReasoningGymEnvironment",
    "workload": "env_pool.workloads.environment:WorkloadEnvironment",
}

HELD_OUT_SEED = 0
"""Held-out tasks are the same in every run, whatever its seed."""

_loaded: dict[str, type[Environment]] = {}


def load_object(path: str, what: str) -> Any:
    """What ``package.module:name`` names. Raises ValueError, naming ``what`` asked for it, when it does not exist."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{what}: {path!r} is not of the form package.module:name")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise ValueError(f"{what}: there is no module {error.name!r} (is its folder on PYTHONPATH?)") from error
        raise ValueError(f"{what}: module {module_name!r} needs {error.name!r}, which is not installed") from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise ValueError(f"{what}: module {module_name!r} has no {attribute!r}.{nearest(attribute, public)}")
    return getattr(module, attribute)


def load_environment(name: str) -> type[Environment]:
    """The class behind a registered name or ``package.module:Class``. Raises ValueError when there is none."""
    if name not in _loaded:
        if name not in BUNDLED and ":" not in name:
            raise ValueError(
                f"tasks.environment: no environment {name!r}; bundled are {', '.join(BUNDLED)}, your own is named "
                f"package.module:Class.{nearest(name, BUNDLED)}"
            )
        found = load_object(BUNDLED.get(name, name), "tasks.environment")
        if not (isinstance(found, type) and issubclass(found, Environment)):
            raise ValueError(f"tasks.environment: {name!r} is not a subclass of env_pool.environment.Environment")
        _loaded[name] = found
    return _loaded[name]


def defines(kind: type[Environment], name: str) -> bool:
    """Whether an environment has a method of its own, or of a class between it and `Environment`."""
    mine, base = getattr(kind, name), getattr(Environment, name)
    return getattr(mine, "__func__", mine) is not getattr(base, "__func__", base)  # behind a class method is a function


@dataclass(frozen=True)
class TaskSource:
    """Numbered tasks of one split; the only state a reader needs is the next index."""

    environment: str
    split: Split
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_config(config: TasksConfig, split: Split, seed: int) -> TaskSource:
        """The training stream of a run with ``seed``, or the held-out set, which is the same for all seeds."""
        return TaskSource(config.environment, split, seed if split == "train" else HELD_OUT_SEED, dict(config.options))

    def task(self, index: int) -> Task:
        """Task number ``index``, from 0; the same one whenever asked.

        Its ``environment`` is the name in the configuration, so that any process can load the class by it.
        """
        made = load_environment(self.environment).make_task(index, self.seed, self.split, self.options)
        if made.environment == self.environment:
            return made
        return Task(
            task_id=made.task_id,
            environment=self.environment,
            payload=made.payload,
            domain=made.domain,
            difficulty=made.difficulty,
        )
