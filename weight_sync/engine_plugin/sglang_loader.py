"""Millrace's side of a weight update inside SGLang's scheduler process.

SGLang calls `load` as a custom weight loader (``--custom-weight-loader``). With the command ``attach`` the model's
``get_weights_by_name`` begins to answer to Millrace's commands as well (`sglang_messages`), so that a version is fetched
while requests go on; with ``commit`` the fetched tensors go into the model. Every rank of a tensor-parallel server
attaches and stages by itself and loads its own part of each tensor, as SGLang's models do with whole tensors.

SGLang takes an exception in here as its own end. So everything that can be wrong with an offer is found while it is
staged and told in answers; what fails at the commit leaves the weights in an unknown state, and there the end is right.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from weight_sync.base_weights import BaseWeights
from weight_sync.engine_plugin.checkpoint import Shapes, arriving, checkpoint_shapes, misfit, tied
from weight_sync.engine_plugin.sglang_messages import (
    MODEL_PATH,
    Command,
    PluginState,
    decode_command,
    encode_state,
    is_command,
)
from weight_sync.engine_plugin.sglang_sampling import BATCHES, SAMPLER, install
from weight_sync.engine_plugin.shadow import Phase, Shadow, fetcher_for
from weight_sync.errors import WeightTransferError
from weight_sync.transports.protocol import decode_offer

logger = logging.getLogger(__name__)

_PLUGIN = "_millrace_plugin"


class SchedulerPlugin:
    """What is staged beside one model, and the answers about it."""

    def __init__(
        self,
        model: Any,
        shadow: Shadow,
        expected: Shapes | None,
        head_is_tied: bool,
        base: BaseWeights | None = None,
    ) -> None:
        self._model, self._shadow, self._base = model, shadow, base
        self._expected, self._head_is_tied = expected, head_is_tied

    def answer(self, command: Command) -> PluginState:
        """Do what does not touch the model, and say how far the staging is. Never raises."""
        try:
            if command.kind == "stage":
                self._stage(command)
            elif command.kind == "expect":
                self._shadow.take(command.version)
            elif command.kind != "state":
                return PluginState(error=f"{command.kind} cannot be asked for here")
        except Exception as error:
            logger.warning("%s of weights refused", command.kind, exc_info=True)
            return PluginState(version=command.version, error=str(error))
        return self._state()

    def commit(self, version: int) -> None:
        """Load the staged version into the model. Raises WeightTransferError if it is not staged."""
        tensors = self._shadow.take(version)
        with torch.no_grad():
            self._model.load_weights(tensors)

    def close(self) -> None:
        """Let go of mapped files and process groups."""
        self._shadow.close()

    def _stage(self, command: Command) -> None:
        manifest = arriving(decode_offer(command.offer).manifest, self._expected, self._base)
        reason = misfit(manifest, self._expected, self._head_is_tied) if self._expected is not None else None
        if reason is not None:
            raise WeightTransferError(reason)
        self._shadow.begin(command.offer, command.member)

    def _state(self) -> PluginState:
        state = self._shadow.state
        version = -1 if state.version is None else state.version
        return PluginState(version=version, staging=state.phase is Phase.FETCHING, error=state.error)


def load(model: Any, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """SGLang's custom weight loader: the name of the only tensor is a command of Millrace's.

    Raises ValueError for anything else, WeightTransferError for a version that is not staged.
    """
    command = decode_command(named_tensors[0][0])
    if command.kind == "attach":
        _install_sampling()
        attach(model, os.environ.get(MODEL_PATH, ""))
    elif command.kind == "commit":
        plugin_of(model).commit(command.version)
    else:
        raise ValueError(f"{command.kind} is no command for a weight loader")


def _install_sampling() -> None:
    """In a process without SGLang's sampler there is nothing to do."""
    sampler, batches = sys.modules.get(SAMPLER), sys.modules.get(BATCHES)
    if sampler is not None and batches is not None:
        install(sampler, batches)


def attach(model: Any, model_path: str) -> None:
    """Let ``model`` answer to Millrace's commands. Once is enough; again does no harm.

    Versions must have the tensors that ``model_path`` holds; with "" SGLang alone decides what it can load.
    """
    if getattr(model, _PLUGIN, None) is not None:
        return
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    expected = checkpoint_shapes(model_path) if model_path else None
    base = None if expected is None else BaseWeights(model_path)
    shadow = Shadow(fetcher_for(expected, base), device=device)
    plugin = SchedulerPlugin(model, shadow, expected, bool(model_path) and tied(model_path), base)
    # Past nn.Module's own bookkeeping: the plugin is no part of the model.
    object.__setattr__(model, _PLUGIN, plugin)
    original = getattr(model, "get_weights_by_name", None)

    def get_weights_by_name(name: str, *arguments: Any, **named: Any) -> Any:
        if is_command(name):
            return encode_state(plugin.answer(decode_command(name)))
        if original is None:
            raise AttributeError(f"{type(model).__name__} does not give its weights by name")
        return original(name, *arguments, **named)

    object.__setattr__(model, "get_weights_by_name", get_weights_by_name)
    logger.info("Millrace's weight updates: attached to %s on %s", type(model).__name__, device)


def plugin_of(model: Any) -> SchedulerPlugin:
    """Raises WeightTransferError if `attach` has not been called."""
    plugin = getattr(model, _PLUGIN, None)
    if plugin is None:
        raise WeightTransferError("Millrace's plugin is not attached to this model")
    found: SchedulerPlugin = plugin
    return found
