"""What is set of every kind of server (``engines.vllm``, ``engines.sglang``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Dict, List, Optional  # noqa: UP035  (OmegaConf reads these annotations)

from rollout_workers.engines.servers.arguments import check_arguments


@dataclass
class ServerConfig:
    """How servers of one kind are started, or where they are."""

    args: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006
    """Passed through: ``tensor_parallel_size: 2`` becomes ``--tensor-parallel-size 2``; true is a flag, null leaves a default out."""
    urls: List[str] = field(default_factory=list)  # noqa: UP006
    """Servers that run already, one for each replica, instead of ones that the run starts."""
    python: Optional[str] = None  # noqa: UP045
    """Interpreter of the environment that holds the engine; None: ``.venv-KIND`` beside the repository (`make engines`)."""
    startup_timeout_s: float = 600.0
    """Until a started server must answer, in seconds."""
    request_timeout_s: float = 120.0
    """Longest silence of a server during a call, in seconds."""
    env: Dict[str, str] = field(default_factory=dict)  # noqa: UP006
    """Environment variables of the servers, over those that Millrace sets."""

    kind: ClassVar[str]
    owned: ClassVar[Mapping[str, str]]
    """Arguments that Millrace sets itself, with what to do instead."""

    def validate(self) -> None:
        """Raise ValueError, naming the key and what would be right."""
        section = f"engines.{self.kind}"
        check_arguments(f"{section}.args", self.args, self.owned)
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{section}.urls: {url!r} is no address; write http://host:port")
        for name in ("startup_timeout_s", "request_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{section}.{name}={getattr(self, name)}: must be greater than 0 (seconds)")
