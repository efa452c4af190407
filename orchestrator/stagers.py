"""The stagers of a run: one a node that has engines, started when the first of its engines takes weights, replaced when it dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from weight_sync.transports.protocol import with_routes

logger = logging.getLogger(__name__)

ANSWER_S = 60.0
"""How long a stager's process may take to start and answer."""

Address = tuple[str, int]


class Stagers:
    """``start(node)`` starts the actor of a node, given its Ray id."""

    def __init__(self, start: Callable[[str], Any], happened: Callable[[str], None]) -> None:
        self._start, self._happened = start, happened
        self._stagers: dict[str, tuple[Any, Address]] = {}
        self._nodes: dict[str, str] = {}

    async def route(self, offer: bytes, members: list[tuple[str, Any]]) -> bytes:
        """The offer with the stager of each member (name, handle). Raises TimeoutError, and what starting one raises."""
        nodes = {name: await self._node(name, handle) for name, handle in members}
        addresses = {node: await self._address(node) for node in sorted(set(nodes.values()))}
        return with_routes(offer, {name: addresses[node] for name, node in nodes.items()})

    async def stop(self) -> None:
        """Remove what they hold in shared memory."""
        for node in list(self._stagers):
            stager, _ = self._stagers.pop(node)
            try:
                async with asyncio.timeout(ANSWER_S):
                    await stager.stop.remote()
            except Exception as error:  # noqa: BLE001 - it may be gone already; its files are removed by the next
                logger.info("the stager of node %s: %s", node, error)

    async def _node(self, name: str, handle: Any) -> str:
        if name not in self._nodes:
            async with asyncio.timeout(ANSWER_S):
                self._nodes[name] = await handle.node_id.remote()
        return self._nodes[name]

    async def _address(self, node: str) -> Address:
        known = self._stagers.get(node)
        if known is not None:
            try:
                async with asyncio.timeout(ANSWER_S):
                    await known[0].held.remote()
                return known[1]
            except Exception as error:  # noqa: BLE001 - whatever ails it, another one takes its place
                first = str(error).strip().splitlines() or [type(error).__name__]
                self._happened(f"the stager of node {node[:8]} is replaced ({first[0]})")
        stager = self._start(node)
        async with asyncio.timeout(ANSWER_S):
            host, port = await stager.address.remote()
        self._stagers[node] = (stager, (host, port))
        return host, port
