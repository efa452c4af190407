"""Evaluation on held-out tasks with one pinned version: what to run, and the result. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from experience.records import GroupHeader, Task
from orchestrator.dispatcher import seed_of
from rollout_workers.assignments import Assignment, EpisodeReport, Purpose

SUCCESS_AT = 1.0 - 1e-6
"""An episode is a success when its reward is at least this."""


class Evaluation:
    """Held-out tasks at one version: hands out assignments, gathers reports, knows when it is complete.

    The seeds of the episodes depend on the run's seed and the task alone, so that evaluations of one run differ by the
    weights and nothing else.
    """

    def __init__(self, step: int, version: int, tasks: list[Task], seed: int) -> None:
        self.step = step
        self.version = version
        self._headers = {
            f"e{step:06d}-{index:04d}": GroupHeader(
                group_id=f"e{step:06d}-{index:04d}",
                index=index,
                task=task,
                size=1,
                version_floor=version,
                seed=seed_of(seed, "evaluate", index),
            )
            for index, task in enumerate(tasks)
        }
        self._worker_of: dict[str, str] = {}
        self._reports: dict[str, EpisodeReport] = {}

    @property
    def complete(self) -> bool:
        return len(self._reports) == len(self._headers)

    @property
    def collection(self) -> str:
        return f"step-{self.step:06d}.journal"

    def assign(self, workers: Iterable[str]) -> dict[str, list[Assignment]]:
        """Give every task that has no report and no worker to one of ``workers``, evenly."""
        names = sorted(workers)
        given: dict[str, list[Assignment]] = defaultdict(list)
        open_groups = [key for key in self._headers if key not in self._reports and key not in self._worker_of]
        for position, group_id in enumerate(open_groups if names else []):
            worker = names[position % len(names)]
            self._worker_of[group_id] = worker
            given[worker].append(
                Assignment(
                    header=self._headers[group_id],
                    members=[0],
                    purpose=Purpose.EVALUATE,
                    pinned_version=self.version,
                    collection=self.collection,
                )
            )
        return dict(given)

    def worker_lost(self, worker: str) -> None:
        """Its unreported tasks are free to be assigned again."""
        self._worker_of = {group: name for group, name in self._worker_of.items() if name != worker}

    def report(self, report: EpisodeReport) -> bool:
        """Take one report; False when it belongs to another evaluation."""
        if report.group_id not in self._headers:
            return False
        self._reports.setdefault(report.group_id, report)
        return True

    def result(self) -> dict[str, Any]:
        """``{step, version, tasks, failed, success, reward_mean, by_domain, by_difficulty}``; failed episodes do not count."""
        scored = [report for report in self._reports.values() if report.reward is not None]
        by_domain: dict[str, list[EpisodeReport]] = defaultdict(list)
        by_difficulty: dict[str, list[EpisodeReport]] = defaultdict(list)
        for report in scored:
            by_domain[report.domain].append(report)
            by_difficulty[str(report.difficulty)].append(report)
        return {
            "step": self.step,
            "version": self.version,
            "tasks": len(scored),
            "failed": len(self._reports) - len(scored),
            "success": _success(scored),
            "reward_mean": sum(report.reward or 0.0 for report in scored) / max(1, len(scored)),
            "turns_mean": sum(report.turns for report in scored) / max(1, len(scored)),
            "by_domain": {key: {"n": len(some), "success": _success(some)} for key, some in sorted(by_domain.items())},
            "by_difficulty": {
                key: {"n": len(some), "success": _success(some)} for key, some in sorted(by_difficulty.items())
            },
        }


def _success(reports: list[EpisodeReport]) -> float | None:
    if not reports:
        return None
    return sum((report.reward or 0.0) >= SUCCESS_AT for report in reports) / len(reports)
