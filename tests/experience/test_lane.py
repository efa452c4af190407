"""An actor's methods over a socket: answers, errors, a connection that ends, and the way through Ray when there is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from experience.transport.connecting import connect
from experience.transport.frames import Endpoint, Kind, head
from experience.transport.lane import LaneCallError, LaneLostError, LaneServer, OverLane, _LaneChannel
from experience.wire import decode


class Actor:
    """What a lane is for, here in this process; ``.method.remote(...)`` is what Ray would do."""

    def __init__(self, listens: bool = True) -> None:
        self.through_ray = 0
        self.started = asyncio.Event()
        self.lane = LaneServer("test actor", {"double": self._double, "hold": self._hold, "fail": self._fail})
        self._listens = listens

    async def _double(self, body: bytes) -> bytes:
        return body * 2

    async def _hold(self, body: bytes) -> bytes:
        self.started.set()
        await asyncio.wait_for(asyncio.Event().wait(), 60)
        return body

    async def _fail(self, body: bytes) -> bytes:
        raise ValueError(f"cannot take {body.decode()}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return Method(self, name)


class Method:
    def __init__(self, actor: Actor, name: str) -> None:
        self.actor, self.name = actor, name

    async def remote(self, *arguments: Any) -> Any:
        if self.name == "endpoint":
            return await self.actor.lane.endpoint() if self.actor._listens else b""
        self.actor.through_ray += 1
        return f"{self.name} of {arguments}"


@asynccontextmanager
async def actor_and_lane(listens: bool = True) -> AsyncIterator[tuple[Actor, OverLane]]:
    actor = Actor(listens)
    over = OverLane(actor, "test actor", ("double", "hold", "fail"))
    try:
        yield actor, over
    finally:
        over.close()
        actor.lane.close()


async def test_calls_are_answered_each_with_its_own_answer() -> None:
    async with actor_and_lane() as (actor, over):
        bodies = [str(number).encode() * (number * 1000) for number in range(40)]
        answers = await asyncio.gather(*(over.double.remote(body) for body in bodies))
        assert answers == [body * 2 for body in bodies]
        assert await over.double.remote("text") == b"texttext"
        assert over.route == "unix"
        assert actor.through_ray == 0


async def test_what_is_not_offered_goes_to_the_handle() -> None:
    async with actor_and_lane() as (actor, over):
        assert await over.health.remote() == "health of ()"
        assert actor.through_ray == 1


async def test_an_error_is_told_and_the_connection_goes_on() -> None:
    async with actor_and_lane() as (_, over):
        with pytest.raises(LaneCallError, match="ValueError: cannot take this"):
            await over.fail.remote(b"this")
        assert await over.double.remote(b"a") == b"aa"


async def test_a_call_whose_connection_ends_is_lost_and_so_are_later_ones() -> None:
    async with actor_and_lane() as (actor, over):
        held = asyncio.ensure_future(over.hold.remote(b""))
        await asyncio.wait_for(actor.started.wait(), 10)
        actor.lane.close()
        with pytest.raises(LaneLostError, match="connection to the test actor ended"):
            await asyncio.wait_for(held, 10)
        with pytest.raises(LaneLostError):
            await over.double.remote(b"a")
        assert actor.through_ray == 0


async def test_without_a_socket_calls_go_through_ray() -> None:
    async with actor_and_lane(listens=False) as (actor, over):
        assert await over.double.remote(b"a") == "double of (b'a',)"
        assert over.route == "ray"
        assert actor.through_ray == 1


async def test_an_address_that_nobody_listens_at_is_as_good_as_none() -> None:
    async with actor_and_lane() as (actor, over):
        await actor.lane.endpoint()
        actor.lane.close()
        assert await over.double.remote(b"a") == "double of (b'a',)"
        assert over.route == "ray"


async def test_strangers_and_frames_for_others_end_the_connection() -> None:
    async with actor_and_lane() as (actor, over):
        endpoint, names = decode(await actor.lane.endpoint(), tuple[Endpoint, tuple[str, ...]])
        assert names == ("double", "hold", "fail")
        with pytest.raises(OSError, match="ended"):
            await connect(endpoint, lambda: _LaneChannel(b"another token", "test actor"))
        channel = await connect(endpoint, lambda: _LaneChannel(endpoint.token, "test actor"))
        pending = asyncio.ensure_future(channel.call(1, b""))
        await asyncio.wait_for(actor.started.wait(), 10)
        await channel.write([head(Kind.CALL + 3, 9, 0)])
        with pytest.raises(LaneLostError):
            await asyncio.wait_for(pending, 10)
        assert await over.double.remote(b"a") == b"aa"
