"""Small models of every architecture that Megatron-Core trains, and ranks that are told anew how to divide one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from learner_fixtures import VOCABULARY

from learner.backends.megatron.settings import MegatronConfig
from learner.backends.rank_actor import RankActor, RankSettings
from learner.backends.rank_group import RankGroup
from learner.config import LearnerConfig, ModelConfig
from learner.learner import Learner

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe")
SHAPE = {
    "vocab_size": VOCABULARY + 3,  # tensor parallelism has to pad it
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA_ROTARY = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_model_of(architecture: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Norms and biases are random, too: at their initial value a wrong one would not show."""
    import transformers as hf

    shape = {**SHAPE, **changes}
    torch.manual_seed(seed)
    model: Any
    if architecture == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**shape, rope_parameters=LLAMA_ROTARY))
    elif architecture == "qwen2":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**{"tie_word_embeddings": True, **shape}))
    elif architecture == "qwen3":
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**shape, head_dim=16))
    else:
        model = hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(
                **shape, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True
            )
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


class ReusedRank(RankActor):
    """A rank that outlives its learner, so that a process is started once for all tests of a module."""

    def configure(self, settings: RankSettings) -> None:
        self._settings = settings
        self._backend = None

    def join(self, address: str) -> None:
        if not torch.distributed.is_initialized():
            super().join(address)

    def do(self, function: Callable[[Any], Any]) -> Any:
        """Whatever ``function`` does with the backend."""
        return function(self._backend)


class Ranks:
    """``world`` processes, each with a GPU of its own where ``device`` is ``cuda``."""

    def __init__(self, world: int, timeout_s: float = 180.0, device: str = "cpu") -> None:
        kind = ray.remote(ReusedRank).options(num_cpus=0, num_gpus=int(device == "cuda"))
        self._timeout_s, self._device = timeout_s, device
        settings = RankSettings(0, world, LearnerConfig(device=device), "float32", 1, 1, timeout_s)
        self.actors: Sequence[Any] = [kind.remote(settings) for _ in range(world)]

    def group(self, dtype: str = "float32", **settings: Any) -> RankGroup:
        """Settings of `LearnerConfig`; those of `MegatronConfig` go by its names."""
        config = self.config(**settings)
        world = len(self.actors)
        calls = [
            actor.configure.remote(RankSettings(rank, world, config, dtype, 1, 1, self._timeout_s))
            for rank, actor in enumerate(self.actors)
        ]
        ray.get(calls, timeout=self._timeout_s)
        return RankGroup(self.actors, config, self._timeout_s)

    def learner(self, directory: Path, dtype: str = "float32", **settings: Any) -> Learner:
        config = self.config(**settings)
        model = ModelConfig(dtype=dtype)
        learner = Learner(config, model, max_lag=4, seed=1, group=self.group(dtype, **settings), initial=directory)
        learner.load(directory)
        return learner

    def do(self, function: Callable[[Any], Any]) -> list[Any]:
        return list(ray.get([actor.do.remote(function) for actor in self.actors], timeout=self._timeout_s))

    def config(self, **settings: Any) -> LearnerConfig:
        names = vars(MegatronConfig())
        division = {name: settings.pop(name) for name in list(settings) if name in names}
        return LearnerConfig(
            backend="megatron",
            ranks=len(self.actors),
            warm_up_steps=0,
            device=self._device,
            megatron=MegatronConfig(**division),
            **settings,
        )
