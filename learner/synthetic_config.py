"""Settings of the synthetic learner (``learner.synthetic`` in a run's configuration)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SyntheticLearnerConfig:
    """The modelled learner, in seconds and tokens of the modelled cluster; the scales are those of the engines."""

    accelerators: int = 16
    """Modelled accelerators that train; in ``mode: sync`` those of the engines, which train and roll out in turns."""
    seconds_per_token: float = 1.2e-4
    """Accelerator-seconds of training for a token of a trajectory (context and generated alike); the default is
    6 operations a parameter and token for 8 billion parameters at 400e12 operations a second."""
    step_overhead_s: float = 1.0
    """Seconds of a step that do not shrink with more accelerators: the optimizer, gathering the weights."""
    switch_s: float = 10.0
    """``mode: sync``: seconds that the accelerators take from rolling out to training and back, once a step."""
    time_scale: float = 50.0
    """Modelled seconds in a wall second; as ``engines.synthetic.time_scale``."""
    token_scale: float = 50.0
    """Modelled tokens in a carried token; as ``engines.synthetic.token_scale``."""

    def validate(self) -> None:
        """Raise ValueError, naming the key and what it may be, if any setting is out of range."""
        if self.accelerators < 1:
            raise ValueError(f"learner.synthetic.accelerators={self.accelerators}: must be at least 1")
        for name in ("time_scale", "token_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"learner.synthetic.{name}={getattr(self, name)}: must be greater than 0")
        for name in ("seconds_per_token", "step_overhead_s", "switch_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"learner.synthetic.{name}={getattr(self, name)}: must not be negative")
