"""The synthetic engine in real time: the face that the engine actor expects, and the one place that reads the clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experience.books import clock as process_clock
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import EngineHealth, GenerateRequest, KvPolicy, PauseMode, TokenChunk
from rollout_workers.engines.synthetic.accelerator import Accelerator
from rollout_workers.engines.synthetic.cost_model import CostModel
from rollout_workers.engines.synthetic.engine import SyntheticEngine
from rollout_workers.engines.synthetic.weights import VersionedWeights, read_vocabulary, read_weights

Clock = Callable[[], float]


class SyntheticDriver:
    """A `SyntheticEngine` with the methods of the torch engine; `delay` says when the next `step` is due."""

    def __init__(self, engine: SyntheticEngine, clock: Clock) -> None:
        self.engine = engine
        self.clock = clock

    @property
    def accelerators(self) -> list[Accelerator]:
        return self.engine.accelerators

    @property
    def weight_bytes(self) -> int:
        return self.engine.weights.nbytes

    @property
    def stage_s(self) -> float:
        """Wall seconds that new weights take to arrive."""
        return self.engine.cost.stage_s

    def delay(self) -> float | None:
        """Seconds until something happens by itself (0: now); None while nothing will."""
        at = self.engine.next_event()
        return None if at is None else max(0.0, at - self.clock())

    def step(self) -> list[TokenChunk]:
        return self.engine.advance(self.clock())

    def submit(self, request: GenerateRequest) -> None:
        self.engine.submit(request, self.clock())

    def abort(self, request_id: str) -> None:
        self.engine.abort(request_id, self.clock())

    def release(self, session_id: str) -> None:
        self.engine.release(session_id, self.clock())

    def make_receiver(self, member: str) -> Any:
        """A receiver of weights; this engine's need no torch."""
        from weight_sync.transports.numpy_receiver import NumpyReceiver

        return NumpyReceiver(member)

    def stage_begin(self, version: int) -> None:
        self.engine.weights.begin(version)

    def stage_tensor(self, name: str, tensor: Any) -> None:
        self.engine.weights.take(name, tensor)

    def stage_end(self) -> None:
        self.engine.weights.end()

    def commit(self, version: int, kv: KvPolicy) -> int:
        return self.engine.commit(version, kv, self.clock())

    def pin(self, version: int) -> None:
        self.engine.weights.pin(version)

    def unpin(self, version: int) -> None:
        self.engine.unpin(version)

    def pause(self, mode: PauseMode) -> None:
        if mode is PauseMode.ABORT:
            self.engine.abort_all(self.clock())
        self.engine.pause(self.clock())

    def resume(self) -> None:
        self.engine.resume(self.clock())

    def health(self) -> EngineHealth:
        return self.engine.health(self.clock())


def build_driver(config: EnginesConfig, path: Path, version: int, lane: str | None = None) -> SyntheticDriver:
    """An engine over the model directory ``path``, whose weights count as ``version``. Raises SyntheticModelError."""
    config.validate()
    synthetic = config.synthetic
    engine = SyntheticEngine(
        CostModel.from_config(synthetic),
        synthetic.accelerators,
        config.max_len,
        read_vocabulary(path),
        VersionedWeights(read_weights(path), version),
        process_clock(),
        lane,
    )
    return SyntheticDriver(engine, process_clock)
