"""Settings of the hand-off of keys and values (``engines.handoff:``)."""

from __future__ import annotations

from dataclasses import dataclass

TRANSPORTS = ("auto", "shared_memory", "ring", "tcp")


@dataclass
class HandoffConfig:
    """How keys and values get from prefill to decode engines, and which prompts are worth it."""

    transport: str = "auto"
    """``auto`` writes into the other engine's cache where both engines run on one node, or else through a ring of shared
    memory there, and over TCP elsewhere. ``shared_memory`` is the same without TCP, ``ring`` the ring alone."""
    ring_mb: int = 16
    """Memory between a prefill and a decode engine (MiB). It also bounds what is taken in between two decode steps, and
    what is written at once into the other engine's cache."""
    piece_kb: int = 4096
    """Through a ring and over TCP, KV moves in pieces of at most this size (KiB)."""
    min_tokens: int = 32
    """A decode engine computes prompts with no more new tokens than this by itself."""
    timeout_s: float = 10.0
    """How long one side waits for the other before the hand-off is given up and the KV computed where it is needed."""

    @property
    def direct(self) -> bool:
        """Whether engines may write into each other's caches."""
        return self.transport in ("auto", "shared_memory")

    def validate(self) -> None:
        """Raise ValueError, naming the key and what it may be, if any setting is out of range."""
        if self.transport not in TRANSPORTS:
            raise ValueError(f"engines.handoff.transport={self.transport}: must be one of {', '.join(TRANSPORTS)}")
        for name, least in (("ring_mb", 1), ("piece_kb", 1), ("min_tokens", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"engines.handoff.{name}={value}: must be at least {least}")
        if self.piece_kb * 2 > self.ring_mb * 1024:
            raise ValueError(
                f"engines.handoff.piece_kb={self.piece_kb}: must be at most half of engines.handoff.ring_mb="
                f"{self.ring_mb} MiB, so that one piece fills while another empties"
            )
        if self.timeout_s <= 0:
            raise ValueError(f"engines.handoff.timeout_s={self.timeout_s:g}: must be more than 0")
