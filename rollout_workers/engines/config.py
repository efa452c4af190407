"""Settings of the inference engines (``engines:`` in a run's configuration)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from rollout_workers.disaggregation.config import HandoffConfig
from rollout_workers.disaggregation.roles import RolePolicy
from rollout_workers.engines.protocol import EngineRole
from rollout_workers.engines.sglang.config import SglangConfig
from rollout_workers.engines.sglang.disaggregation import check_split
from rollout_workers.engines.synthetic.config import SyntheticEngineConfig
from rollout_workers.engines.vllm.config import VllmConfig

KINDS = ("torch", "vllm", "sglang", "synthetic")
SERVERS = ("vllm", "sglang")
"""Engines that are servers in processes of their own."""
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class EnginesConfig:
    """Which engines a run starts, and how large each of them is."""

    kind: str = "torch"
    replicas: int = 1
    prefill: int = 0
    """Engines that only prefill; with ``decode`` > 0 this splits the two phases."""
    decode: int = 0
    roles: str = "fixed"
    handoff: HandoffConfig = field(default_factory=HandoffConfig)
    """How keys and values get from prefill to decode engines."""
    role_policy: RolePolicy = field(default_factory=RolePolicy)
    """When engines change their roles (``roles: auto``)."""
    park_mb: int = 0
    """Host memory (MiB an engine) for the KV of sessions between turns that have to leave their slot; 0: it is dropped."""
    slots: int = 160
    """Sequences whose KV an engine holds: requests in flight plus sessions that wait between turns."""
    max_len: int = 512
    """Tokens (prompt and generated) that a sequence may have."""
    prefill_tokens: int = 1024
    """Most prompt tokens computed in one step; longer prompts are split over several steps."""
    share_prefixes: bool = True
    """The embedded engine computes what the prompts of a group have in common once. Servers have a prefix cache."""
    stream_every: int = 16
    """A request reports its tokens at least this often, so that a lost engine loses at most as many."""
    threads: Optional[int] = None  # noqa: UP045
    """CPU threads of an engine; None leaves torch's own choice."""
    device: str = "auto"
    dtype: str = "auto"
    """Data type of weights and KV; ``auto`` is float32 on a CPU and bfloat16 on a GPU."""
    trace: bool = True
    """On a CPU, replay a trace of the model's forward pass (dense architectures) instead of running its Python."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """How ``kind: vllm`` starts its servers, or where they are."""
    sglang: SglangConfig = field(default_factory=SglangConfig)
    """The same for ``kind: sglang``."""
    synthetic: SyntheticEngineConfig = field(default_factory=SyntheticEngineConfig)
    """What ``kind: synthetic`` models."""

    @property
    def split(self) -> bool:
        """Whether prefill and decode run on engines of their own."""
        return self.prefill > 0 and self.decode > 0

    @property
    def count(self) -> int:
        """How many engines a run starts."""
        return self.prefill + self.decode if self.split else self.replicas

    def role_of(self, index: int) -> EngineRole:
        """What engine ``index`` begins as: the first ``prefill`` of a split prefill, the others decode."""
        if not self.split:
            return EngineRole.MIXED
        return EngineRole.PREFILL if index < self.prefill else EngineRole.DECODE

    def validate(self) -> None:
        """Raise ValueError, naming the key and what it may be, if any setting is out of range."""
        _one_of("engines.kind", self.kind, KINDS)
        _one_of("engines.device", self.device, DEVICES)
        _one_of("engines.dtype", self.dtype, DTYPES)
        _one_of("engines.roles", self.roles, ("fixed", "auto"))
        self._validate_split()
        for name in ("replicas", "slots", "prefill_tokens", "stream_every"):
            _at_least(f"engines.{name}", getattr(self, name), 1)
        _at_least("engines.max_len", self.max_len, 2)
        if self.threads is not None:
            _at_least("engines.threads", self.threads, 1)
        if self.kind == "synthetic":
            self._validate_synthetic()
        if self.kind in SERVERS:
            self._validate_server()

    def _validate_server(self) -> None:
        settings = self.vllm if self.kind == "vllm" else self.sglang
        settings.validate()
        if settings.urls and len(settings.urls) != self.count:
            raise ValueError(
                f"engines.{self.kind}.urls names {len(settings.urls)} servers for {self.count} engines: give one for each, or "
                f"set engines.replicas={len(settings.urls)}"
            )
        if settings.urls and len(set(settings.urls)) < len(settings.urls):
            raise ValueError(f"engines.{self.kind}.urls names a server twice: each engine needs one of its own")
        if self.kind == "sglang":
            check_split(self.sglang.args, self.prefill, self.decode)
        if not self.split:
            return
        counts = f"engines.prefill={self.prefill}, engines.decode={self.decode}"
        if self.kind != "vllm":
            raise ValueError(
                f"{counts}: runs split prefill and decode of the kinds torch, synthetic and vllm; set both to 0 for "
                f"{self.kind}, and choose engines.replicas"
            )
        if self.roles == "auto":
            raise ValueError(f"engines.roles=auto: the roles of {self.kind} servers do not change; set it to fixed")
        if settings.urls:
            raise ValueError(
                f"engines.{self.kind}.urls: servers that prefill or decode are started by the run ({counts})"
            )

    def _validate_split(self) -> None:
        counts = f"engines.prefill={self.prefill}, engines.decode={self.decode}"
        if self.prefill < 0 or self.decode < 0 or (self.prefill > 0) != (self.decode > 0):
            raise ValueError(f"{counts}: set both to at least 1 (split), or both to 0 and choose engines.replicas")
        if self.split and self.replicas != 1:
            raise ValueError(
                f"engines.replicas={self.replicas} counts engines that do both phases, and {counts} splits them: leave "
                "engines.replicas at 1"
            )
        if self.roles == "auto" and not self.split:
            raise ValueError(f"engines.roles=auto changes the roles of a split, and {counts}: set both to at least 1")
        _at_least("engines.park_mb", self.park_mb, 0)
        self.handoff.validate()
        self.role_policy.validate()

    def _validate_synthetic(self) -> None:
        synthetic = self.synthetic
        synthetic.validate()
        if self.max_len * synthetic.token_scale > synthetic.kv_tokens:
            raise ValueError(
                f"engines.max_len={self.max_len} carried tokens stand for {self.max_len * synthetic.token_scale:.0f}, more "
                f"than the KV of an accelerator (engines.synthetic.kv_tokens={synthetic.kv_tokens}): lower engines.max_len "
                "or give it more"
            )


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key}={value}: must be one of {', '.join(allowed)}")


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{key}={value}: must be at least {least}")
