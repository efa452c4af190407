"""The account of a learner that trains in modelled time: what it trains counts as training, also while its actor waits."""

from __future__ import annotations

from collections.abc import Callable

from experience.accounting import Account, Cause, Span

Interval = tuple[float, float]


class TrainingLane:
    """``account`` says what the actor does; ``take_training`` gives the intervals of training since its last call, in order.

    An interval may reach into the future; what lies before the spans that were taken already is left out.

    >>> account = Account("learner-0", 0.0, Cause.QUEUE_EMPTY)
    >>> lane = TrainingLane(account, iter([[(1.0, 4.0)], []]).__next__)
    >>> [(span.cause.value, span.began_at, span.ended_at) for now in (2.0, 5.0) for span in lane.take_spans(now)]
    [('queue_empty', 0.0, 1.0), ('train', 1.0, 2.0), ('train', 2.0, 4.0), ('queue_empty', 4.0, 5.0)]
    """

    def __init__(self, account: Account, take_training: Callable[[], list[Interval]]) -> None:
        self.lane = account.lane
        self._account = account
        self._take_training = take_training
        self._training: list[Interval] = []
        self._seconds: dict[Cause, float] = {}

    def seconds(self, now: float) -> dict[Cause, float]:
        """Seconds by cause up to the last call of `take_spans`."""
        del now
        return dict(self._seconds)

    def take_spans(self, now: float | None = None) -> list[Span]:
        """The spans of the account, with training laid over them."""
        self._training += self._take_training()
        spans = [part for span in self._account.take_spans(now) for part in self._laid_over(span)]
        for span in spans:
            self._seconds[span.cause] = self._seconds.get(span.cause, 0.0) + span.ended_at - span.began_at
        return spans

    def _laid_over(self, span: Span) -> list[Span]:
        parts, at = [], span.began_at
        while self._training and self._training[0][0] < span.ended_at:
            began_at, ended_at = max(self._training[0][0], at), min(self._training[0][1], span.ended_at)
            if began_at > at:
                parts.append(span._replace(began_at=at, ended_at=began_at))
            if ended_at > began_at:
                parts.append(span._replace(cause=Cause.TRAIN, began_at=began_at, ended_at=ended_at))
                at = ended_at
            if self._training[0][1] > span.ended_at:
                break
            self._training.pop(0)
        if span.ended_at > at:
            parts.append(span._replace(began_at=at))
        return parts
