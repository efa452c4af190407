"""In which order finished groups are offered to a consumer."""

from __future__ import annotations

from collections.abc import Sequence

from experience.config import QueueOrder
from experience.state import LiveGroup


def arrange(order: QueueOrder, window: int, waiting: Sequence[LiveGroup]) -> tuple[list[LiveGroup], list[LiveGroup]]:
    """(ready groups in order of preference, ready groups outside the window).

    ``waiting`` are the live groups that are not delivered, in dispatch order. With ``windowed`` the first of them,
    ready or not, is the head, and only dispatch positions head to head + window - 1 may be taken: a straggler is
    overtaken by fewer than ``window`` groups. Only then is the second list ever filled.
    """
    if order is QueueOrder.windowed:
        end = waiting[0].index + window if waiting else 0
        ready = [group for group in waiting if group.finished]
        return [g for g in ready if g.index < end], [g for g in ready if g.index >= end]
    ready = [group for group in waiting if group.finished]
    if order is QueueOrder.ready_first:
        ready.sort(key=lambda group: -1 if group.ready_rank is None else group.ready_rank)
    return ready, []
