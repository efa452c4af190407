"""The same paths as on the CPU, on CUDA: skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    from orchestrator.recipes.shop_small.build import make_model
    from orchestrator.recipes.shop_small.vocabulary import save_tokenizer

    save_tokenizer(tmp_path)
    make_model(0).save_pretrained(tmp_path)
    return tmp_path


def test_the_engines_log_probabilities_are_those_of_a_plain_forward(model_directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    from rollout_workers.engines.config import EnginesConfig
    from rollout_workers.engines.protocol import GenerateRequest
    from rollout_workers.engines.torch_engine import build_engine

    engine = build_engine(EnginesConfig(device="cuda", max_len=96, slots=16), model_directory, "float32")
    prompts = [list(range(3, 3 + length)) for length in (4, 9, 17, 30)]
    for index, prompt in enumerate(prompts):
        engine.submit(
            GenerateRequest(
                request_id=str(index),
                session_id=str(index),
                prompt=np.asarray(prompt, np.int32),
                max_tokens=8 + 4 * index,
                seed=index,
            )
        )
    tokens: dict[str, list[int]] = {str(i): [] for i in range(4)}
    logprobs: dict[str, list[float]] = {str(i): [] for i in range(4)}
    while engine.has_work:
        for chunk in engine.step():
            tokens[chunk.request_id] += chunk.tokens.tolist()
            logprobs[chunk.request_id] += chunk.logprobs.tolist()
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).cuda().eval()
    for index, prompt in enumerate(prompts):
        sampled = tokens[str(index)]
        row = torch.tensor([prompt + sampled], device="cuda")
        with torch.no_grad():
            expected = torch.log_softmax(model(row).logits.float(), -1)[0, len(prompt) - 1 : -1]
        chosen = expected[torch.arange(len(sampled)), torch.tensor(sampled)].cpu()
        torch.testing.assert_close(torch.tensor(logprobs[str(index)]), chosen, atol=1e-3, rtol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs for two ranks")
def test_weights_travel_by_nccl(model_directory: Path) -> None:
    from weight_sync.transports.collective import CollectiveReceiver, CollectiveSender

    sender = CollectiveSender(host="127.0.0.1", device="cuda:0", bucket_bytes=1 << 20, timeout_s=60)
    receiver = CollectiveReceiver("engine", device="cuda:1")
    weights = {"a": torch.randn(1000, 33, device="cuda:0"), "b": torch.randn(7, device="cuda:0")}
    offer = sender.prepare(3, weights.items(), ["engine"])
    received: dict[str, torch.Tensor] = {}
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        fetch = pool.submit(receiver.fetch, offer, lambda name, tensor: received.update({name: tensor.cpu().clone()}))
        sender.send()
        assert fetch.result(60) == 3
    for name, tensor in weights.items():
        assert torch.equal(received[name], tensor.cpu())
    receiver.close()
    sender.close()


def test_shared_prefixes_by_flex_attention_give_the_plain_loss_and_gradient(model_directory: Path) -> None:
    from learner.backends.fsdp import FsdpBackend
    from learner.batching import Sample, collate
    from learner.config import LearnerConfig
    from learner.prefix_tree import ALWAYS

    rng = np.random.default_rng(0)
    prompt = rng.integers(3, 60, 300)
    samples = []
    for index, length in enumerate((200, 150, 90, 31)):
        tokens = np.concatenate([prompt, rng.integers(3, 60, length)]).astype(np.int32)
        positions = np.arange(len(prompt), len(tokens) - 1)
        samples.append(
            Sample(
                trajectory_id=str(index),
                group_id="g",
                inputs=tokens[:-1],
                positions=positions,
                targets=tokens[positions + 1].astype(np.int64),
                behaviour=np.full(len(positions), -4.0, np.float32),
                lags=np.zeros(len(positions), np.int64),
                advantage=float((-1) ** index),
                temperature=1.0,
            )
        )
    config = LearnerConfig(device="cuda")
    found = []
    for sharing in (ALWAYS, None):
        backend = FsdpBackend(model_directory, config)
        sums = backend.forward_backward(collate(samples, "token", backend.device, sharing=sharing), config).sums
        found.append((sums.loss, {name: p.grad for name, p in backend._parameters.items() if p.grad is not None}))
    (shared_loss, shared), (plain_loss, plain) = found
    assert shared_loss == pytest.approx(plain_loss, rel=1e-4)
    for name, gradient in plain.items():
        torch.testing.assert_close(shared[name], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()), msg=name)
