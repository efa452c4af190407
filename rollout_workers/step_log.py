"""Durable steps: each generation and environment call of an episode is journalled when it completes.

When a worker dies, the loop runs again elsewhere and is given the recorded results until it has caught up, so that no
completed turn is generated twice. A rollout loop must therefore be a deterministic function of what `generate` and the
environment return; a loop that asks for something else than what is recorded starts again from nothing.
"""

from __future__ import annotations

import shutil
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
    """One completed step. ``call`` is `generate` or the name of an environment method."""

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
    """Append-only log of one worker's steps, in numbered segments below ``directory``.

    A segment is deleted when it is full and every episode that wrote to it has ended, so that the log holds what is in
    flight and little more.
    """

    def __init__(self, directory: Path, segment_records: int = 4096) -> None:
        self._directory = directory
        self._segment_records = segment_records
        self._number = 0
        self._written = 0
        self._journal = Journal(self._segment(0))
        self._episodes: dict[int, set[str]] = {0: set()}

    def append(self, record: StepRecord) -> None:
        """Write one record; it survives the death of the process from here on."""
        if self._written >= self._segment_records:
            self._rotate()
        self._journal.append(STEP_KIND, encode(record))
        self._journal.flush()
        self._written += 1
        self._episodes[self._number].add(record.episode_id)

    def ended(self, episode_id: str) -> None:
        """The episode's result is safe elsewhere: its records are not needed any more."""
        for number, episodes in list(self._episodes.items()):
            episodes.discard(episode_id)
            if not episodes and number != self._number:
                del self._episodes[number]
                shutil.rmtree(self._segment(number))

    def close(self) -> None:
        self._journal.close()

    def _rotate(self) -> None:
        full, self._journal = self._journal, Journal(self._segment(self._number + 1))
        self._number += 1
        self._written = 0
        self._episodes[self._number] = set()
        full.close()

    def _segment(self, number: int) -> Path:
        return self._directory / f"{number:06d}"


class RecordedSteps:
    """What dead workers had completed, by episode, newest attempt only."""

    def __init__(self) -> None:
        self._steps: dict[str, deque[StepRecord]] = defaultdict(deque)

    def read(self, directory: Path) -> None:
        """Add the log of a dead worker; a torn last record is ignored."""
        for segment in sorted(path for path in directory.glob("*") if path.is_dir()):
            for _, payload in JournalReader(segment).replay():
                self._add(decode(payload, StepRecord))

    def take(self, episode_id: str) -> Replay:
        """The recorded steps of one episode, to be consumed once."""
        return Replay(self._steps.pop(episode_id, deque()))

    def _add(self, record: StepRecord) -> None:
        steps = self._steps[record.episode_id]
        if steps and steps[-1].attempt < record.attempt:
            steps.clear()
        if not steps or steps[-1].attempt == record.attempt:
            steps.append(record)


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
