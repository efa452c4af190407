"""Stagers as actors on two nodes of a Ray cluster: routes, a stager that dies, engines that join without the learner."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
import torch

from orchestrator.stagers import Stagers
from weight_sync.relay.stager import Stager
from weight_sync.transports.protocol import RelayOffer, decode_offer
from weight_sync.transports.relay import RelayReceiver, RelaySender

WEIGHTS = [("a", torch.arange(5000, dtype=torch.float32)), ("b", torch.ones(7))]


class Call:
    """A method of an actor that is a plain object."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def remote(self, *arguments: Any) -> Any:
        async def answer() -> Any:
            return self._function(*arguments)

        return answer()


class LocalStager:
    """The actor's methods over a stager of this process."""

    def __init__(self, directory: Any) -> None:
        self.stager = Stager(directory=directory)
        self.dead = False
        self.address, self.held, self.stop = (
            Call(lambda: self.stager.address),
            Call(self._held),
            Call(self.stager.close),
        )

    def _held(self) -> list[int]:
        if self.dead:
            raise RuntimeError("The actor died unexpectedly.\nmore lines")
        return self.stager.held()


class Engine:
    def __init__(self, node: str) -> None:
        self.node_id = Call(lambda: node)


def fetched(member: str, offer: bytes) -> dict[str, torch.Tensor]:
    arrived: dict[str, torch.Tensor] = {}
    RelayReceiver(member).fetch(offer, lambda name, tensor: arrived.__setitem__(name, tensor.clone()))
    return arrived


def routes(offer: bytes) -> dict[str, tuple[str, int]]:
    decoded = decode_offer(offer)
    assert isinstance(decoded, RelayOffer)
    return decoded.routes


def test_one_stager_a_node_and_a_dead_one_is_replaced(tmp_path: Any) -> None:
    started: list[tuple[str, LocalStager]] = []
    happened: list[str] = []

    def start(node: str) -> LocalStager:
        started.append((node, LocalStager(tmp_path)))
        return started[-1][1]

    async def story() -> None:
        stagers, sender = Stagers(start, happened.append), RelaySender()
        members = [("e0", Engine("n0")), ("e1", Engine("n1")), ("e2", Engine("n1"))]
        offer = await stagers.route(sender.prepare(1, WEIGHTS), members)
        assert [node for node, _ in started] == ["n0", "n1"]
        way = routes(offer)
        assert way["e1"] == way["e2"] != way["e0"]
        assert all(torch.equal(fetched(member, offer)[name], t) for member, _ in members for name, t in WEIGHTS)
        started[1][1].dead = True
        started[1][1].stager.close()
        again = routes(await stagers.route(sender.offer(), members))
        assert [node for node, _ in started] == ["n0", "n1", "n1"]
        assert again["e0"] == way["e0"]
        assert again["e1"] not in (way["e0"], way["e1"])
        assert happened == ["the stager of node n1 is replaced (The actor died unexpectedly.)"]
        await stagers.stop()
        sender.close()

    asyncio.run(story())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_real_nodes() -> None:
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from weight_sync.relay.stager import StagerActor

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        nodes = sorted(node["NodeID"] for node in ray.nodes())
        happened: list[str] = []
        pids: dict[str, list[int]] = {}

        def start(node: str) -> Any:
            options = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
            actor = ray.remote(StagerActor).options(**options).remote()
            pids.setdefault(node, []).append(ray.get(actor.process.remote()))
            return actor

        async def story() -> None:
            stagers, sender = Stagers(start, happened.append), RelaySender(host="0.0.0.0")
            members = [(f"e{index}", Engine(node)) for index, node in enumerate(nodes)]
            offer = await stagers.route(sender.prepare(1, WEIGHTS), members)
            for member, _ in members:
                assert torch.equal(fetched(member, offer)["a"], WEIGHTS[0][1])
            sender.close()  # who joins now needs no learner
            late = await stagers.route(offer, [("late", Engine(nodes[1]))])
            assert torch.equal(fetched("late", late)["a"], WEIGHTS[0][1])
            os.kill(pids[nodes[0]][0], signal.SIGKILL)
            fresh = RelaySender(host="0.0.0.0")
            offer = await stagers.route(fresh.prepare(2, WEIGHTS), members)
            for member, _ in members:
                assert torch.equal(fetched(member, offer)["b"], WEIGHTS[1][1])
            assert [len(pids[node]) for node in nodes] == [2, 1]
            assert len(happened) == 1
            assert "is replaced" in happened[0]
            await stagers.stop()
            fresh.close()

        asyncio.run(story())
    finally:
        ray.shutdown()
        cluster.shutdown()
