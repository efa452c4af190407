"""How many bytes versions take as changes: real steps of Adam on a real small model, every version compared bit for bit."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ChangesPlan:
    """``steps`` updates at ``lr`` with float32 masters; the wire is bfloat16. ``warm_up`` updates at 1e-3 come before."""

    steps: int = 200
    lr: float = 1e-6
    warm_up: int = 20
    hidden: int = 192
    layers: int = 4
    snapshot_every: int = 50
    transport: str = "shared_memory"
    seed: int = 0


def measure_changes(plan: ChangesPlan) -> dict[str, Any]:
    """Bytes that an engine got, offers included, against whole versions; and how many versions differed in any bit."""
    import torch

    from weight_sync.config import WeightsConfig
    from weight_sync.transports.select import AnyReceiver, make_sender
    from weight_sync.wire_dtypes import on_the_wire

    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    model = _model(plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(plan.warm_up):
        _step(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = plan.lr
    config = WeightsConfig(delta=True, delta_snapshot_every=plan.snapshot_every, dtype="bfloat16")
    moved, whole, wrong, changes, snapshots = 0, 0, 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="millrace-weights-") as directory:
        sender: Any = make_sender(config, plan.transport, disk_directory=Path(directory))
        receiver, served = AnyReceiver("engine"), dict[str, Any]()
        for version in range(1, plan.steps + 1):
            _step(model, optimizer)
            sender.prepare(version, on_the_wire(model.named_parameters(), config.dtype), [])
            offer = sender.offer(["engine"])
            receiver.fetch(offer, lambda name, tensor: served.__setitem__(name, tensor.clone()))
            wrong += any(
                not torch.equal(served[name].view(torch.int16), p.detach().to(torch.bfloat16).view(torch.int16))
                for name, p in model.named_parameters()
            )
            size = sum(tensor.nbytes for tensor in served.values())
            is_whole = sender.moved_bytes >= size
            snapshots += is_whole
            whole += size
            moved += sender.moved_bytes + len(offer)
            changes += 0 if is_whole else sender.moved_bytes
        receiver.close()
        sender.close()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "version_bytes": whole // plan.steps,
        "snapshots": snapshots,
        "change_bytes_mean": round(changes / max(1, plan.steps - snapshots)),
        "moved_bytes": moved,
        "fewer": round(whole / moved, 2),
        "versions_not_bit_exact": wrong,
    }


def _model(plan: ChangesPlan) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=plan.hidden,
        num_hidden_layers=plan.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=plan.hidden // 4,
        intermediate_size=2 * plan.hidden,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config).train()


def _step(model: Any, optimizer: Any) -> None:
    """On fresh random sequences that repeat themselves, so that there is something to learn."""
    import torch

    half = torch.randint(0, 1024, (4, 24))
    tokens = torch.cat([half, half], dim=1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
