"""In which order finished groups are offered to a consumer."""

from __future__ import annotations

from collections.abc import Sequence

from experience.config import QueueOrder
from experience.state import LiveGroup


def arrange(order: QueueOrder, window: int, waiting: Sequence[LiveGroup]) -> tuple[list[LiveGroup], list[LiveGroup]]:
    """(ready groups in order of preference, ready groups outside the window).

    ``waiting`` are the live groups that are not delivered, in dispatch order; only with ``windowed`` is the second list
    ever filled.
    """
    if order is QueueOrder.windowed:
        inside, outside = waiting[:window], waiting[window:]
        return [g for g in inside if g.finished], [g for g in outside if g.finished]
    ready = [group for group in waiting if group.finished]
    if order is QueueOrder.ready_first:
        ready.sort(key=lambda group: -1 if group.ready_rank is None else group.ready_rank)
    return ready, []
