"""The engines of a run: who is in service with which weights, and how a new version reaches them all.

Carries out what `weight_sync.membership.Membership` and `weight_sync.publication.Publication` decide. A version is
announced, what it makes useless is expired, its bytes are staged while the engines go on decoding, and each engine
commits at a token boundary with its requests in flight. Joining, leaving and publishing exclude each other: an engine
that joins holds what is current, and one that leaves breaks no transfer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from weight_sync.config import WeightsConfig
from weight_sync.membership import Membership, MemberState
from weight_sync.publication import Action, Phase, Publication

logger = logging.getLogger(__name__)
T = TypeVar("T")

Transfer = Callable[[int, list[tuple[str, Any]]], Awaitable[list[str]]]
"""Move a version to these engines (name, handle); returns the names that hold it now."""


@dataclass(frozen=True)
class FleetEvents:
    """Whom the fleet tells."""

    expire: Callable[[int], Awaitable[None]]
    """Drop what a version makes useless."""
    prepare: Callable[[int], Awaitable[None]]
    """Have the learner copy this version aside; until the next call it is the one that `transfer` moves."""
    served: Callable[[int], Awaitable[None]]
    """The oldest version that any engine serves has changed."""
    committed: Callable[[int], Awaitable[None]]
    """Every engine serves this version; nothing newer is published before this returns."""
    joined: Callable[[str, Any], Awaitable[None]]
    """An engine (name, handle) serves the current version; nothing newer is published before this returns."""
    broken: Callable[[str, str], None]
    """An engine does not take weights and must be replaced: name, reason."""
    changed: Callable[[str, MemberState, int | None, str], None]
    """An engine is in this state now, with this version: name, state, version, why."""


class EngineGone(Exception):
    """An engine was declared lost while something was asked of it."""


class Fleet:
    """Engines by name. `publish` returns when every member serves the version (or is gone)."""

    def __init__(self, config: WeightsConfig, base_version: int, transfer: Transfer, events: FleetEvents) -> None:
        self._config = config
        self._transfer = transfer
        self._events = events
        self._handles: dict[str, Any] = {}
        self._gone: dict[str, asyncio.Event] = {}
        """Of each engine that is there: set when it is lost."""
        self.membership = Membership(base_version)
        self._publication = Publication(current_version=base_version, rolling=config.rolling)
        self._moving = asyncio.Lock()
        self.base_version = base_version

    def handle(self, name: str) -> Any:
        return self._handles[name]

    def state(self, name: str) -> str:
        return str(self.membership.get(name).state.value)

    @property
    def awaited(self) -> tuple[str, ...]:
        """Engines that a publication under way waits for."""
        return self._publication.awaited

    def held(self, name: str) -> int | None:
        """The version that an engine was given last; None while it has none or is gone."""
        return self.membership.get(name).version if name in self.membership.sampling() else None

    def starting(self, name: str) -> None:
        """The process of an engine is being started."""
        self.membership.join(name)
        self._gone[name] = asyncio.Event()
        self._tell(name, "")

    async def join(self, name: str, handle: Any, version: int) -> None:
        """Bring an engine that holds ``version`` (from disk) into service, with the current weights.

        Raises RuntimeError if it cannot be given them, TransitionError if it was declared lost meanwhile.
        """
        self._handles[name] = handle
        async with self._moving:
            wanted = self.membership.begin_load(name)
            self._tell(name, "")
            if wanted != version:
                if name not in await self._transfer(wanted, [(name, handle)]):
                    raise RuntimeError(f"engine {name} could not be given version {wanted}")
                await self._commit(name, handle, wanted)
            self.membership.loaded(name, wanted)
            self._tell(name, "")
            await self._events.joined(name, handle)
        await self._tell_served()

    def drain(self, name: str, why: str) -> None:
        """An engine gets no new requests; until it has left it goes on with those it has, and takes updates.

        Raises TransitionError if it is draining or gone.
        """
        self.membership.drain(name)
        self._tell(name, why)

    async def leave(self, name: str, why: str) -> None:
        """A drained engine goes, as soon as no version is on its way."""
        async with self._moving:
            self.lost(name, why)
        await self._tell_served()

    def lost(self, name: str, why: str) -> bool:
        """An engine is gone: nothing waits for it any more. False if that was known, or it never was there."""
        self._handles.pop(name, None)
        gone = self._gone.pop(name, None)
        if gone is not None:
            gone.set()
        if not self.membership.knows(name) or not self.membership.died(name):
            return False
        self._publication.died(name)
        self._tell(name, why)
        return True

    async def while_there(self, name: str, answer: Awaitable[T]) -> T:
        """What an engine answers. Raises EngineGone as soon as it is lost, whether or not its call ever ends."""
        gone = self._gone.get(name)
        if gone is None:
            raise EngineGone(f"{name} is gone")
        answering, lost = asyncio.ensure_future(_awaited(answer)), asyncio.ensure_future(gone.wait())
        try:
            await asyncio.wait({answering, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise EngineGone(f"{name} was lost meanwhile")
            return answering.result()
        finally:
            answering.cancel()
            lost.cancel()

    async def publish(self, version: int) -> None:
        """Bring ``version``, which the learner holds, to all engines in service."""
        async with self._moving:
            await self._events.prepare(version)
            self._publication.offer(version)
            while self._publication.phase is not Phase.IDLE:
                actions = self._publication.actions()
                if not actions:
                    raise RuntimeError(f"publication of version {version} came to a halt in {self._publication.phase}")
                for action in actions:
                    await self._carry_out(action)
            self.membership.advance(version)  # also with nobody in service: whoever joins must load it
            await self._events.committed(version)
        await self._tell_served()

    async def _carry_out(self, action: Action) -> None:
        match action.kind:
            case Phase.ANNOUNCE:
                self._publication.announced(self.membership.sampling())
            case Phase.EXPIRE:
                await self._events.expire(action.version)
                self._publication.expired()
            case Phase.STAGE:
                await self._stage(action)
            case Phase.COMMIT:
                self.membership.advance(action.version)
                await asyncio.gather(*(self._commit_member(name, action.version) for name in action.members))

    async def _stage(self, action: Action) -> None:
        members = [(name, self._handles[name]) for name in action.members if name in self._handles]
        staged = await self._transfer(action.version, members)
        for name in staged:
            if self._publication.phase is Phase.STAGE:
                self._publication.staged(name)
        left = [name for name in action.members if name not in staged and name in self._publication.members]
        if not left or self._publication.phase is not Phase.STAGE:
            return
        try:
            self._publication.transfer_failed(f"{left} did not take it")
        except Exception as error:  # noqa: BLE001 - TransitionError: the transfers are used up
            for name in left:
                self._give_up(name, error)

    async def _commit_member(self, name: str, version: int) -> None:
        handle = self._handles.get(name)
        try:
            if handle is not None:
                await self._commit(name, handle, version)
                if self.membership.get(name).state is not MemberState.DEAD:
                    self.membership.switched(name, version)
        except EngineGone as error:
            logger.info("version %d: %s", version, error)
            return
        except Exception as error:  # noqa: BLE001 - an engine can die at any moment; it is replaced
            self._give_up(name, error)
            return
        if self._publication.phase is Phase.COMMIT:
            self._publication.committed(name)

    async def _commit(self, name: str, handle: Any, version: int) -> None:
        async with asyncio.timeout(self._config.timeout_s):
            served = await self.while_there(name, handle.commit.remote(version, self._config.kv))
        if served != version:
            raise RuntimeError(f"engine {name} serves version {served} after committing {version}")

    def _give_up(self, name: str, error: Exception) -> None:
        reason = str(error) or type(error).__name__
        self._events.broken(name, reason)
        self.lost(name, f"it did not take the weights ({reason})")

    def _tell(self, name: str, why: str) -> None:
        member = self.membership.get(name)
        self._events.changed(name, member.state, member.version, why)

    async def _tell_served(self) -> None:
        oldest = self.membership.oldest_served()
        if oldest is not None:
            await self._events.served(oldest)


async def _awaited(answer: Awaitable[T]) -> T:
    return await answer
