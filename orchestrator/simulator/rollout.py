"""Simulated rollout workers: episodes that play their scripts against the simulated engines, event by event."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from env_pool.workloads.environment import script_of
from env_pool.workloads.scripts import EpisodeScript, carried_tokens
from experience.records import GroupHeader
from orchestrator.simulator.engines import Engines
from orchestrator.simulator.entries import Segments, SimulatedEntry, merge, simulated_entry
from orchestrator.simulator.events import EventLoop


@dataclass(frozen=True)
class RolloutLimits:
    """What bounds an episode and how many run at once. Tokens are carried ones."""

    concurrency: int
    """Episodes in flight of one worker."""
    max_episode_tokens: int
    max_attempts: int
    call_s: float = 0.0
    """Seconds that the control plane adds to each generation and each environment call."""


class RolloutEvents(Protocol):
    """Whom the workers tell."""

    def deliver(self, entry: SimulatedEntry, delivered: Callable[[], None]) -> None:
        """An episode is finished; ``delivered`` is called when the queue has taken it."""
        ...

    def give_up(self, group_id: str, episode_id: str, reason: str) -> None: ...


@dataclass(eq=False, slots=True)
class _Episode:
    header: GroupHeader
    id: str
    member: int
    worker: str
    payload: Mapping[str, object]
    script: EpisodeScript
    attempt: int = 0
    turn: int = 0
    length: int = 0
    segments: Segments = field(default_factory=list)
    in_environment: bool = False
    waiting: bool = True
    """For a slot."""
    gone: bool = False

    @property
    def session(self) -> str:
        return f"{self.id}/{self.attempt}"


class _Slots:
    """The episodes that one worker may run at once; the others wait in order."""

    def __init__(self, limit: int) -> None:
        self.free = limit
        self.queue: deque[_Episode] = deque()


class RolloutWorkers:
    """All workers of a run."""

    def __init__(
        self,
        workers: list[str],
        limits: RolloutLimits,
        token_scale: float,
        engines: Engines,
        loop: EventLoop,
        events: RolloutEvents,
        changing: Callable[[], None],
    ) -> None:
        """``changing`` is called before episodes change their state."""
        self._limits, self._scale = limits, token_scale
        self._engines, self._loop, self._events = engines, loop, events
        self._changing = changing
        self._slots = {worker: _Slots(limits.concurrency) for worker in workers}
        self._of_group: dict[str, dict[str, _Episode]] = {}
        self.running = 0
        self.queued = 0
        """Episodes that wait for a slot of their worker."""
        self.in_environment = 0
        self.truncated = 0
        self.retried = 0

    def start(self, worker: str, header: GroupHeader) -> None:
        """A group was assigned to ``worker``."""
        self._changing()
        slots = self._slots[worker]
        group = self._of_group.setdefault(header.group_id, {})
        for member in range(header.size):
            episode_id = header.episode_id(member)
            payload = header.task.payload
            episode = _Episode(header, episode_id, member, worker, payload, script_of(payload, member))
            group[episode_id] = episode
            slots.queue.append(episode)
        self.queued += header.size
        self._fill(slots)

    def cancel(self, group_id: str) -> None:
        """The group can no longer be used: stop what runs of it."""
        for episode in list(self._of_group.pop(group_id, {}).values()):
            if episode.waiting:
                self.queued -= 1
            else:
                self._engines.abort(f"{episode.session}/{episode.turn}")
                self._engines.release(episode.session)
                self._leave(episode)
            episode.gone = True

    def _fill(self, slots: _Slots) -> None:
        while slots.free and slots.queue:
            episode = slots.queue.popleft()
            if episode.gone:
                continue
            slots.free -= 1
            self.queued -= 1
            self.running += 1
            episode.waiting = False
            self._begin(episode)

    def _begin(self, episode: _Episode) -> None:
        episode.turn, episode.length, episode.segments = 0, 0, []
        self._visit(episode, episode.script.reset_s, self._has_begun)

    def _has_begun(self, episode: _Episode) -> None:
        episode.length = carried_tokens(episode.script.prompt_tokens, self._scale)
        self._generate(episode)

    def _generate(self, episode: _Episode) -> None:
        room = self._limits.max_episode_tokens - episode.length
        if room <= 0:
            self.truncated += 1
            self._end(episode)
            return
        wanted = carried_tokens(episode.script.turns[episode.turn].output_tokens, self._scale)
        request_id = f"{episode.session}/{episode.turn}"

        def done(segments: Segments) -> None:
            if not episode.gone:
                merge(episode.segments, segments)
                episode.length += sum(tokens for _, tokens in segments)
                self._visit(episode, episode.script.turns[episode.turn].tool_s, self._answered)

        output, group = min(wanted, room), episode.header.group_id
        self._engines.generate(request_id, episode.session, episode.length, output, done, group)

    def _answered(self, episode: _Episode) -> None:
        turn = episode.script.turns[episode.turn]
        if episode.turn == episode.script.lost_at and episode.attempt == 0:
            self._fail(episode, "environment_fault")
            return
        episode.turn += 1
        if episode.turn == len(episode.script.turns):
            self._end(episode)
            return
        episode.length += carried_tokens(turn.observation_tokens, self._scale)
        self._generate(episode)

    def _visit(self, episode: _Episode, seconds: float, then: Callable[[_Episode], None]) -> None:
        """The environment works for ``seconds``."""
        seconds += self._limits.call_s
        if seconds <= 0:
            then(episode)
            return
        self._changing()
        episode.in_environment = True
        self.in_environment += 1

        def back() -> None:
            if not episode.gone:
                self._changing()
                episode.in_environment = False
                self.in_environment -= 1
                then(episode)

        self._loop.after(seconds, back)

    def _fail(self, episode: _Episode, reason: str) -> None:
        self._engines.release(episode.session)
        episode.attempt += 1
        if episode.attempt < self._limits.max_attempts:
            self.retried += 1
            self._begin(episode)
            return
        self._forget(episode)
        self._leave(episode)
        self._events.give_up(episode.header.group_id, episode.id, reason)

    def _end(self, episode: _Episode) -> None:
        self._engines.release(episode.session)
        entry = simulated_entry(episode.header.group_id, episode.id, episode.segments, episode.length)
        self._events.deliver(entry, lambda: self._delivered(episode))

    def _delivered(self, episode: _Episode) -> None:
        if not episode.gone:
            self._forget(episode)
            self._leave(episode)

    def _forget(self, episode: _Episode) -> None:
        group = self._of_group.get(episode.header.group_id, {})
        group.pop(episode.id, None)
        if not group:
            self._of_group.pop(episode.header.group_id, None)

    def _leave(self, episode: _Episode) -> None:
        """Give the slot to the next in the queue."""
        self._changing()
        episode.gone = True
        if episode.in_environment:
            episode.in_environment = False
            self.in_environment -= 1
        self.running -= 1
        slots = self._slots[episode.worker]
        slots.free += 1
        self._fill(slots)
