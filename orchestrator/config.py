"""The whole configuration of a run: one dataclass a part, composed here.

:func:`load` composes files and overrides, :func:`resolve_mode` applies what ``mode`` implies, :func:`validate` refuses
what cannot work, :func:`to_yaml` writes a config that runs again as it is. No torch, Ray or transformers here.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import yaml
from omegaconf import OmegaConf

from env_pool.config import EnvironmentsConfig, RewardConfig, TasksConfig
from experience.config import QueueConfig, StalenessConfig
from learner.config import LearnerConfig, ModelConfig
from learner.objectives.names import GROUP_RELATIVE
from learner.objectives.presets import PART_OF, PRESETS
from orchestrator.composition import ConfigError, Origin, compose, leaves
from orchestrator.fleet_config import FleetConfig
from rollout_workers.config import RolloutConfig
from rollout_workers.engines.config import EnginesConfig
from weight_sync.config import WeightsConfig

__all__ = ["ClusterConfig", "Config", "ConfigError", "RunConfig", "load", "resolve_mode", "to_yaml", "validate"]

MODES = ("sync", "one_step", "async")

MODE_PRESETS: dict[str, dict[str, Any]] = {
    "sync": {"staleness.target_lag": 0.0, "staleness.max_lag": 0, "staleness.on_violation": "wait"},
    "one_step": {"staleness.target_lag": 1.0, "staleness.max_lag": 1, "staleness.on_violation": "wait"},
    "async": {},
}
"""What each mode fixes; everything else about a run is the same in all three."""

SECRET_KEY = re.compile(r"secret|passw|credential|(^|_)(token|api_?key|access_key|private_key)$", re.IGNORECASE)
"""Names of keys whose text is never shown (``hf_token``, ``api_key``; not ``max_tokens`` or ``token_budget``)."""

MASK = "********"


@dataclass
class RunConfig:
    """Where a run lives, how long it goes and when it evaluates and saves. Times are in seconds."""

    dir: str = "runs/default"
    steps: int = 400
    """Learner steps (published versions)."""
    deterministic: bool = False
    """Lock-step scheduling: the same seed gives the same run bit for bit. Needs ``mode: sync``."""
    eval_every: int = 50
    """Steps between evaluations on the held-out tasks; 0: only before the first and after the last step."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0: only after the last step."""
    keep_checkpoints: int = 2
    overwrite: bool = False
    """Replace an existing run in ``dir`` instead of refusing."""
    startup_timeout_s: float = 180.0
    stall_timeout_s: float = 300.0
    """A run in which nothing finishes for this long ends with an error that names what it waited for."""
    stall_warn_factor: float = 3.0
    """A warning names what the run waits for when nothing was trained for this many median steps plus the longest of
    the recent episodes."""
    stall_warn_floor_s: float = 30.0
    """The warning comes no earlier than after this many seconds."""
    view_every_s: float = 0.5
    """Seconds between refreshes of the terminal view."""

    def validate(self) -> None:
        """Raise ValueError naming the first setting that cannot work."""
        if not self.dir:
            raise ValueError("run.dir must name a directory, such as runs/first")
        _at_least("run", self, 1, "steps", "keep_checkpoints")
        _at_least("run", self, 0, "eval_every", "checkpoint_every")
        for name in (
            "startup_timeout_s",
            "stall_timeout_s",
            "stall_warn_factor",
            "stall_warn_floor_s",
            "view_every_s",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"run.{name} must be positive, got {getattr(self, name)}")


@dataclass
class ClusterConfig:
    """The Ray cluster: ``address: local`` starts one on this machine, anything else joins that one."""

    address: str = "local"
    placement: str = "auto"
    num_cpus: int | None = None
    """Logical CPUs a local cluster offers; null: enough for the actors of the run."""
    object_store_mb: int = 256

    def validate(self) -> None:
        """Raise ValueError naming the first setting that cannot work."""
        if not self.address:
            raise ValueError("cluster.address must be 'local', 'auto' or HOST:PORT of a running Ray cluster")
        if self.placement != "auto":
            raise ValueError(f"cluster.placement must be 'auto', got {self.placement!r}")
        if self.num_cpus is not None and self.num_cpus < 1:
            raise ValueError(f"cluster.num_cpus must be at least 1 or null, got {self.num_cpus}")
        _at_least("cluster", self, 80, "object_store_mb")


@dataclass
class Config:
    """A run's configuration. Each field is one part, documented beside that part."""

    mode: str = "async"
    """``sync``, ``one_step`` or ``async``: presets of one code path, see :data:`MODE_PRESETS`."""
    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engines: EnginesConfig = field(default_factory=EnginesConfig)
    environments: EnvironmentsConfig = field(default_factory=EnvironmentsConfig)
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        self.origins: dict[str, Origin] = {}
        """Where each key that was set came from (not part of the configuration)."""
        self.references: dict[str, str] = {}
        """Keys whose value was read from an environment variable, as they were written."""


def load(paths: Sequence[str], overrides: Sequence[str] = ()) -> Config:
    """Compose config files (or packaged names) and ``key.path=value`` overrides, and apply what the mode implies.

    Raises:
        ConfigError: Anything about the files, keys or types is wrong, or a setting contradicts the mode.
    """
    composed = compose(Config, paths, overrides)
    config = composed.config
    config.origins = composed.origins
    config.references = composed.references
    return resolve_objective(resolve_mode(config))


def resolve_objective(config: Config) -> Config:
    """A copy of ``config`` with the values of its objective's preset wherever nothing else was set.

    What was set in an earlier layer than ``learner.objective`` gives way to the preset, as with ``mode``; what was set beside
    it or later stays, and a part of something that was set otherwise (the bounds of another surrogate) is not taken over.

    Raises:
        ConfigError: No preset of that name.
    """
    name = config.learner.objective
    if name not in PRESETS:
        raise ConfigError(f"learner.objective: {one_of(name, tuple(PRESETS))}")
    resolved = copy.deepcopy(config)
    chosen = config.origins.get("learner.objective", Origin(-1, "the default"))
    settings = PRESETS[name].settings

    def stays(key: str) -> bool:
        origin = config.origins.get(key)
        return origin is not None and origin.layer >= chosen.layer

    def owner_differs(key: str) -> bool:
        owner = PART_OF.get(key)
        return owner is not None and stays(owner) and reduce(getattr, owner.split("."), config) != settings.get(owner)

    for key, value in settings.items():
        if not stays(key) and not owner_differs(key):
            *sections, field_name = key.split(".")
            setattr(reduce(getattr, sections, resolved), field_name, value)
    learner = resolved.learner
    if learner.aggregation == "constant" and learner.constant_length is None:
        learner.constant_length = resolved.rollout.max_episode_tokens
    return resolved


def resolve_mode(config: Config) -> Config:
    """A copy of ``config`` with the mode's presets applied.

    A preset replaces what an earlier layer set (so ``millrace train quickstart mode=sync`` works); a different value
    set in the same layer as the mode or in a later one contradicts it.

    Raises:
        ConfigError: The mode is unknown, or such a contradiction, naming both places.
    """
    if config.mode not in MODES:
        raise ConfigError(f"mode: {one_of(config.mode, MODES)}")
    resolved = copy.deepcopy(config)
    mode_origin = config.origins.get("mode", Origin(-1, "the default"))
    for key, wanted in MODE_PRESETS[config.mode].items():
        section, name = key.split(".")
        part = getattr(resolved, section)
        current = getattr(part, name)
        origin = config.origins.get(key)
        if plain(current) != wanted and origin is not None and origin.layer >= mode_origin.layer:
            raise ConfigError(
                f"{origin.where}: {key}={plain(current)} contradicts mode={config.mode} ({mode_origin.where}), "
                f"which needs {key}={wanted}; remove {key} or choose mode=async"
            )
        setattr(part, name, type(current)[wanted] if hasattr(type(current), "__members__") else wanted)
    return resolved


def validate(config: Config) -> None:
    """Refuse a config that cannot run.

    Raises:
        ConfigError: One line for each part that is wrong.
    """
    parts: dict[str, Any] = {name: getattr(config, name) for name in config.__dataclass_fields__}
    checks: list[tuple[str, Callable[[], None]]] = [
        (name, part.validate) for name, part in parts.items() if hasattr(part, "validate")
    ]
    checks += [(f"rewards.{index}", reward.validate) for index, reward in enumerate(config.rewards)]
    checks.append(("", lambda: _validate_together(config)))
    problems = []
    for name, check in checks:
        try:
            check()
        except ValueError as error:
            text = str(error)
            problems.append(text if not name or text.startswith(name) else f"{name}: {text}")
    if problems:
        raise ConfigError("\n".join(problems))


def _validate_together(config: Config) -> None:
    if config.seed < 0:
        raise ValueError(f"seed must not be negative, got {config.seed}")
    if config.queue.min_size > config.rollout.group_size:
        raise ValueError(
            f"queue.min_size ({config.queue.min_size}) must not exceed rollout.group_size "
            f"({config.rollout.group_size}): no group could ever be complete"
        )
    if config.rollout.max_episode_tokens > config.engines.max_len:
        raise ValueError(
            f"rollout.max_episode_tokens ({config.rollout.max_episode_tokens}) must not exceed engines.max_len "
            f"({config.engines.max_len}): the engine could not hold the episode"
        )
    if config.rollout.group_size == 1 and config.learner.advantage in GROUP_RELATIVE:
        raise ValueError(
            f"learner.advantage={config.learner.advantage} compares the episodes of a group, and rollout.group_size=1 leaves "
            "nothing to compare: every advantage would be 0; use groups of 2 or more, or learner.advantage=reinforce_pp"
        )
    _validate_every(config)
    if config.rollout.group_size == 1 and config.queue.require_signal:
        raise ValueError(
            "queue.require_signal=true drops groups whose rewards are all equal, and with rollout.group_size=1 that is every "
            "group; use groups of 2 or more, or queue.require_signal=false"
        )
    if config.learner.updates_per_step > config.rollout.groups_per_update:
        raise ValueError(
            f"learner.updates_per_step={config.learner.updates_per_step} cannot be more than rollout.groups_per_update="
            f"{config.rollout.groups_per_update}: every update needs a group"
        )
    if config.learner.backend == "synthetic" and config.queue.require_signal:
        raise ValueError(
            "queue.require_signal=true can have no meaning with modelled episodes, which have no real rewards"
        )
    if config.learner.lora.rank and config.weights.dtype == "fp8_block":
        raise ValueError(
            "weights.dtype=fp8_block is for whole matrices, and learner.lora sends none: leave it at auto, or set bfloat16"
        )
    if "synthetic" in (config.engines.kind, config.learner.backend):
        _validate_synthetic(config)
    if config.run.deterministic:
        _validate_deterministic(config)


def _validate_every(config: Config) -> None:
    every, max_lag = config.weights.every, config.staleness.max_lag
    if every > 1 and config.mode == "sync":
        raise ValueError(f"mode=sync is on-policy for every token, and weights.every={every} is not: set it to 1")
    if every > max_lag + 1:
        raise ValueError(
            f"weights.every={every} lets engines sample with weights up to {every - 1} updates old, and "
            f"staleness.max_lag={max_lag} takes those tokens out of the loss: set it to {every - 1} or more"
        )


def _validate_synthetic(config: Config) -> None:
    if config.engines.kind != config.learner.backend:
        raise ValueError(
            f"engines.kind={config.engines.kind} and learner.backend={config.learner.backend}: modelled engines make "
            "tokens without meaning, and a modelled learner changes no weights; set both to synthetic, or neither"
        )
    if config.run.deterministic:
        raise ValueError(
            "run.deterministic=true: synthetic engines follow the clock; the same seed gives the same episodes, not the "
            "same run bit for bit; set it to false"
        )
    _validate_scales(config)
    engine, learner = config.engines.synthetic, config.learner.synthetic
    if config.model.path is None and config.model.recipe != "synthetic":
        raise ValueError(
            f"model.recipe={config.model.recipe}: synthetic engines sample from a vocabulary of their own; set "
            "model.recipe=synthetic"
        )
    if engine.stage_s / engine.time_scale >= config.weights.timeout_s:
        raise ValueError(
            f"engines.synthetic.stage_s={engine.stage_s:g} takes {engine.stage_s / engine.time_scale:g} wall seconds, and a "
            f"transfer may take weights.timeout_s={config.weights.timeout_s:g}: raise that or engines.synthetic.time_scale"
        )
    together = engine.accelerators * config.engines.count
    if config.mode == "sync" and learner.accelerators != together:
        raise ValueError(
            f"mode=sync: the engines' {together} accelerators (engines.replicas x engines.synthetic.accelerators) train in "
            f"turns, so learner.synthetic.accelerators must be {together} (is {learner.accelerators})"
        )


def _validate_scales(config: Config) -> None:
    engine, learner = config.engines.synthetic, config.learner.synthetic
    for name in ("time_scale", "token_scale"):
        if getattr(engine, name) != getattr(learner, name):
            raise ValueError(
                f"engines.synthetic.{name}={getattr(engine, name):g} and learner.synthetic.{name}="
                f"{getattr(learner, name):g} must be equal: they model one cluster"
            )
        if config.tasks.environment == "workload" and config.tasks.options.get(name, 1.0) != getattr(engine, name):
            raise ValueError(
                f"tasks.options.{name}={config.tasks.options.get(name, 1.0):g} and engines.synthetic.{name}="
                f"{getattr(engine, name):g} must be equal: tools and engines run in the same time"
            )


def _validate_deterministic(config: Config) -> None:
    needed = {"mode": (config.mode, "sync"), "rollout.workers": (config.rollout.workers, 1)}
    needed["engines.replicas"] = (config.engines.replicas, 1)
    needed["engines.kind"] = (config.engines.kind, "torch")
    needed["engines.prefill"] = (config.engines.prefill, 0)
    wrong = [f"{key}={wanted} (is {value})" for key, (value, wanted) in needed.items() if value != wanted]
    if wrong:
        raise ValueError(f"run.deterministic=true needs {', '.join(wrong)}")


def to_yaml(config: Config, *, mask_secrets: bool = False) -> str:
    """The config as YAML that :func:`load` reads back to an equal one.

    Values that came from ``${oc.env:NAME}`` are written as that reference. With ``mask_secrets`` (for a screen) other
    values of secret keys are replaced by asterisks.
    """
    values = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    for key, reference in config.references.items():
        _put(values, key.split("."), reference)
    if mask_secrets:
        for key in secret_values(config).keys() - config.references.keys():
            _put(values, key.split("."), MASK)
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120))


def secret_values(config: Config) -> dict[str, str]:
    """Dotted key -> text of every secret that the config holds literally or read from the environment."""
    values = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    return {
        key: value
        for key, value in leaves(values)
        if isinstance(value, str) and value and SECRET_KEY.search(key.rsplit(".", 1)[-1])
    }


def _put(values: Any, parts: list[str], value: str) -> None:
    for part in parts[:-1]:
        values = values[int(part)] if isinstance(values, list) else values[part]
    if isinstance(values, list):
        values[int(parts[-1])] = value
    else:
        values[parts[-1]] = value


def one_of(value: str, choices: Sequence[str]) -> str:
    """The sentence for a value that is none of ``choices``, with the nearest one."""
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"must be one of {', '.join(choices)}, got {value!r}{hint}"


def plain(value: Any) -> Any:
    """An enum member as its name, anything else as it is."""
    return value.name if hasattr(type(value), "__members__") else value


def _at_least(section: str, part: Any, least: int, *names: str) -> None:
    for name in names:
        if getattr(part, name) < least:
            raise ValueError(f"{section}.{name} must be at least {least}, got {getattr(part, name)}")
