"""The episodes of a group compute what their prompts have in common once, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_helpers import drain, make_engine, make_model, prompt, reference_logprobs, request, run_all
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_workers.engines.protocol import GenerateRequest, KvPolicy
from rollout_workers.engines.torch_engine import TorchEngine
from rollout_workers.engines.torch_engine.scheduler import Scheduler
from rollout_workers.engines.torch_engine.slot_table import SlotTable

COMMON = 40
MEMBERS = 4


def member(index: int, group: str = "g", extra: int = 0, **fields: object) -> GenerateRequest:
    """An episode's first turn: the group's prompt, and ``extra`` tokens of its own."""
    tokens = np.concatenate([prompt(COMMON, seed=1), prompt(extra, seed=index + 10)])
    tokens[COMMON : COMMON + 1] = 2 + index  # so that no more than that is common
    name = f"{group}-{index}"
    return request(name, session_id=name, prompt=tokens, prefix_group=group, seed=index, **fields)


def run_group(
    sharing: bool, extra: int, dtype: torch.dtype = torch.float32, **settings: object
) -> tuple[dict[str, object], TorchEngine]:
    engine = make_engine(make_model().to(dtype), share_prefixes=sharing, **settings)
    return run_all(engine, *(member(index, extra=extra) for index in range(MEMBERS))), engine


@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("prefill_tokens", [1024, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens_and_logprobs_are_those_without_sharing(extra: int, prefill_tokens: int, dtype: torch.dtype) -> None:
    """Bit for bit in double precision. In single precision a prompt computed in other pieces differs in its last bits,
    shared or not, and sharing changes the pieces."""
    apart, engine_apart = run_group(False, extra, dtype, prefill_tokens=prefill_tokens)
    together, engine = run_group(True, extra, dtype, prefill_tokens=prefill_tokens)
    assert apart.keys() == together.keys()
    for name, result in together.items():
        assert result.tokens.tolist() == apart[name].tokens.tolist()
        if dtype is torch.float64:
            assert result.logprobs.tolist() == apart[name].logprobs.tolist()
        np.testing.assert_allclose(result.logprobs, apart[name].logprobs, rtol=0, atol=5e-6)
    done = COMMON if prefill_tokens > COMMON else 32  # for the last 8 tokens nobody waits another step
    common = min(done, COMMON + extra - 1)  # one token is left to compute, which counts as decoding
    assert [together[f"g-{index}"].chunks[0].cached_tokens for index in range(MEMBERS)] == [0, common, common, common]
    health = engine.health()
    assert (health.shared_tokens, health.cached_tokens) == (3 * common, 3 * common)
    assert health.prefill_tokens == engine_apart.health().prefill_tokens - 3 * done
    assert engine_apart.health().shared_tokens == 0


def test_the_logprobs_are_the_models() -> None:
    model = make_model()
    engine = make_engine(model)
    for name, result in run_all(engine, *(member(index, extra=5) for index in range(MEMBERS))).items():
        given_tokens = member(int(name[-1]), extra=5).prompt
        np.testing.assert_allclose(result.logprobs, reference_logprobs(model, given_tokens, result.tokens), atol=1e-4)


def test_siblings_wait_while_the_prompt_is_computed_and_strangers_do_not() -> None:
    engine = make_engine(prefill_tokens=16)
    for index in range(3):
        engine.submit(member(index))
    engine.submit(request("stranger", prompt=prompt(3)))
    engine.step()
    assert set(engine.table.slot_of) == {"g-0", "session of stranger"}
    assert [each.request_id for each in engine.scheduler.waiting] == ["g-1", "g-2"]
    engine.step()
    assert len(engine.scheduler.waiting) == 2
    engine.step()
    assert not engine.scheduler.waiting
    assert engine.health().shared_tokens == 2 * 32
    assert set(drain(engine)) == {"g-0", "g-1", "g-2", "stranger"}


def test_a_sibling_that_is_aborted_while_it_computes_holds_nobody_up() -> None:
    engine = make_engine(prefill_tokens=16)
    for index in range(3):
        engine.submit(member(index))
    engine.step()
    engine.abort("g-0")
    results = drain(engine)
    assert results["g-1"].chunks[0].cached_tokens == 16  # what the first one had computed
    assert results["g-2"].chunks[0].cached_tokens == 32  # and the second one after it
    assert len(results["g-1"].tokens) == len(results["g-2"].tokens) == 8


def test_the_kv_of_a_session_that_waits_between_turns_is_shared() -> None:
    engine = make_engine()
    run_all(engine, member(0))
    assert run_all(engine, member(1))["g-1"].chunks[0].cached_tokens == COMMON - 1
    assert run_all(engine, member(2, group="h"))["h-2"].chunks[0].cached_tokens == 0


def test_a_branch_begins_with_all_that_its_parent_has() -> None:
    engine = make_engine(slots=8)
    parent = run_all(engine, member(0))["g-0"]
    context = np.concatenate([member(0).prompt, parent.tokens, prompt(4, seed=5)])
    branch = request("branch", session_id="branch", prompt=context, prefix_group="g")
    assert run_all(engine, branch)["branch"].chunks[0].cached_tokens == COMMON + 7


@pytest.mark.parametrize("policy", [KvPolicy.KEEP, KvPolicy.RECOMPUTE])
def test_kv_of_other_weights_is_not_shared(policy: KvPolicy) -> None:
    new = make_model(seed=1)
    engine = make_engine()
    run_all(engine, member(0))
    engine.stage(1, new.named_parameters())
    engine.commit(1, policy)
    after = run_all(engine, member(1))["g-1"]
    assert after.chunks[0].cached_tokens == 0
    np.testing.assert_allclose(after.logprobs, reference_logprobs(new, member(1).prompt, after.tokens), atol=1e-4)
    assert run_all(engine, member(2))["g-2"].chunks[0].cached_tokens == COMMON - 1  # of the new weights


def test_pinned_and_served_requests_do_not_share() -> None:
    old, new = make_model(), make_model(seed=1)
    engine = make_engine(old)
    engine.pin(0)
    run_all(engine, member(0, pinned_version=0))
    engine.stage(1, new.named_parameters())
    engine.commit(1, KvPolicy.KEEP)
    assert run_all(engine, member(1))["g-1"].chunks[0].cached_tokens == 0
    pinned = run_all(engine, member(2, pinned_version=0))["g-2"]
    assert pinned.chunks[0].cached_tokens == COMMON - 1
    np.testing.assert_allclose(pinned.logprobs, reference_logprobs(old, member(2).prompt, pinned.tokens), atol=1e-4)


def test_the_one_that_has_the_prompt_is_the_last_to_lose_its_slot() -> None:
    engine = make_engine(slots=2)
    run_all(engine, member(0), request("other"))
    assert run_all(engine, member(1))["g-1"].chunks[0].cached_tokens == COMMON - 1
    assert set(engine.table.slot_of) == {"g-0", "g-1"}


def test_in_a_single_slot_there_is_nobody_to_share_with() -> None:
    engine = make_engine(slots=1)
    results = run_all(engine, *(member(index) for index in range(3)))
    assert [result.chunks[0].cached_tokens for result in results.values()] == [0, 0, 0]
    assert len({tuple(result.tokens.tolist()) for result in results.values()}) > 1


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "step", "step", "abort", "release", "update"]),
        st.integers(0, 7),
        st.integers(1, 40),
    ),
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(OPERATIONS)
def test_whatever_happens_kv_is_taken_only_where_the_tokens_and_the_weights_agree(
    operations: list[tuple[str, int, int]],
) -> None:
    table = SlotTable(5, 128)
    scheduler = Scheduler(table, 12)
    version = 0
    kv: dict[int, list[tuple[int, int]]] = {slot: [] for slot in range(5)}
    """The (token, version) that the KV of each slot's positions was computed of."""

    def copied(source: int, slot: int, length: int) -> None:
        kv[slot] = kv[source][:length]

    scheduler.on_shared = copied

    def step() -> None:
        for slot in scheduler.admit():
            request_ = table.request[slot]
            assert request_ is not None
            have = int(table.kv_length[slot])
            assert [token for token, _ in kv[slot][:have]] == request_.prompt[:have].tolist()
            kv[slot] = kv[slot][:have]
        plan = scheduler.plan()
        if plan is None:
            assert not scheduler.waiting
            return
        for slot, position, token in zip(plan.slots, plan.positions, plan.tokens, strict=True):
            kv[int(slot)][int(position) :] = [(int(token), version)]
        scheduler.computed(plan, version)
        for slot in plan.sample_slots.tolist():
            table.tokens[slot, table.length[slot]] = 7
            table.length[slot] += 1
            if table.length[slot] >= table.limit[slot]:
                table.finish(slot)

    for count, (operation, which, size) in enumerate(operations):
        session = f"s{which}"
        slot = table.slot_of.get(session)
        if operation == "submit" and not scheduler.busy(session):
            tokens = np.concatenate([prompt(30, seed=which % 2), prompt(size, seed=count)])
            group = f"g{which % 2}"
            scheduler.enqueue(request(f"{count}", session_id=session, prompt=tokens, max_tokens=4, prefix_group=group))
        elif operation == "step":
            step()
        elif operation == "abort" and slot is not None and table.running[slot]:
            table.finish(slot)
        elif operation == "release" and not scheduler.busy(session):
            scheduler.release(session)
        elif operation == "update":
            version += 1
            scheduler.invalidate(version, KvPolicy.KEEP if which % 2 else KvPolicy.RECOMPUTE)
        check(table, kv)
    for _ in range(1000):
        if not scheduler.waiting and not table.running.any():
            return
        step()
        check(table, kv)
    raise AssertionError("requests are left")


def check(table: SlotTable, kv: dict[int, list[tuple[int, int]]]) -> None:
    """What the table says of a slot's KV is what was computed or copied."""
    for session, slot in table.slot_of.items():
        have = int(table.kv_length[slot])
        assert [token for token, _ in kv[slot][:have]] == table.tokens[slot, :have].tolist()
        if have:
            assert min(version for _, version in kv[slot][:have]) >= table.kv_oldest[slot]
        group = table.group[slot]
        assert not group or session in table.members[group]
    assert sum(len(members) for members in table.members.values()) == sum(map(bool, table.group))
