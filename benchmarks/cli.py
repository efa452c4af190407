"""`millrace bench NAME`: each benchmark is imported only when it is called."""

from __future__ import annotations

import importlib
import signal
import sys
import threading

import click

BENCHMARKS = {
    "checkpoint": "benchmarks.checkpoint:checkpoint",
    "control-plane": "benchmarks.control_plane.command:control_plane",
    "engine": "benchmarks.engine:engine",
    "fleet": "benchmarks.fleet.command:fleet",
    "kv": "benchmarks.kv:kv",
    "learn": "benchmarks.learn:learn",
    "packing": "benchmarks.packing:packing",
    "pd": "benchmarks.pd.command:pd",
    "peer": "benchmarks.peer_trl:peer",
    "prefix-tree": "benchmarks.prefix_tree:prefix_tree",
    "queue": "benchmarks.queue.command:queue",
    "routing": "benchmarks.routing.command:routing",
    "simulator": "benchmarks.simulator_validation:simulator",
    "staleness": "benchmarks.staleness.command:staleness",
    "staleness-control": "benchmarks.staleness.control:staleness_control",
    "sync-vs-async": "benchmarks.sync_vs_async.command:sync_vs_async",
    "weights": "benchmarks.weights.command:weights",
}


class BenchGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(BENCHMARKS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in BENCHMARKS:
            return None
        module, _, name = BENCHMARKS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.group(cls=BenchGroup)
def bench() -> None:
    """Measure, and write the figures with machine, versions and seeds."""
    if threading.current_thread() is threading.main_thread():  # a benchmark that is ended ends the runs it started
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
