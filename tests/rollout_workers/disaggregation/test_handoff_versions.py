"""Hand-offs, weight updates and losses at exactly chosen moments: engines are stepped by hand."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator

import msgspec
import numpy as np
import pytest
from engine_helpers import make_engine, make_model, prompt, reference_logprobs, request, run_all
from split_engines import SteppedEngine, from_source, until

from rollout_workers.disaggregation.config import HandoffConfig
from rollout_workers.disaggregation.handoff import Reason
from rollout_workers.disaggregation.link import receive
from rollout_workers.disaggregation.messages import Hello, KvAddress, KvLinkError, Welcome, frame, parse
from rollout_workers.engines.protocol import FinishReason, KvPolicy, KvTarget, PauseMode

ASKED = request("r", prompt=prompt(64), max_tokens=12, seed=4)
SESSION = ASKED.session_id


@pytest.fixture(params=["auto", "ring"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[tuple[SteppedEngine, SteppedEngine]]:
    config = HandoffConfig(transport=request.param, timeout_s=20.0)
    prefill, decode = SteppedEngine(config), SteppedEngine(config)
    yield prefill, decode
    prefill.station.close()
    decode.station.close()


def update(engine: SteppedEngine, version: int, policy: KvPolicy, seed: int = 1) -> None:
    engine.engine.stage(version, make_model(seed=seed).named_parameters())
    engine.engine.commit(version, policy)
    engine.station.committed()


def begin(prefill: SteppedEngine, decode: SteppedEngine) -> None:
    prefill.station.submit(msgspec.structs.replace(ASKED, kv_target=decode.target()))


async def accepted(decode: SteppedEngine, count: int = 1) -> None:
    await until(lambda: decode.station.open == count, "the announcement arrives")


async def test_kv_arrives_while_the_prompt_is_still_being_computed(
    pair: tuple[SteppedEngine, SteppedEngine],
) -> None:
    prefill, decode = pair
    begin(prefill, decode)
    await accepted(decode)
    for done in (16, 32, 48):
        prefill.step()
        await until(lambda done=done: decode.computed(SESSION) == done, f"{done} tokens arrive")  # type: ignore[misc]
        assert prefill.chunks == []
    prefill.step()
    assert prefill.ended.finish_reason is FinishReason.HANDED_OVER
    decode.station.submit(from_source(ASKED, prefill.ended))
    await until(lambda: decode.engine.has_work, "the hand-off completes")
    decode.run()
    wanted = run_all(make_engine(prefill_tokens=16), ASKED)["r"]
    assert np.concatenate([prefill.tokens, decode.tokens]).tolist() == wanted.tokens.tolist()
    assert np.concatenate([prefill.logprobs, decode.logprobs]).tobytes() == wanted.logprobs.tobytes()


async def test_kv_of_another_version_is_refused(pair: tuple[SteppedEngine, SteppedEngine]) -> None:
    prefill, decode = pair
    update(decode, 1, KvPolicy.RECOMPUTE)
    begin(prefill, decode)
    await until(lambda: prefill.wakes > 0, "the refusal arrives")
    prefill.run()
    assert (prefill.ended.finish_reason, prefill.ended.error) == (FinishReason.HANDED_OVER, Reason.VERSION.value)
    assert (len(prefill.tokens), decode.station.open, prefill.station.open) == (0, 0, 0)
    assert decode.engine.kv.computed(SESSION) == 0


@pytest.mark.parametrize("policy", [KvPolicy.RECOMPUTE, KvPolicy.KEEP])
async def test_a_commit_at_the_decode_engine_does_with_what_has_arrived_what_its_policy_says(
    pair: tuple[SteppedEngine, SteppedEngine], policy: KvPolicy
) -> None:
    prefill, decode = pair
    begin(prefill, decode)
    await accepted(decode)
    prefill.step()
    await until(lambda: decode.computed(SESSION) == 16, "16 tokens arrive")
    update(decode, 1, policy)
    prefill.step()
    if policy is KvPolicy.KEEP:
        await until(lambda: decode.computed(SESSION) == 32, "32 tokens arrive")
        prefill.run()
        assert prefill.ended.error is None
    else:
        await until(lambda: prefill.wakes > 0, "the refusal arrives")
        prefill.run()
        assert prefill.ended.error == Reason.DROPPED.value
    decode.station.submit(from_source(ASKED, prefill.ended))
    await until(lambda: decode.engine.has_work, "the request starts")
    decode.run()
    versions = np.concatenate([prefill.versions, decode.versions]).tolist()
    tokens = np.concatenate([prefill.tokens, decode.tokens])
    if policy is KvPolicy.RECOMPUTE:
        assert versions == [1] * 12
        np.testing.assert_allclose(
            decode.logprobs, reference_logprobs(make_model(seed=1), ASKED.prompt, tokens), atol=1e-4
        )
    else:
        assert versions == [0] + [1] * 11
        first = reference_logprobs(make_model(seed=0), ASKED.prompt, tokens[:1])
        np.testing.assert_allclose(prefill.logprobs, first, atol=1e-4)
        assert int(decode.engine.table.kv_oldest[decode.engine.table.slot_of[SESSION]]) == 0


@pytest.mark.parametrize("policy", [KvPolicy.RECOMPUTE, KvPolicy.KEEP])
async def test_a_commit_at_the_prefill_engine_ends_the_hand_off(
    pair: tuple[SteppedEngine, SteppedEngine], policy: KvPolicy
) -> None:
    prefill, decode = pair
    begin(prefill, decode)
    await accepted(decode)
    prefill.step()
    await until(lambda: decode.computed(SESSION) == 16, "16 tokens arrive")
    update(prefill, 1, policy)
    prefill.run()
    assert (prefill.ended.error, len(prefill.tokens)) == (Reason.COMMIT.value, 0)
    await until(lambda: decode.station.open == 0, "the decode side hears of it")
    decode.station.submit(ASKED)
    decode.run()
    assert decode.versions.tolist() == [0] * 12
    assert decode.chunks[0].cached_tokens == 0
    assert decode.engine.health().prefill_tokens == 64 - 16  # what came of version 0 is good
    np.testing.assert_allclose(
        decode.logprobs, reference_logprobs(make_model(seed=0), ASKED.prompt, decode.tokens), atol=1e-4
    )


async def test_a_request_that_waited_through_an_update_is_handed_over_as_of_the_new_version(
    pair: tuple[SteppedEngine, SteppedEngine],
) -> None:
    prefill, decode = pair
    prefill.engine.submit(request("first", prompt=prompt(40, seed=8), max_tokens=1))
    begin(prefill, decode)
    for engine in pair:
        update(engine, 1, KvPolicy.RECOMPUTE)
    while not prefill.station.open or not decode.station.open:
        prefill.step()
        await asyncio.sleep(0.01)
    await until(lambda: decode.computed(SESSION) > 0, "tokens arrive")
    prefill.run()
    await until(lambda: decode.computed(SESSION) == 64, "all tokens arrive")
    assert prefill.versions.tolist() == [1, 1]
    assert [chunk.error for chunk in prefill.chunks] == [None, None]


async def test_a_commit_after_the_hand_off_acts_on_its_kv_as_on_any_other(
    pair: tuple[SteppedEngine, SteppedEngine],
) -> None:
    prefill, decode = pair
    begin(prefill, decode)
    await accepted(decode)
    prefill.run()
    await until(lambda: decode.computed(SESSION) == 64, "all tokens arrive")
    update(decode, 1, KvPolicy.RECOMPUTE)
    assert decode.computed(SESSION) == 0
    decode.station.submit(from_source(ASKED, prefill.ended))
    await until(lambda: decode.engine.has_work, "the request starts")
    decode.run()
    context = np.concatenate([ASKED.prompt, prefill.tokens])
    assert decode.versions.tolist() == [1] * 11
    np.testing.assert_allclose(
        decode.logprobs, reference_logprobs(make_model(seed=1), context, decode.tokens), atol=1e-4
    )


async def test_a_pause_that_drops_kv_costs_computing_only(pair: tuple[SteppedEngine, SteppedEngine]) -> None:
    prefill, decode = pair
    begin(prefill, decode)
    await accepted(decode)
    prefill.step()
    await until(lambda: decode.computed(SESSION) == 16, "16 tokens arrive")
    prefill.engine.pause(PauseMode.KEEP_REQUESTS)
    prefill.step()
    prefill.engine.resume()
    prefill.run()
    await until(lambda: decode.computed(SESSION) == 64, "all tokens arrive")
    assert prefill.ended.error is None


async def test_an_abort_before_between_and_after_the_pieces(pair: tuple[SteppedEngine, SteppedEngine]) -> None:
    prefill, decode = pair
    for steps in (0, 1, 3):
        begin(prefill, decode)
        await accepted(decode)
        for _ in range(steps):
            prefill.step()
        prefill.station.abort("r")
        prefill.run()
        assert (prefill.ended.finish_reason, len(prefill.tokens)) == (FinishReason.ABORT, 0)
        await until(lambda: decode.station.open == 0, "the decode side hears of it")
        prefill.chunks.clear()
        for engine in pair:
            engine.station.release(SESSION)
            assert engine.engine.health().sessions == 0


async def test_a_prefill_engine_that_dies_leaves_what_it_sent(pair: tuple[SteppedEngine, SteppedEngine]) -> None:
    prefill, decode = pair
    begin(prefill, decode)
    await accepted(decode)
    prefill.step()
    await until(lambda: decode.computed(SESSION) == 16, "16 tokens arrive")
    decode.station.submit(msgspec.structs.replace(ASKED, kv_source="h"))
    prefill.station.close()
    await until(lambda: decode.engine.has_work, "the request starts without the rest")
    decode.run()
    wanted = run_all(make_engine(prefill_tokens=16), ASKED)["r"]
    assert decode.tokens.tolist() == wanted.tokens.tolist()
    assert decode.engine.health().prefill_tokens == 64 - 16


async def test_a_decode_engine_that_dies_gives_the_request_back(pair: tuple[SteppedEngine, SteppedEngine]) -> None:
    prefill, decode = pair
    begin(prefill, decode)
    await accepted(decode)
    prefill.step()
    decode.station.close()
    await until(lambda: prefill.wakes > 0, "the prefill side notices")
    prefill.run()
    assert (prefill.ended.finish_reason, prefill.ended.error) == (FinishReason.HANDED_OVER, Reason.LOST.value)
    third = SteppedEngine()
    prefill.chunks.clear()
    begin(prefill, third)
    await accepted(third)
    before = prefill.engine.health().prefill_tokens
    prefill.run()
    await until(lambda: third.computed(SESSION) == 64, "all tokens arrive")
    assert prefill.engine.health().prefill_tokens - before <= 64 - 16  # it had kept what it computed
    third.station.close()


async def test_nobody_listening_and_somebody_silent_end_in_a_hand_over_without_kv() -> None:
    prefill = SteppedEngine(HandoffConfig(timeout_s=0.2))
    silent = socket.create_server(("127.0.0.1", 0))
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    for name, address, reason in (
        ("refuses", f"127.0.0.1:{port}:x", Reason.LOST),
        ("silent", f"127.0.0.1:{silent.getsockname()[1]}:x", Reason.LATE),
    ):
        target = KvTarget(handoff_id=name, engine=name, address=address)
        prefill.station.submit(msgspec.structs.replace(ASKED, kv_target=target))
        await until(lambda: prefill.wakes > 0, f"the one that {name} is given up")
        prefill.run()
        assert (prefill.ended.finish_reason, prefill.ended.error) == (FinishReason.HANDED_OVER, reason.value)
        prefill.chunks.clear()
        prefill.wakes = 0
    prefill.station.close()
    silent.close()


async def test_with_an_address_that_is_none_the_request_stays() -> None:
    prefill = SteppedEngine()
    target = KvTarget(handoff_id="h", engine="d", address="nowhere")
    prefill.station.submit(msgspec.structs.replace(ASKED, kv_target=target))
    prefill.run()
    assert prefill.ended.finish_reason is FinishReason.LENGTH
    assert len(prefill.tokens) == 12
    prefill.station.close()


async def test_models_with_other_kv_do_not_exchange_it() -> None:
    prefill, decode = SteppedEngine(), SteppedEngine(model=make_model("llama"))
    begin(prefill, decode)
    await until(lambda: prefill.wakes > 0, "the refusal arrives")
    prefill.run()
    assert prefill.ended.error == Reason.LOST.value
    prefill.station.close()
    decode.station.close()


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff" * 64, b"\x04\x00\x00\x00\xc1\xc1\xc1\xc1", frame(Hello("wrong", "x", 1 << 20)), b"\x00\x00\x00\x00"],
)
async def test_strangers_are_turned_away(data: bytes) -> None:
    decode = SteppedEngine()
    address = KvAddress.parse(decode.station.address)
    answers: list[bytes] = []

    def knock() -> None:
        with socket.create_connection((address.host, address.port), timeout=20) as stranger:
            stranger.sendall(data)
            try:
                stranger.shutdown(socket.SHUT_WR)
                answers.append(stranger.recv(100))
            except ConnectionError:
                answers.append(b"")

    thread = threading.Thread(target=knock)
    thread.start()
    await until(lambda: bool(answers), "the stranger is turned away")
    thread.join(20)
    assert answers == [b""]
    assert decode.station.open == 0
    decode.station.close()


def test_what_is_no_message_says_so() -> None:
    with pytest.raises(KvLinkError, match="not a message"):
        parse(b"\xc1")
    with pytest.raises(KvLinkError, match="host:port:secret"):
        KvAddress.parse("a:b:c")
    left, right = socket.socketpair()
    with left, right:
        left.sendall(frame(Welcome(shared=True)) + b"\xff\xff\xff\xff")
        assert receive(right) == Welcome(shared=True)
        with pytest.raises(KvLinkError, match="at most"):
            receive(right)
