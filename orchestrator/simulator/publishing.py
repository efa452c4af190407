"""Weights on their way in the simulated run: the steps of `orchestrator.fleet.Fleet`, with modelled durations."""

from __future__ import annotations

from typing import Protocol

from orchestrator.simulator.events import EventLoop
from weight_sync.config import WeightsConfig
from weight_sync.membership import Membership
from weight_sync.publication import Phase, Publication


class PublicationEvents(Protocol):
    """Whom a publication concerns."""

    def expire(self, version: int) -> None: ...

    def served(self, oldest: int) -> None: ...

    def published(self, version: int) -> None: ...


class EngineFleet(Protocol):
    """The engines, one by one."""

    @property
    def names(self) -> list[str]: ...

    def join(self, name: str, version: int) -> None: ...

    def kill(self, name: str) -> None: ...

    def commit(self, name: str, version: int, keep_kv: bool) -> None: ...


class Publisher:
    """Drives `Membership` and `Publication`; joining and publishing exclude each other."""

    def __init__(
        self, config: WeightsConfig, stage_s: float, loop: EventLoop, engines: EngineFleet, events: PublicationEvents
    ) -> None:
        self._keep_kv = config.kv != "recompute"
        self._stage_s, self._loop, self._engines, self._events = stage_s, loop, engines, events
        self.membership = Membership(0)
        self.publication = Publication(current_version=0, rolling=config.rolling)
        self._joining: list[str] = []
        self._loading = 0

    @property
    def busy(self) -> bool:
        """A version is on its way."""
        return self.publication.phase is not Phase.IDLE

    def join(self, name: str, version: int) -> None:
        """An engine process that holds ``version`` is there; it serves once it holds the current one."""
        self.membership.join(name)
        if self.busy:
            self._joining.append(name)
        else:
            self._load(name, version)

    def lost(self, name: str) -> None:
        """An engine in service is gone."""
        self._engines.kill(name)
        if self.membership.died(name):
            self.publication.died(name)
            self._go_on()

    def publish(self, version: int) -> None:
        """Bring ``version`` to all engines in service, as soon as none is joining."""
        if self._loading:
            self._loop.after(self._stage_s, lambda: self.publish(version))
            return
        self.publication.offer(version)
        self._go_on()

    def _load(self, name: str, version: int) -> None:
        wanted = self.membership.begin_load(name)
        if wanted == version:
            self._serve(name, wanted)
            return
        self._loading += 1

        def arrived() -> None:
            self._loading -= 1
            self._serve(name, wanted)

        self._loop.after(self._stage_s, arrived)

    def _serve(self, name: str, version: int) -> None:
        self.membership.loaded(name, version)
        self._engines.join(name, version)
        self._tell_served()

    def _go_on(self) -> None:
        while self.busy:
            actions = self.publication.actions()
            if not actions:
                return
            for action in actions:
                match action.kind:
                    case Phase.ANNOUNCE:
                        self.publication.announced(self.membership.serving())
                    case Phase.EXPIRE:
                        self._events.expire(action.version)
                        self.publication.expired()
                    case Phase.STAGE:
                        self._stage(action.members)
                    case Phase.COMMIT:
                        self._commit(action.version, action.members)
            if not self.busy:
                self._completed()

    def _stage(self, members: tuple[str, ...]) -> None:
        def staged() -> None:
            for name in members:
                if self.publication.phase is Phase.STAGE:
                    self.publication.staged(name)
            self._go_on()

        self._loop.after(self._stage_s, staged)

    def _commit(self, version: int, members: tuple[str, ...]) -> None:
        self.membership.advance(version)
        for name in members:
            if name in self._engines.names:
                self._engines.commit(name, version, self._keep_kv)
                self.membership.switched(name, version)
            if self.publication.phase is Phase.COMMIT:
                self.publication.committed(name)

    def _completed(self) -> None:
        version = self.publication.current
        self.membership.advance(version)
        self._events.published(version)
        self._tell_served()
        joining, self._joining = self._joining, []
        for name in joining:
            self._load(name, -1)

    def _tell_served(self) -> None:
        oldest = self.membership.oldest_served()
        if oldest is not None:
            self._events.served(oldest)
