"""What `millrace export` writes is a directory that vLLM and SGLang serve as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from contract_engine import Engine, require_environment
from contract_model import logprobs, prompt, write_model
from learner_fixtures import make_groups, make_learner, train_step
from transformers import AutoModelForCausalLM

from learner.export import export_checkpoint

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900), pytest.mark.engines]


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
