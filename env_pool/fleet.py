"""A set of interchangeable actors: who serves whom, and what happens when one is lost.

:class:`PoolState` decides, without Ray, threads or time; :class:`Fleet` carries it out over channels.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from env_pool.batches import ActorLost, Channel
from env_pool.errors import SystemFault

OnLost = Callable[[int, str], None]
"""Called with an actor's index and the reason, once for every actor that this process finds lost."""


class PoolState:
    """Which actor holds which lease.

    Invariants: a lease is held by at most one actor, and that one is alive; a new lease goes to an alive actor with
    the fewest; the leases of a lost actor are held by nobody until they are acquired again.
    """

    def __init__(self, actors: int, offset: int = 0) -> None:
        """``offset`` turns the order among equals, so that several clients do not all begin with the same actor."""
        self._leases: dict[int, set[str]] = {index: set() for index in range(actors)}
        self._holder: dict[str, int] = {}
        self._offset = offset

    @property
    def alive(self) -> list[int]:
        """Indices of the actors that take leases."""
        return sorted(self._leases)

    def load(self, index: int) -> int:
        """Leases that an actor holds; 0 for a lost one."""
        return len(self._leases.get(index, ()))

    def holder(self, lease: str) -> int | None:
        """The actor that holds a lease, None when none does."""
        return self._holder.get(lease)

    def acquire(self, lease: str) -> int | None:
        """Give a lease to the least loaded actor; None when no actor is alive."""
        if lease in self._holder:
            raise ValueError(f"lease {lease!r} is held by actor {self._holder[lease]} already")
        if not self._leases:
            return None
        span = max(self._leases) + 1
        index = min(self._leases, key=lambda i: (len(self._leases[i]), (i + self._offset) % span))
        self._leases[index].add(lease)
        self._holder[lease] = index
        return index

    def release(self, lease: str) -> None:
        """End a lease; no effect when nobody holds it."""
        index = self._holder.pop(lease, None)
        if index is not None:
            self._leases[index].discard(lease)

    def lost(self, index: int) -> list[str]:
        """An actor is gone; returns the leases it held."""
        leases = sorted(self._leases.pop(index, set()))
        for lease in leases:
            del self._holder[lease]
        return leases

    def joined(self, index: int) -> None:
        """An actor, empty, takes leases from now on."""
        self.lost(index)
        self._leases[index] = set()


class Fleet:
    """Channels to the actors of a :class:`PoolState`."""

    def __init__(
        self,
        handles: Sequence[Any],
        client: str,
        label: str,
        wait_timeout_s: float,
        on_lost: OnLost | None = None,
    ) -> None:
        """``handles`` are Ray handles of actors with ``call_many`` and ``collect``; ``label`` names them in errors."""
        self._client = client
        self._label = label
        self._wait_timeout_s = wait_timeout_s
        self._on_lost = on_lost
        self._state = PoolState(len(handles), offset=sum(client.encode()))
        self._channels = {index: self._channel(index, handle) for index, handle in enumerate(handles)}
        self._some_alive = asyncio.Event()
        self._wake()

    @property
    def alive(self) -> list[int]:
        """Indices of the actors that answer."""
        return self._state.alive

    async def acquire(self, key: str) -> int:
        """Bind ``key`` to an actor; waits while none is alive. Raises :class:`SystemFault` when that takes too long."""
        while (index := self._state.acquire(key)) is None:
            try:
                await asyncio.wait_for(self._some_alive.wait(), self._wait_timeout_s)
            except TimeoutError:
                raise SystemFault(
                    f"no {self._label} is alive, and none came back within {self._wait_timeout_s:g} s"
                ) from None
        return index

    def release(self, key: str) -> None:
        """End the binding of ``key``."""
        self._state.release(key)

    async def call(self, key: str, body: bytes, timeout_s: float) -> bytes:
        """A call to the actor that ``key`` is bound to. Raises :class:`ActorLost`; the binding is then gone."""
        index = self._state.holder(key)
        if index is None:
            raise ActorLost(f"the {self._label} that served {key} is lost")
        channel = self._channels[index]
        try:
            return await channel.call(body, timeout_s)
        except ActorLost as lost:
            if self._channels.get(index) is channel:
                self._drop(index, str(lost))
                if self._on_lost is not None:
                    self._on_lost(index, str(lost))
            raise

    def handle(self, index: int) -> Any:
        """The handle of an actor that is alive."""
        return self._channels[index].actor

    def replace(self, index: int, handle: Any) -> None:
        """A new actor takes the place of number ``index``, or a further place; what the old one held is lost."""
        self._drop(index, "the actor was replaced")
        self._channels[index] = self._channel(index, handle)
        self._state.joined(index)
        self._wake()

    def close(self) -> None:
        """Close all channels; calls still waiting end with :class:`ActorLost`."""
        for index in list(self._channels):
            self._drop(index, "the client was closed")

    def _channel(self, index: int, handle: Any) -> Channel:
        return Channel(handle, self._client, f"{self._label} {index}")

    def _drop(self, index: int, reason: str) -> None:
        channel = self._channels.pop(index, None)
        if channel is not None:
            channel.close(reason)
        self._state.lost(index)
        self._wake()

    def _wake(self) -> None:
        if self._state.alive:
            self._some_alive.set()
        else:
            self._some_alive.clear()
