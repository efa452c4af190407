"""Rollout of very many episodes at once: accelerators and episodes in mean field, advanced together by numpy.

What is aggregated: all accelerators are one pool in which decoding sequences are spread evenly (c = C / A on each; the
router keeps loads that close), and an episode is a fluid of W sampled tokens, P prompt tokens and Z seconds of tools that
progresses evenly over its turns: with r tokens/s a sequence, u the share of accelerator time spent on prompts and p the
prefill rate, an episode takes ``m + Z`` seconds with ``m = W / (r (1 - u)) + P / p`` and decodes a share ``m / (m + Z)`` of
them. r follows from C by the law of the cost model, C from all episodes; both are iterated to their fixed point in each
interval, which is a small part of the mean remaining time. When contexts exceed the KV of the pool, the share of the idle
ones that does not fit is computed again on each turn. Versions of tokens are exact in time to an interval.

Not modelled: imbalance between accelerators, queueing for prefill, losses of environments and engines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from env_pool.workloads.environment import script_of
from experience.accounting import Cause
from experience.records import GroupHeader
from orchestrator.config import ConfigError
from orchestrator.planning.costs import walk
from orchestrator.simulator.cluster import Cluster
from orchestrator.simulator.entries import Segments, simulated_entry
from orchestrator.simulator.events import EventLoop
from orchestrator.simulator.rollout import RolloutEvents, RolloutLimits

INTERVAL = 0.005
"""Part of the mean duration of the running episodes after which rates are computed again."""
LEAST_INTERVAL_S = 1e-3
ITERATIONS = 4
"""Damped steps towards the fixed point of rate and concurrency, an interval."""

Floats = npt.NDArray[np.float64]


class MeanFieldRollout:
    """Engines and workers in one; the same face as `engines.Engines` and `rollout.RolloutWorkers`."""

    def __init__(
        self,
        cluster: Cluster,
        limits: RolloutLimits,
        workers: int,
        loop: EventLoop,
        events: RolloutEvents,
        on_busy: Callable[[int], None],
        changing: Callable[[], None],
    ) -> None:
        self._cluster, self._limits, self._loop, self._events = cluster, limits, loop, events
        self._on_busy, self._changing = on_busy, changing
        self._capacity = limits.concurrency * workers
        self._waiting: deque[tuple[GroupHeader, int]] = deque()
        self._cancelled: set[str] = set()
        self._episodes: list[tuple[GroupHeader, int] | None] = []
        self._free: list[int] = []
        self._columns = np.zeros((7, 0))
        self._born = np.zeros(0, np.int64)
        self._marks: list[tuple[int, Floats]] = []
        """A version that was replaced, and how far each episode was then."""
        self._forgotten = 0
        self._names: list[str] = []
        self._version = 0
        self._rate = cluster.cost.decode_peak
        self._decoding = 0.0
        self._stalled_until = 0.0
        self._ticking = False
        self._seconds: dict[Cause, float] = {}
        self._at = 0.0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.running = 0
        self.in_environment = 0

    # The face of the engines

    @property
    def names(self) -> list[str]:
        return self._names

    def join(self, name: str, version: int) -> None:
        """Engines join before anything runs."""
        self._names.append(name)
        self._version = version

    def kill(self, name: str) -> None:
        """Not modelled."""
        raise ConfigError(f"engine {name} cannot be lost in mean field: simulate this without --mean-field")

    def commit(self, name: str, version: int, keep_kv: bool) -> None:
        """The pool switches when its first engine does (``keep_kv`` is not modelled)."""
        del name, keep_kv
        if version == self._version:
            return
        self._advance()
        self._marks.append((self._version, self._progress.copy()))
        self._version = version
        self._stalled_until = self._loop.now + self._cluster.cost.update_pause_s
        self._forget_marks()

    def seconds(self) -> dict[Cause, float]:
        """Accelerator-seconds by what the pool did."""
        self._advance()
        return dict(self._seconds)

    # The face of the workers

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def start(self, worker: str, header: GroupHeader) -> None:
        """A group was assigned (mean field knows no workers)."""
        del worker
        self._changing()
        if self._loop.now > self._at:
            self._advance()
        self._waiting.extend((header, member) for member in range(header.size))
        self._fill()
        if not self._ticking:
            self._tick()

    def cancel(self, group_id: str) -> None:
        """What runs of the group stops at the next interval."""
        self._cancelled.add(group_id)

    # Columns: one episode a place

    @property
    def _progress(self) -> Floats:
        progress: Floats = self._columns[0]
        return progress

    def _fill(self) -> None:
        while self.running < self._capacity and self._waiting:
            header, member = self._waiting.popleft()
            if header.group_id in self._cancelled:
                continue
            script = script_of(header.task.payload, member)
            costs = walk(script, self._cluster.token_scale, self._limits.max_episode_tokens)
            prompt, output, context, _, tool_s, turns = costs
            place = self._place()
            tool_s += self._limits.call_s * (turns + 1)
            self._columns[:, place] = (0.0, self._loop.now, output, prompt, context, max(tool_s, 0.0), turns)
            self._born[place] = self._forgotten + len(self._marks)
            self._episodes[place] = (header, member)
            self.running += 1

    def _place(self) -> int:
        if not self._free:
            old = len(self._episodes)
            more = max(1024, old)
            self._columns = np.concatenate([self._columns, np.zeros((7, more))], axis=1)
            self._born = np.concatenate([self._born, np.zeros(more, np.int64)])
            self._marks = [(version, np.concatenate([mark, np.zeros(more)])) for version, mark in self._marks]
            self._episodes.extend([None] * more)
            self._free = list(range(old + more - 1, old - 1, -1))
        return self._free.pop()

    # The passage of time

    def _tick(self) -> None:
        """Live through an interval, deliver what has ended, and plan the next one."""
        self._changing()
        durations = self._advance()
        self._deliver()
        self._fill()
        self._ticking = self.running > 0
        if self._ticking:
            mean = float(durations.mean()) if durations.size else 1.0
            self._loop.after(max(LEAST_INTERVAL_S, INTERVAL * mean), self._tick)

    def _advance(self) -> Floats:
        """Bring all episodes up to now; returns their durations at the present rates, in seconds."""
        now = self._loop.now
        active = np.flatnonzero(self._columns[2] > 0)
        if not active.size:
            self._spend(now, 0.0, 0.0)
            return np.zeros(0)
        progress, since, output, prompt, context, tool_s, turns = self._columns[:, active]
        held = context * progress
        again = np.maximum(turns - 1, 0) * held
        computed = prompt + self._recomputed(held) * again
        model_s, busy_prefill = self._model_seconds(output, computed, tool_s)
        duration: Floats = model_s + tool_s
        elapsed = now - since
        stalled = np.clip(np.minimum(now, self._stalled_until) - since, 0.0, elapsed)
        moved = np.minimum((elapsed - stalled * model_s / duration) / duration, 1.0 - progress)
        self._columns[0, active] = progress + moved
        self._columns[1, active] = now
        brought = float((moved * (again + prompt)).sum())
        self.prompt_tokens += round(brought)
        self.cached_tokens += round(max(0.0, brought - float((moved * computed).sum())))
        self._decoding = float((model_s / duration).sum())
        self.in_environment = max(0, active.size - round(self._decoding))
        self._spend(now, self._decoding, busy_prefill)
        self._on_busy(min(self._cluster.rollout_accelerators, round(self._decoding)))
        return duration

    def _model_seconds(self, output: Floats, prompt: Floats, tool_s: Floats) -> tuple[Floats, float]:
        """Seconds that engines work on each episode, and the share of their time that goes to prompts."""
        cost, accelerators = self._cluster.cost, self._cluster.rollout_accelerators
        prefill_s = prompt / cost.prefill_rate
        share = 0.0
        model_s = output / self._rate + prefill_s
        for _ in range(ITERATIONS):
            duration = model_s + tool_s
            share = min(0.9, float((prefill_s / duration).sum()) / accelerators)
            decoding = float(((model_s - prefill_s) / duration).sum())
            each = max(1.0, decoding / accelerators)
            slots = min(each, float(cost.slots))
            wanted = cost.decode_peak * slots / (slots + cost.half_concurrency) / each * (1 - share)
            self._rate = 0.5 * (self._rate + wanted)
            model_s = output / self._rate + prefill_s
        return model_s, share

    def _recomputed(self, held: Floats) -> float:
        """Share of a context that has to be computed again on each turn, for want of KV."""
        room = self._cluster.cost.kv_tokens * self._cluster.rollout_accelerators
        total = float(held.sum())
        return max(0.0, 1.0 - room / total) if total > 0 else 0.0

    def _spend(self, now: float, decoding: float, prefill_share: float) -> None:
        elapsed, accelerators = now - self._at, self._cluster.rollout_accelerators
        if elapsed <= 0:
            return
        busy = min(float(accelerators), decoding)
        stalled = min(max(0.0, min(now, self._stalled_until) - self._at), elapsed) if busy else 0.0
        self._at = now
        prefill = min(busy, prefill_share * accelerators) * (elapsed - stalled)
        for cause, seconds in (
            (Cause.WEIGHT_STALL, busy * stalled),
            (Cause.PREFILL, prefill),
            (Cause.DECODE, busy * (elapsed - stalled) - prefill),
        ):
            self._seconds[cause] = self._seconds.get(cause, 0.0) + seconds

    # Ends

    def _deliver(self) -> None:
        columns = self._columns
        for place in np.flatnonzero((columns[2] > 0) & (columns[0] >= 1.0 - 1e-9)).tolist():
            known = self._episodes[place]
            assert known is not None
            header, member = known
            segments, context = self._segments(place), round(columns[4, place])
            self._clear(place)
            if header.group_id not in self._cancelled:
                entry = simulated_entry(header.group_id, header.episode_id(member), segments, context)
                self._events.deliver(entry, lambda: None)
        if self._cancelled:
            for place, known in enumerate(self._episodes):
                if known is not None and known[0].group_id in self._cancelled:
                    self._clear(place)
            self._cancelled.clear()

    def _clear(self, place: int) -> None:
        self._columns[:, place] = 0.0
        self._episodes[place] = None
        self._free.append(place)
        self.running -= 1

    def _segments(self, place: int) -> Segments:
        output = round(self._columns[2, place])
        segments: Segments = []
        before = 0
        for version, mark in self._marks[max(0, int(self._born[place]) - self._forgotten) :]:
            upto = min(output, int(output * mark[place] + 0.5))
            if upto > before:
                segments.append((version, upto - before))
                before = upto
        if output > before:
            segments.append((self._version, output - before))
        return segments

    def _forget_marks(self) -> None:
        """Drop the marks that are older than every running episode."""
        active = self._columns[2] > 0
        oldest = int(self._born[active].min()) if active.any() else self._forgotten + len(self._marks)
        useless = max(0, oldest - self._forgotten)
        del self._marks[:useless]
        self._forgotten += useless
