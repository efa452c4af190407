"""An environment of two tools: which of two orders was damaged, and refund that one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from env_pool.environment import Split, ToolEnvironment, VerifierResult
from env_pool.errors import AgentFault
from experience.records import Task


class Parcels(ToolEnvironment):
    """Two orders with numbers from 1 to 5, one of them damaged. The state is their statuses and what was refunded."""

    name = "parcels"
    deterministic = True

    @classmethod
    def make_task(cls, index: int, seed: int, split: Split, options: Mapping[str, Any]) -> Task:
        """Held out are the pairs whose sum is divisible by five: no training task is among them."""
        pairs = [
            (a, b) for a in range(1, 6) for b in range(1, 6) if a != b and ((a + b) % 5 == 0) == (split == "held_out")
        ]
        damaged, sound = random.Random(f"{seed}/{index}").choice(pairs)
        return Task(
            task_id=f"{split}/{index}",
            environment=cls.name,
            payload={"damaged": str(damaged), "sound": str(sound)},
            domain=cls.name,
        )

    @classmethod
    def verify(cls, task: Task, outcome: Mapping[str, Any]) -> VerifierResult:
        """1 for the damaged order's refund and no other; a little for finding out how that tool is used."""
        parts = {
            "right": float(outcome["refunded"] == [task.payload["damaged"]]),
            "some_refund": float(bool(outcome["refunded"])),
            "tried": float(outcome["tried"]),
        }
        reward = 0.8 * parts["right"] + 0.1 * parts["some_refund"] + 0.1 * parts["tried"]
        return VerifierResult(reward=reward, parts=parts)

    def reset(self, task: Task) -> str:
        damaged, sound = task.payload["damaged"], task.payload["sound"]
        self.statuses = {damaged: "damaged", sound: "delivered"}
        self.refunded: list[str] = []
        self.tried = False
        return f"refund order {min(self.statuses)} else {max(self.statuses)} if damaged"

    def find_order(self, order: str) -> str:
        """Look up the status of an order."""
        if order not in self.statuses:
            raise AgentFault(f"there is no order {order}")
        return self.statuses[order]

    def refund(self, order: str) -> str:
        """Pay an order back."""
        self.tried = True
        if order not in self.statuses:
            raise AgentFault(f"there is no order {order}")
        self.refunded.append(order)
        return "ok"

    def render_error(self, reason: str) -> str:
        """One word: the small model's vocabulary has no sentences."""
        return "error"

    def outcome(self) -> dict[str, Any]:
        return {**super().outcome(), "refunded": self.refunded, "tried": self.tried}
