"""AdamW (or plain SGD) over a Megatron-Core model: gradients summed over all ranks, divided once, skipped by all ranks alike."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from learner.backends.megatron.cpu import cuda_tensor_types
from learner.backends.megatron.parallel import Ranks
from learner.config import LearnerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class ModelOptimizer:
    """Wraps ``stage`` (a `GPTModel`, or one in a `Float16Module`) for gradient sums and holds its optimizer.

    Weights that are not float32 have float32 ones beside them, which are what is updated and saved.
    """

    def __init__(self, stage: Any, transformer: Any, ranks: Ranks, config: LearnerConfig) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self._ranks, self._config = ranks, config
        self._distributed = config.megatron.distributed_optimizer
        bf16 = transformer.params_dtype is torch.bfloat16
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=self._distributed
        )
        self.model: Any = DistributedDataParallel(transformer, settings, stage)
        with cuda_tensor_types():
            self._optimizer: Any = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="sgd" if config.optimizer == "sgd" else "adam",
                    sgd_momentum=0.0,
                    lr=config.lr,
                    min_lr=0.0,
                    weight_decay=config.weight_decay,
                    adam_beta1=config.betas[0],
                    adam_beta2=config.betas[1],
                    bf16=bf16,
                    params_dtype=transformer.params_dtype,
                    use_distributed_optimizer=self._distributed,
                    clip_grad=0.0,
                ),
                [self.model],
                config_overrides={},  # every weight decays alike
                use_gloo_process_groups=False,
            )
        self.discard_gradient()

    def discard_gradient(self) -> None:
        self.model.zero_grad_buffer()
        self._optimizer.zero_grad()

    def step(self, normaliser: float, learning_rate: float) -> float | None:
        """Gradient sums over ``normaliser``, clipped; returns the norm before. None: it was not finite, nothing was changed."""
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads([self.model])
        self.model.scale_gradients(1.0 / normaliser)
        self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(norm):
            self.discard_gradient()
            return None
        limit = self._config.clip_grad
        if 0 < limit < norm:
            gradients = [p.grad for part in self._parts() for p in part.get_parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, limit / norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step_with_ready_grads()
        self.discard_gradient()
        return norm

    def gradient_is_finite(self) -> bool:
        """Whether the gradients of all ranks so far are; all of them ask together."""
        bad = torch.zeros((), device=next(self.model.parameters()).device)
        for parameter in self.model.parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None:
                bad += (~torch.isfinite(gradient)).any()
        dist.all_reduce(bad)
        return float(bad) == 0.0

    # One parameter at a time: what the optimizer holds of it, whole on this rank

    def weight(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Its float32 value. All data-parallel ranks must call this at once."""
        main = self._main(parameter)
        if main is None and parameter.dtype is torch.float32:
            return parameter.detach()
        return self._whole(parameter, main)

    def set_weight(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """The inverse of `weight` for a parameter that is not float32: the tensor beside it, or this rank's share."""
        main = self._main(parameter)
        if main is not None:
            start, end = self._range(parameter)
            main.detach().copy_(value.flatten()[start:end].reshape(main.shape))

    def moment(self, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
        """``exp_avg`` or ``exp_avg_sq``, float32, of the parameter's shape, after the first update. As `weight`, together."""
        state = self._state(parameter)
        return self._whole(parameter, None if state is None else state.get(kind))

    def set_state(self, parameter: torch.nn.Parameter, moments: dict[str, torch.Tensor], updates: int) -> None:
        """The inverse: moments of the parameter's shape; of a distributed optimizer this rank keeps its share."""
        key = self._key(parameter)
        if key is None:
            return
        start, end = self._range(parameter)
        kept = {kind: value.flatten()[start:end].reshape(key.shape).clone() for kind, value in moments.items()}
        step = torch.tensor(float(updates), device="cpu")
        self._owner(parameter).optimizer.state[key] = {"step": step, **kept}

    def clear_state(self) -> None:
        for part in self._parts():
            part.optimizer.state.clear()

    def _parts(self) -> list[Any]:
        return [part for part in self._optimizer.chained_optimizers if not part.is_stub_optimizer]

    def _owner(self, parameter: torch.nn.Parameter) -> Any:
        """The optimizer of the parameter: experts have one of their own."""
        expert = not getattr(parameter, "allreduce", True)
        for part in self._parts():
            if part.param_groups and bool(part.param_groups[0]["is_expert_parallel"]) == expert:
                return part
        raise KeyError("no optimizer holds this parameter")

    def _range(self, parameter: torch.nn.Parameter) -> tuple[int, int]:
        """Which elements of the parameter this rank's optimizer holds."""
        if not self._distributed:
            return 0, parameter.numel()
        try:
            found = self._owner(parameter)._get_model_param_range_map(parameter)["param"]
        except KeyError:
            return 0, 0
        return found.start, found.end

    def _main(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """The float32 tensor beside a parameter that is not; of a distributed optimizer this rank's share."""
        main: torch.Tensor | None = getattr(parameter, "main_param", None)
        return main

    def _key(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """What the inner optimizer knows this parameter as; None if another rank has it."""
        if not self._distributed:
            main = self._main(parameter)
            return parameter if main is None else main
        start, end = self._range(parameter)
        if start == end:
            return None
        owner = self._owner(parameter)
        group, order = owner.model_param_group_index_map[parameter]
        key: torch.Tensor = owner.optimizer.param_groups[group]["params"][order]
        return key

    def _state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor] | None:
        key = self._key(parameter)
        return None if key is None else self._owner(parameter).optimizer.state.get(key)

    def _whole(self, parameter: torch.nn.Parameter, part: torch.Tensor | None) -> torch.Tensor:
        """A tensor of the parameter's shape from what the data-parallel ranks hold of it."""
        if not self._distributed:
            assert part is not None, "the optimizer has no state of a parameter that it updates"
            return part.detach().reshape(parameter.shape)
        found = torch.zeros(parameter.numel(), device=parameter.device)
        if part is not None:
            start, end = self._range(parameter)
            found[start:end] = part.detach().flatten()
        expert = not getattr(parameter, "allreduce", True)
        dist.all_reduce(found, group=self._ranks.expert_data_group if expert else self._ranks.data_group)
        return found.view(parameter.shape)
