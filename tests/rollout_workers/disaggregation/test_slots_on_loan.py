"""The prefill engine writes into the decode engine's slots: whose they are, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from engine_helpers import make_engine, make_model, prompt, reference_logprobs, request, run_all
from hypothesis import given
from hypothesis import strategies as st
from split_engines import SteppedEngine, from_source, until

from rollout_workers.disaggregation.cache_memory import CacheMemory, CachePlace, map_cache
from rollout_workers.disaggregation.handoff import Reason
from rollout_workers.disaggregation.link import KvLink, KvListener, dial, receive
from rollout_workers.disaggregation.messages import Hello, KvAddress, Message, Reach, Welcome, Written, frame
from rollout_workers.engines.torch_engine.scheduler import Scheduler
from rollout_workers.engines.torch_engine.slot_table import SlotTable

ASKED = request("r", prompt=prompt(64), max_tokens=12, seed=4)
SESSION = ASKED.session_id
OTHER = request("other", prompt=prompt(50, seed=9), max_tokens=12, seed=5)

Pair = tuple[SteppedEngine, SteppedEngine]


async def make_pair(**settings: object) -> AsyncIterator[Pair]:
    prefill, decode = SteppedEngine(**settings), SteppedEngine(**settings)
    yield prefill, decode
    prefill.station.close()
    decode.station.close()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async for each in make_pair():
        yield each


@pytest.fixture
async def pair_of_one_slot() -> AsyncIterator[Pair]:
    async for each in make_pair(slots=1):
        yield each


async def halfway(prefill: SteppedEngine, decode: SteppedEngine) -> int:
    """The first 16 of 64 tokens are across. Returns the slot that is on loan."""
    prefill.station.submit(msgspec.structs.replace(ASKED, kv_target=decode.target()))
    await until(lambda: decode.station.open == 1, "the announcement arrives")
    prefill.step()
    await until(lambda: decode.computed(SESSION) == 16, "16 tokens arrive")
    (slot,) = np.flatnonzero(decode.engine.table.lent)
    assert decode.engine.table.slot_of[SESSION] == slot
    return int(slot)


async def returned(decode: SteppedEngine) -> None:
    await until(lambda: not decode.engine.table.lent.any(), "the slot comes back")


def keys(engine: SteppedEngine, slot: int) -> torch.Tensor:
    return engine.engine.kv.tensors()[0][slot].clone()


def assert_as_alone(engine: SteppedEngine, asked: object) -> None:
    """What the engine has generated is what an engine without hand-offs generates."""
    wanted = run_all(make_engine(prefill_tokens=16), asked)[asked.request_id]  # type: ignore[attr-defined,arg-type]
    assert engine.tokens.tolist() == wanted.tokens.tolist()
    np.testing.assert_allclose(engine.logprobs, wanted.logprobs, atol=1e-5)


async def test_kv_is_written_into_its_slot_and_the_slot_comes_back(pair: Pair) -> None:
    prefill, decode = pair
    slot = await halfway(prefill, decode)
    prefill.run()
    await returned(decode)
    assert decode.engine.table.slot_of[SESSION] == slot
    assert torch.equal(keys(decode, slot)[:, :64], keys(prefill, prefill.engine.table.slot_of[SESSION])[:, :64])
    decode.station.submit(from_source(ASKED, prefill.ended))
    decode.run()
    assert decode.engine.health().prefill_tokens == 0


async def test_a_slot_whose_session_is_released_waits_for_who_writes_into_it(pair: Pair) -> None:
    prefill, decode = pair
    slot, table = await halfway(prefill, decode), decode.engine.table
    decode.station.release(SESSION)
    assert (table.free, SESSION in table.slot_of) == (table.slots - 1, False)
    decode.station.submit(OTHER)
    decode.step()
    assert table.slot_of[OTHER.session_id] != slot
    before = keys(decode, slot)
    prefill.step()  # it has not heard of the release
    assert not torch.equal(keys(decode, slot), before)
    decode.run()
    assert_as_alone(decode, OTHER)
    await returned(decode)
    prefill.run()
    assert prefill.ended.error == Reason.DROPPED.value
    decode.station.release(OTHER.session_id)
    assert table.free == table.slots


async def test_the_only_slot_is_not_used_before_it_comes_back(pair_of_one_slot: Pair) -> None:
    prefill, decode = pair_of_one_slot
    await halfway(prefill, decode)
    decode.station.release(SESSION)
    decode.station.submit(OTHER)
    decode.run(steps=5)
    assert decode.engine.health().waiting == 1
    prefill.step()
    await returned(decode)
    decode.run()
    assert_as_alone(decode, OTHER)


async def test_a_hand_off_that_is_refused_leaves_its_slot_to_the_writer(pair_of_one_slot: Pair) -> None:
    prefill, decode = pair_of_one_slot
    await halfway(prefill, decode)
    side = decode.station._decode
    ((link, _),) = side._lent.values()
    side.on_message(link, Written("h", start=40, end=41, nbytes=1, version=0, oldest=0))
    assert decode.station.open == 0
    assert (decode.engine.table.free, SESSION in decode.engine.table.slot_of) == (0, False)
    decode.station.submit(OTHER)
    decode.run(steps=5)
    assert decode.engine.health().waiting == 1
    await returned(decode)
    decode.run()
    assert_as_alone(decode, OTHER)
    prefill.run()
    assert prefill.ended.error == Reason.DAMAGED.value


async def test_a_request_that_does_not_wait_for_its_kv_leaves_the_slot(pair: Pair) -> None:
    prefill, decode = pair
    slot = await halfway(prefill, decode)
    decode.station.submit(ASKED)
    decode.step()
    assert decode.engine.table.slot_of[SESSION] != slot
    prefill.run()
    decode.run()
    assert_as_alone(decode, ASKED)
    await returned(decode)


async def test_what_an_old_version_still_writes_reaches_no_request_of_the_new_one(pair: Pair) -> None:
    prefill, decode = pair
    slot = await halfway(prefill, decode)
    decode.engine.stage(1, make_model(seed=1).named_parameters())
    decode.engine.commit(1)
    decode.station.submit(ASKED)
    decode.step()
    assert decode.engine.table.slot_of[SESSION] != slot
    prefill.run()  # writes all of the old version's KV
    decode.run()
    assert decode.versions.tolist() == [1] * 12
    expected = reference_logprobs(make_model(seed=1), ASKED.prompt, decode.tokens)
    np.testing.assert_allclose(decode.logprobs, expected, atol=1e-4)
    await returned(decode)


async def test_the_same_session_announced_again_gets_another_slot(pair: Pair) -> None:
    prefill, decode = pair
    slot = await halfway(prefill, decode)
    third = SteppedEngine()
    third.station.submit(msgspec.structs.replace(ASKED, kv_target=decode.target("again")))
    await until(lambda: decode.engine.table.slot_of[SESSION] != slot, "the second announcement arrives")
    await until(lambda: decode.station.open == 1, "the first hand-off ends")
    third.run()
    prefill.run()
    await returned(decode)
    decode.station.submit(from_source(ASKED, third.ended, "again"))
    decode.run()
    wanted = run_all(make_engine(prefill_tokens=16), ASKED)["r"]
    assert np.concatenate([third.tokens, decode.tokens]).tolist() == wanted.tokens.tolist()
    assert decode.engine.health().prefill_tokens == 0
    third.station.close()


async def test_a_writer_that_is_gone_has_given_everything_back(pair: Pair) -> None:
    prefill, decode = pair
    await halfway(prefill, decode)
    prefill.station.close()
    await returned(decode)
    await until(lambda: decode.station.open == 0, "the hand-off ends")
    prefill.step()  # of a closed station: nothing more is written
    assert decode.computed(SESSION) == 16
    decode.station.submit(ASKED)
    decode.run()
    assert_as_alone(decode, ASKED)
    assert decode.engine.health().prefill_tokens == 64 - 16


async def test_where_the_cache_cannot_be_reached_kv_goes_through_the_ring(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = pair
    place = decode.engine.kv.place
    assert place is not None
    elsewhere = msgspec.structs.replace(place, nonce="0" * len(place.nonce))
    monkeypatch.setattr(decode.station._decode._listener, "_cache", elsewhere)
    prefill.station.submit(msgspec.structs.replace(ASKED, kv_target=decode.target()))
    await until(lambda: decode.station.open == 1, "the announcement arrives")
    assert not decode.engine.table.lent.any()
    prefill.run()
    await until(lambda: decode.computed(SESSION) == 64, "all tokens arrive")


# --- who hangs up when ----------------------------------------------------------------------------------------------


async def test_who_dialled_hangs_up_only_when_its_event_loop_has_stopped_writing() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    lost: list[Exception] = []
    address = KvAddress("127.0.0.1", server.getsockname()[1], "secret")
    link = dial(address, "layout", 1 << 16, "auto", [], _ignore, lambda link, error: lost.append(error))

    def welcome() -> socket.socket:
        connection, _ = server.accept()
        connection.settimeout(5)
        assert isinstance(receive(connection), Hello)
        connection.sendall(frame(Welcome()))
        assert receive(connection) == Reach(False)
        return connection

    with await asyncio.to_thread(welcome) as connection, server:
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):  # the event loop is busy: with this
            connection.recv(1)
        assert lost == []
        await until(lambda: bool(lost), "the loss is known")
        assert link.cache is None
        connection.settimeout(5)
        assert await asyncio.to_thread(connection.recv, 1) == b""


async def test_who_listens_takes_a_connection_for_lost_only_when_the_other_side_has_hung_up() -> None:
    lost: list[Exception] = []
    place = CachePlace("/proc/0/fd/0", "", 1, 1, ())
    listener = KvListener("127.0.0.1", "layout", place, _ignore, lambda link, error: lost.append(error))

    def call_and_talk_nonsense() -> socket.socket:
        caller = socket.create_connection((listener.address.host, listener.address.port), timeout=20)
        caller.sendall(frame(Hello(listener.address.secret, "layout", 1 << 16)))
        welcome = receive(caller)
        assert isinstance(welcome, Welcome)
        assert welcome.cache == place
        caller.sendall(frame(Reach(True)) + b"\x01\x00\x00\x00\xc1")
        assert caller.recv(1) == b""  # it wants to end this
        return caller

    with await asyncio.to_thread(call_and_talk_nonsense) as caller:
        await asyncio.sleep(0.2)
        assert lost == []
        caller.sendall(b"still here")
        await asyncio.sleep(0.1)
        assert lost == []
    await until(lambda: bool(lost), "the loss is known")
    assert "not a message" in str(lost[0])
    listener.close()


def _ignore(link: KvLink, message: Message) -> None:
    """Nothing is said in these tests."""


# --- the table and the memory ---------------------------------------------------------------------------------------


CALLS = st.tuples(st.sampled_from(["seat", "lend", "back", "start", "end", "drop"]), st.integers(0, 5))


@given(st.lists(CALLS, min_size=20, max_size=60))
def test_a_slot_on_loan_neither_runs_nor_moves_nor_is_given_away(calls: list[tuple[str, int]]) -> None:
    table = SlotTable(6, 8)
    scheduler = Scheduler(table, 16)
    asked = [request(f"r{number}", session_id=f"s{number}", prompt=prompt(4), max_tokens=2) for number in range(6)]
    for call, number in calls:
        session = f"s{number}"
        slot = table.slot_of.get(session)
        lent = set(np.flatnonzero(table.lent).tolist())
        if call == "seat":
            seat = scheduler.seat(session)
            assert seat not in lent
        elif call == "start" and not scheduler.busy(session):
            seat = scheduler.seat(session)
            assert seat not in lent
            if seat is not None:
                table.start(seat, asked[number], number)
        elif call == "end" and slot is not None and table.running[slot]:
            table.finish(slot)
        elif call == "lend" and slot is not None and not table.running[slot] and slot not in lent:
            table.expect(slot, asked[number])
            table.lend(slot)
        elif call == "back" and number in lent:
            table.give_back(number)
        elif call == "drop" and slot is not None and not table.running[slot]:
            table.drop(slot)
        moves = scheduler.compact()
        if moves is not None:
            assert not table.lent[np.concatenate(moves)].any()
            table.swap(*moves)
            running, free_to_run = table.running.nonzero()[0], np.flatnonzero(~table.lent)
            assert running.tolist() == free_to_run[: len(running)].tolist()
        assert not (table.running & table.lent).any()
        abandoned = int(sum(table.session[slot] is None for slot in np.flatnonzero(table.lent)))
        assert table.free + len(table.slot_of) + abandoned == table.slots


def test_a_running_or_free_slot_cannot_be_lent() -> None:
    table = SlotTable(2, 8)
    with pytest.raises(ValueError, match="slot 1 cannot be lent: it is free"):
        table.lend(1)
    table.start(table.take("s"), request("r", session_id="s", max_tokens=2), 0)
    with pytest.raises(ValueError, match="slot 0 cannot be lent: it is running"):
        table.lend(0)


def test_memory_that_is_reached_is_the_same_memory_and_ends_with_its_owner() -> None:
    memory = CacheMemory()
    mine = [memory.zeros((2, 3, 5, 4), torch.bfloat16) for _ in range(2)]
    place = memory.place(mine)
    like = [tensor[:, :, :1].clone() for tensor in mine]
    peer = map_cache(place, like)
    assert peer is not None
    peer.tensors[1][1, :, 2:4] = 7
    assert (mine[0].sum().item(), mine[1].sum().item()) == (0, 7 * 3 * 2 * 4)
    assert mine[1][1, :, 2:4].eq(7).all()
    for wrong in (
        msgspec.structs.replace(place, nonce="x" * 32),
        msgspec.structs.replace(place, path=str(Path("/etc/hostname"))),
        msgspec.structs.replace(place, path=f"/proc/{os.getpid()}/fd/99999"),
        msgspec.structs.replace(place, offsets=place.offsets[:1]),
        msgspec.structs.replace(place, offsets=(place.offsets[0], 1 << 40)),
        msgspec.structs.replace(place, max_len=1 << 20),
    ):
        assert map_cache(wrong, like) is None
    del memory, mine
    gc.collect()
    assert map_cache(place, like) is None
    peer.tensors[1].zero_()  # harmless
