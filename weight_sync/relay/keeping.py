"""Which publications a stager keeps."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Kept:
    """The last publications of each sender.

    Of those that came whole the last ``whole`` stay, and every change that came after the oldest of them: with these a joining
    engine gets to the newest version. Publications of senders that have not been heard of for ``senders`` other ones go.
    """

    whole: int = 2
    senders: int = 64
    _order: dict[str, list[tuple[str, bool]]] = field(default_factory=dict)

    def add(self, sender: str, key: str, *, change: bool) -> list[str]:
        """A publication has arrived; returns the keys of those that are no longer wanted.

        >>> kept = Kept(whole=1)
        >>> kept.add("a", "a1", change=False), kept.add("a", "a2", change=True), kept.add("a", "a3", change=False)
        ([], [], ['a1', 'a2'])
        """
        mine = self._order.pop(sender, [])
        mine.append((key, change))
        self._order[sender] = mine  # heard of last
        starts = [index for index, (_, is_change) in enumerate(mine) if not is_change]
        first = starts[-self.whole] if len(starts) >= self.whole else 0
        dropped = [name for name, _ in mine[:first]]
        del mine[:first]
        while len(self._order) > self.senders:
            dropped += [name for name, _ in self._order.pop(next(iter(self._order)))]
        return dropped
