"""The plugin's part in seeded sampling, with CPU generators of torch and the shape of vLLM's runner around them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from weight_sync.engine_plugin.vllm_seeds import spare_generators


class Runner:
    """Samples as vLLM's runner does: every request draws, and generators of dropped samples are set back by offset."""

    def __init__(self, seeds: dict[int, int], requests: int) -> None:
        generators = {index: torch.Generator().manual_seed(seed) for index, seed in seeds.items()}
        self.input_batch = SimpleNamespace(num_reqs=requests, generators=generators)
        self.discard_request_mask = SimpleNamespace(np=np.zeros(8, bool))

    def sample_tokens(self, grammar: None) -> list[float]:
        batch = self.input_batch
        drawn = [float(torch.rand((), generator=batch.generators.get(index))) for index in range(batch.num_reqs)]
        for index in self.discard_request_mask.np[: batch.num_reqs].nonzero()[0]:
            if int(index) in batch.generators:
                batch.generators[int(index)].get_offset()
        return drawn


def test_a_dropped_sample_takes_nothing_from_its_generator() -> None:
    plain, spared = Runner({0: 5, 2: 6}, 3), Runner({0: 5, 2: 6}, 3)
    assert spare_generators(spared)
    spared.discard_request_mask.np[[0, 1, 7]] = True
    first = spared.sample_tokens(None)
    spared.discard_request_mask.np[:] = False
    second = spared.sample_tokens(None)
    expected = [plain.sample_tokens(None) for _ in range(2)]
    assert second[0] == expected[0][0]
    assert [first[2], second[2]] == [expected[0][2], expected[1][2]]


def test_without_it_a_dropped_sample_ends_the_server() -> None:
    """The defect that this is for; when torch or vLLM no longer has it, the module can go."""
    runner = Runner({0: 5}, 1)
    runner.discard_request_mask.np[0] = True
    with pytest.raises(RuntimeError, match="does not use offset"):
        runner.sample_tokens(None)


def test_generators_come_back_when_sampling_fails_and_it_is_installed_once() -> None:
    runner = Runner({0: 5}, 1)

    def failing(grammar: None) -> list[float]:
        assert not runner.input_batch.generators
        raise RuntimeError("no tokens today")

    runner.sample_tokens = failing  # type: ignore[method-assign]
    assert spare_generators(runner)
    assert not spare_generators(runner)
    runner.discard_request_mask.np[0] = True
    with pytest.raises(RuntimeError, match="no tokens today"):
        runner.sample_tokens(None)
    assert list(runner.input_batch.generators) == [0]
