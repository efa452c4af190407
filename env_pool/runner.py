"""Synchronous user code off the event loop: cheap while it is quick, harmless while it is slow or hangs.

One thread runs the calls in order, so a batch of quick calls costs no thread switches between them. When a call has
run for ``takeover_s``, a fresh thread takes over the queue behind it and the slow call goes on alone; so slow calls run
beside each other. When it exceeds its time-out it is given up: the caller gets HungError, the thread is abandoned
(Python cannot end it) and counted in ``hung``.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import monotonic
from typing import Any


class HungError(Exception):
    """A call did not return within its time-out; unlike a TimeoutError that the code itself may raise."""


async def within(pending: Awaitable[Any], timeout_s: float) -> Any:
    """The result of asynchronous user code, or :class:`HungError` after ``timeout_s``."""
    try:
        async with asyncio.timeout(timeout_s) as limit:
            return await pending
    except TimeoutError:
        if limit.expired():
            raise HungError(f"no return within {timeout_s:g} s") from None
        raise


@dataclass(eq=False)
class _Call:
    function: Callable[[], Any]
    timeout_s: float
    future: asyncio.Future[Any]
    value: Any = None
    error: BaseException | None = None


@dataclass(eq=False)
class _Worker:
    """One thread. ``call`` is what it runs now; ``leading`` says whether it serves the queue."""

    call: _Call | None = None
    began_at: float = 0.0
    leading: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)


class Runner:
    """Runs functions on threads for one event loop. All methods are called on that loop."""

    def __init__(self, name: str, takeover_s: float = 0.02, max_threads: int = 128) -> None:
        self._name = name
        self._takeover_s = takeover_s
        self._max_threads = max_threads
        self._queue: SimpleQueue[_Call | None] = SimpleQueue()
        self._finished: deque[_Call] = deque()
        self._posted = False
        self._leader: _Worker | None = None
        self._slow: list[_Worker] = []
        self._watch: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting = 0
        self.hung = 0
        """Threads given up so far."""

    def submit(self, function: Callable[[], Any], timeout_s: float) -> asyncio.Future[Any]:
        """Run ``function``; the future gets its value or exception, or HungError ``timeout_s`` after it began."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        call = _Call(function, timeout_s, self._loop.create_future())
        if self._leader is None:
            self._lead()
        self._waiting += 1
        self._queue.put(call)
        if self._watch is None:
            self._watch = self._loop.call_later(self._takeover_s, self._check)
        return call.future

    def close(self) -> None:
        """End the thread that serves the queue, after what is queued."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._leader is not None:
            self._queue.put(None)
            self._leader = None

    def _lead(self) -> None:
        self._leader = _Worker()
        threading.Thread(target=self._serve, args=(self._leader,), name=f"{self._name}-runner", daemon=True).start()

    def _serve(self, worker: _Worker) -> None:
        while (call := self._queue.get()) is not None:
            with worker.lock:
                if not worker.leading:  # taken over between two calls: this one belongs to the next leader
                    self._queue.put(call)
                    return
                worker.call, worker.began_at = call, monotonic()
            try:
                call.value = call.function()
            except Exception as error:  # noqa: BLE001 - user code; its caller gets whatever it was
                call.error = error
            with worker.lock:
                given_up = worker.call is not call
                worker.call = None
                leading = worker.leading
            if not given_up:
                self._post(call)
            if not leading:
                return

    def _post(self, call: _Call) -> None:
        self._finished.append(call)
        if not self._posted and self._loop is not None:
            self._posted = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._posted = False  # the loop is closed: nobody is left to hear the result

    def _deliver(self) -> None:
        self._posted = False  # before draining: a result posted from now on schedules another delivery
        while self._finished:
            call = self._finished.popleft()
            self._waiting -= 1
            if call.future.done():
                continue
            if call.error is not None:
                call.future.set_exception(call.error)
            else:
                call.future.set_result(call.value)

    def _check(self) -> None:
        """Hand the queue on when its call is slow, and give up calls past their time-out."""
        assert self._loop is not None
        self._watch = None
        now = monotonic()
        if self._leader is not None and len(self._slow) < self._max_threads:
            with self._leader.lock:
                slow = self._leader.call is not None and now - self._leader.began_at >= self._takeover_s
                self._leader.leading = not slow
            if slow:
                self._slow.append(self._leader)
                self._lead()
        overdue = [w for w in (*self._slow, self._leader) if w is not None and self._give_up(w, now)]
        self._slow = [w for w in self._slow if w.call is not None]
        if self._leader in overdue:  # only when no thread was left to take over
            self._lead()
        if self._waiting:
            self._watch = self._loop.call_later(self._takeover_s, self._check)

    def _give_up(self, worker: _Worker, now: float) -> bool:
        with worker.lock:
            call = worker.call
            if call is None or now - worker.began_at < call.timeout_s:
                return False
            worker.call, worker.leading = None, False
        self.hung += 1
        self._waiting -= 1
        if not call.future.done():
            call.future.set_exception(HungError(f"no return within {call.timeout_s:g} s"))
        return True
