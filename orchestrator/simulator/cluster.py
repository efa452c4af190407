"""The modelled cluster of a synthetic configuration, in seconds of that cluster, and its other modes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from orchestrator.bound import Calibration, split_of
from orchestrator.config import Config, ConfigError, resolve_mode, validate
from rollout_workers.disaggregation.roles import RolePolicy
from rollout_workers.engines.protocol import EngineRole
from rollout_workers.engines.synthetic.cost_model import CostModel


@dataclass(frozen=True)
class Cluster:
    """What the simulation needs to know of the hardware. Seconds are modelled, tokens are carried ones."""

    replicas: int
    accelerators: int
    """Of each replica."""
    cost: CostModel
    learner_accelerators: int
    seconds_per_token: float
    """Accelerator-seconds of training for a carried token."""
    step_overhead_s: float
    switch_s: float
    token_scale: float
    time_shared: bool
    """Rollout and training take turns on the same accelerators."""
    roles: tuple[EngineRole, ...] = ()
    """Of each replica, where prefill and decode are split."""
    local_tokens: int = 0
    """An engine that decodes computes prompts with no more new tokens itself (split)."""
    role_policy: RolePolicy | None = None
    """Roles flip by load; None: they stay."""

    @classmethod
    def of(cls, config: Config) -> Cluster:
        """From a synthetic configuration.

        Raises:
            ConfigError: The engines or the learner are not synthetic.
        """
        require_synthetic(config)
        engine, learner = config.engines.synthetic, config.learner.synthetic
        roles = tuple(config.engines.role_of(index) for index in range(config.engines.count))
        return cls(
            replicas=config.engines.count,
            accelerators=engine.accelerators,
            cost=CostModel.from_config(dataclasses.replace(engine, time_scale=1.0)),
            learner_accelerators=learner.accelerators,
            seconds_per_token=learner.seconds_per_token * engine.token_scale,
            step_overhead_s=learner.step_overhead_s,
            switch_s=learner.switch_s if config.mode == "sync" else 0.0,
            token_scale=engine.token_scale,
            time_shared=config.mode == "sync",
            roles=roles if config.engines.split else (),
            local_tokens=config.engines.handoff.min_tokens,
            role_policy=config.engines.role_policy if config.engines.roles == "auto" else None,
        )

    @property
    def rollout_accelerators(self) -> int:
        return self.replicas * self.accelerators

    @property
    def total(self) -> int:
        """All accelerators."""
        return self.rollout_accelerators if self.time_shared else self.rollout_accelerators + self.learner_accelerators


def require_synthetic(config: Config) -> None:
    """Raise ConfigError unless the configuration models its hardware and its workload."""
    if config.engines.kind != "synthetic" or config.learner.backend != "synthetic":
        raise ConfigError(
            f"engines.kind={config.engines.kind}, learner.backend={config.learner.backend}: only a modelled cluster can be "
            "simulated; set both to synthetic and describe it in engines.synthetic and learner.synthetic (or start from "
            "the packaged config `synthetic`)"
        )
    if config.tasks.environment != "workload":
        raise ConfigError(
            f"tasks.environment={config.tasks.environment}: the simulator plays scripted workloads; set it to workload and "
            "choose tasks.options.suite (a recorded run is suite: replay with its file)"
        )


def total_accelerators(config: Config) -> int:
    """All accelerators of a synthetic configuration; in ``mode: sync`` engines and learner share them."""
    rollout = config.engines.count * config.engines.synthetic.accelerators
    return rollout if config.mode == "sync" else rollout + config.learner.synthetic.accelerators


def in_mode(config: Config, mode: str, calibration: Calibration) -> Config:
    """The same cluster, workload and steps in another mode; the config itself when it is in that mode already.

    ``sync`` gives all accelerators to both roles in turns; leaving ``sync`` splits them by ``calibration`` in whole
    accelerators a replica. All episodes of a step run at once in ``sync``.

    Raises:
        ConfigError: The config cannot be run in that mode.
    """
    if mode == config.mode:
        return config
    if config.engines.split:
        raise ConfigError(
            f"engines.prefill={config.engines.prefill}, engines.decode={config.engines.decode}: a split is simulated in the "
            f"mode of its configuration ({config.mode}), not in {mode}; set `mode` and choose both counts for it"
        )
    values: dict[str, Any] = {}
    total, replicas = total_accelerators(config), config.engines.replicas
    episodes = config.rollout.groups_per_update * config.rollout.group_size
    if mode == "sync":
        if total % replicas:
            raise ConfigError(f"mode=sync: {total} accelerators cannot be shared by engines.replicas={replicas} evenly")
        rollout, learner = total, total
        values["concurrency"] = max(episodes, config.rollout.concurrency)
    elif config.mode == "sync":
        rollout, learner = split_of(calibration, replicas)
    else:
        rollout, learner = total - config.learner.synthetic.accelerators, config.learner.synthetic.accelerators
    changed = dataclasses.replace(
        config,
        mode=mode,
        rollout=dataclasses.replace(config.rollout, **values),
        engines=dataclasses.replace(
            config.engines, synthetic=dataclasses.replace(config.engines.synthetic, accelerators=rollout // replicas)
        ),
        learner=dataclasses.replace(
            config.learner, synthetic=dataclasses.replace(config.learner.synthetic, accelerators=learner)
        ),
    )
    resolved = resolve_mode(changed)
    validate(resolved)
    return resolved
