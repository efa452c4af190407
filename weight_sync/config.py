"""Settings of the weight synchronisation (the ``weights`` section of a run's configuration)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

TRANSPORTS = ("auto", "shared_memory", "collective", "relay", "disk")
WIRE_DTYPES = ("auto", "float32", "bfloat16", "float16", "fp8_block")
KV_CHOICES = ("auto", "keep", "recompute")


@dataclass
class WeightsConfig:
    """How new weights reach the inference engines."""

    transport: str = "auto"
    """``shared_memory`` (learner and engines on one node), ``collective`` (broadcast), ``relay`` (a stager
    on every node, which its engines pull from), ``disk`` (a directory that all see), or ``auto``: shared memory where it reaches every engine, else broadcast."""
    directory: Optional[str] = None  # noqa: UP045
    """Where ``disk`` writes the versions; None: ``weights`` in the run's directory."""
    every: int = 1
    """Publish after every that many optimizer steps."""
    kv: str = "auto"
    """What an update does with the KV of requests in flight: ``keep``, ``recompute`` or ``auto`` (decided by cost)."""
    rolling: bool = True
    """Engines switch one after another (True) or all together (False)."""
    dtype: str = "auto"
    """In which dtype weights travel: ``auto`` (``model.dtype``), ``float32``, ``bfloat16``, ``float16``, or ``fp8_block``
    (linear layers in 8 bits with a float32 scale for every block of 128 x 128)."""
    delta: bool = False
    """Send only what changed since the version before, bit for bit."""
    delta_snapshot_every: int = 50
    """With ``delta``, every that many versions one travels whole."""
    checksums: bool = False
    """Check every tensor that arrives by ``shared_memory`` or ``collective``, too (``relay``, ``disk`` and ``delta`` always do)."""
    bucket_mb: float = 64.0
    """Size of a transfer bucket in MiB."""
    timeout_s: float = 60.0
    """How long one transfer may take, in seconds."""

    @property
    def bucket_bytes(self) -> int:
        return int(self.bucket_mb * 2**20)

    def validate(self) -> None:
        """Raises ValueError, naming the key and what would be right."""
        if self.transport not in TRANSPORTS:
            raise ValueError(f"weights.transport={self.transport!r} is unknown: use one of {', '.join(TRANSPORTS)}")
        if self.kv not in KV_CHOICES:
            raise ValueError(f"weights.kv={self.kv!r} is unknown: use one of {', '.join(KV_CHOICES)}")
        if self.dtype not in WIRE_DTYPES:
            raise ValueError(f"weights.dtype={self.dtype!r} is unknown: use one of {', '.join(WIRE_DTYPES)}")
        if self.delta_snapshot_every < 1:
            raise ValueError(
                f"weights.delta_snapshot_every={self.delta_snapshot_every} must be at least 1 (1: every version whole)"
            )
        if self.every < 1:
            raise ValueError(f"weights.every={self.every} must be at least 1 (publish after every that many steps)")
        if self.bucket_mb <= 0:
            raise ValueError(f"weights.bucket_mb={self.bucket_mb} must be greater than 0 (MiB)")
        if self.timeout_s <= 0:
            raise ValueError(f"weights.timeout_s={self.timeout_s} must be greater than 0 (seconds)")
