"""The embedded engine, mixed and split, in real processes on this machine: real tokens, real KV that moves between them.

Both layouts are run by the same client, as a rollout worker has one, over engine actors of one thread each. All sessions of a
load begin together and go through their turns (generate, wait for the tool, read what it returned); a *batch* is all of them.
Layouts take turns, batch after batch, so that a busy machine disturbs them alike; medians count.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.output import document, save_figure, table_console, write_json
from benchmarks.pd.cases import Layout, default_splits, parse_splits
from experience.wire import decode
from rollout_workers.disaggregation.client import PairedEngineClient
from rollout_workers.engine_client import EngineClient, RayEngineHandle
from rollout_workers.engines.actor import EngineActor
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import EngineHealth, GenerateRequest, TokenChunk

LIMIT_S = 300.0
"""How long engines may take to start, or a batch to end."""
VOCABULARY = 256
MAX_LEN = 1024
TABLE_WIDTH = 170


@dataclass(frozen=True)
class RealLoad:
    """``sessions`` episodes of ``turns`` turns; a tool takes ``tool_s`` on average (exponential)."""

    name: str
    sessions: int
    prompt: int
    turns: int
    output: int
    observation: int
    tool_s: float

    @property
    def tokens(self) -> int:
        """Sampled in a batch."""
        return self.sessions * self.turns * self.output


LOADS = (
    RealLoad("one long answer", sessions=48, prompt=32, turns=1, output=192, observation=0, tool_s=0.0),
    RealLoad("many turns", sessions=32, prompt=96, turns=6, output=24, observation=96, tool_s=0.2),
    RealLoad("long prefixes, many turns", sessions=24, prompt=512, turns=6, output=12, observation=64, tool_s=0.2),
)


@dataclass(frozen=True)
class RealRow:
    """Medians over the batches; latencies over all requests of all of them, in milliseconds."""

    case: str
    layout: str
    batch_s: float
    tokens_per_s: float
    first_token_ms: dict[str, float]
    inter_token_ms: dict[str, float]
    handoffs: int
    """All that follows: a batch's."""
    handoffs_failed: int
    kv_moved_mb: float
    computed: int
    """Prompt tokens computed."""
    cached: int
    """Prompt tokens whose KV was there."""
    evicted: int
    """Sessions that lost their KV."""


class _Stamps:
    """Notes when tokens reach the client."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.arrivals: dict[str, list[float]] = defaultdict(list)

    def _accept(self, name: str, chunk: TokenChunk) -> None:
        self.arrivals[chunk.request_id] += [time.perf_counter()] * len(chunk.tokens)
        super()._accept(name, chunk)  # type: ignore[misc]


class _MixedClient(_Stamps, EngineClient):
    """A worker's client that notes times."""


class _SplitClient(_Stamps, PairedEngineClient):
    """The same over pairs of engines."""


@dataclass
class _Fleet:
    """The engines of one layout, and their client."""

    layout: Layout
    client: Any
    handles: list[Any]

    async def health(self) -> list[EngineHealth]:
        return [decode(await handle.health.remote(), EngineHealth) for handle in self.handles]


def run_real(options: dict[str, Any], json_path: Path | None, figure_path: Path | None) -> None:
    """`millrace bench pd --engine torch`. Raises ConfigError."""
    engines = options["engines"] or 2
    splits = parse_splits(options["splits"], engines) if options["splits"] else default_splits(engines)
    rows = measure_real(LOADS, [Layout(), *splits], engines, options["steps"], options["seed"])
    console = table_console(TABLE_WIDTH)
    console.print(table_of(rows))
    lines = words_of(rows)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if json_path is not None:
        settings = {
            "engine": "torch",
            "engines": engines,
            "batches": options["steps"],
            "loads": [asdict(x) for x in LOADS],
        }
        results = {"rows": [asdict(row) for row in rows], "words": lines}
        write_json(json_path, document("pd", seeds=[options["seed"]], settings=settings, results=results))
    if figure_path is not None:
        save_figure(figure_path, figure_of(rows))


def measure_real(
    loads: Sequence[RealLoad], layouts: Sequence[Layout], engines: int, batches: int, seed: int
) -> list[RealRow]:
    """Every layout on every load, ``batches`` times after one that is not counted. Starts Ray and stops it."""
    import ray

    from benchmarks.engine.command import quickstart_sized_model
    from orchestrator.config import Config
    from orchestrator.launch import start_ray

    temporary = start_ray(Config())
    with tempfile.TemporaryDirectory(prefix="millrace-pd-") as directory:
        try:
            quickstart_sized_model(seed, "cpu").save_pretrained(directory)
            return asyncio.run(_measure(loads, layouts, engines, batches, seed, Path(directory)))
        finally:
            ray.shutdown()
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


async def _measure(
    loads: Sequence[RealLoad], layouts: Sequence[Layout], engines: int, batches: int, seed: int, model: Path
) -> list[RealRow]:
    rows = []
    for load in loads:
        found: dict[Layout, list[tuple[float, list[list[float]], list[EngineHealth]]]] = {one: [] for one in layouts}
        async with _fleets(load, layouts, engines, model) as fleets:
            for batch in range(batches + 1):
                for fleet in fleets:
                    before = await fleet.health()
                    measured = await _batch(load, fleet, f"{seed}.{batch}")
                    if batch:
                        after = await fleet.health()
                        grown = [grown_since(now, then) for now, then in zip(after, before, strict=True)]
                        found[fleet.layout].append((*measured, grown))
        rows += [row_of(load, layout, found[layout]) for layout in layouts]
    return rows


@asynccontextmanager
async def _fleets(load: RealLoad, layouts: Sequence[Layout], engines: int, model: Path) -> AsyncIterator[list[_Fleet]]:
    import ray

    fleets: list[_Fleet] = []
    try:
        for layout in layouts:
            fleets.append(await _start(load, layout, engines, model))
        yield fleets
    finally:
        for fleet in fleets:
            await fleet.client.close()
            for handle in fleet.handles:
                await handle.stop.remote()
                ray.kill(handle)


async def _start(load: RealLoad, layout: Layout, engines: int, model: Path) -> _Fleet:
    import ray

    config = EnginesConfig(
        slots=load.sessions, max_len=MAX_LEN, prefill_tokens=256, stream_every=1, threads=1, device="cpu",
        prefill=layout.prefill, decode=layout.decode, replicas=1 if layout.prefill else engines,
    )  # fmt: skip
    actor = ray.remote(EngineActor).options(num_cpus=0, max_concurrency=1000)
    client: Any = _SplitClient("bench", config.handoff.min_tokens) if layout.prefill else _MixedClient("bench")
    handles = []
    async with asyncio.timeout(LIMIT_S):
        for index in range(config.count):
            name, role = f"engine-{layout.prefill}-{layout.decode}-{index}", config.role_of(index)
            handle = actor.remote(name, config, role)
            handles.append(handle)
            await handle.load.remote(str(model), "float32", 1, 0)
            if layout.prefill:
                client.add_paired_engine(name, RayEngineHandle(handle, name), role, (await handle.kv_place.remote())[1])
            else:
                client.add_engine(name, RayEngineHandle(handle, name))
    return _Fleet(layout, client, handles)


async def _batch(load: RealLoad, fleet: _Fleet, batch: str) -> tuple[float, list[list[float]]]:
    """Seconds of the whole batch, and of each request when its tokens came (after it was made)."""
    came: list[list[float]] = []
    began_at = time.perf_counter()
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(*(_session(load, fleet, batch, number, came) for number in range(load.sessions)))
    return time.perf_counter() - began_at, came


async def _session(load: RealLoad, fleet: _Fleet, batch: str, number: int, came: list[list[float]]) -> None:
    """One episode. What it reads and how long its tools take depend on its number alone."""
    rng = np.random.default_rng([load.prompt, number])
    context = rng.integers(0, VOCABULARY, load.prompt).astype(np.int32)
    session = f"{load.name}/{batch}/{number}"
    for turn in range(load.turns):
        request = GenerateRequest(
            request_id=f"{session}/{turn}", session_id=session, prompt=context, max_tokens=load.output, seed=number
        )
        asked_at = time.perf_counter()
        answer = await fleet.client.generate(request)
        if len(answer.tokens) != load.output:
            raise RuntimeError(f"{request.request_id}: {len(answer.tokens)} tokens where {load.output} were asked for")
        came.append([at - asked_at for at in fleet.client.arrivals.pop(request.request_id)])
        read = rng.integers(0, VOCABULARY, load.observation).astype(np.int32)
        context = np.concatenate([context, answer.tokens, read])
        await asyncio.sleep(float(rng.exponential(load.tool_s)) if load.tool_s else 0.0)
    fleet.client.release(session)


COUNTED = ("handoffs_failed", "kv_sent_mb", "prefill_tokens", "cached_tokens", "evicted_sessions", "handoffs")


def grown_since(now: EngineHealth, then: EngineHealth) -> EngineHealth:
    """What an engine counted in between."""
    return EngineHealth(version=now.version, **{name: getattr(now, name) - getattr(then, name) for name in COUNTED})


def row_of(
    load: RealLoad, layout: Layout, batches: Sequence[tuple[float, list[list[float]], list[EngineHealth]]]
) -> RealRow:
    """One line of the table from its batches."""
    seconds = statistics.median(batch_s for batch_s, _, _ in batches)
    requests = [times for _, came, _ in batches for times in came]

    def each(name: str) -> float:
        return sum(float(getattr(health, name)) for _, _, grown in batches for health in grown) / len(batches)

    return RealRow(
        case=load.name,
        layout=layout.name,
        batch_s=round(seconds, 4),
        tokens_per_s=round(load.tokens / seconds, 1),
        first_token_ms=_percentiles([times[0] for times in requests]),
        inter_token_ms=_percentiles([float(gap) for times in requests for gap in np.diff(times)]),
        handoffs=round(each("handoffs") / 2),
        handoffs_failed=round(each("handoffs_failed")),
        kv_moved_mb=round(each("kv_sent_mb"), 2),
        computed=round(each("prefill_tokens")),
        cached=round(each("cached_tokens")),
        evicted=round(each("evicted_sessions")),
    )


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(np.asarray(seconds) * 1000, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def words_of(rows: Sequence[RealRow]) -> list[str]:
    """What each split changed, against the mixed layout on the same load."""
    mixed = {row.case: row for row in rows if row.layout == "mixed"}
    lines = []
    for row in rows:
        if row.layout == "mixed" or row.case not in mixed:
            continue
        base = mixed[row.case]
        changes = [("batch", row.batch_s / base.batch_s - 1)]
        for name, values, before in (
            ("first token", row.first_token_ms, base.first_token_ms),
            ("between tokens", row.inter_token_ms, base.inter_token_ms),
        ):
            changes += [(f"{name} {key}", values[key] / before[key] - 1) for key in ("p50", "p99") if before[key] > 0]
        told = ", ".join(f"{name} {change:+.0%}" for name, change in changes)
        lines.append(
            f"{row.case}, {row.layout} against mixed: {told}; a batch computes {row.computed:,} prompt tokens "
            f"(mixed {base.computed:,}) and moves {row.kv_moved_mb:.1f} MB of KV in {row.handoffs} hand-offs "
            f"({row.handoffs_failed} failed)"
        )
    return lines


def table_of(rows: Sequence[RealRow]) -> Any:
    """A line for each layout on each load."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    names = (
        "load",
        "engines",
        "batch s",
        "tokens/s",
        "first token ms p50/p99",
        "between tokens ms p50/p99",
        "computed",
    )
    for name in (*names, "cached", "evicted", "hand-offs", "KV MB"):
        table.add_column(name, justify="left" if name in ("load", "engines") else "right", no_wrap=True)
    for row in rows:
        first, inter = row.first_token_ms, row.inter_token_ms
        table.add_row(
            row.case,
            row.layout,
            f"{row.batch_s:.2f}",
            f"{row.tokens_per_s:,.0f}",
            f"{first['p50']:.1f} / {first['p99']:.1f}",
            f"{inter['p50']:.2f} / {inter['p99']:.2f}",
            f"{row.computed:,}",
            f"{row.cached:,}",
            str(row.evicted),
            f"{row.handoffs} ({row.handoffs_failed} failed)" if row.layout != "mixed" else "",
            f"{row.kv_moved_mb:.1f}" if row.layout != "mixed" else "",
        )
    return table


def figure_of(rows: Sequence[RealRow]) -> Any:
    """Tokens a second, first token and between tokens (median; the line ends at p99) by load and layout."""
    from matplotlib.figure import Figure

    cases, layouts = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("case", "layout"))
    figure = Figure(figsize=(11, 0.6 * len(rows) + 1.4))
    panels = figure.subplots(1, 3, sharey=True)
    height = 0.8 / len(layouts)
    for row in rows:
        at = cases.index(row.case) + (layouts.index(row.layout) - (len(layouts) - 1) / 2) * height
        colour = f"C{layouts.index(row.layout)}"
        panels[0].barh(at, row.tokens_per_s, height, color=colour, label=row.layout if row.case == cases[0] else None)
        for panel, times in ((panels[1], row.first_token_ms), (panels[2], row.inter_token_ms)):
            panel.barh(at, times["p50"], height, color=colour)
            panel.hlines(at, times["p50"], times["p99"], color=colour)
    panels[0].set_yticks(range(len(cases)), cases)
    panels[0].invert_yaxis()
    for panel, label in zip(panels, ("tokens/s", "first token, ms", "between tokens, ms"), strict=True):
        panel.set_xlabel(label)
    panels[0].legend(frameon=False, fontsize=7)
    return figure
