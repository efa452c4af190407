"""Brings what was written to the disk, on a thread, and lets go of the memory that held it.

A file that only grows takes a fresh page of memory for every page written, and fresh memory is several times slower than
the disk (the machine has to find, clear and, in a virtual machine, get it from its host). Pages that are on the disk are
given back at once and used again for the next ones.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

FILES_AT_ONCE = 32
"""Finished files that may wait for the disk before `WriteBehind.close` waits too."""


class WriteBehind:
    """Syncs ranges of files in the order of the calls. Errors are raised by a later call, as ``OSError``."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._running: deque[Future[None]] = deque()

    @property
    def idle(self) -> bool:
        """Whether all that was asked for is done."""
        return all(future.done() for future in self._running)

    def sync(self, descriptor: int, begin: int, end: int) -> None:
        """Bytes ``begin:end`` of a file to the disk."""
        self._submit(descriptor, begin, end, closes=False)

    def close(self, descriptor: int, begin: int) -> None:
        """All of a file to the disk, and close it; its bytes before ``begin`` were asked for earlier."""
        self._submit(descriptor, begin, 0, closes=True)

    def wait(self) -> None:
        """Returns when all is on the disk."""
        while self._running:
            self._running.popleft().result()

    def _submit(self, descriptor: int, begin: int, end: int, *, closes: bool) -> None:
        while self._running and (self._running[0].done() or len(self._running) >= FILES_AT_ONCE):
            self._running.popleft().result()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._running.append(self._threads.submit(_sync, descriptor, begin, end, closes))


def _sync(descriptor: int, begin: int, end: int, closes: bool) -> None:
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, begin, max(end - begin, 0), os.POSIX_FADV_DONTNEED)
    finally:
        if closes:
            os.close(descriptor)
