"""One hand-off of keys and values, from a prefill engine to a decode engine, as both sides see it.

```
              accepted(have)             moved(start, end) ... finish()
  announced ───────────────► streaming ──────────────────────────────► complete
      │                          │
      │ refused(reason)          │ cancel(reason): an abort, a commit, the other side is gone, too late
      ▼                          ▼
   refused                   cancelled
```

A hand-off is bound to the policy version that computes its keys and values, covers the tokens ``have .. total`` of one
sequence (``have``: what the decode side holds already), and moves them in order and without gaps. Whatever ends it early
costs time, never correctness: the decode side computes what it lacks.
"""

from __future__ import annotations

from enum import StrEnum


class HandoffState(StrEnum):
    ANNOUNCED = "announced"
    STREAMING = "streaming"
    COMPLETE = "complete"
    REFUSED = "refused"
    CANCELLED = "cancelled"


class Reason(StrEnum):
    """Why a hand-off ended before it was complete."""

    VERSION = "other_version"
    """The decode side serves another version than the one that computes the KV."""
    COMMIT = "version_changed"
    """A commit on the prefill side came in between: the rest would be another version's."""
    DROPPED = "kv_dropped"
    """The decode side lost what it had received: a commit whose KV policy is to recompute, or a release."""
    BUSY = "session_busy"
    NO_ROOM = "no_room"
    LAYOUT = "other_layout"
    ABORTED = "aborted"
    RELEASED = "session_released"
    LOST = "engine_lost"
    LATE = "timed_out"
    DAMAGED = "damaged"
    """A message that does not fit what went before."""


class HandoffError(RuntimeError):
    """An event that the hand-off's present state does not allow."""


class Handoff:
    """The state of one hand-off on one side. Tokens are counted from the beginning of the sequence.

    >>> handoff = Handoff("h", version=3, total=100)
    >>> handoff.accepted(40); handoff.moved(40, 70, 3, 3000); handoff.moved(70, 100, 3, 3000); handoff.finish()
    >>> handoff.state.value, handoff.pieces, handoff.nbytes
    ('complete', 2, 6000)
    """

    def __init__(self, handoff_id: str, version: int, total: int) -> None:
        if total < 1:
            raise HandoffError(f"hand-off {handoff_id}: of {total} tokens")
        self.handoff_id = handoff_id
        self.version = version
        self.total = total
        self.state = HandoffState.ANNOUNCED
        self.reason: Reason | None = None
        self.have = 0
        """Tokens that the decode side held before."""
        self.position = 0
        """Tokens that are across, ``have`` included."""
        self.pieces = 0
        self.nbytes = 0

    @property
    def open(self) -> bool:
        """Whether anything may still happen."""
        return self.state in (HandoffState.ANNOUNCED, HandoffState.STREAMING)

    @property
    def streaming(self) -> bool:
        return self.state is HandoffState.STREAMING

    def accepted(self, have: int) -> None:
        """The decode side has a place for it, and holds the first ``have`` tokens."""
        self._expect(HandoffState.ANNOUNCED, "accepted")
        if not 0 <= have <= self.total:
            raise HandoffError(f"hand-off {self.handoff_id}: {have} of {self.total} tokens held already")
        self.state = HandoffState.STREAMING
        self.have = self.position = have

    def refused(self, reason: Reason) -> None:
        """The decode side does not want it; allowed as long as the hand-off is open."""
        if not self.open:
            raise self._impossible("refused")
        self.state, self.reason = HandoffState.REFUSED, reason

    def moved(self, start: int, end: int, version: int, nbytes: int) -> None:
        """Tokens ``start .. end``, computed by ``version``, left (prefill side) or arrived (decode side)."""
        self._expect(HandoffState.STREAMING, "moved")
        if version != self.version:
            raise HandoffError(f"hand-off {self.handoff_id}: of version {self.version}, a piece of {version}")
        if start != self.position or not start < end <= self.total:
            raise HandoffError(
                f"hand-off {self.handoff_id}: tokens {start}..{end} after {self.position} of {self.total}"
            )
        self.position = end
        self.pieces += 1
        self.nbytes += nbytes

    def finish(self) -> None:
        """All tokens are across."""
        self._expect(HandoffState.STREAMING, "finish")
        if self.position != self.total:
            raise HandoffError(f"hand-off {self.handoff_id}: finished after {self.position} of {self.total} tokens")
        self.state = HandoffState.COMPLETE

    def cancel(self, reason: Reason) -> bool:
        """End it early, for whatever reason. False when it had ended before."""
        if not self.open:
            return False
        self.state, self.reason = HandoffState.CANCELLED, reason
        return True

    def _expect(self, state: HandoffState, event: str) -> None:
        if self.state is not state:
            raise self._impossible(event)

    def _impossible(self, event: str) -> HandoffError:
        why = f" ({self.reason.value})" if self.reason is not None else ""
        return HandoffError(f"hand-off {self.handoff_id} is {self.state.value}{why}: {event} refused")
