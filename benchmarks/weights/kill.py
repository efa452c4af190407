"""A receiver gets SIGKILL in the middle of a broadcast: how long until all others hold the version.

Sender and receivers are real processes. That a process is gone is noticed as in a run, from outside the transport: the broadcast
is then ended, and what is missing offered again to those that are left. Nobody else is restarted.
"""

from __future__ import annotations

import threading
from multiprocessing.connection import wait
from typing import Any

from benchmarks.weights.engines import Fetched, Receivers
from benchmarks.weights.throughput import make_weights

MEMBERS = ("engine-0", "engine-1", "engine-2")
VICTIM = "engine-1"
TIMEOUT_S = 60.0


def measure_kills(megabytes: float) -> dict[str, Any]:
    """Killed at the first, the middle and the last tensor; seconds from the kill until the others hold the version."""
    named = make_weights(megabytes)
    places = {"first tensor": 0, "middle": len(named) // 2, "last tensor": len(named) - 1}
    return {name: measure_kill(named, place) for name, place in places.items()}


def measure_kill(named: list[tuple[str, Any]], kill_at: int) -> dict[str, Any]:
    """One of three receivers dies at tensor ``kill_at`` of version 2."""
    from weight_sync.transports.collective import CollectiveSender

    receivers = Receivers(MEMBERS)
    sender = CollectiveSender(bucket_bytes=4 << 20, timeout_s=TIMEOUT_S)
    try:
        for version in (1, 2):
            sender.prepare(version, named, [])
            receivers.tell("fetch", sender.offer(MEMBERS))
            if version == 1:
                sender.send()
                for member in MEMBERS:
                    receivers.answer(member)
                receivers.tell("kill_at", kill_at, [VICTIM])
                continue
            # The command that was told last comes before the fetch.
            return _after_the_kill(sender, receivers)
    finally:
        receivers.close()
        sender.close()
    raise AssertionError("two versions were sent")


def _after_the_kill(sender: Any, receivers: Receivers) -> dict[str, Any]:
    from weight_sync.errors import WeightTransferError

    before = {member: process.pid for member, process in receivers.processes.items()}
    victim = receivers.processes[VICTIM]

    def end_the_broadcast() -> None:
        if wait([victim.sentinel], timeout=TIMEOUT_S):
            sender.cancel()

    watcher = threading.Thread(target=end_the_broadcast, daemon=True)
    watcher.start()
    broken = ""
    try:
        sender.send()
    except WeightTransferError as error:
        broken = str(error)
    killed_at = float(receivers.answer(VICTIM))
    others = [member for member in MEMBERS if member != VICTIM]
    answers: dict[str, Fetched] = {member: receivers.answer(member) for member in others}
    again = [member for member in others if answers[member].version != 2]
    if again:
        receivers.tell("fetch", sender.offer(again), again)
        sender.send()
        answers |= {member: receivers.answer(member) for member in again}
    watcher.join(TIMEOUT_S)
    return {
        "seconds": round(max(answer.ended_at for answer in answers.values()) - killed_at, 3),
        "hold_the_version": all(answer.version == 2 for answer in answers.values()),
        "sent_again_to": len(again),
        "restarted": sum(receivers.processes[member].pid != before[member] for member in others),
        "broadcast_ended_with": broken,
    }
