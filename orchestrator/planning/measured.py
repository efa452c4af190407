"""w and tau from a run that has been made: accelerator-seconds of work in its accounts, over its trajectories."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.bound import Calibration, split_of
from orchestrator.composition import ConfigError
from orchestrator.config import Config, load

ROLLOUT_WORK = ("prefill", "decode")
TRAINING_WORK = ("train",)


@dataclass(frozen=True)
class Measured:
    """A run's own calibration. Seconds are those of the modelled cluster for a synthetic run, else wall-clock."""

    run: str
    calibration: Calibration
    rollout: int
    """Accelerators (or engine processes) that rolled out."""
    learner: int
    step_s: float
    """Mean over the run's last steps."""
    efficiency: float
    best_rollout: int
    best_learner: int
    best_step_s: float
    """T* with that split in whole accelerators."""
    lag_mean: float
    masked: float


def measure(directory: Path, groups_per_update: int | None = None) -> Measured:
    """Read a run's accounts.

    Raises:
        ConfigError: The directory holds no finished run with accounts, or none of its steps.
    """
    summary = _read(directory / "summary.json")
    config = load([str(directory / "config.yaml")])
    accounting = summary.get("accounting")
    if not isinstance(accounting, Mapping):
        raise ConfigError(f"{directory / 'summary.json'} has no accounting: the run was made by an older version")
    steps = _steps(directory / "metrics.jsonl")
    scale = _scale(config)
    engines = _lanes(accounting, "engine-")
    rollout, learner = len(engines), _learners(config)
    episodes = groups_per_update or config.rollout.groups_per_update
    episodes *= config.rollout.group_size
    trained = episodes * int(summary["steps"])
    if not rollout or not trained:
        raise ConfigError(f"{directory} trained nothing: there is nothing to calibrate from")
    w_s = _seconds(engines, ROLLOUT_WORK) * scale / trained
    tau_s = _seconds(_lanes(accounting, "learner-"), TRAINING_WORK) * learner * scale / trained
    shared = config.mode == "sync" and config.engines.kind == "synthetic"
    total = rollout if shared else rollout + learner
    calibration = Calibration(w_s, tau_s, total)
    best = split_of(calibration) if total >= 2 else (rollout, learner)
    step_s = _late_step_s(steps) * scale
    tokens = summary.get("tokens", {})
    return Measured(
        run=str(directory),
        calibration=calibration,
        rollout=rollout,
        learner=learner,
        step_s=step_s,
        efficiency=calibration.efficiency(step_s, episodes),
        best_rollout=best[0],
        best_learner=best[1],
        best_step_s=episodes * max(w_s / best[0], tau_s / best[1]),
        lag_mean=float(summary.get("lag_mean") or 0.0),
        masked=tokens.get("masked", 0) / max(1, tokens.get("generated", 0)),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--from: {path} does not exist; give the directory of a run that has finished") from None
    except ValueError as error:
        raise ConfigError(f"--from: {path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--from: {path} does not hold a summary")
    return content


def _steps(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    steps = [record for line in lines if line.endswith("}") for record in [json.loads(line)] if "step" in record]
    if not steps:
        raise ConfigError(f"--from: {path} holds no step")
    return steps


def _late_step_s(steps: list[dict[str, Any]]) -> float:
    """Mean wall seconds of the second half of the steps."""
    if len(steps) == 1:
        return float(steps[0]["time/step_s"])
    first = len(steps) // 2
    return float(steps[-1]["wall_s"] - steps[first - 1]["wall_s"]) / (len(steps) - first)


def _lanes(accounting: Mapping[str, Any], prefix: str) -> list[Mapping[str, float]]:
    """The accounts of a role; those of single accelerators where there are any, else those of the processes."""
    names = [name for name in accounting if name.startswith(prefix)]
    parts = [name for name in names if "/" in name]
    return [accounting[name] for name in parts or names]


def _seconds(lanes: list[Mapping[str, float]], causes: tuple[str, ...]) -> float:
    return float(sum(lane.get(cause, 0.0) for lane in lanes for cause in causes))


def _scale(config: Config) -> float:
    return config.engines.synthetic.time_scale if config.engines.kind == "synthetic" else 1.0


def _learners(config: Config) -> int:
    return config.learner.synthetic.accelerators if config.learner.backend == "synthetic" else config.learner.ranks
