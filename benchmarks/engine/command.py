"""Tokens a second, time to the first token and time between tokens of three engines on the same work.

All run in one process, on the same model (the quickstart's size, random weights), the same prompts and the same numbers
of tokens, repeat after repeat in turn, so that a busy machine slows them alike. Medians count. Rates are by the clock and
by CPU seconds of the process (which other processes disturb less); only tokens that were asked for count:
``generate`` runs a batch until its longest row ends. Latencies are measured in rounds of their own, in which every token
is delivered as soon as it is there; all requests are submitted together. Servers (``--engines``) run in processes of their
own, whose CPU seconds are counted with the caller's; they stream every token in all rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.engine.workloads import WORKLOADS, Arrivals, Prompt, Workload, percentiles_ms
from benchmarks.output import document, save_figure, write_json
from rollout_workers.engines.config import SERVERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from benchmarks.engine.contenders import Contender

VOCABULARY = 256
BASELINE = "model.generate"
COLORS = ("#2f6f9f", "#9aa5b1", "#c98b3b", "#7a9a4a", "#8a5a83")


def quickstart_sized_model(seed: int, device: str) -> PreTrainedModel:
    """A Qwen3 of the quickstart's shape (2 layers, hidden 128, 0.3 M parameters) with random float32 weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        tie_word_embeddings=True,
        initializer_range=0.06,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval().to(device)


def run(
    json_path: str | Path | None = None,
    *,
    repeats: int = 7,
    latency_repeats: int = 3,
    threads: int = 1,
    seed: int = 0,
    device: str = "cpu",
    engines: Sequence[str] = (),
    workloads: tuple[Workload, ...] = WORKLOADS,
) -> dict[str, Any]:
    """Measure every workload; returns (and writes to ``json_path``) the result of `millrace bench engine`.

    ``engines``: servers to measure besides.
    """
    import torch

    from benchmarks.engine.contenders import CONTENDERS, skipped
    from benchmarks.engine.servers import Served

    torch.set_num_threads(threads)
    model = quickstart_sized_model(seed, device)
    contenders = [make(model) for make in CONTENDERS]
    try:
        for kind in engines:
            contenders.append(Served(kind, model, threads))
        rows = [measure(workload, contenders, repeats, latency_repeats, seed) for workload in workloads]
    finally:
        for contender in contenders:
            contender.close()
    settings = {
        "repeats": repeats,
        "latency_repeats": latency_repeats,
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "skipped": skipped(engines),
    }
    result = document("engine", seeds=[seed], settings=settings, results=rows)
    if json_path is not None:
        write_json(Path(json_path), result)
    return result


def measure(
    workload: Workload, contenders: list[Contender], repeats: int, latency_repeats: int, seed: int
) -> dict[str, Any]:
    """Rates (medians of the repeats after an unmeasured one) and latencies of each contender on one workload."""
    prompts = workload.prompts(seed, VOCABULARY)
    lengths = workload.lengths(seed)
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    cpu_rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for repeat in range(repeats + 1):
        for contender in contenders:
            began, cpu_began = time.perf_counter(), cpu_of(contender)
            contender.run(prompts, lengths)
            seconds, cpu_seconds = time.perf_counter() - began, cpu_of(contender) - cpu_began
            if repeat > 0:
                rates[contender.name].append(sum(lengths) / seconds)
                cpu_rates[contender.name].append(sum(lengths) / cpu_seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    cpu_medians = {name: statistics.median(values) for name, values in cpu_rates.items()}
    return {
        "workload": asdict(workload),
        "tokens": sum(lengths),
        "tokens_per_s": {name: round(rate, 1) for name, rate in medians.items()},
        "tokens_per_s_range": {name: [round(min(v), 1), round(max(v), 1)] for name, v in rates.items()},
        "ratio_to_generate": {name: round(rate / medians[BASELINE], 3) for name, rate in medians.items()},
        "tokens_per_cpu_s": {name: round(rate, 1) for name, rate in cpu_medians.items()},
        "cpu_ratio_to_generate": {name: round(rate / cpu_medians[BASELINE], 3) for name, rate in cpu_medians.items()},
        **_latencies(contenders, prompts, lengths, latency_repeats),
    }


def cpu_of(contender: Contender) -> float:
    """CPU seconds so far of this process and of the contender's server, if it is one."""
    from benchmarks.engine.servers import Served

    return time.process_time() + (contender.server_cpu_s() if isinstance(contender, Served) else 0.0)


def _latencies(
    contenders: list[Contender], prompts: list[Prompt], lengths: list[int], repeats: int
) -> dict[str, dict[str, dict[str, float]]]:
    """``first_token_ms`` and ``inter_token_ms`` of each contender: percentiles over the tokens of all repeats but the first."""
    first: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    gaps: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for repeat in range(repeats + 1):
        for contender in contenders:
            arrivals = Arrivals(lengths)
            contender.run(prompts, lengths, arrivals)
            if arrivals.counts() != lengths:
                raise RuntimeError(
                    f"{contender.name} delivered {arrivals.counts()} tokens where {lengths} were asked for"
                )
            if repeat > 0:
                first[contender.name] += arrivals.first_s()
                gaps[contender.name] += arrivals.gaps_s()
    return {
        "first_token_ms": {name: percentiles_ms(seconds) for name, seconds in first.items()},
        "inter_token_ms": {name: percentiles_ms(seconds) for name, seconds in gaps.items()},
    }


def report(result: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    rows, settings = result["results"], result["settings"]
    names = list(rows[0]["tokens_per_s"])
    table = Table("tokens/s (ratio; by CPU time)", *names, box=None)
    for row in rows:
        ratio, by_cpu = row["ratio_to_generate"], row["cpu_ratio_to_generate"]
        cells = [f"{row['tokens_per_s'][n]:,.0f} ({ratio[n]:.2f}; {by_cpu[n]:.2f})" for n in names]
        table.add_row(row["workload"]["name"], *cells)
    console.print(table)
    for key, title in (
        ("first_token_ms", "first token, ms p50 / p99"),
        ("inter_token_ms", "between tokens, ms p50 / p99"),
    ):
        table = Table(title, *names, box=None)
        for row in rows:
            cells = [f"{row[key][n]['p50']:.2f} / {row[key][n]['p99']:.2f}" if row[key][n] else "" for n in names]
            table.add_row(row["workload"]["name"], *cells)
        console.print(table)
    for each in settings["skipped"]:
        console.print(f"{each['engine']}: skipped, {each['reason']}")
    console.print(f"machine: {result['machine']}\nversions: {result['versions']}\nseeds: {result['seeds']}")


def draw(result: dict[str, Any]) -> Any:
    """Tokens a second, first-token and inter-token latency (median; the line ends at p99) by workload."""
    from matplotlib.figure import Figure

    rows = result["results"]
    names = list(rows[0]["tokens_per_s"])
    figure = Figure(figsize=(11, 0.55 * len(rows) + 1.6))
    panels = figure.subplots(1, 3, sharey=True)
    height = 0.8 / len(names)
    middle = (len(names) - 1) / 2
    for index, (name, color) in enumerate(zip(names, COLORS, strict=False)):
        places = [row + (index - middle) * height for row in range(len(rows))]
        rates = [row["tokens_per_s"][name] for row in rows]
        panels[0].barh(places, rates, height, label=name, color=color)
        for panel, key in ((panels[1], "first_token_ms"), (panels[2], "inter_token_ms")):
            medians = [row[key][name].get("p50", 0.0) for row in rows]
            worst = [row[key][name].get("p99", 0.0) for row in rows]
            panel.barh(places, medians, height, color=color)
            panel.hlines(places, medians, worst, color=color, linewidth=1.5)
    panels[0].set_yticks(range(len(rows)), [row["workload"]["name"] for row in rows])
    panels[0].invert_yaxis()
    for panel, label in zip(panels, ("tokens/s", "first token, ms", "between tokens, ms"), strict=True):
        panel.set_xlabel(label)
    panels[0].legend(fontsize=7, loc="lower right")
    return figure


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result to this file.")
@click.option("--figure", "figure_path", type=click.Path(path_type=Path), help="Save the figure (.svg or .png).")
@click.option("--repeats", default=7, show_default=True, help="Measured rounds; the median counts.")
@click.option("--latency-repeats", default=3, show_default=True, help="Rounds in which every token is stamped.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of torch.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option(
    "--engines", default="", help=f"Servers to measure besides, separated by commas: {', '.join(SERVERS)} (slow)."
)
def engine(json_path: Path | None, figure_path: Path | None, engines: str, **settings: Any) -> None:
    """Tokens/s and latencies of the embedded engine, model.generate and transformers' continuous batching."""
    kinds = [kind.strip() for kind in engines.split(",") if kind.strip()]
    if unknown := sorted(set(kinds) - set(SERVERS)):
        raise click.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(SERVERS)}", param_hint="--engines")
    result = run(json_path, engines=kinds, **settings)
    report(result, Console())
    if figure_path is not None:
        save_figure(figure_path, draw(result))
