"""What a controller is told to do, and how a run ends early."""

from __future__ import annotations

from dataclasses import dataclass

from experience.entries import InFlight
from orchestrator.config import Config
from orchestrator.resources import Resources
from orchestrator.supervisor import first_line


class RunFailed(Exception):
    """The run cannot go on; the message is the first cause."""


class RunInterrupted(RunFailed):
    """A person ended the run."""


@dataclass(frozen=True)
class RunPlan:
    """What the driver hands to the controller."""

    config: Config
    run_directory: str
    model_path: str
    checkpoint: str | None
    """Checkpoint to continue from; None: from the beginning."""
    served: str
    """Directory of the weights that engines begin with."""
    version: int
    """Version of the weights in ``served``."""
    resources: Resources
    run_attempt: int
    started_at: float
    """Wall-clock time at which the command was started."""
    secrets: list[str]
    dispatched: int = 0
    """Groups dispatched before the checkpoint; used when there is no journal to count them from."""


def cause_of(error: BaseException) -> str:
    """What to tell a person: the message of a RunFailed as it stands, anything else with its type."""
    return str(error) if isinstance(error, RunFailed) else first_line(error)


def members_of(group: InFlight) -> list[int]:
    """Indices of the episodes that are missing."""
    missing = set(group.missing)
    return [member for member in range(group.header.size) if group.header.episode_id(member) in missing]
