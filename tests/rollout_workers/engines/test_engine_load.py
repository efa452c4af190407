"""What the embedded engine tells of its load: prompts to compute, sequences that decode, KV by who holds it."""

from __future__ import annotations

import numpy as np

from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.torch_engine.load import load_of
from rollout_workers.engines.torch_engine.slot_table import SlotTable


def request(name: str, prompt: int) -> GenerateRequest:
    return GenerateRequest(
        request_id=name, session_id=name, prompt=np.arange(prompt, dtype=np.int32) + 1, max_tokens=10
    )


def test_an_idle_engine_has_nothing_to_do_and_all_its_room() -> None:
    load = load_of(SlotTable(4, 100), [])
    assert (load["queued"], load["backlog_tokens"], load["decoding"]) == (0, 0, 0)
    assert (load["kv_capacity_tokens"], load["kv_running_tokens"], load["kv_suspended_tokens"]) == (400, 0, 0)


def test_prompts_sequences_and_kv_are_told_apart() -> None:
    table = SlotTable(4, 100)
    for name, prompt, computed in (("decodes", 30, 29), ("prefills", 50, 20), ("suspended", 41, 41)):
        slot = table.take(name)
        table.start(slot, request(name, prompt), order=slot)
        table.kv_length[slot] = computed
        if name == "suspended":
            table.finish(slot)
    load = load_of(table, [request("waits", 25)])
    assert load["decoding"] == 1
    assert (load["queued"], load["backlog_tokens"]) == (2, 30 + 25)
    assert (load["kv_running_tokens"], load["kv_suspended_tokens"]) == (29 + 20, 41)
    assert load["kv_capacity_tokens"] == 4 * (29 + 20 + 41) / 3
