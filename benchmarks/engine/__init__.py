"""The embedded engine against ``model.generate`` and transformers' continuous batching."""

from benchmarks.engine.command import engine, run
from benchmarks.engine.workloads import WORKLOADS, Workload

__all__ = ["WORKLOADS", "Workload", "engine", "run"]
