"""The shop as an environment: five tools over a database, judged by the state they leave and the answer."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from env_pool.environment import Observation, Split, ToolEnvironment, VerifierResult
from env_pool.errors import AgentFault
from env_pool.shop.database import ShopDatabase
from env_pool.shop.tasks import make_task, parse_payload, spell, spell_stock
from env_pool.shop.words import NONE_LEFT
from experience.records import Task

STYLES = ("terse", "natural")

_SYSTEM_PROMPT = (
    "You serve the customers of a shop. Look up what you need with the tools, one call at a time, and carry out "
    "exactly what is asked: no refund and no note more. When everything is done, reply with the answer alone, in one "
    "word or number, without a tool call."
)


class ShopEnvironment(ToolEnvironment):
    """Customer service. Options: `style` (`terse`: the small vocabulary, `natural`: English) and `levels` (depths)."""

    name = "shop"
    deterministic = True
    default_options: ClassVar[Mapping[str, Any]] = {"style": "terse", "levels": [1, 2, 3, 4, 5]}

    @classmethod
    def make_task(cls, index: int, seed: int, split: Split, options: Mapping[str, Any]) -> Task:
        settings = cls.resolve_options(options)
        if settings["style"] not in STYLES:
            raise ValueError(f"tasks.options.style must be one of {STYLES}, got {settings['style']!r}")
        return make_task(index, seed, split, settings["levels"], settings["style"])

    @classmethod
    def verify(cls, task: Task, outcome: Mapping[str, Any]) -> VerifierResult:
        """1 when refunds, notes and answer are exactly the expected ones, otherwise 0."""
        expected = task.payload["expected"]
        state = outcome["refunds"] == expected["refunds"] and outcome["notes"] == expected["notes"]
        answered = outcome["answer"] is not None and normalise(outcome["answer"]) == normalise(expected["answer"])
        parts = {"state": float(state), "answer": float(answered)}
        return VerifierResult(reward=float(state and answered), parts=parts)

    def reset(self, task: Task) -> Observation:
        self._begin(task)
        self._database = ShopDatabase(*parse_payload(task.payload))
        messages = [{"role": "user", "content": task.payload["request"]}]
        if not self._terse:
            messages.insert(0, {"role": "system", "content": _SYSTEM_PROMPT})
        return Observation(messages=messages)

    def find_user(self, name: str) -> str:
        """Find a customer's order.

        Args:
            name: the customer's first name.
        """
        number = self._database.order_of(name.strip().lower())
        if number is None:
            raise AgentFault(f"there is no customer {name}")
        return f"order {spell(number)}" if self._terse else f"Customer {name} has order {number}."

    def find_order(self, order: int) -> str:
        """Look up who ordered what, and the status of the order.

        Args:
            order: number of the order.
        """
        row = self._database.order(order)
        if row is None:
            raise AgentFault(f"there is no order {order}")
        _, customer, item, status = row
        if self._terse:
            return f"{customer} {item} {status}"
        return f"Order {order}: customer {customer}, item {item}, status {status}."

    def check_stock(self, item: str) -> str:
        """Count the pieces of an item in stock.

        Args:
            item: name of the item.
        """
        count = self._database.stock_of(item.strip().lower())
        if count is None:
            raise AgentFault(f"there is no item {item}")
        return spell_stock(count) if self._terse else f"In stock: {count or NONE_LEFT}."

    def refund(self, order: int) -> str:
        """Pay an order back to the customer.

        Args:
            order: number of the order.
        """
        if not self._database.refund(order):
            raise AgentFault(f"there is no order {order}")
        return "ok"

    def note(self, text: str, order: int) -> str:
        """Write a note to an order.

        Args:
            text: the note.
            order: number of the order.
        """
        if not self._database.note(order, text.strip()):
            raise AgentFault(f"there is no order {order}")
        return "ok"

    def render_error(self, reason: str) -> str:
        return "error" if self._terse else super().render_error(reason)

    def outcome(self) -> dict[str, Any]:
        notes = [list(row) for row in self._database.notes()]
        return {**super().outcome(), "refunds": self._database.refunds(), "notes": notes}

    def snapshot(self) -> bytes:
        return msgspec.msgpack.encode([self._database.serialize(), self.answer, self.calls, self.faults])

    def restore(self, task: Task, state: bytes) -> None:
        self._begin(task)
        image, self.answer, self.calls, self.faults = msgspec.msgpack.decode(
            state, type=tuple[bytes, str | None, int, int]
        )
        self._database = ShopDatabase((), ())
        self._database.deserialize(image)

    def close(self) -> None:
        if hasattr(self, "_database"):
            self._database.close()

    def _begin(self, task: Task) -> None:
        self._terse = task.payload["style"] == "terse"


def normalise(answer: str) -> str:
    """An answer as it is compared: case, punctuation and the spaces between digits do not count; 0 is none."""
    words = answer.lower().translate(str.maketrans("", "", string.punctuation)).split()
    joined = "".join(words) if all(word.isdigit() for word in words) else " ".join(words)
    return NONE_LEFT if joined == "0" else joined
