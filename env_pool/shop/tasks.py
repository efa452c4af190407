"""Shop tasks, made solvable-path-first: the kind and the facts give the golden tool chain, the request is read off it.

Training and held-out tasks are disjoint by construction: the order a request is about has a (customer, item) pair and
a number that only ever occur, as such, in one of the two splits.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from env_pool.environment import Split
from env_pool.shop.database import OrderRow
from env_pool.shop.kinds import KINDS, MAX_DEPTH, Kind
from env_pool.shop.words import ITEMS, LATE, NAMES, NONE_LEFT, NOTES, STATUSES
from experience.records import Task

ORDERS = 6
"""Orders (one a customer, one an item) in an episode's shop; the first drawn is the one the request is about."""
HELD_OUT_RESIDUE = 0
_PAIR_MODULUS = 5
_DIGIT_MODULUS = 4
_LATE_SHARE = 0.4
_GONE_SHARE = 0.4
_EMPTY_SHARE = 0.08
"""How often the stock of an item is none where no condition depends on it."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is true of the order a request is about, and the words the request itself brings."""

    order: int
    customer: str
    item: str
    status: str
    stock: int
    note: str

    def holds(self, condition: str | None) -> bool:
        """Whether the actions are due."""
        if condition == "late":
            return self.status == LATE
        return self.stock == 0 if condition == "gone" else True


def in_held_out(customer: str, item: str) -> bool:
    """Whether this (customer, item) pair belongs to the held-out split."""
    return (NAMES.index(customer) * 3 + ITEMS.index(item)) % _PAIR_MODULUS == HELD_OUT_RESIDUE


def is_held_out_number(order: int) -> bool:
    """Whether this order number belongs to the held-out split (by its sum of digits, so every digit trains)."""
    return sum(map(int, str(order))) % _DIGIT_MODULUS == HELD_OUT_RESIDUE


def spell(number: int) -> str:
    """A number as the words of its digits: 482 is ``4 8 2``."""
    return " ".join(str(number))


def spell_stock(count: int) -> str:
    """A stock count in words."""
    return spell(count) if count else NONE_LEFT


def golden_chain(kind: Kind, facts: Facts) -> list[str]:
    """The shortest right episode: tool calls in the word syntax, last the answer after ``done``."""
    number = spell(facts.order)
    chain = []
    if kind.target == "customer":
        chain.append(f"find_user {facts.customer}")
    if kind.reads_order:
        chain.append(f"find_order {number}")
    if kind.condition == "gone":
        chain.append(f"check_stock {facts.item}")
    if facts.holds(kind.condition):
        if kind.refund:
            chain.append(f"refund {number}")
        if kind.note:
            chain.append(f"note {facts.note} {number}")
    elif kind.otherwise:
        chain.append(f"note {facts.note} {number}")
    if kind.say == "stock":
        chain.append(f"check_stock {facts.item}")
    return [*chain, f"done {answer(kind, facts)}"]


def answer(kind: Kind, facts: Facts) -> str:
    """What a right episode ends with, in the word syntax; ``ok`` where nothing is asked."""
    match kind.say:
        case "status":
            return facts.status
        case "item":
            return facts.item
        case "stock":
            return spell_stock(facts.stock)
        case "order":
            return spell(facts.order)
        case None:
            return "ok"


def terse_request(kind: Kind, facts: Facts) -> str:
    """The request in the small vocabulary."""
    match kind.target:
        case "order":
            words = ["order", spell(facts.order)]
        case "customer":
            words = [facts.customer]
        case "purchase":
            words = [facts.customer, "wants", facts.item]
    if kind.condition:
        words += ["if", kind.condition]
    if kind.refund:
        words += ["refund"]
    if kind.note:
        words += ["note", facts.note]
    if kind.otherwise:
        words += ["else", "note", facts.note]
    if kind.say:
        words += ["say", kind.say]
    return " ".join(words)


def natural_request(kind: Kind, facts: Facts) -> str:
    """The request in English sentences."""
    match kind.target:
        case "order":
            about = f"This is about order {facts.order}."
        case "customer":
            about = f"This is about the order of customer {facts.customer}."
        case "purchase":
            about = f"Customer {facts.customer} wants to buy: {facts.item}."
    sentences = [about, *_natural_actions(kind, facts)]
    match kind.say:
        case "status":
            sentences.append("Answer with the status of the order.")
        case "item":
            sentences.append("Answer with the item that was ordered.")
        case "stock":
            sentences.append("Answer with the number of pieces of the item in stock.")
        case "order":
            sentences.append("Answer with the number of the order.")
        case None:
            sentences.append("Answer ok when that is done.")
    return " ".join(sentences)


def _natural_actions(kind: Kind, facts: Facts) -> list[str]:
    actions = [
        text for wanted, text in ((kind.refund, "refund it"), (kind.note, f"write the note '{facts.note}'")) if wanted
    ]
    if not actions:
        return []
    order = " and ".join(actions)
    if kind.condition is None:
        return [order.capitalize() + "."]
    condition = "the order is late" if kind.condition == "late" else "its item is out of stock"
    otherwise = f" Otherwise write the note '{facts.note}' to it and do nothing else." if kind.otherwise else ""
    return [f"If {condition}, {order}.{otherwise}"]


def kinds_of(levels: Sequence[int]) -> dict[int, list[Kind]]:
    """The kinds of each depth asked for. Raises ValueError on a depth that no kind has."""
    valid = range(1, MAX_DEPTH + 1)
    if not levels or any(level not in valid for level in levels):
        raise ValueError(f"tasks.options.levels: shop has the depths 1 to {MAX_DEPTH}, got {list(levels)}")
    return {level: [kind for kind in KINDS if kind.depth == level] for level in levels}


def make_task(index: int, seed: int, split: Split, levels: Sequence[int], style: str) -> Task:
    """Task number ``index`` of a split; depths take turns, kinds within a depth are drawn."""
    by_depth = kinds_of(levels)
    rng = random.Random(f"shop/{seed}/{split}/{index}")
    kind = rng.choice(by_depth[levels[index % len(levels)]])
    orders = _draw_orders(rng, split == "held_out", kind)
    number, customer, item, status = orders[0]
    stock = {row[2]: _draw_stock(rng, _EMPTY_SHARE) for row in orders}
    if kind.condition == "gone":
        stock[item] = _draw_stock(rng, _GONE_SHARE)
    facts = Facts(order=number, customer=customer, item=item, status=status, stock=stock[item], note=rng.choice(NOTES))
    rng.shuffle(orders)
    payload: dict[str, Any] = {
        "request": terse_request(kind, facts) if style == "terse" else natural_request(kind, facts),
        "style": style,
        "orders": [list(row) for row in orders],
        "stock": stock,
        "facts": asdict(facts),
        "golden": golden_chain(kind, facts),
        "expected": _expected(kind, facts),
    }
    return Task(
        task_id=f"shop/{split}/{seed}/{index}",
        environment="shop",
        payload=payload,
        domain=kind.name,
        difficulty=kind.depth,
    )


def _expected(kind: Kind, facts: Facts) -> dict[str, Any]:
    """The one final state and answer that count as success."""
    due = facts.holds(kind.condition)
    notes = [[facts.order, facts.note]] if (kind.note if due else kind.otherwise) else []
    return {"refunds": [facts.order] if due and kind.refund else [], "notes": notes, "answer": answer(kind, facts)}


def _draw_orders(rng: random.Random, held_out: bool, kind: Kind) -> list[OrderRow]:
    customers, items = rng.sample(NAMES, ORDERS), rng.sample(ITEMS, ORDERS)
    while in_held_out(customers[0], items[0]) != held_out:
        items = rng.sample(ITEMS, ORDERS)
    numbers = rng.sample(range(100, 1000), ORDERS)
    while is_held_out_number(numbers[0]) != held_out:
        numbers = rng.sample(range(100, 1000), ORDERS)
    statuses = [rng.choice(STATUSES) for _ in range(ORDERS)]
    if kind.condition == "late":
        statuses[0] = LATE if rng.random() < _LATE_SHARE else rng.choice(STATUSES[1:])
    return list(zip(numbers, customers, items, statuses, strict=True))


def _draw_stock(rng: random.Random, empty_share: float) -> int:
    return 0 if rng.random() < empty_share else rng.randint(10, 99)


def parse_facts(payload: Mapping[str, Any]) -> Facts:
    """What the task was made from."""
    return Facts(**payload["facts"])


def parse_payload(payload: Mapping[str, Any]) -> tuple[list[OrderRow], list[tuple[str, int]]]:
    """Rows of the orders and of the stock table."""
    orders = [(int(row[0]), str(row[1]), str(row[2]), str(row[3])) for row in payload["orders"]]
    return orders, [(str(item), int(count)) for item, count in payload["stock"].items()]
