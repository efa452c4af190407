"""`millrace trace RUN`: the run as a file for ui.perfetto.dev."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click

from orchestrator.run_directory import RunDirectory, RunDirectoryError


@click.command("trace")
@click.argument("run")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Where to write (default: RUN/trace.json)."
)
@click.option("--from", "begin_s", type=float, default=0.0, show_default=True, help="Seconds of the run to begin at.")
@click.option("--to", "end_s", type=float, default=math.inf, help="Seconds of the run to end at (default: its end).")
@click.option("--episodes", is_flag=True, help="A slice for each episode, too.")
def trace_command(run: str, out: Path | None, begin_s: float, end_s: float, episodes: bool) -> None:
    """Write where every actor's time went in RUN as a Chrome trace; open it in ui.perfetto.dev.

    One lane an actor (or modelled accelerator), counters, and an arrow for each group from its dispatch to the step that
    trained it.
    """
    from orchestrator.accounting.trace import build_trace
    from orchestrator.accounting.trace_sources import read_sources

    if begin_s < 0 or not begin_s < end_s:
        raise click.ClickException(f"--from {begin_s:g} --to {end_s:g}: give 0 <= from < to, in seconds of the run")
    try:
        directory = RunDirectory.open(run)
    except RunDirectoryError as error:
        raise click.ClickException(str(error)) from None
    sources, zero = read_sources(directory, begin_s, end_s)
    if not sources.spans and not sources.steps:
        raise click.ClickException(
            f"{directory.path} has no timeline and no steps between {begin_s:g} s and {end_s:g} s of the run: nothing to trace"
        )
    trace = build_trace(sources, zero, episodes)
    target = out or directory.path / "trace.json"
    try:
        target.write_text(json.dumps(trace, allow_nan=False, separators=(",", ":")), encoding="utf-8")
    except OSError as error:
        raise click.ClickException(
            f"{target} cannot be written: {error.strerror or error}; give another --out"
        ) from None
    click.echo(
        f"{target}: {len(trace['traceEvents'])} events of {len({span.lane for span in sources.spans})} lanes, "
        f"{len(sources.steps)} steps and {len(sources.groups)} groups; open it in ui.perfetto.dev"
    )
    for note in trace["otherData"]["notes"]:
        click.echo(f"note: {note}")
