"""Stands between an actor and its server, so that the server never outlives the actor, however that one ends.

Run as a script (standard library only), with a pipe on each of its standard streams::

    python guardian.py LOG COMMAND...

It leaves the actor's process tree, starts the command in a session of its own with its output in LOG, writes
``started PID`` and, when the command has ended, ``ended STATUS`` (a negative status is a signal). When its standard
input ends, because the actor closed it or is gone, it ends the server and everything that the server started: a
terminating signal first, the killing one after a few seconds. It does the same with what is left when the server ends by
itself, and then closes its pipes. As their subreaper it knows also of processes whose parents are gone. If the guardian
itself is killed, the kernel kills the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

GRACE_S = 3.0
"""From the terminating signal to the killing one."""
GIVE_UP_S = 20.0
"""A process that the kernel does not let die (it waits for a device) is not waited for any longer."""


def main(log_path: str, command: list[str]) -> int:
    if os.fork():
        return 0  # the actor's child ends here: what Ray does to the children of an actor does not reach the guardian
    os.setsid()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    wakeup_read, wakeup_write = os.pipe()
    os.set_blocking(wakeup_read, False)
    os.set_blocking(wakeup_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    server = _start(log_path, command)
    if server is None:
        return 1
    status = _watch(server, wakeup_read)
    if status is not None:
        _report(f"ended {status}")  # at once: what the server left behind may need seconds to end
        _end(server)
    else:
        _report(f"ended {_end(server)}")
    return 0


def _start(log_path: str, command: list[str]) -> int | None:
    """The server's process id; None (and the reason is reported) if it cannot be started."""
    guardian = os.getpid()

    def in_the_child() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guardian:
            os._exit(1)
        for restored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(restored, signal.SIG_DFL)

    try:
        with open(log_path, "ab", buffering=0) as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=in_the_child,
            )
    except OSError as error:
        _report(f"failed {error}")
        return None
    _report(f"started {process.pid}")
    process.returncode = 0  # the guardian reaps its children itself
    return process.pid


def _watch(server: int, wakeup: int) -> int | None:
    """Until the server ends (its status) or standard input does (None)."""
    while True:
        readable, _, _ = select.select([0, wakeup], [], [])
        if wakeup in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(wakeup, 4096)
        status = _reap(server)
        if status is not None:
            return status
        if 0 in readable and not os.read(0, 4096):
            return None


def _end(server: int) -> int:
    """End the server's session and all that descends from the guardian. Returns the server's status."""
    began_at = time.monotonic()
    status, killed = None, False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(server, signal.SIGTERM)
    while time.monotonic() - began_at < GIVE_UP_S:
        reaped = _reap(server)
        status = status if reaped is None else reaped
        left = _descendants()
        if not left:
            break
        if killed or time.monotonic() - began_at >= GRACE_S:
            killed = True
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        select.select([], [], [], 0.02)
    return 0 if status is None else status


def _reap(server: int) -> int | None:
    """Collect every child that has ended; the server's status if it was among them."""
    status = None
    while True:
        try:
            pid, raw = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == server:
            status = os.waitstatus_to_exitcode(raw)


def _descendants() -> list[int]:
    """Living processes whose chain of parents leads here."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
                if state != b"Z":
                    parents[int(name)] = int(parent)
    here, found = os.getpid(), []
    for pid in parents:
        ancestor: int | None = pid
        while ancestor is not None and ancestor != here:
            ancestor = parents.get(ancestor)
        if ancestor == here and pid != here:
            found.append(pid)
    return found


def _report(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1, f"{line}\n".encode())


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the process group is all there is."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
