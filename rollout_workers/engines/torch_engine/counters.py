"""What an engine has done so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rollout_workers.engines.torch_engine.scheduler import PREFILL_GAIN


@dataclass
class Counters:
    """Cumulative counts and seconds; the fields are those of EngineHealth."""

    generated_tokens: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    busy_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    stall_s: float = 0.0

    def stepped(self, seconds: float, prefilled: int, decoded: int) -> None:
        """Count a step. One that did both is split by the usual cost of a decoded and a prefilled token."""
        self.prefill_tokens += prefilled
        self.busy_s += seconds
        prefill_s = seconds * prefilled / (prefilled + PREFILL_GAIN * decoded)
        self.prefill_s += prefill_s
        self.decode_s += seconds - prefill_s

    def snapshot(self) -> dict[str, Any]:
        return asdict(self)
