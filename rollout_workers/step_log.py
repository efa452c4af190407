"""Durable steps: each generation and environment call of an episode is journalled when it completes.

When a worker dies, the loop runs again elsewhere and is given the recorded results until it has caught up, so that no
completed turn is generated twice. A rollout loop must therefore be a deterministic function of what `generate` and the
environment return; a loop that asks for something else than what is recorded starts again from nothing.
"""

from __future__ import annotations

from collections import defaultdict, deque
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from experience.journal import Journal, JournalReader
from experience.wire import decode, encode
from rollout_workers.engines.protocol import FinishReason, TokenChunk

STEP_KIND = "step"


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One completed step. ``call`` is `generate`, `delivered` or the name of an environment method."""

    episode_id: str
    attempt: int
    trajectory_id: str
    call: str
    tokens: npt.NDArray[np.int32] | None = None
    logprobs: npt.NDArray[np.float32] | None = None
    versions: npt.NDArray[np.int32] | None = None
    finish_reason: FinishReason | None = None
    stop_match: str | None = None
    action: str | None = None
    result: bytes = b""
    began_at: float = 0.0
    ended_at: float = 0.0

    def chunk(self) -> TokenChunk:
        """The generation that was recorded."""
        assert self.tokens is not None
        assert self.logprobs is not None
        assert self.versions is not None
        return TokenChunk(
            request_id=self.trajectory_id,
            tokens=self.tokens,
            logprobs=self.logprobs,
            versions=self.versions,
            finish_reason=self.finish_reason,
            stop_match=self.stop_match,
        )


class StepLog:
    """Append-only log of one worker's steps in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._journal = Journal(directory)

    def append(self, record: StepRecord) -> None:
        """Write one record; it survives the death of the process from here on."""
        self._journal.append(STEP_KIND, encode(record))
        self._journal.flush()

    def close(self) -> None:
        self._journal.close()


class RecordedSteps:
    """What dead workers had completed, by episode, newest attempt only."""

    def __init__(self) -> None:
        self._steps: dict[str, deque[StepRecord]] = defaultdict(deque)
        self._delivered: set[str] = set()

    def read(self, directory: Path) -> None:
        """Add the log of a dead worker; a torn last record is ignored."""
        for _, payload in JournalReader(directory).replay():
            record = decode(payload, StepRecord)
            if record.call == "delivered":
                self._delivered.add(record.episode_id)
                continue
            steps = self._steps[record.episode_id]
            if steps and steps[-1].attempt < record.attempt:
                steps.clear()
            steps.append(record)

    def delivered(self, episode_id: str) -> bool:
        """Whether the episode's result had reached the queue."""
        return episode_id in self._delivered

    def take(self, episode_id: str) -> Replay:
        """The recorded steps of one episode, to be consumed once."""
        return Replay(self._steps.pop(episode_id, deque()))


class Replay:
    """Recorded steps of one episode, handed out per trajectory and kind of call in their order."""

    def __init__(self, steps: deque[StepRecord] | None = None) -> None:
        self.attempt = steps[0].attempt if steps else 0
        self._steps: dict[tuple[str, bool], deque[StepRecord]] = defaultdict(deque)
        for step in steps or ():
            self._steps[step.trajectory_id, step.call == "generate"].append(step)

    def __len__(self) -> int:
        return sum(len(steps) for steps in self._steps.values())

    def next_generation(self, trajectory_id: str) -> StepRecord | None:
        steps = self._steps.get((trajectory_id, True))
        return steps.popleft() if steps else None

    def next_environment_call(self, trajectory_id: str) -> StepRecord | None:
        steps = self._steps.get((trajectory_id, False))
        return steps.popleft() if steps else None
