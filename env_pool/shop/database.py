"""The shop's state: one in-memory SQLite database per episode, and the five operations on it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

_SCHEMA = """
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT NOT NULL, item TEXT NOT NULL, status TEXT NOT NULL);
CREATE TABLE stock (item TEXT PRIMARY KEY, count INTEGER NOT NULL);
CREATE TABLE refunds (order_id INTEGER NOT NULL);
CREATE TABLE notes (order_id INTEGER NOT NULL, text TEXT NOT NULL);
"""

OrderRow = tuple[int, str, str, str]
"""Number, customer, item, status."""


class ShopDatabase:
    """Orders and stock to look up, refunds and notes to write.

    The connection may be used from any thread, one at a time: the pool moves an episode between runner threads.
    """

    def __init__(self, orders: Iterable[OrderRow], stock: Iterable[tuple[str, int]]) -> None:
        self._connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self._connection.executescript(_SCHEMA)
        self._connection.executemany("INSERT INTO orders VALUES (?, ?, ?, ?)", orders)
        self._connection.executemany("INSERT INTO stock VALUES (?, ?)", stock)

    def order_of(self, customer: str) -> int | None:
        """The number of the customer's order; None for an unknown customer."""
        row = self._connection.execute("SELECT id FROM orders WHERE customer = ?", (customer,)).fetchone()
        return None if row is None else int(row[0])

    def order(self, number: int) -> OrderRow | None:
        """The order with this number, or None."""
        row = self._connection.execute(
            "SELECT id, customer, item, status FROM orders WHERE id = ?", (number,)
        ).fetchone()
        return None if row is None else (int(row[0]), str(row[1]), str(row[2]), str(row[3]))

    def stock_of(self, item: str) -> int | None:
        """How many pieces are left; None for an unknown item."""
        row = self._connection.execute("SELECT count FROM stock WHERE item = ?", (item,)).fetchone()
        return None if row is None else int(row[0])

    def refund(self, number: int) -> bool:
        """Pay the order back; False when there is no such order. Paying twice is two rows."""
        if self.order(number) is None:
            return False
        self._connection.execute("INSERT INTO refunds VALUES (?)", (number,))
        return True

    def note(self, number: int, text: str) -> bool:
        """Write a note to the order; False when there is no such order."""
        if self.order(number) is None:
            return False
        self._connection.execute("INSERT INTO notes VALUES (?, ?)", (number, text))
        return True

    def refunds(self) -> list[int]:
        """Numbers of the refunded orders, ascending, with repetitions."""
        return [int(row[0]) for row in self._connection.execute("SELECT order_id FROM refunds ORDER BY order_id")]

    def notes(self) -> list[tuple[int, str]]:
        """All notes as (order number, text), sorted."""
        rows = self._connection.execute("SELECT order_id, text FROM notes ORDER BY order_id, text")
        return [(int(row[0]), str(row[1])) for row in rows]

    def serialize(self) -> bytes:
        """The whole database as bytes that :meth:`deserialize` takes."""
        return self._connection.serialize()

    def deserialize(self, data: bytes) -> None:
        """Replace the whole state by what :meth:`serialize` returned."""
        self._connection.deserialize(data)

    def close(self) -> None:
        self._connection.close()
