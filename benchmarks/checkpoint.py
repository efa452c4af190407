"""How long training stands still for a checkpoint, and how long writing one takes, against writing it while training waits.

Real ranks in processes of their own with a random model. Each repeat writes one checkpoint both ways: *synchronous* begins
and waits; *asynchronous* begins, trains on, and waits afterwards. The seconds before training may go on are the stall.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from benchmarks.output import document, table_console, write_json

VOCABULARY = 512


@dataclass(frozen=True)
class Settings:
    """One invocation."""

    ranks: int = 2
    layers: int = 4
    hidden: int = 512
    repeats: int = 3
    seed: int = 0


def make_model(directory: Path, settings: Settings) -> int:
    """A random Qwen3; returns its parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(settings.seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=settings.hidden // 8,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def encoded_groups(seed: int, version: int) -> list[bytes]:
    """Two groups of four short trajectories, rewarded in turn."""
    from experience.records import Group, GroupHeader, Task, Trajectory
    from experience.wire import encode_group

    rng = np.random.default_rng(seed)
    groups = []
    for index in range(2):
        name = f"g{seed}-{index}"
        trainable = np.arange(64) >= 16
        trajectories = [
            Trajectory(
                trajectory_id=f"{name}-{member}",
                episode_id=f"{name}-{member}",
                group_id=name,
                task_id="t",
                tokens=rng.integers(0, VOCABULARY, 64).astype(np.int32),
                trainable=trainable,
                logprobs=np.where(trainable, -6.0, 0.0).astype(np.float32),
                versions=np.where(trainable, version, -1).astype(np.int32),
                reward=float(member % 2),
            )
            for member in range(4)
        ]
        task = Task(task_id="t", environment="none", payload={})
        header = GroupHeader(group_id=name, index=index, task=task, size=4, version_floor=version, seed=0)
        groups.append(encode_group(Group(header=header, trajectories=trajectories)))
    return groups


def make_learner(model: Path, settings: Settings) -> Any:
    """A learner on its own ranks, with one update behind it so that the optimizer has something to save."""
    import ray

    from learner.backends.rank_actor import RankActor, RankSettings
    from learner.backends.rank_group import RankGroup
    from learner.config import LearnerConfig, ModelConfig
    from learner.learner import Learner

    config = LearnerConfig(device="cpu", ranks=settings.ranks)
    kind = ray.remote(RankActor).options(num_cpus=0)
    ranks = [
        kind.remote(RankSettings(rank, settings.ranks, config, "float32", 1, settings.seed, 300.0))
        for rank in range(settings.ranks)
    ]
    group = RankGroup(ranks, config, 300.0)
    learner = Learner(config, ModelConfig(), max_lag=4, seed=settings.seed, group=group)
    learner.load(model)
    train(learner)
    return learner


def train(learner: Any) -> None:
    """One step."""
    learner.begin_step()
    learner.add(encoded_groups(learner.version, learner.version))
    learner.finish_step()


def seconds(work: Callable[[], Any]) -> float:
    began_at = time.monotonic()
    work()
    return time.monotonic() - began_at


def one_of_each(learner: Any, directory: Path) -> dict[str, float]:
    """Both ways once, and the steps beside them."""
    synchronous = seconds(lambda: learner.save(directory))
    plain_step = seconds(lambda: train(learner))
    began_at = time.monotonic()
    stall = seconds(lambda: learner.begin_save(directory))
    steps = [seconds(lambda: train(learner)) for _ in range(2)]
    learner.finish_save()
    return {
        "synchronous_s": synchronous,
        "stall_s": stall,
        "asynchronous_s": time.monotonic() - began_at,
        "step_s": plain_step,
        "step_beside_s": statistics.fmean(steps),
    }


def run(settings: Settings) -> dict[str, Any]:
    """Measure; returns the document. The first of each is a warm-up."""
    import ray

    with tempfile.TemporaryDirectory(prefix="millrace-checkpoint-") as place:
        model = Path(place) / "model"
        parameters = make_model(model, settings)
        ray.init(
            address="local",
            num_cpus=settings.ranks,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        try:
            learner = make_learner(model, settings)
            found = [one_of_each(learner, Path(place) / "checkpoints") for _ in range(settings.repeats + 1)][1:]
            files = (Path(place) / "checkpoints").rglob("*")
            nbytes = sum(path.stat().st_size for path in files if path.is_file()) // 2  # two checkpoints are kept
        finally:
            ray.shutdown()
    results = {name: statistics.median(one[name] for one in found) for name in found[0]}
    ratio = statistics.median(one["stall_s"] / one["synchronous_s"] for one in found)
    facts = {"parameters": parameters, "checkpoint_bytes": nbytes, "stall_share": ratio}
    return document("checkpoint", seeds=[settings.seed], settings=asdict(settings), results={**facts, **results})


def table(found: dict[str, Any]) -> Table:
    """The results for a terminal."""
    results = found["results"]
    made = Table(
        title=f"Checkpoints of {results['parameters'] / 1e6:.0f} M parameters and their optimizer "
        f"({results['checkpoint_bytes'] / 1e6:.0f} MB), {found['settings']['ranks']} ranks"
    )
    for name in ("what", "seconds"):
        made.add_column(name, justify="right" if name == "seconds" else "left")
    rows = {
        "training waits until it is written (synchronous)": "synchronous_s",
        "training waits for the copy (asynchronous)": "stall_s",
        "until it is written, beside training": "asynchronous_s",
        "a step": "step_s",
        "a step beside the writing": "step_beside_s",
    }
    for text, name in rows.items():
        made.add_row(text, f"{results[name]:.3f}")
    made.caption = f"the stall is {results['stall_share']:.1%} of the synchronous one (median of the repeats)"
    return made


@click.command("checkpoint")
@click.option("--ranks", default=2, show_default=True, type=click.IntRange(2))
@click.option("--layers", default=4, show_default=True, type=click.IntRange(1))
@click.option("--hidden", default=512, show_default=True, type=click.IntRange(16))
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the results to a file."
)
def checkpoint(ranks: int, layers: int, hidden: int, repeats: int, seed: int, json_path: Path | None) -> None:
    """How long training stands still for a checkpoint."""
    found = run(Settings(ranks, layers, hidden, repeats, seed))
    table_console(80).print(table(found))
    if json_path is not None:
        write_json(json_path, found)
