"""Sessions of a group begin alike on a modelled accelerator too."""

from __future__ import annotations

from rollout_workers.engines.synthetic.accelerator import Accelerator
from rollout_workers.engines.synthetic.cost_model import CostModel
from rollout_workers.engines.synthetic.kv_cache import KvCache

COST = CostModel(
    prefill_rate=100.0, decode_peak=1e6, half_concurrency=0.0, slots=8, kv_tokens=5000, update_pause_s=0.0, stage_s=0.0
)


def run(accelerator: Accelerator, until: float = 1e6) -> dict[str, int]:
    """Cached tokens of each request that ends."""
    cached = {}
    while (at := accelerator.next_event()) is not None and at <= until:
        cached |= {done.request_id: done.cached_tokens for done in accelerator.advance(at)}
    return cached


def test_a_group_computes_its_prompt_once() -> None:
    accelerator = Accelerator(COST, 0, 0.0)
    for member in range(4):
        accelerator.submit(f"{member}", f"s{member}", 300, 10, 0.0, group="g")
    accelerator.submit("other", "other", 300, 10, 0.0)
    assert run(accelerator) == {"0": 0, "1": 300, "2": 300, "3": 300, "other": 0}
    assert (accelerator.prefilled_tokens, accelerator.cached_tokens) == (600, 900)


def test_a_session_that_was_evicted_finds_its_groups_prompt() -> None:
    kv = KvCache(1000)
    assert kv.take("a", 300, 50, "g") == 0
    kv.put_back("a", 350)
    assert kv.take("b", 300, 50, "g") == 300
    assert kv.take("big", 500, 100) == 0  # evicts a
    assert kv.evicted_sessions == 1
    kv.put_back("big", 600)
    assert kv.take("a", 450, 50, "g") == 300


def test_a_group_of_which_nobody_is_left_has_to_begin_again() -> None:
    kv = KvCache(1000)
    kv.take("a", 300, 50, "g")
    kv.release("a")  # while it runs
    kv.put_back("a", 350)
    assert kv.take("b", 300, 50, "g") == 0
    kv.put_back("b", 350)
    kv.release("b")
    assert kv.take("c", 300, 50, "g") == 0


def test_what_other_weights_computed_is_not_shared() -> None:
    accelerator = Accelerator(COST, 0, 0.0)
    accelerator.submit("0", "s0", 300, 10, 0.0, group="g")
    assert run(accelerator) == {"0": 0}
    accelerator.commit(1, 10.0)
    accelerator.submit("1", "s1", 300, 10, 10.0, group="g")
    accelerator.submit("2", "s2", 300, 10, 10.0, group="g")
    accelerator.submit("0b", "s0", 310, 10, 10.0, group="g")
    accelerator.submit("pinned", "s3", 300, 10, 10.0, pinned_version=0, group="g")
    assert run(accelerator) == {"1": 0, "2": 300, "0b": 310, "pinned": 0}
