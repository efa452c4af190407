"""Which groups start, when, and on which worker. A pure state machine: no Ray, no clock, no randomness of its own.

The staleness policy decides *when* (`admit`; the bundled ones pace by
``dispatched - returned < (version + 1 + target_lag) * groups_per_update``). The dispatcher decides *where*: the worker with
the fewest episodes. It never starts more groups than the run can still train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from experience.records import GroupHeader, Task
from experience.staleness import Progress, StalenessPolicy


@dataclass
class _Worker:
    groups: dict[str, GroupHeader] = field(default_factory=dict)

    @property
    def episodes(self) -> int:
        return sum(header.size for header in self.groups.values())


class Dispatcher:
    """Feed it events (`worker_joined`, `worker_lost`, `version_served`, `returned`, `finished`); `due` says what to start.

    >>> from experience.config import StalenessConfig
    >>> from experience.staleness import make_policy
    >>> policy = make_policy(StalenessConfig(target_lag=0.0), groups_per_update=2)
    >>> task = lambda index: Task(task_id=f"t{index}", environment="shop", payload={})
    >>> d = Dispatcher(policy, task, group_size=4, total_groups=4, seed=0)
    >>> d.worker_joined("w0")
    >>> [(worker, header.group_id) for worker, header in d.due()]
    [('w0', 'g000000'), ('w0', 'g000001')]
    >>> d.due()
    []
    >>> d.version_served(1); len(d.due())
    2
    """

    def __init__(
        self,
        policy: StalenessPolicy,
        task_of: Callable[[int], Task],
        group_size: int,
        total_groups: int,
        seed: int,
    ) -> None:
        self._policy = policy
        self._task_of = task_of
        self._group_size = group_size
        self._total = total_groups
        self._seed = seed
        self._workers: dict[str, _Worker] = {}
        self._home: dict[str, str] = {}
        self._orphans: list[GroupHeader] = []
        self.dispatched = 0
        self.slots_returned = 0
        self.version = 0
        self._trained = 0

    def pace(self, policy: StalenessPolicy) -> None:
        """Another policy decides from now on; what was started stays."""
        self._policy = policy

    @property
    def in_flight(self) -> int:
        """Groups that some worker is running, or that wait for a worker after theirs was lost."""
        return len(self._home) + len(self._orphans)

    @property
    def episodes_in_flight(self) -> int:
        return sum(worker.episodes for worker in self._workers.values())

    @property
    def exhausted(self) -> bool:
        """Every group that the run can train has been started."""
        return self.dispatched - self.slots_returned >= self._total

    @property
    def paced(self) -> bool:
        """Pacing forbids another group at the present version."""
        return self._policy.admit(Progress(self.dispatched, self.slots_returned, max(self.version, self._trained))) <= 0

    def oldest_in_flight(self, count: int) -> list[str]:
        """The groups that were started first and are not finished, with their worker: for messages."""
        return [f"{group} on {worker}" for group, worker in self.oldest(count)]

    def oldest(self, count: int) -> list[tuple[str, str]]:
        """The groups that were started first and are not finished, with their worker."""
        headers = [header for worker in self._workers.values() for header in worker.groups.values()] + self._orphans
        headers.sort(key=lambda header: header.index)
        return [(header.group_id, self._home.get(header.group_id, "no worker")) for header in headers[:count]]

    def worker_of(self, group_id: str) -> str | None:
        return self._home.get(group_id)

    def worker_joined(self, worker: str) -> None:
        self._workers.setdefault(worker, _Worker())

    def worker_lost(self, worker: str) -> list[GroupHeader]:
        """The groups it was running; they stay in flight and go to whoever `adopt` names."""
        lost = self._workers.pop(worker, _Worker())
        for group_id in lost.groups:
            del self._home[group_id]
        headers = sorted(lost.groups.values(), key=lambda header: header.index)
        self._orphans.extend(headers)
        return headers

    def adopt(self) -> list[tuple[str, GroupHeader]]:
        """Give orphaned groups to the workers there are (none: they go on waiting)."""
        if not self._workers:
            return []
        orphans, self._orphans = self._orphans, []
        return [(self._place(header), header) for header in orphans]

    def restore(self, dispatched: int, slots_returned: int, version: int, in_flight: Iterable[GroupHeader]) -> None:
        """Take up a resumed run: counters, and groups that were open when it stopped."""
        self.dispatched = dispatched
        self.slots_returned = slots_returned
        self.version = version
        self._orphans = sorted(in_flight, key=lambda header: header.index)

    def version_served(self, version: int) -> None:
        """``version`` is now the oldest that any engine serves."""
        self.version = max(self.version, version)

    def trained(self, version: int) -> None:
        """The learner is at ``version``, and will not publish it: what paces is how far it is, not what engines serve."""
        self._trained = max(self._trained, version)

    def returned(self, group_id: str) -> None:
        """A group was dropped: its pacing slot is free again."""
        self.slots_returned += 1
        self.finished(group_id)

    def finished(self, group_id: str) -> None:
        """A group left its worker (complete, or dropped)."""
        worker = self._home.pop(group_id, None)
        if worker is not None and worker in self._workers:
            self._workers[worker].groups.pop(group_id, None)
        self._orphans = [header for header in self._orphans if header.group_id != group_id]

    def due(self) -> list[tuple[str, GroupHeader]]:
        """Start as many groups as pacing allows now; each call hands every group out once."""
        started: list[tuple[str, GroupHeader]] = []
        while self._workers and not self.exhausted and not self.paced:
            header = self._next_header()
            started.append((self._place(header), header))
        return started

    def _next_header(self) -> GroupHeader:
        index = self.dispatched
        self.dispatched += 1
        return GroupHeader(
            group_id=f"g{index:06d}",
            index=index,
            task=self._task_of(index),
            size=self._group_size,
            version_floor=self.version,
            seed=seed_of(self._seed, "train", index),
        )

    def _place(self, header: GroupHeader) -> str:
        worker = min(self._workers, key=lambda name: (self._workers[name].episodes, name))
        self._workers[worker].groups[header.group_id] = header
        self._home[header.group_id] = worker
        return worker


def seed_of(seed: int, purpose: str, index: int) -> int:
    """A 63-bit seed that depends on the run's seed, the purpose and the index alone."""
    digest = blake2b(f"{seed}:{purpose}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
