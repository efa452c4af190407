"""The modelled clusters, a suite each, and the configuration of every run of the benchmark on them.

All suites run on the same hardware; what differs is the batch and how far dispatching runs ahead. The figures are those of
the modelled cluster (seconds, tokens). An accelerator decodes ``slots`` sequences at 50 tokens/s each (100 in all), computes
2,000 prompt tokens/s and trains 250 tokens/s: the proportions of an 8 billion parameter model on one GPU (2,700, 50,000
and 6,000 tokens/s), with fewer sequences, so that a whole cluster's control plane fits on one small machine.

*In flight* follows Little's law: the rollout's slots stay full when ``slots x (1 + tool time / model time)`` episodes are in
flight, with a margin for the spread of both. *Target lag* follows from it: a group lives as long as its slowest member, about
twice the mean, so about ``2 x in_flight / B`` steps' groups are live. The *batch* B fills all slots of the time-shared
synchronous cluster at least once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from env_pool.workloads.scripts import FAULT_ENGINE_KILL_EVERY_S
from orchestrator.composition import ConfigError
from orchestrator.config import Config, load

BASE = "synthetic"
"""The packaged configuration that everything here overrides."""

ACCELERATORS = 64
LARGEST = 18_000
"""Carried tokens of an episode: more than any suite has, and less than an accelerator's KV holds."""


@dataclass(frozen=True)
class Cluster:
    """What a suite runs on, in modelled seconds and tokens; see the module's docstring for how the figures are chosen."""

    suite: str
    groups: int
    """Groups a step (B = groups x group_size)."""
    in_flight: int
    """Episodes in flight, asynchronous."""
    target_lag: float
    time_scale: float
    token_scale: float = 100.0
    group_size: int = 4
    accelerators: int = ACCELERATORS
    replicas: int = 1
    """Engine processes; each models its share of the accelerators."""
    max_lag: int = 8
    warm_up: int = 3
    """Steps of the asynchronous run until its pipeline is full."""
    window: int = 4
    """Steps measured."""
    sync_steps: int = 2
    """Steps of the synchronous run, all of which are measured: no step reaches into the next."""
    slots: int = 2
    decode_tokens_per_s: float = 150.0
    half_concurrency: float = 1.0
    prefill_tokens_per_s: float = 2000.0
    seconds_per_token: float = 4e-3
    kv_tokens: int = 2_000_000
    update_pause_s: float = 0.5
    stage_s: float = 2.0
    step_overhead_s: float = 2.0
    switch_s: float = 10.0
    sync_hurry: float = 1.0
    """How many times faster still the synchronous run's time goes: with the longest tails it mostly waits for a few episodes,
    and hardly uses the processor."""
    kill_every_s: float | None = None
    """An engine process is killed this often (modelled seconds)."""

    @property
    def batch(self) -> int:
        """B: trajectories a step."""
        return self.groups * self.group_size

    @property
    def drain(self) -> int:
        """The last steps of an asynchronous run, in which nothing new starts any more."""
        return int(self.target_lag) + 1

    def timed_for(self, mode: str) -> Cluster:
        """The same cluster at the time scale of ``mode``."""
        return replace(self, time_scale=self.time_scale * self.sync_hurry) if mode == "sync" else self

    def sized(self, accelerators: int) -> Cluster:
        """The same proportions on another number of accelerators."""
        share = accelerators / self.accelerators
        return replace(
            self,
            accelerators=accelerators,
            groups=max(1, round(self.groups * share)),
            in_flight=max(self.group_size, round(self.in_flight * share)),
        )

    def measuring(self, steps: int) -> Cluster:
        """The same cluster, ``steps`` steps of it measured."""
        return replace(self, window=steps, sync_steps=min(max(2, steps), self.sync_steps))


CLUSTERS = {
    cluster.suite: cluster
    for cluster in (
        Cluster("reason", groups=64, in_flight=128, target_lag=2.0, time_scale=80.0, window=5, sync_steps=3),
        Cluster("swe", groups=32, in_flight=176, target_lag=2.5, time_scale=90.0),
        Cluster(
            "long", groups=32, in_flight=240, target_lag=4.0, time_scale=300.0, warm_up=6, window=5, sync_hurry=4.0
        ),
        Cluster(
            "mixed", groups=40, in_flight=220, target_lag=4.0, time_scale=120.0, warm_up=8, window=5, sync_hurry=4.0
        ),
        Cluster(
            "fault",
            groups=32,
            in_flight=176,
            target_lag=2.0,
            time_scale=12.0,  # a replacement takes real seconds, and no more than five of a role come within two minutes
            replicas=4,
            warm_up=2,
            window=3,
            kill_every_s=FAULT_ENGINE_KILL_EVERY_S,
        ),
        Cluster(
            "burst", groups=625, in_flight=10_000, target_lag=3.0, time_scale=10.0, warm_up=0, window=4, sync_steps=4
        ),
    )
}

SATURATING = 4
"""Episodes in flight for a slot when rollout is measured alone."""
CALIBRATION_STEPS = 5

MODES = ("sync", "one_step", "async")


@dataclass(frozen=True)
class Split:
    """How the accelerators are shared: all of them in turns (sync), or some for rollout and the rest for training."""

    rollout: int
    learner: int


def shared_settings(cluster: Cluster, seed: int) -> dict[str, object]:
    """What all runs on a cluster have in common."""
    engine = "engines.synthetic."
    learner = "learner.synthetic."
    return {
        "seed": seed,
        "run.eval_every": 0,
        "run.checkpoint_every": 0,
        "tasks.environment": "workload",
        "tasks.held_out": 0,
        "tasks.options.suite": cluster.suite,
        "tasks.options.time_scale": cluster.time_scale,
        "tasks.options.token_scale": cluster.token_scale,
        "tasks.options.group_size": cluster.group_size,
        "rollout.loop": "scripted",
        "rollout.groups_per_update": cluster.groups,
        "rollout.group_size": cluster.group_size,
        "rollout.max_turns": 1000,
        "rollout.max_tokens": LARGEST // 2,
        "rollout.max_episode_tokens": LARGEST,
        "engines.kind": "synthetic",
        "engines.max_len": LARGEST,
        "engines.replicas": cluster.replicas,
        engine + "slots": cluster.slots,
        engine + "decode_tokens_per_s": cluster.decode_tokens_per_s,
        engine + "half_concurrency": cluster.half_concurrency,
        engine + "prefill_tokens_per_s": cluster.prefill_tokens_per_s,
        engine + "kv_tokens": cluster.kv_tokens,
        engine + "update_pause_s": cluster.update_pause_s,
        engine + "stage_s": cluster.stage_s,
        engine + "time_scale": cluster.time_scale,
        engine + "token_scale": cluster.token_scale,
        "learner.backend": "synthetic",
        learner + "seconds_per_token": cluster.seconds_per_token,
        learner + "step_overhead_s": cluster.step_overhead_s,
        learner + "switch_s": cluster.switch_s,
        learner + "time_scale": cluster.time_scale,
        learner + "token_scale": cluster.token_scale,
        "environments.step_timeout_s": 600.0,
        "environments.reset_timeout_s": 600.0,
        "rollout.episode_timeout_s": 3600.0,
    }


def mode_settings(cluster: Cluster, mode: str, split: Split, seed: int) -> dict[str, object]:
    """The settings of one mode. Synchronous: all accelerators in turns, longest first, the whole batch in flight."""
    settings = shared_settings(cluster, seed) | {"mode": mode}
    if mode == "sync":
        settings |= {
            "engines.synthetic.accelerators": cluster.accelerators // cluster.replicas,
            "learner.synthetic.accelerators": cluster.accelerators,
            "rollout.concurrency": cluster.batch,
            "tasks.options.longest_first": cluster.groups,
            "run.steps": cluster.sync_steps,
        }
        return settings
    settings |= {
        "engines.synthetic.accelerators": split.rollout // cluster.replicas,
        "learner.synthetic.accelerators": split.learner,
        "rollout.concurrency": max(cluster.in_flight, cluster.group_size),
    }
    if mode == "one_step":
        return settings | {"rollout.concurrency": 2 * cluster.batch, "run.steps": 1 + max(2, cluster.window // 2) + 1}
    return settings | {
        "staleness.target_lag": cluster.target_lag,
        "staleness.max_lag": cluster.max_lag,
        "staleness.on_violation": "mask_tokens",
        "run.steps": cluster.warm_up + cluster.window + cluster.drain,
    }


def unmeasured(cluster: Cluster, mode: str) -> tuple[int, int]:
    """How many steps to leave out at the beginning and at the end of a run."""
    if mode == "sync":
        return 0, 0
    return (1, 1) if mode == "one_step" else (cluster.warm_up, cluster.drain)


def rollout_alone(cluster: Cluster, split: Split, seed: int) -> dict[str, object]:
    """Calibration of w: so many episodes in flight that all slots are full, and a learner that costs nothing."""
    slots = split.rollout * cluster.slots
    in_flight = slots * SATURATING
    groups = max(1, in_flight // cluster.group_size // 4)
    return mode_settings(cluster, "async", split, seed) | {
        "rollout.groups_per_update": groups,
        "rollout.concurrency": in_flight,
        "staleness.target_lag": 12.0,
        "staleness.max_lag": 1000,
        "learner.synthetic.seconds_per_token": 0.0,
        "learner.synthetic.step_overhead_s": 0.0,
        "engines.synthetic.update_pause_s": 0.0,
        "engines.synthetic.stage_s": 0.0,
        "run.steps": CALIBRATION_STEPS,
    }


def learner_alone(cluster: Cluster, split: Split, seed: int) -> dict[str, object]:
    """Calibration of tau: engines take no time and many episodes run, so that finished groups always wait for the learner."""
    return mode_settings(cluster, "async", split, seed) | {
        "rollout.concurrency": 4 * cluster.batch,
        "staleness.target_lag": 3.0,
        "staleness.max_lag": 1000,
        "engines.synthetic.decode_tokens_per_s": 1e9,
        "engines.synthetic.prefill_tokens_per_s": 1e9,
        "engines.synthetic.update_pause_s": 0.0,
        "engines.synthetic.stage_s": 0.0,
        "engines.synthetic.slots": 1024,
        "learner.synthetic.step_overhead_s": 0.0,
        "run.steps": 4,
    }


def overrides_of(settings: dict[str, object], more: tuple[str, ...] = ()) -> list[str]:
    """As the command line takes them; ``more`` come last and win."""
    return [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()
    ] + list(more)


def config_of(overrides: list[str]) -> Config:
    """The configuration that a run with these overrides has. Raises ConfigError."""
    return load([BASE], overrides)


def find_cluster(suite: str) -> Cluster:
    """The cluster of a suite. Raises ConfigError when there is none."""
    if suite not in CLUSTERS:
        raise ConfigError(f"--suite {suite}: there is no such suite; there are {', '.join(CLUSTERS)}, and all")
    return CLUSTERS[suite]
