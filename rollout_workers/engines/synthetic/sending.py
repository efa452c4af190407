"""KV on its way from an engine that prefills, as modelled: which requests wait for theirs to arrive, and until when."""

from __future__ import annotations

import heapq
import itertools

from rollout_workers.engines.synthetic.cost_model import CostModel


class Sending:
    """The outgoing links of an engine's accelerators. Pieces leave while the prompt is computed; a link sends one prompt after
    the other. What was sent to an engine before is there: its own tokens in between are sent again."""

    def __init__(self, cost: CostModel, accelerators: int) -> None:
        self._cost = cost
        self._free_at = [0.0] * accelerators
        self._sent: dict[str, dict[str, int]] = {}
        """session -> engine -> tokens that it was sent."""
        self._due: list[tuple[float, int, str]] = []
        self._order = itertools.count()
        self._moving: set[str] = set()
        self.tokens = 0
        """All that was sent."""

    def computed(
        self, request_id: str, session: str, engine: str, prompt: int, cached: int, accelerator: int, now: float
    ) -> None:
        """An accelerator has computed a prompt (but for what was cached); its KV goes to ``engine``."""
        sent = self._sent.setdefault(session, {})
        missing = max(0, prompt - sent.get(engine, 0))
        sent[engine] = prompt
        last = min(missing, self._cost.prefill_chunk) if self._cost.prefill_chunk else missing
        began_at = max(now - (prompt - cached) / self._cost.prefill_rate, self._free_at[accelerator])
        token_s = self._cost.kv_token_s
        arrives_at = max(now + last * token_s, began_at + missing * token_s)
        self._free_at[accelerator] = arrives_at
        self.tokens += missing
        self._moving.add(request_id)
        heapq.heappush(self._due, (arrives_at, next(self._order), request_id))

    def next_event(self) -> float | None:
        """When KV arrives next."""
        while self._due and self._due[0][2] not in self._moving:
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def arrived(self, now: float) -> list[str]:
        """Requests whose KV has arrived since the last call."""
        arrived = []
        while (at := self.next_event()) is not None and at <= now:
            request_id = heapq.heappop(self._due)[2]
            self._moving.discard(request_id)
            arrived.append(request_id)
        return arrived

    def stop(self, request_id: str) -> bool:
        """Nobody waits for this KV any more. False if it is not on its way."""
        known = request_id in self._moving
        self._moving.discard(request_id)
        return known

    def forget(self, session: str) -> None:
        """The session is over."""
        self._sent.pop(session, None)
