"""The embedded engine: continuous batching of Hugging Face causal LMs on a CPU or a GPU, without a server."""

from rollout_workers.engines.torch_engine.async_engine import AsyncTorchEngine, EngineFailedError
from rollout_workers.engines.torch_engine.engine import TorchEngine, build_engine
from rollout_workers.engines.torch_engine.loader import ModelError, load_model
from rollout_workers.engines.torch_engine.weights import WeightError

__all__ = [
    "AsyncTorchEngine",
    "EngineFailedError",
    "ModelError",
    "TorchEngine",
    "WeightError",
    "build_engine",
    "load_model",
]
