from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transport_processes import make_weights

from weight_sync.config import WeightsConfig
from weight_sync.errors import WeightTransferError
from weight_sync.tensors import unique_tensors
from weight_sync.transports import collective, shared_memory
from weight_sync.transports.collective import CollectiveReceiver, CollectiveSender
from weight_sync.transports.protocol import CollectiveOffer, SharedMemoryOffer, decode_offer
from weight_sync.transports.select import choose_transport, make_sender
from weight_sync.transports.shared_memory import SharedMemoryReceiver, SharedMemorySender

BUCKET_BYTES = 8192
TIMEOUT_S = 5.0


def expect(result: Any, version: int, scale: int = 1) -> None:
    got_version, arrived = result
    assert got_version == version, arrived
    wanted = dict(unique_tensors(make_weights(version, scale)))
    assert list(arrived) == list(wanted)
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(arrived[name], tensor.float().numpy())


@pytest.fixture(params=["shared_memory", "collective", "collective, delta", "relay", "disk"])
def sender(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    kind, _, delta = request.param.partition(", ")
    config = WeightsConfig(bucket_mb=BUCKET_BYTES / 2**20, timeout_s=30.0, delta=bool(delta))
    made = make_sender(config, kind, directory=tmp_path, disk_directory=tmp_path / "weights")
    yield made
    made.close()


def test_engines_receive_every_version_bit_for_bit(sender: Any, start_engines: Any) -> None:
    engines = start_engines("e0", "e1")
    for version in (1, 2, 3):
        offer = sender.prepare(version, make_weights(version), ["e0", "e1"])
        for engine in engines:
            engine.begin(offer)
        sender.send()
        for engine in engines:
            expect(engine.result(), version)


def test_the_learner_may_change_its_weights_after_prepare(sender: Any, start_engines: Any) -> None:
    (engine,) = start_engines("e0")
    weights = make_weights(5)
    offer = sender.prepare(5, weights, ["e0"])
    for _, tensor in weights:
        tensor.zero_()
    engine.begin(offer)
    sender.send()
    expect(engine.result(), 5)


def test_a_joining_engine_gets_the_last_version_again(sender: Any, start_engines: Any) -> None:
    first, late = start_engines("e0", "late")
    offer = sender.prepare(1, make_weights(1), ["e0"])
    first.begin(offer)
    sender.send()
    expect(first.result(), 1)
    offer = sender.offer(["late"])
    late.begin(offer)
    sender.send()
    expect(late.result(), 1)
    offer = sender.prepare(2, make_weights(2), ["e0", "late"])
    for engine in (first, late):
        engine.begin(offer)
    sender.send()
    for engine in (first, late):
        expect(engine.result(), 2)


def test_the_same_offer_can_be_repeated_to_the_same_members(sender: Any, start_engines: Any) -> None:
    (engine,) = start_engines("e0")
    for offer in (sender.prepare(1, make_weights(1), ["e0"]), None):
        engine.begin(offer or sender.offer(["e0"]))
        sender.send()
        expect(engine.result(), 1)


def test_an_offer_before_the_first_version_is_refused(sender: Any) -> None:
    with pytest.raises(WeightTransferError, match="no version has been prepared"):
        sender.offer(["e0"])


def test_nothing_to_send_to_nobody(sender: Any) -> None:
    sender.prepare(1, make_weights(1), [])
    sender.send()


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81\xa4type\xa5other", bytes(range(200, 256))])
def test_a_malformed_offer_is_a_transfer_error(data: bytes) -> None:
    with pytest.raises(WeightTransferError, match="not an offer of weights"):
        decode_offer(data)


def test_auto_takes_shared_memory_only_when_all_are_on_the_learners_node() -> None:
    assert choose_transport("auto", "n0", ["n0", "n0"]) == "shared_memory"
    assert choose_transport("auto", "n0", ["n0", "n1"]) == "collective"
    assert choose_transport("collective", "n0", ["n0"]) == "collective"


# --- collective ------------------------------------------------------------------------------------------------------


def test_a_receiver_killed_mid_broadcast_is_an_error_in_time_and_the_rest_goes_on(start_engines: Any) -> None:
    survivor, victim = start_engines("survivor", "victim")
    sender = CollectiveSender(bucket_bytes=64 << 10, timeout_s=TIMEOUT_S)
    offer = sender.prepare(1, make_weights(1, scale=100), ["survivor", "victim"])
    survivor.begin(offer)
    victim.begin(offer, kill_after=2)
    began = time.monotonic()
    with pytest.raises(WeightTransferError, match="broadcast of version 1 to survivor, victim failed"):
        sender.send()
    assert time.monotonic() - began < TIMEOUT_S + 3
    victim.process.join(10)
    assert victim.process.exitcode == -signal.SIGKILL
    survivor.result()
    offer = sender.offer(["survivor"])
    survivor.begin(offer)
    sender.send()
    expect(survivor.result(), 1, scale=100)
    sender.close()


def test_a_member_known_to_be_gone_ends_the_wait_for_it_at_once(start_engines: Any) -> None:
    """Killed before it joins: the others are neither held up nor restarted."""
    survivor, victim = start_engines("survivor", "victim")
    sender = CollectiveSender(bucket_bytes=64 << 10, timeout_s=60.0)
    offer = sender.prepare(1, make_weights(1), ["survivor", "victim"])
    victim.stop()
    survivor.begin(offer)
    began = time.monotonic()
    threading.Timer(0.2, sender.cancel).start()  # as the fleet does when it hears that the process has ended
    with pytest.raises(
        WeightTransferError, match="broadcast of version 1 to survivor, victim failed: a member is gone"
    ):
        sender.send()
    version, error = survivor.result()
    assert version is None
    assert "did not begin: a member did not come" in error
    survivor.begin(sender.offer(["survivor"]))
    sender.send()
    expect(survivor.result(), 1)
    assert time.monotonic() - began < 30
    sender.close()


def test_the_group_outlives_a_version_and_an_offer_to_nobody(start_engines: Any) -> None:
    (engine,) = start_engines("e0")
    sender = CollectiveSender(bucket_bytes=BUCKET_BYTES, timeout_s=30.0)
    epochs = []
    for version in (1, 2):
        sender.prepare(version, make_weights(version), [])
        offer = sender.offer(["e0"])
        decoded = decode_offer(offer)
        assert isinstance(decoded, CollectiveOffer)
        epochs.append(decoded.epoch)
        engine.begin(offer)
        sender.send()
        expect(engine.result(), version)
    assert epochs == [1, 1]
    sender.close()


def test_two_broadcasts_of_one_process_never_interleave() -> None:
    waiting, other = CollectiveSender(timeout_s=4.0), CollectiveSender(timeout_s=0.5)
    waiting.prepare(1, make_weights(1), ["absent"])
    other.prepare(1, make_weights(1), ["absent"])

    def send_to_nobody_there() -> None:
        with pytest.raises(WeightTransferError, match="broadcast of version 1 to absent failed"):
            waiting.send()

    thread = threading.Thread(target=send_to_nobody_there)
    thread.start()
    assert _becomes_true(collective._sending.locked)
    with pytest.raises(WeightTransferError, match=r"waited 0\.5 s for another broadcast of this process to end"):
        other.send()
    thread.join(30)
    waiting.close()
    other.close()


def _becomes_true(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def test_a_member_that_never_comes_is_an_error_in_time() -> None:
    sender = CollectiveSender(bucket_bytes=BUCKET_BYTES, timeout_s=1.0)
    sender.prepare(1, make_weights(1), ["absent"])
    began = time.monotonic()
    with pytest.raises(WeightTransferError, match="broadcast of version 1 to absent failed"):
        sender.send()
    assert time.monotonic() - began < 5
    sender.close()


def test_a_receiver_that_cannot_use_the_weights_tells_the_sender_at_once() -> None:
    sender = CollectiveSender(bucket_bytes=BUCKET_BYTES, timeout_s=30.0)
    offer = sender.prepare(1, make_weights(1), ["e0"])
    failures: list[str] = []

    def fetch() -> None:
        def on_tensor(name: str, tensor: torch.Tensor) -> None:
            raise ValueError(f"no parameter {name}")

        try:
            CollectiveReceiver("e0").fetch(offer, on_tensor)
        except ValueError as error:
            failures.append(str(error))

    thread = threading.Thread(target=fetch)
    thread.start()
    began = time.monotonic()
    with pytest.raises(WeightTransferError, match="broadcast of version 1 to e0 failed"):
        sender.send()
    assert time.monotonic() - began < 10
    thread.join(10)
    assert failures == ["no parameter model.embed_tokens.weight"]
    sender.close()


def test_an_engine_that_is_no_member_is_refused() -> None:
    sender = CollectiveSender(timeout_s=1.0)
    offer = sender.prepare(1, make_weights(1), ["e0"])
    with pytest.raises(WeightTransferError, match="engine e9"):
        CollectiveReceiver("e9").fetch(offer, lambda name, tensor: None)
    sender.close()


def test_a_flipped_byte_in_a_broadcast_is_noticed_when_checksums_are_taken() -> None:
    sender = CollectiveSender(bucket_bytes=BUCKET_BYTES, timeout_s=10.0, checksums=True)
    offer = sender.prepare(1, make_weights(1), ["e0"])
    sender._buckets[0][100] ^= 1
    errors: list[str] = []

    def fetch() -> None:
        try:
            CollectiveReceiver("e0").fetch(offer, lambda name, tensor: None)
        except WeightTransferError as error:
            errors.append(str(error))

    thread = threading.Thread(target=fetch)
    thread.start()
    with pytest.raises(WeightTransferError):
        sender.send()
    thread.join(10)
    assert len(errors) == 1
    assert "tensor model.embed_tokens.weight" in errors[0]
    assert "checksum" in errors[0]
    sender.close()


# --- shared memory ---------------------------------------------------------------------------------------------------


def path_of(offer: bytes) -> Path:
    decoded = decode_offer(offer)
    assert isinstance(decoded, SharedMemoryOffer)
    return Path(decoded.path)


def test_the_version_before_the_newest_stays_readable_and_older_ones_are_refused(tmp_path: Path) -> None:
    sender = SharedMemorySender(directory=tmp_path, bucket_bytes=BUCKET_BYTES)
    offers = [sender.prepare(version, make_weights(version)) for version in (1, 2)]
    receiver = SharedMemoryReceiver()
    assert [receiver.fetch(offer, lambda name, tensor: None) for offer in offers] == [1, 2]
    sender.prepare(3, make_weights(3))
    assert receiver.fetch(offers[1], lambda name, tensor: None) == 2
    with pytest.raises(WeightTransferError, match="holds version 3, not the offered version 1"):
        receiver.fetch(offers[0], lambda name, tensor: None)
    assert len(list(tmp_path.iterdir())) == 2
    sender.close()


def test_weights_overwritten_during_the_fetch_are_refused(tmp_path: Path) -> None:
    sender = SharedMemorySender(directory=tmp_path, bucket_bytes=BUCKET_BYTES, checksums=False)
    offer = sender.prepare(1, make_weights(1))
    overwritten = []

    def on_tensor(name: str, tensor: torch.Tensor) -> None:
        if not overwritten:
            overwritten.append(sender.prepare(2, make_weights(2)))
            sender.prepare(3, make_weights(3))

    with pytest.raises(WeightTransferError, match="holds version 3, not the offered version 1"):
        SharedMemoryReceiver().fetch(offer, on_tensor)
    sender.close()


def test_a_reader_killed_mid_fetch_disturbs_nobody(tmp_path: Path, start_engines: Any) -> None:
    survivor, victim = start_engines("survivor", "victim")
    sender = SharedMemorySender(directory=tmp_path, bucket_bytes=BUCKET_BYTES)
    offer = sender.prepare(1, make_weights(1))
    victim.begin(offer, kill_after=2)
    victim.process.join(10)
    assert victim.process.exitcode == -signal.SIGKILL
    for version in (1, 2):
        survivor.begin(offer)
        expect(survivor.result(), version)
        offer = sender.prepare(version + 1, make_weights(version + 1))
    sender.close()


def test_a_flipped_byte_is_named(tmp_path: Path) -> None:
    sender = SharedMemorySender(directory=tmp_path, bucket_bytes=BUCKET_BYTES)
    offer = sender.prepare(1, make_weights(1))
    with open(path_of(offer), "r+b") as file:
        file.seek(shared_memory.HEADER_BYTES + 100)
        file.write(b"\xff\xff\xff\xff")
    with pytest.raises(WeightTransferError, match=r"version 1, tensor model.embed_tokens.weight: checksum"):
        SharedMemoryReceiver().fetch(offer, lambda name, tensor: None)
    sender.close()


def test_a_receiver_cannot_change_what_others_see(tmp_path: Path) -> None:
    sender = SharedMemorySender(directory=tmp_path, bucket_bytes=BUCKET_BYTES)
    offer = sender.prepare(1, make_weights(1))
    SharedMemoryReceiver().fetch(offer, lambda name, tensor: tensor.zero_())
    assert SharedMemoryReceiver().fetch(offer, lambda name, tensor: None) == 1
    sender.close()


def test_larger_weights_get_a_larger_file_and_close_removes_all(tmp_path: Path) -> None:
    sender = SharedMemorySender(directory=tmp_path, bucket_bytes=BUCKET_BYTES)
    receiver = SharedMemoryReceiver()
    for version, scale in ((1, 1), (2, 1), (3, 5), (4, 5)):
        offer = sender.prepare(version, make_weights(version, scale))
        assert receiver.fetch(offer, lambda name, tensor: None) == version
    assert len(list(tmp_path.iterdir())) == 2
    sender.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WeightTransferError, match="cannot map the weights of version 4"):
        SharedMemoryReceiver().fetch(offer, lambda name, tensor: None)


def test_files_of_a_killed_learner_are_removed_by_the_next(tmp_path: Path) -> None:
    script = (
        "import sys, os, signal, torch\n"
        "from weight_sync.transports.shared_memory import SharedMemorySender\n"
        "sender = SharedMemorySender(directory=sys.argv[1])\n"
        "sender.prepare(1, [('w', torch.zeros(10))])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    alive = SharedMemorySender(directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
    alive.prepare(1, make_weights(1))
    assert shared_memory.remove_stale_files(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 1
    alive.close()


def test_a_full_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    sender = SharedMemorySender(directory=tmp_path)
    with pytest.raises(WeightTransferError, match=r"has no room for .* MiB of weights \(No space left on device\)"):
        sender.prepare(1, make_weights(1))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightTransferError, match="nowhere is not a directory"):
        SharedMemorySender(directory=tmp_path / "nowhere")
