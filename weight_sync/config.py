"""Settings of the weight synchronisation (the ``weights`` section of a run's configuration)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

TRANSPORTS = ("auto", "shared_memory", "collective", "disk")
PLANNED_TRANSPORTS = ("relay",)
KV_CHOICES = ("auto", "keep", "recompute")


@dataclass
class WeightsConfig:
    """How new weights reach the inference engines."""

    transport: str = "auto"
    """``shared_memory`` (learner and engines on one node), ``collective`` (broadcast), ``disk`` (a directory that all see),
    or ``auto``: shared memory where it reaches every engine, else broadcast."""
    directory: Optional[str] = None  # noqa: UP045
    """Where ``disk`` writes the versions; None: ``weights`` in the run's directory."""
    every: int = 1
    """Publish after every that many optimizer steps."""
    kv: str = "auto"
    """What an update does with the KV of requests in flight: ``keep``, ``recompute`` or ``auto`` (decided by cost)."""
    rolling: bool = True
    """Engines switch one after another (True) or all together (False)."""
    delta: bool = False
    """Send only what changed. Not built yet."""
    bucket_mb: float = 64.0
    """Size of a transfer bucket in MiB."""
    timeout_s: float = 60.0
    """How long one transfer may take, in seconds."""

    def validate(self) -> None:
        """Raises ValueError, naming the key and what would be right."""
        if self.transport in PLANNED_TRANSPORTS:
            raise ValueError(f"weights.transport={self.transport} is not built yet: use one of {', '.join(TRANSPORTS)}")
        if self.transport not in TRANSPORTS:
            raise ValueError(f"weights.transport={self.transport!r} is unknown: use one of {', '.join(TRANSPORTS)}")
        if self.kv not in KV_CHOICES:
            raise ValueError(f"weights.kv={self.kv!r} is unknown: use one of {', '.join(KV_CHOICES)}")
        if self.delta:
            raise ValueError("weights.delta=true is not built yet: leave it false (full weights are sent)")
        if self.every < 1:
            raise ValueError(f"weights.every={self.every} must be at least 1 (publish after every that many steps)")
        if self.bucket_mb <= 0:
            raise ValueError(f"weights.bucket_mb={self.bucket_mb} must be greater than 0 (MiB)")
        if self.timeout_s <= 0:
            raise ValueError(f"weights.timeout_s={self.timeout_s} must be greater than 0 (seconds)")
