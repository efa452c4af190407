"""Which bytes of a ring buffer are free: given out in pieces without a break, given back in the same order. Pure."""

from __future__ import annotations

from collections import deque

ALIGNMENT = 64
"""Pieces begin at multiples of this many bytes."""


class RingSpace:
    """Space of ``capacity`` bytes.

    >>> ring = RingSpace(256)
    >>> ring.reserve(100), ring.reserve(100), ring.reserve(100)
    (0, 128, None)
    >>> ring.release(0); ring.reserve(100)
    0
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._live: deque[tuple[int, int]] = deque()
        """(offset, end) of the pieces that are out, oldest first."""
        self._next = 0

    @property
    def out(self) -> int:
        """Pieces that were not given back yet."""
        return len(self._live)

    def reserve(self, nbytes: int) -> int | None:
        """The offset of ``nbytes`` free bytes, or None while there are not that many in one place.

        Raises ValueError for more than there can ever be.
        """
        if not 0 < nbytes <= self.capacity:
            raise ValueError(f"{nbytes} bytes of a ring of {self.capacity}")
        if not self._live:
            self._next = 0
        oldest = self._live[0][0] if self._live else None
        offset = self._next
        if oldest is None or offset > oldest:
            if offset + nbytes > self.capacity:
                if oldest is None or nbytes > oldest:
                    return None
                offset = 0
        elif offset + nbytes > oldest:
            return None
        self._live.append((offset, offset + nbytes))
        self._next = min(self.capacity, -(-(offset + nbytes) // ALIGNMENT) * ALIGNMENT)
        return offset

    def release(self, offset: int) -> None:
        """The oldest piece, which must be the one at ``offset``, is free again. Raises ValueError if it is not."""
        if not self._live or self._live[0][0] != offset:
            raise ValueError(f"offset {offset} is not the oldest piece ({self._live[0][0] if self._live else 'none'})")
        self._live.popleft()
