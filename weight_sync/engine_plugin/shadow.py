"""A fetched version beside the one that is served.

`Shadow.begin` returns at once; a thread fetches. What it holds is complete or nothing: `Shadow.take` gives all tensors of
a version whose bytes have all arrived and passed the transport's own checks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

import torch

from weight_sync.base_weights import BaseWeights
from weight_sync.engine_plugin.checkpoint import takes_fp8
from weight_sync.errors import WeightTransferError
from weight_sync.transports.protocol import CollectiveOffer, carriers, decode_offer

logger = logging.getLogger(__name__)


class Phase(StrEnum):
    EMPTY = "empty"
    FETCHING = "fetching"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class StageState:
    """What a shadow holds or is about to hold."""

    phase: Phase = Phase.EMPTY
    version: int | None = None
    error: str = ""


class Fetcher(Protocol):
    def fetch(self, offer: bytes, on_tensor: Callable[[str, Any], None]) -> int: ...

    def close(self) -> None: ...


class Shadow:
    """Host memory for one version. ``make_fetcher(member, device)`` makes the receiving end of the transports."""

    def __init__(
        self, make_fetcher: Callable[[str, torch.device], Fetcher], *, device: torch.device | str = "cpu"
    ) -> None:
        self._make_fetcher = make_fetcher
        self._device = torch.device(device)
        self._fetchers: dict[tuple[str, torch.device], Fetcher] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._names: list[str] = []
        self._state = StageState()
        self._thread: threading.Thread | None = None
        self._turn = 0
        self._lock = threading.Lock()

    @property
    def state(self) -> StageState:
        return self._state

    def begin(self, offer: bytes, member: str) -> int:
        """Start to fetch an offered version; what was staged before is forgotten. Returns the version.

        Raises WeightTransferError for anything but an offer.
        """
        decoded = decode_offer(offer)
        version = decoded.manifest.version
        on_device = any(isinstance(each, CollectiveOffer) and each.backend == "nccl" for each in carriers(offer))
        device = self._device if on_device else torch.device("cpu")
        with self._lock:
            self._turn += 1
            before, turn = self._thread, self._turn
            self._state = StageState(Phase.FETCHING, version)
            self._thread = threading.Thread(
                target=self._fetch, args=(turn, before, offer, member, device), name=f"stage-{version}", daemon=True
            )
            self._thread.start()
        return version

    def take(self, version: int) -> list[tuple[str, torch.Tensor]]:
        """All tensors of the staged version, by Hugging Face name; valid until the next `begin`.

        Raises WeightTransferError if this version is not completely staged.
        """
        state = self._state
        if state.phase is not Phase.READY or state.version != version:
            held = f"version {state.version} is {state.phase}" if state.version is not None else "none was offered"
            raise WeightTransferError(f"version {version} is not staged: {held}{state.error and ': ' + state.error}")
        return [(name, self._tensors[name]) for name in self._names]

    def wait(self, timeout_s: float) -> StageState:
        """The state once the fetch under way has ended. Raises WeightTransferError if it takes longer."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
            if thread.is_alive():
                raise WeightTransferError(f"version {self._state.version} was not fetched within {timeout_s:g} s")
        return self._state

    def close(self) -> None:
        """Let go of mapped files and process groups."""
        while self._fetchers:
            self._fetchers.popitem()[1].close()

    def _fetch(
        self, turn: int, before: threading.Thread | None, offer: bytes, member: str, device: torch.device
    ) -> None:
        if before is not None:
            before.join()  # bounded by the time-out of its transport; two must not fill the same memory
        names: list[str] = []
        try:
            if turn != self._turn:
                return
            version = self._fetcher(member, device).fetch(offer, lambda name, tensor: self._keep(names, name, tensor))
            state = StageState(Phase.READY, version)
        except Exception as error:
            logger.warning("staging failed", exc_info=True)
            state = StageState(Phase.FAILED, decode_offer(offer).manifest.version, f"{type(error).__name__}: {error}")
        with self._lock:
            if turn == self._turn:
                self._names, self._state = names, state

    def _fetcher(self, member: str, device: torch.device) -> Fetcher:
        key = (member, device)
        if key not in self._fetchers:
            self._fetchers[key] = self._make_fetcher(member, device)
        return self._fetchers[key]

    def _keep(self, names: list[str], name: str, tensor: torch.Tensor) -> None:
        held = self._tensors.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            pinned = self._device.type == "cuda"
            held = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
            self._tensors[name] = held
        with torch.no_grad():
            held.copy_(tensor)
        names.append(name)


def any_fetcher(member: str, device: torch.device, fp8: bool = False, base: BaseWeights | None = None) -> Fetcher:
    """The receiver that understands every transport's offers; see `AnyReceiver` for ``fp8`` and ``base``."""
    from weight_sync.transports.select import AnyReceiver

    return AnyReceiver(member, device=device, fp8=fp8, base=base)


def fetcher_for(
    expected: Mapping[str, tuple[int, ...]] | None, base: BaseWeights | None = None
) -> Callable[[str, torch.device], Fetcher]:
    """What fetches for a model with these tensors: in 8 bits if the model has them so, adapters merged into ``base``."""
    return partial(any_fetcher, fp8=takes_fp8(expected), base=base)
