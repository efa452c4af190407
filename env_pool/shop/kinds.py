"""The kinds of request a customer makes, and the tool chain that serves each.

A kind is a composition: who or what it is about (`target`), an optional condition, what to do when it holds (`refund`,
`note`) or does not (`otherwise`: the note), and what to report (`say`). Its depth is the number of tool calls on its
longest path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Target = Literal["order", "customer", "purchase"]
Condition = Literal["late", "gone"]
Report = Literal["status", "item", "stock", "order"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One composition.

    The target is an order by number, a customer by name, or a purchase (a customer who wants an item). The condition
    is `late` (the order's status) or `gone` (no stock of the order's item).
    """

    name: str
    target: Target
    condition: Condition | None = None
    refund: bool = False
    note: bool = False
    otherwise: bool = False
    """Write the note when the condition does not hold, instead of the refund."""
    say: Report | None = None

    @property
    def reads_order(self) -> bool:
        """Whether serving it takes `find_order`."""
        return self.target != "purchase" and (self.condition is not None or self.say in ("status", "item", "stock"))

    @property
    def reads_stock(self) -> bool:
        """Whether serving it takes `check_stock`."""
        return self.condition == "gone" or self.say == "stock"

    @property
    def depth(self) -> int:
        """Tool calls on the longest path."""
        actions = max(self.refund + self.note, int(self.otherwise))
        return (self.target == "customer") + self.reads_order + self.reads_stock + actions


KINDS: tuple[Kind, ...] = (
    Kind(name="stock", target="purchase", say="stock"),
    Kind(name="order_status", target="order", say="status"),
    Kind(name="customer_order", target="customer", say="order"),
    Kind(name="order_refund", target="order", refund=True),
    Kind(name="customer_status", target="customer", say="status"),
    Kind(name="order_stock", target="order", say="stock"),
    Kind(name="customer_refund", target="customer", refund=True),
    Kind(name="order_refund_item", target="order", refund=True, say="item"),
    Kind(name="order_late_else", target="order", condition="late", refund=True, otherwise=True),
    Kind(name="customer_stock", target="customer", say="stock"),
    Kind(name="customer_late_else", target="customer", condition="late", refund=True, otherwise=True),
    Kind(name="order_gone_else", target="order", condition="gone", refund=True, otherwise=True),
    Kind(name="customer_late_item", target="customer", condition="late", refund=True, say="item"),
    Kind(name="order_gone_item", target="order", condition="gone", refund=True, say="item"),
    Kind(name="order_refund_note", target="order", refund=True, note=True, say="status"),
    Kind(name="customer_gone_else", target="customer", condition="gone", refund=True, otherwise=True),
    Kind(name="customer_refund_note", target="customer", refund=True, note=True, say="item"),
    Kind(name="customer_late_stock", target="customer", condition="late", refund=True, otherwise=True, say="stock"),
    Kind(name="order_late_note_stock", target="order", condition="late", refund=True, note=True, say="stock"),
    Kind(name="customer_gone_note", target="customer", condition="gone", refund=True, note=True, say="item"),
    Kind(name="customer_gone_note_status", target="customer", condition="gone", refund=True, note=True, say="status"),
    Kind(name="customer_late_note_stock", target="customer", condition="late", refund=True, note=True, say="stock"),
)
KIND_BY_NAME = {kind.name: kind for kind in KINDS}
MAX_DEPTH = max(kind.depth for kind in KINDS)
