"""What an engine handed over and received so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class KvCounters:
    """Cumulative."""

    sent_bytes: int = 0
    received_bytes: int = 0
    handoffs: int = 0
    handoff_s: float = 0.0
    handoffs_failed: int = 0

    def snapshot(self) -> dict[str, Any]:
        """As the fields of EngineHealth."""
        return {
            "kv_sent_mb": self.sent_bytes / 2**20,
            "kv_received_mb": self.received_bytes / 2**20,
            "handoffs": self.handoffs,
            "handoff_s": self.handoff_s,
            "handoffs_failed": self.handoffs_failed,
        }
