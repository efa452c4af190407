"""The asyncio front of the embedded engine: steps it on the event loop, hands its chunks to those who asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from torch import Tensor

from rollout_workers.engines.protocol import (
    EngineHealth,
    FinishReason,
    GenerateRequest,
    KvPolicy,
    PauseMode,
    TokenChunk,
    WeightUpdate,
)
from rollout_workers.engines.torch_engine.engine import TorchEngine

logger = logging.getLogger(__name__)


class EngineFailedError(RuntimeError):
    """A step of the engine raised; it serves nothing any more. The cause is chained."""


class AsyncTorchEngine:
    """Implements InferenceEngine over a :class:`TorchEngine` in the same thread.

    | loop | consumes | produces | waits for | unblocked by |
    |---|---|---|---|---|
    | ``_run`` | the engine's steps | chunks for iterators and ``on_chunks`` | work | every other method |

    Between two steps the event loop runs whatever else is ready once, so a control call waits for one step at most.
    """

    def __init__(self, engine: TorchEngine, on_chunks: Callable[[list[TokenChunk]], None] | None = None) -> None:
        """``on_chunks`` gets the chunks of requests from :meth:`submit_many`, once a step and all together."""
        self.engine = engine
        self._on_chunks = on_chunks
        self._streams: dict[str, asyncio.Queue[TokenChunk | EngineFailedError]] = {}
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    # ------------------------------------------------------------------------------------------------- requests

    def submit_many(self, requests: Sequence[GenerateRequest]) -> None:
        """Queue requests in order; their chunks go to ``on_chunks``. Raises ValueError for an id in flight."""
        if self._on_chunks is None:
            raise ValueError("submit_many needs an engine made with on_chunks=...")
        self._check()
        for request in requests:
            self.engine.submit(request)
        self._wake()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """Yield a request's chunks until the one with a finish reason; leaving early aborts the request."""
        self._check()
        self.engine.submit(request)
        stream = self._streams[request.request_id] = asyncio.Queue()
        finished: FinishReason | None = None
        try:
            self._wake()
            while finished is None:
                chunk = await stream.get()
                if isinstance(chunk, EngineFailedError):
                    raise chunk
                finished = chunk.finish_reason
                yield chunk
        finally:
            if finished is None and self._failure is None:
                self.engine.abort(request.request_id)
                self._wake()
            else:
                self._streams.pop(request.request_id, None)

    async def abort(self, request_id: str) -> None:
        self.engine.abort(request_id)
        self._wake()

    async def release(self, session_id: str) -> None:
        self.engine.release(session_id)
        self._wake()

    # ------------------------------------------------------------------------------------------------- control

    async def pause(self, keep: PauseMode) -> None:
        self.engine.pause(keep)
        self._wake()

    async def resume(self) -> None:
        self.engine.resume()
        self._wake()

    async def stage(self, version: int, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy a version tensor by tensor, with steps of the engine in between."""
        self._check()
        self.engine.stage_begin(version)
        for name, tensor in named_tensors:
            self.engine.stage_tensor(name, tensor)
            await asyncio.sleep(0)
        self.engine.stage_end()

    async def apply(self, update: WeightUpdate) -> int:
        """Serve a staged version from the next token on; returns it."""
        self._check()
        return self.engine.commit(update.version, KvPolicy(update.kv))

    async def pin(self, version: int) -> None:
        self.engine.pin(version)

    async def unpin(self, version: int) -> None:
        self.engine.unpin(version)

    async def health(self) -> EngineHealth:
        self._check()
        return self.engine.health()

    async def close(self) -> None:
        """Abort what is in flight, deliver its last chunks and stop stepping."""
        if self._task is None:
            return
        self.engine.pause(PauseMode.ABORT)
        self._deliver(self.engine.step())
        self._task.cancel()
        await asyncio.wait([self._task], timeout=10.0)
        self._task = None

    # ------------------------------------------------------------------------------------------------- the loop

    def _check(self) -> None:
        if self._failure is not None:
            raise EngineFailedError(f"the engine failed: {self._failure!r}") from self._failure

    def _wake(self) -> None:
        """Let the loop go on if there is work; starts it on first use."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="torch-engine")
        self._work.set()

    async def _run(self) -> None:
        try:
            while True:
                if not self.engine.has_work:
                    self._work.clear()
                    await self._work.wait()
                self._deliver(self.engine.step())
                await asyncio.sleep(0)
        except Exception as error:
            logger.exception("the torch engine failed")
            self._failure = error
            failure = EngineFailedError(f"the engine failed: {error!r}")
            failure.__cause__ = error
            for stream in self._streams.values():
                stream.put_nowait(failure)

    def _deliver(self, chunks: list[TokenChunk]) -> None:
        """Give each chunk to its iterator, and the rest to ``on_chunks`` in one call."""
        rest = []
        for chunk in chunks:
            stream = self._streams.get(chunk.request_id)
            if stream is None:
                rest.append(chunk)
                continue
            stream.put_nowait(chunk)
            if chunk.finish_reason is not None:
                del self._streams[chunk.request_id]
        if rest and self._on_chunks is not None:
            self._on_chunks(rest)
