"""How much of what an engine has to do: the part of its health that is read off the slots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.torch_engine.slot_table import SlotTable


def load_of(table: SlotTable, waiting: Iterable[GenerateRequest]) -> dict[str, Any]:
    """Fields of EngineHealth. A slot holds one session of any length, so the capacity is that many of the present mean length."""
    running, prompts = table.running, [len(request.prompt) for request in waiting]
    lacking = (table.length - table.kv_length)[running]
    prefilling = lacking > 1
    held = int(table.kv_length.sum())
    sessions = len(table.slot_of)
    return {
        "queued": len(prompts) + int(prefilling.sum()),
        "backlog_tokens": sum(prompts) + int(lacking[prefilling].sum()),
        "decoding": int(running.sum() - prefilling.sum()),
        "kv_capacity_tokens": table.slots * (held / sessions if held else table.max_len),
        "kv_running_tokens": int(table.kv_length[running].sum()),
        "kv_suspended_tokens": held - int(table.kv_length[running].sum()),
    }
