"""Seeded requests whose prompt takes several steps, in a vLLM worker on a CPU.

A step samples for every request, also for one of whose prompt only a part is computed; that sample is dropped and the
request's generator is set back by its offset. Generators of a CPU have none, and vLLM 0.32.0 ends with "CPU Generator does
not use offset". It meets every prompt that is longer than what a step takes, and every request whose KV is computed again.
So a request whose sample will be dropped is sampled without its generator, which then need not be set back.
"""

from __future__ import annotations

import functools
from typing import Any


def spare_generators(model_runner: Any) -> bool:
    """Have a worker's ``model_runner`` draw from a request's generator only what is kept. False if it does already."""
    sample = model_runner.sample_tokens
    if getattr(sample, "spares_generators", False):
        return False

    @functools.wraps(sample)
    def spared(*args: Any, **kwargs: Any) -> Any:
        batch = model_runner.input_batch
        dropped = model_runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        held = {index: batch.generators.pop(index) for index in dropped if index in batch.generators}
        try:
            return sample(*args, **kwargs)
        finally:
            batch.generators.update(held)

    spared.spares_generators = True  # type: ignore[attr-defined]
    model_runner.sample_tokens = spared
    return True
