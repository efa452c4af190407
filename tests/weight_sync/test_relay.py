"""Stagers: one pull a version, whoever asks; gone ones are named; other nodes read over TCP."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_one_process import Taker, evolving_weights, move

from weight_sync.errors import WeightTransferError
from weight_sync.relay import frames
from weight_sync.relay.frames import Answer, Request, ask, connect, receive_frame, send_frame
from weight_sync.relay.keeping import Kept
from weight_sync.relay.serving import VersionServer
from weight_sync.relay.stager import Stager
from weight_sync.transports import relay
from weight_sync.transports.protocol import RelayOffer, decode_offer, encode_offer, with_routes
from weight_sync.transports.relay import RelaySender


@pytest.fixture
def sender() -> Iterator[RelaySender]:
    made = RelaySender(bucket_bytes=8192, timeout_s=10.0)
    yield made
    made.close()


@pytest.fixture
def stager(tmp_path: Path) -> Iterator[Stager]:
    made = Stager(directory=tmp_path)
    yield made
    made.close()


def routed(offer: bytes, stager: Stager, *members: str) -> bytes:
    return with_routes(offer, dict.fromkeys(members, stager.address))


def test_engines_pull_once_through_their_stager_when_they_like(sender: RelaySender, stager: Stager) -> None:
    reads: list[int] = []
    inner = sender._server._lookup
    sender._server._lookup = lambda key: (reads.append(1), inner(key))[1]
    named = next(evolving_weights())
    offer = routed(sender.prepare(1, iter(named)), stager, "e0", "e1", "late")
    assert stager.held() == []
    takers = [Taker("e0"), Taker("e1")]
    assert move(sender, takers, offer) == [1, 1]
    pulled = len(reads)
    assert pulled == len(decode_offer(offer).manifest.buckets)
    assert stager.held() == [1]
    sender.close()  # the learner is gone, or busy
    late = Taker("late")
    assert late.fetch(offer) == 1
    for taker in (*takers, late):
        taker.expect(named)
    assert len(reads) == pulled


def test_an_engine_of_another_node_reads_over_tcp(
    sender: RelaySender, stager: Stager, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = next(evolving_weights())
    offer = routed(sender.prepare(1, iter(named)), stager, "far")
    near = Taker("far")
    assert near.fetch(offer) == 1
    monkeypatch.setattr(relay.socket, "gethostname", lambda: "elsewhere")
    mapped: list[Any] = []
    far = Taker("far")
    fetch = relay.SharedMemoryReceiver.fetch
    monkeypatch.setattr(relay.SharedMemoryReceiver, "fetch", lambda self, *a: (mapped.append(a), fetch(self, *a))[1])
    assert far.fetch(offer) == 1
    far.expect(named)
    assert mapped == []


def test_the_last_versions_stay_and_older_ones_are_refused_by_name(sender: RelaySender, stager: Stager) -> None:
    taker, offers = Taker("e0"), []
    for version, named in zip(range(1, 5), evolving_weights(), strict=False):
        offers.append(routed(sender.prepare(version, iter(named)), stager, "e0"))
        assert taker.fetch(offers[-1]) == version
        taker.expect(named)
    assert stager.held() == [3, 4]
    assert Taker("e0").fetch(offers[2]) == 3
    assert taker.fetch(offers[0]) is None
    assert "no longer holds" in taker.error


def test_what_was_damaged_on_the_way_is_refused_and_not_kept(sender: RelaySender, stager: Stager) -> None:
    taker, named = Taker("e0"), next(evolving_weights())
    offer = routed(sender.prepare(1, iter(named)), stager, "e0")
    sender._published[-1].flat[10] ^= 1
    assert taker.fetch(offer) is None
    assert "tensor embed.weight: checksum" in taker.error
    assert (taker.tensors, stager.held()) == ({}, [])
    sender._published[-1].flat[10] ^= 1
    assert taker.fetch(offer) == 1
    taker.expect(named)


def test_a_stager_or_sender_that_is_gone_is_named_with_its_place(sender: RelaySender, tmp_path: Path) -> None:
    gone = Stager(directory=tmp_path)
    offer = routed(sender.prepare(1, iter(next(evolving_weights()))), gone, "e0")
    gone.close()
    assert list(tmp_path.iterdir()) == []
    taker = Taker("e0")
    assert taker.fetch(offer) is None
    assert f"engine e0: its stager (for version 1) at 127.0.0.1:{gone.address[1]} cannot be reached" in taker.error
    fresh = Stager(directory=tmp_path)
    sender.close()
    assert taker.fetch(routed(offer, fresh, "e0")) is None
    assert "the sender of version 1 at 127.0.0.1" in taker.error
    fresh.close()


def test_a_stager_without_room_says_so(sender: RelaySender, stager: Stager, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    def no_space(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    taker = Taker("e0")
    assert taker.fetch(routed(sender.prepare(1, iter(next(evolving_weights()))), stager, "e0")) is None
    assert "has no room for" in taker.error


def test_an_offer_of_other_contents_is_refused(sender: RelaySender, stager: Stager) -> None:
    taker = Taker("e0")
    offer = routed(sender.prepare(1, iter(next(evolving_weights()))), stager, "e0")
    assert taker.fetch(offer) == 1
    decoded = decode_offer(offer)
    assert isinstance(decoded, RelayOffer)
    other = msgspec.structs.replace(decoded, manifest=msgspec.structs.replace(decoded.manifest, version=9))
    assert taker.fetch(encode_offer(other)) is None
    assert "holds something else than what was offered" in taker.error


def test_requests_and_answers_are_bounded_and_checked() -> None:
    server = VersionServer("127.0.0.1", lambda key: memoryview(b"0123456789"))
    with connect(("127.0.0.1", server.port), 10.0, "the server") as connection:
        target = bytearray(4)
        frames.read(connection, "any", 3, memoryview(target))
        assert bytes(target) == b"3456"
        for request, message in [
            (Request(kind="read", start=4, end=40), "bytes 4:40 of 10 were asked for"),
            (Request(kind="stage"), "'stage' is nothing that can be asked for here"),
        ]:
            with pytest.raises(WeightTransferError, match=message):
                ask(connection, request)
    server.close()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_frame(ours, Answer(error="x"))
        ours.sendall(b"\x04\x00\x00\x00nope" + b"\xff\xff\xff\xff")
        assert receive_frame(theirs, Answer) == Answer(error="x")
        with pytest.raises(WeightTransferError, match="not a answer"):
            receive_frame(theirs, Answer)
        with pytest.raises(WeightTransferError, match="is longer than"):
            receive_frame(theirs, Answer)
        ours.sendall(b"\x10\x00\x00\x00half")
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(WeightTransferError, match="closed the connection after 4 of 16 bytes"):
            receive_frame(theirs, Answer)


def test_many_engines_at_once_are_one_pull(sender: RelaySender, stager: Stager) -> None:
    offer = sender.prepare(1, iter(next(evolving_weights())))
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(stager.stage(offer))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 8
    assert len(set(found)) == 1


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), max_size=40), st.integers(1, 3))
def test_a_joining_engine_always_finds_a_whole_version_and_all_changes_after_it(
    arrivals: list[tuple[str, bool]], whole: int
) -> None:
    kept, held, ever = Kept(whole=whole), dict[str, tuple[str, bool]](), dict[str, list[tuple[str, bool]]]()
    for number, (sender, change) in enumerate(arrivals):
        held[str(number)] = (sender, change)
        ever.setdefault(sender, []).append((str(number), change))
        for key in kept.add(sender, str(number), change=change):
            del held[key]
        for name, mine in ever.items():
            starts = [index for index, (_, is_change) in enumerate(mine) if not is_change]
            needed = mine[starts[-whole] if len(starts) >= whole else 0 :]
            assert [key for key, _ in needed] == [key for key in held if held[key][0] == name]
