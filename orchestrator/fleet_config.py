"""Settings of the fleet of engines (``fleet:`` in a run's configuration). Times are in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class FleetConfig:
    """How engines are watched while they serve, and how one leaves."""

    probe_every_s: float = 2.0
    """An engine that answers is asked again after this long."""
    probe_timeout_s: float = 5.0
    """An answer that takes longer is a miss. An engine whose answers usually take long gets more time, up to four times
    as much."""
    probe_misses: int = 3
    """An engine that misses this many probes one after another is ended and replaced."""
    drain_s: float = 30.0
    """When an engine is taken out of a run, its requests may end within this time; what is left goes on elsewhere."""

    def validate(self) -> None:
        """Raise ValueError naming the first setting that cannot work."""
        for name in ("probe_every_s", "probe_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"fleet.{name} must be positive, got {getattr(self, name)}")
        if self.probe_misses < 1:
            raise ValueError(f"fleet.probe_misses must be at least 1, got {self.probe_misses}")
        if self.drain_s < 0:
            raise ValueError(f"fleet.drain_s must not be negative, got {self.drain_s}")
