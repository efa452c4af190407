"""``millrace plan``: what a configuration implies before anything is started. Pure but for reading the model's files.

With G groups an update and target lag L, pacing lets ``(1 + L) G`` groups be started and not yet trained. While G of them
are trained, ``L G`` are in flight or queued, so by Little's law the mean lag is ``L G / G = L`` updates.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from experience.config import OnViolation, QueueOrder
from experience.staleness import Pacing
from orchestrator.composition import ConfigError
from orchestrator.config import Config, validate
from orchestrator.planning.forecast import Forecast
from orchestrator.planning.measured import Measured, measure
from orchestrator.planning.memory import MEBIBYTE, TOKEN_BYTES, TRAJECTORY_BYTES
from orchestrator.planning.synthetic import forecast_of, forecast_rows, forecast_warnings, measured_rows, table_of
from orchestrator.view import count, size

UNBOUNDED_LAG = 8.0
"""Updates beyond which weights alone were seen to fail (docs/learner.md, staleness against learning)."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelShape:
    """What the KV cache and a publication cost per token and per version, from a Hugging Face directory."""

    layers: int
    kv_heads: int
    head_dim: int
    weight_bytes: int
    """Size of the safetensors files."""

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


@dataclass(frozen=True)
class Plan:
    """The consequences of a configuration. Groups and episodes are counts, bytes are bytes, lags are versions."""

    mode: str
    episodes_per_update: int
    groups_allowed: int
    """Groups started and not yet trained that pacing lets exist."""
    groups_in_flight: int
    """The most that concurrency and pacing let run at once."""
    mean_lag: float
    """Where the lag settles, by Little's law."""
    largest_lag: int
    """Of a group's oldest token when groups are trained in the order of their dispatch."""
    max_lag: int
    group_bytes: int
    """Upper bound of one finished group in the queue."""
    queue_bytes: int
    """Upper bound of all groups that pacing allows."""
    queue_budget_bytes: int
    micro_batches: int
    """Upper bound of forward and backward passes an update."""
    kv_slots: int
    kv_bytes: int | None
    """KV cache of all engines; None while the model is not there to look at."""
    weight_bytes: int | None
    adapter_rank: int
    """Of the adapter that is published instead; 0: none."""
    """One published version; None as above."""
    warnings: list[str] = field(default_factory=list)
    forecast: Forecast | None = None
    """What the run will be like; None unless it models its cluster and its workload."""
    measured: Measured | None = None
    """What a run that was made says."""
    host_bytes: int = 0
    """Upper bound of trajectories in the memory of workers and queue together."""


def make_plan(config: Config, run: Path | None = None) -> Plan:
    """What ``config`` implies; ``run``: the directory of a finished run to calibrate from.

    Raises:
        ConfigError: The config is not valid, ``model.path`` has no usable ``config.json``, or ``run`` no accounts.
    """
    validate(config)
    modelled = config.engines.kind == "synthetic" and config.tasks.environment == "workload"
    expected = forecast_of(config) if modelled else None
    rollout, engines = config.rollout, config.engines
    allowed = Pacing(rollout.groups_per_update, config.staleness.target_lag).limit(0)
    in_flight = min(allowed, math.ceil(rollout.concurrency / rollout.group_size))
    group_bytes = rollout.group_size * (rollout.max_episode_tokens * TOKEN_BYTES + TRAJECTORY_BYTES)
    episodes = rollout.groups_per_update * rollout.group_size
    shape = None if config.engines.kind == "synthetic" else model_shape(model_directory(config))
    slots = _slots(config)
    kv = shape.kv_bytes_per_token(_element_bytes(config)) * slots * engines.max_len if shape else None
    return Plan(
        mode=config.mode,
        episodes_per_update=episodes,
        groups_allowed=allowed,
        groups_in_flight=in_flight,
        mean_lag=(allowed - rollout.groups_per_update) / rollout.groups_per_update,
        largest_lag=math.ceil(config.staleness.target_lag),
        max_lag=config.staleness.max_lag,
        group_bytes=group_bytes,
        queue_bytes=allowed * group_bytes,
        queue_budget_bytes=int(config.queue.budget_mb * MEBIBYTE),
        micro_batches=math.ceil(episodes * rollout.max_episode_tokens / config.learner.token_budget),
        kv_slots=slots,
        kv_bytes=kv,
        weight_bytes=shape.weight_bytes if shape else None,
        adapter_rank=config.learner.lora.rank,
        warnings=[
            *_flow_warnings(config, allowed),
            *_size_warnings(config, group_bytes),
            *(forecast_warnings(config, expected) if expected else []),
        ],
        forecast=expected,
        measured=measure(run) if run is not None else None,
        host_bytes=(allowed + in_flight) * group_bytes,
    )


def _flow_warnings(config: Config, allowed: int) -> list[str]:
    """Settings under which episodes wait for each other, or for a bound."""
    rollout, staleness = config.rollout, config.staleness
    episodes = rollout.groups_per_update * rollout.group_size
    slots = _slots(config)
    warnings = []
    if rollout.concurrency < episodes:
        warnings.append(
            f"rollout.concurrency={rollout.concurrency} is less than the {episodes} episodes of an update: they run in "
            f"{math.ceil(episodes / rollout.concurrency)} waves"
        )
    if rollout.concurrency > allowed * rollout.group_size:
        warnings.append(
            f"rollout.concurrency={rollout.concurrency} is never reached: staleness.target_lag={staleness.target_lag:g} "
            f"lets {allowed * rollout.group_size} episodes be in flight"
        )
    if config.engines.kind != "synthetic" and slots < rollout.concurrency:
        warnings.append(
            f"the engines hold {slots} sequences (engines.slots x engines.replicas) for {rollout.concurrency} episodes: "
            "the others wait, and prompts are computed again"
        )
    if staleness.on_violation is not OnViolation.wait and staleness.target_lag > staleness.max_lag:
        loss = "masked" if staleness.on_violation is OnViolation.mask_tokens else "dropped with their groups"
        warnings.append(
            f"staleness.target_lag={staleness.target_lag:g} is over staleness.max_lag={staleness.max_lag}: many tokens "
            f"will be {loss}"
        )
    learner = config.learner
    bounded = learner.second_moment_limit is not None or (learner.surrogate == "clip" and learner.correction == "none")
    if staleness.target_lag > UNBOUNDED_LAG and not bounded:
        warnings.append(
            f"staleness.target_lag={staleness.target_lag:g}: at such a lag learner.correction={learner.correction} alone may "
            "not hold; learner.second_moment_limit=0.04 bounds the distance, for one more forward pass an update"
        )
    if config.queue.order is QueueOrder.windowed and config.queue.window < rollout.groups_per_update:
        warnings.append(
            f"queue.window={config.queue.window} is less than rollout.groups_per_update={rollout.groups_per_update}: an "
            "update waits for its slowest groups"
        )
    return warnings


def _size_warnings(config: Config, group_bytes: int) -> list[str]:
    """Settings under which something does not fit, or cannot learn."""
    rollout = config.rollout
    warnings = []
    if config.queue.budget_mb * MEBIBYTE < rollout.groups_per_update * group_bytes:
        warnings.append(
            f"queue.budget_mb={config.queue.budget_mb:g} may not hold one update of up to "
            f"{size(rollout.groups_per_update * group_bytes)}: rollout waits for the learner"
        )
    if rollout.max_episode_tokens > config.learner.token_budget:
        warnings.append(
            f"rollout.max_episode_tokens={rollout.max_episode_tokens} is over learner.token_budget="
            f"{config.learner.token_budget}: the longest trajectories make micro-batches of their own"
        )
    if rollout.temperature == 0:
        warnings.append("rollout.temperature=0 makes all episodes of a group equal: advantages are zero")
    return warnings


# --- the model --------------------------------------------------------------------------------------------------------


def model_directory(config: Config) -> Path | None:
    """Where the model is: ``model.path``, or what a recipe has made in the run directory already."""
    if config.model.path is not None:
        return Path(config.model.path)
    made = Path(config.run.dir) / "model"
    return made if (made / "config.json").is_file() else None


def model_shape(directory: Path | None) -> ModelShape | None:
    """The sizes in a Hugging Face directory; None without a directory.

    Raises:
        ConfigError: There is no ``config.json`` in it, or one that does not say how large the model is.
    """
    if directory is None:
        return None
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"model.path: {path} does not exist; give the directory of a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {path} cannot be read: {error}") from error
    values = values.get("text_config", values)
    try:
        heads = int(values["num_attention_heads"])
        return ModelShape(
            layers=int(values["num_hidden_layers"]),
            kv_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or values["hidden_size"] // heads),
            weight_bytes=sum(file.stat().st_size for file in directory.glob("*.safetensors")),
        )
    except KeyError as error:
        raise ConfigError(f"model.path: {path} has no {error}; it is not the config of a causal LM") from None


def _slots(config: Config) -> int:
    """Sequences that all engines run at once."""
    if config.engines.kind == "synthetic":
        synthetic = config.engines.synthetic
        return config.engines.count * synthetic.accelerators * synthetic.slots
    return config.engines.slots * config.engines.count


def _element_bytes(config: Config) -> int:
    """Bytes of a KV element; ``auto`` counts as the model's own data type."""
    dtype = config.engines.dtype if config.engines.dtype != "auto" else config.model.dtype
    return DTYPE_BYTES.get(dtype, 4)


# --- the table --------------------------------------------------------------------------------------------------------


def render(plan: Plan) -> RenderableType:
    """The plan as a table with its warnings."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(no_wrap=True, justify="right", style="bold")
    table.add_column(style="dim")
    for name, value, explanation in _rows(plan):
        table.add_row(name, value, explanation)
    parts: list[Any] = [table]
    if plan.forecast is not None:
        parts += [Text("expected, by the cost model", style="bold"), table_of(forecast_rows(plan.forecast))]
    if plan.measured is not None:
        parts += [Text("calibrated from a run", style="bold"), table_of(measured_rows(plan.measured))]
    warnings: list[Any] = [Text(f"warning: {warning}", style="yellow") for warning in plan.warnings]
    return Group(*parts, *warnings)


def _rows(plan: Plan) -> list[tuple[str, str, str]]:
    unknown = "known once the recipe has made the model" if plan.forecast is None else "modelled in tokens"
    return [
        ("mode", plan.mode, ""),
        ("episodes an update", str(plan.episodes_per_update), "groups_per_update x group_size"),
        ("groups started, not trained", str(plan.groups_allowed), "at most, by staleness.target_lag"),
        ("groups in flight", str(plan.groups_in_flight), "at most, by rollout.concurrency as well"),
        ("mean lag", f"{plan.mean_lag:.2f}", "(in flight + queued) / groups_per_update"),
        ("largest lag", str(plan.largest_lag), f"in dispatch order; over {plan.max_lag} no token carries loss"),
        ("micro-batches an update", str(plan.micro_batches), "at most, by learner.token_budget"),
        ("queue", size(plan.queue_bytes), f"at most, of {size(plan.queue_budget_bytes)} (queue.budget_mb)"),
        ("host memory", size(plan.host_bytes), "of trajectories in workers and queue, at most"),
        ("KV cache", _bytes(plan.kv_bytes), f"{count(plan.kv_slots)} sequences" if plan.kv_bytes else unknown),
        ("weights a version", _bytes(plan.weight_bytes), _published(plan) if plan.weight_bytes else unknown),
    ]


def _published(plan: Plan) -> str:
    if plan.adapter_rank:
        return f"held by engines; an adapter of rank {plan.adapter_rank} is published every update"
    return "published every update"


def _bytes(number: int | None) -> str:
    return "-" if number is None else size(number)
