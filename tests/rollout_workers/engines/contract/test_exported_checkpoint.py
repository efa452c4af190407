"""What `millrace export` writes is a directory that vLLM and SGLang serve as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from contract_engine import Engine, require_environment
from contract_model import prompt, write_model
from learner_fixtures import make_groups, make_learner, train_step
from transformers import AutoModelForCausalLM

from learner.export import export_checkpoint

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900), pytest.mark.engines]


def logprobs(model: Any, given: npt.NDArray[np.int32], sampled: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    whole = torch.from_numpy(np.concatenate([given, sampled]).astype(np.int64))
    with torch.no_grad():
        logp = torch.log_softmax(model(whole[None], use_cache=False).logits[0].double(), dim=-1)
    found: npt.NDArray[np.float64] = logp[len(given) - 1 : -1].gather(1, whole[len(given) :, None])[:, 0].numpy()
    return found


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
async def test_an_engine_serves_an_exported_checkpoint(kind: str, tmp_path: Path) -> None:
    require_environment(kind)
    write_model(tmp_path / "model")
    learner = make_learner(tmp_path / "model", lr=1e-2)
    train_step(learner, make_groups(3))
    export_checkpoint(learner.save(tmp_path / "checkpoints"), tmp_path / "exported")
    before, trained = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("model", "exported"))
    engine = await Engine.start(kind, tmp_path / "exported", tmp_path)
    try:
        given = prompt(20, seed=0)
        answer = await engine.one(given, 16, seed=0)
        np.testing.assert_allclose(answer.logprobs, logprobs(trained, given, answer.tokens), atol=1e-3)
        assert np.abs(answer.logprobs - logprobs(before, given, answer.tokens)).max() > 1e-2
    finally:
        await engine.stop()
