"""CPU seconds and memory of a run's processes, by what they are."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import psutil

ACTORS = {
    "RolloutWorkerActor": "worker",
    "EnvironmentActor": "environment",
    "RewardActor": "reward",
    "EngineActor": "engine",
    "LearnerActor": "learner",
    "QueueActor": "queue",
    "Controller": "controller",
}
"""Role by the class that Ray names a process after."""
COMMAND = "command line"
RAY = "Ray"
"""Ray's own processes (raylet, GCS, agents, idle workers)."""


@dataclass
class Usage:
    """Of all processes of one role."""

    cpu_s: float = 0.0
    pss_bytes: int = 0
    """Proportional set size: a page that n processes share counts 1/n to each."""


def role_of(command: list[str]) -> str:
    """What a process is, by its command line."""
    title = " ".join(command).strip()
    if title.startswith("ray::"):
        name = title.removeprefix("ray::").split(".")[0].split("(")[0].strip()
        return ACTORS.get(name, RAY)
    return COMMAND if "orchestrator.cli" in title else RAY


def usage_by_role(pid: int, memory: bool) -> dict[str, Usage]:
    """Process ``pid`` and its descendants. ``memory`` also reads their PSS, which costs milliseconds a process."""
    found: dict[str, Usage] = defaultdict(Usage)
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return {}
    for process in family:
        try:
            usage = found[role_of(process.cmdline())]
            times = process.cpu_times()
            usage.cpu_s += times.user + times.system
            if memory:
                usage.pss_bytes += process.memory_full_info().pss
        except psutil.Error:  # it ended, or is not ours
            continue
    return dict(found)
