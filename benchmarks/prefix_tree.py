"""What computing common prefixes once is worth: forward and backward passes with and without, in turns, in one process.

Groups with one long prompt, as a learner's backend trains them: packed by the same token budget, with the objective's loss.
The bar is the ratio of token counts, unshared over shared; attention alone cannot reach it, since a continuation's tokens
attend to the whole prompt either way. Every repeat runs both, one after the other, and the median of the repeats' ratios
counts. Processor seconds stand beside wall seconds: they hardly notice what else the machine does.

``--break-even`` measures what sharing costs instead: many short prefixes, of which none is worth much.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.table import Table

from benchmarks.output import document, table_console, write_json

if TYPE_CHECKING:
    from learner.backends.fsdp import FsdpBackend
    from learner.batching import Sample
    from learner.prefix_tree import Sharing

PREFIXES = (256, 512, 1024)
PREFIX_SHARE = 4
"""A prefix is so many times as long as each continuation."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """Shape of the Qwen3 that is trained."""

    hidden: int = 384
    layers: int = 2
    vocabulary: int = 512

    def make(self, directory: Path, longest: int) -> None:
        """Write one with random weights."""
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 128,
            head_dim=64,
            intermediate_size=3 * self.hidden,
            max_position_embeddings=longest,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        Qwen3ForCausalLM(config).save_pretrained(directory)


@dataclass(frozen=True)
class Load:
    """Groups whose members begin with one prefix, each group with another."""

    groups: int
    group_size: int
    prefix: int
    continuation: int

    def samples(self, vocabulary: int, seed: int) -> list[Sample]:
        """One sample a member; all tokens of the continuation are trained."""
        from learner.batching import Sample

        rng = np.random.default_rng(seed)
        made = []
        for group in range(self.groups):
            prompt = rng.integers(0, vocabulary, self.prefix)
            for member in range(self.group_size):
                tokens = np.concatenate([prompt, rng.integers(0, vocabulary, self.continuation)]).astype(np.int32)
                positions = np.arange(self.prefix - 1, len(tokens) - 1)
                made.append(
                    Sample(
                        trajectory_id=f"{group}-{member}",
                        group_id=str(group),
                        inputs=tokens[:-1],
                        positions=positions,
                        targets=tokens[positions + 1].astype(np.int64),
                        behaviour=rng.uniform(-7, -5, len(positions)).astype(np.float32),
                        lags=np.zeros(len(positions), np.int64),
                        advantage=float(rng.normal()),
                        temperature=1.0,
                    )
                )
        return made


@dataclass(frozen=True)
class Pass:
    """All micro-batches of a load, once."""

    wall: float
    cpu: float
    loss: float
    gradient: dict[str, Any]


def run_passes(backend: FsdpBackend, samples: Sequence[Sample], sharing: Sharing | None, budget: int) -> Pass:
    """Pack as a learner does, collate, forward, backward; the gradient is left at zero."""
    from learner.backends.ranks import train_bin
    from learner.config import LearnerConfig
    from learner.objectives.config import ObjectiveConfig
    from learner.tree_packing import pack_shared

    backend.sharing = sharing
    wall, cpu, loss = time.perf_counter(), time.process_time(), 0.0
    for members in pack_shared(samples, budget, sharing, LearnerConfig.token_budget):
        loss += train_bin(backend, members, ObjectiveConfig()).sums.loss
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gradient = {name: p.grad for name, p in backend._parameters.items() if p.grad is not None}
    backend.discard_gradient()
    return Pass(wall, cpu, loss, gradient)


def measure(backend: FsdpBackend, load: Load, vocabulary: int, repeats: int, budget: int) -> dict[str, Any]:
    """One load: both ways in turns, after one of each that only warms up and is compared."""
    from learner.batching import tokens_of
    from learner.prefix_tree import ALWAYS
    from learner.tree_packing import computed_tokens

    samples = load.samples(vocabulary, seed=0)
    ways: tuple[Sharing | None, Sharing] = (None, ALWAYS)
    plain, shared = (run_passes(backend, samples, way, budget) for way in ways)
    turns = [[run_passes(backend, samples, way, budget) for way in ways] for _ in range(repeats)]
    tokens, computed = tokens_of(samples), computed_tokens(samples, ALWAYS)
    speed_ups = {
        clock: [getattr(without, clock) / getattr(with_it, clock) for without, with_it in turns]
        for clock in ("wall", "cpu")
    }
    medians = {clock: statistics.median(found) for clock, found in speed_ups.items()}
    return {
        **asdict(load),
        "tokens": tokens,
        "computed_tokens": computed,
        "token_ratio": round(tokens / computed, 4),
        "seconds": round(statistics.median(without.wall for without, _ in turns), 4),
        "shared_seconds": round(statistics.median(with_it.wall for _, with_it in turns), 4),
        "cpu_seconds": round(statistics.median(without.cpu for without, _ in turns), 4),
        "shared_cpu_seconds": round(statistics.median(with_it.cpu for _, with_it in turns), 4),
        "speed_up": round(medians["wall"], 3),
        "speed_up_range": [round(min(speed_ups["wall"]), 3), round(max(speed_ups["wall"]), 3)],
        "cpu_speed_up": round(medians["cpu"], 3),
        "of_token_ratio": round(medians["wall"] * computed / tokens, 3),
        "cpu_of_token_ratio": round(medians["cpu"] * computed / tokens, 3),
        "loss_difference": abs(shared.loss - plain.loss) / abs(plain.loss),
        "gradient_difference": max(
            float((shared.gradient[name] - gradient).abs().max() / gradient.abs().max())
            for name, gradient in plain.gradient.items()
        ),
    }


BREAK_EVEN = tuple(
    Load(groups, size, prefix, continuation)
    for groups, size, continuation in ((32, 2, 16), (16, 2, 64), (8, 4, 64), (4, 8, 64), (4, 2, 256))
    for prefix in (4, 16, 64)
)
"""Many short prefixes, read by few and by many tokens."""


def overhead(row: dict[str, Any]) -> float:
    """Tokens that sharing one prefix of these loads costs: what it saves less what it gains, by processor time."""
    saved = row["tokens"] - row["computed_tokens"]
    gained = (row["cpu_seconds"] - row["shared_cpu_seconds"]) / row["cpu_seconds"] * row["tokens"]
    return float((saved - gained) / row["groups"])


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """``overhead = call + reader * readers`` by least squares."""
    readers = np.array([row["group_size"] * row["continuation"] for row in rows])
    costs = np.array([overhead(row) for row in rows])
    solution = np.linalg.lstsq(np.stack([np.ones(len(rows)), readers], axis=1), costs, rcond=None)[0]
    return {"call": round(float(solution[0]), 2), "reader": round(float(solution[1]), 4)}


def run(
    loads: Sequence[Load],
    *,
    model: Model | None = None,
    repeats: int = 7,
    budget: int | None = None,
    break_even: bool = False,
    json_path: Path | None = None,
) -> dict[str, Any]:
    """The result of `millrace bench prefix-tree`; written to ``json_path`` if that is given."""
    import torch

    from learner.backends.fsdp import FsdpBackend
    from learner.config import LearnerConfig
    from learner.learner import CPU_PASS_TOKENS

    torch.set_num_threads(1)
    model, budget = model or Model(), budget or CPU_PASS_TOKENS
    with tempfile.TemporaryDirectory() as directory:
        model.make(Path(directory), max(load.prefix + load.continuation for load in loads))
        backend = FsdpBackend(directory, LearnerConfig(device="cpu"))
        rows = []
        for load in loads:
            rows.append(measure(backend, load, model.vocabulary, repeats, budget))
            logger.info("%s: %s", load, rows[-1])
    results: dict[str, Any] = {"loads": rows}
    if break_even:
        results["overhead_tokens"] = [round(overhead(row), 2) for row in rows]
        results["sharing"] = fit(rows)
    settings = {**asdict(model), "token_budget": budget, "repeats": repeats}
    result = document("prefix-tree", seeds=[0], settings=settings, results=results)
    if json_path is not None:
        write_json(json_path, result)
    return result


def table(result: dict[str, Any]) -> Table:
    """The result for a terminal."""
    shown = Table(title=f"Common prefixes computed once, medians of {result['settings']['repeats']}")
    columns = ("prefix", "groups", "tokens", "computed", "ratio", "speed-up", "of ratio", "CPU", "of ratio")
    for column in (*columns, "loss differs", "gradient differs"):
        shown.add_column(column, justify="right")
    for row in result["results"]["loads"]:
        low, high = row["speed_up_range"]
        shown.add_row(
            f"{row['prefix']} + {row['continuation']}",
            f"{row['groups']} of {row['group_size']}",
            str(row["tokens"]),
            str(row["computed_tokens"]),
            f"{row['token_ratio']:.2f}",
            f"{row['speed_up']:.2f} ({low:.2f} to {high:.2f})",
            f"{row['of_token_ratio']:.0%}",
            f"{row['cpu_speed_up']:.2f}",
            f"{row['cpu_of_token_ratio']:.0%}",
            f"{row['loss_difference']:.1e}",
            f"{row['gradient_difference']:.1e}",
        )
    return shown


def break_even_table(result: dict[str, Any]) -> Table:
    """What sharing costs, for a terminal."""
    found = result["results"]["sharing"]
    shown = Table(
        title=f"Tokens that sharing one prefix costs: about {found['call']:g} + {found['reader']:g} for each reader"
    )
    for column in ("prefix", "continuation", "branches", "saves", "costs", "pays"):
        shown.add_column(column, justify="right")
    for row, cost in zip(result["results"]["loads"], result["results"]["overhead_tokens"], strict=True):
        saves = row["prefix"] * (row["group_size"] - 1)
        shown.add_row(
            str(row["prefix"]),
            str(row["continuation"]),
            str(row["group_size"]),
            str(saves),
            f"{cost:.1f}",
            "yes" if saves > cost else "no",
        )
    return shown


@click.command()
@click.option(
    "--prefix",
    "prefixes",
    multiple=True,
    type=click.IntRange(min=PREFIX_SHARE),
    default=PREFIXES,
    show_default=True,
    help=f"Tokens of a group's prefix, {PREFIX_SHARE} times those of a continuation; may be repeated.",
)
@click.option("--groups", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--group-size", type=click.IntRange(min=2), default=8, show_default=True)
@click.option(
    "--hidden", type=click.IntRange(min=128), default=Model.hidden, show_default=True, help="Width of the model."
)
@click.option("--layers", type=click.IntRange(min=1), default=Model.layers, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True, help="Alternations that count.")
@click.option("--break-even", is_flag=True, help="Measure what sharing costs, on short prefixes.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there.")
def prefix_tree(
    prefixes: tuple[int, ...],
    groups: int,
    group_size: int,
    hidden: int,
    layers: int,
    repeats: int,
    break_even: bool,
    json_path: Path | None,
) -> None:
    """Training on groups with a common prefix: computed once, against computed for each member."""
    if hidden % 128:
        raise click.BadParameter(f"{hidden} is no multiple of 128 (two heads of 64)", param_hint="--hidden")
    loads: Sequence[Load] = BREAK_EVEN
    if not break_even:
        loads = [Load(groups, group_size, prefix, prefix // PREFIX_SHARE) for prefix in prefixes]
    result = run(loads, model=Model(hidden, layers), repeats=repeats, break_even=break_even, json_path=json_path)
    report: Callable[..., None] = table_console(150).print
    report(break_even_table(result) if break_even else table(result))
