"""What Megatron-Core 0.16 needs to run without a GPU: it asks for CUDA devices and streams by name in places where any would do.

Global to the process, and untrue of it: only for ranks that train on a CPU. With a GPU nothing is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

CPU = torch.device("cpu")
FACTORIES = ("zeros", "ones", "empty", "full", "tensor")
"""Functions of torch that Megatron-Core calls with ``device="cuda"``."""

_replaced: list[tuple[Any, str, Any, Any]] = []
"""Where, which name, what was there, what is there now."""


class _Stream:
    """Stands for a CUDA stream: on a CPU everything has happened when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        del other

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        return None


def make_cpu_ready() -> None:
    """Call before Megatron-Core is imported. Does nothing where there is a GPU, or the second time."""
    if _replaced or torch.cuda.is_available():
        return
    _replace(torch.cuda, "current_device", lambda: CPU)
    _replace(torch.cuda, "synchronize", lambda *_, **__: None)
    _replace(torch.cuda, "Stream", _Stream)
    _replace(torch.cuda, "current_stream", _Stream)
    _replace(torch.Tensor, "cuda", lambda self, *_, **__: self)
    for name in FACTORIES:
        _replace(torch, name, _on_cpu(getattr(torch, name)))


def _replace(owner: Any, name: str, new: Any) -> None:
    _replaced.append((owner, name, getattr(owner, name), new))
    setattr(owner, name, new)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Meanwhile torch is as it was: for loading Hugging Face models, whose buffers were left unset with other functions in its place."""
    for owner, name, old, _ in _replaced:
        setattr(owner, name, old)
    try:
        yield
    finally:
        for owner, name, _, new in _replaced:
            setattr(owner, name, new)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


def make_experts_ready() -> None:
    """Call before a layer with experts is built.

    Without TransformerEngine the router asks whether a name is None that is then not defined at all; and without a GPU the numbers of
    tokens that go to each expert stay tensors where a collective wants plain numbers.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not torch.cuda.is_available():
        token_dispatcher.maybe_move_tensor_to_cpu = _as_numbers


def _as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    del record_stream
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


@contextmanager
def cuda_tensor_types() -> Iterator[None]:
    """Meanwhile ``tensor.type()`` names CPU tensors as CUDA ones: Megatron-Core's optimizers tell dtypes by that name."""
    if torch.cuda.is_available():
        yield
        return
    plain = torch.Tensor.type

    def renamed(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = plain(tensor, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    patched: Any = torch.Tensor
    patched.type = renamed
    try:
        yield
    finally:
        patched.type = plain
