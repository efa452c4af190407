"""An engine's side of all hand-offs, whichever role it has: what the engine actor calls around its engine.

==================  ==================================  ======================================  ==========================
what                consumes                            produces                                waits for
==================  ==================================  ======================================  ==========================
``submit``          requests                            requests of the engine, announcements   nothing
``stepped``         a step's chunks, computed KV        pieces, chunks for clients              nothing
decode side         pieces                              KV in slots, credits                    ``timeout_s``, the pieces'
                                                                                                connection
prefill side        answers, credits                    pieces                                  ``timeout_s``
==================  ==================================  ======================================  ==========================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from rollout_workers.disaggregation.config import HandoffConfig
from rollout_workers.disaggregation.counters import KvCounters
from rollout_workers.disaggregation.decode_side import DecodeSide
from rollout_workers.disaggregation.prefill_side import PrefillSide
from rollout_workers.engines.protocol import EngineHealth, EngineRole, GenerateRequest, TokenChunk

if TYPE_CHECKING:
    from rollout_workers.engines.torch_engine import TorchEngine


class KvStation:
    """Made on the event loop that steps ``engine``.

    Args:
        engine: The engine; nobody else submits to it, aborts or releases.
        config: How KV moves.
        host: Where other engines reach this process.
        deliver: Takes chunks that belong to clients and do not come from a step.
        wake: Has the engine stepped.
    """

    def __init__(
        self,
        engine: TorchEngine,
        config: HandoffConfig,
        host: str,
        deliver: Callable[[list[TokenChunk]], None],
        wake: Callable[[], None],
    ) -> None:
        self.role = EngineRole.MIXED
        self._engine = engine
        self._counters = KvCounters()
        self._prefill = PrefillSide(engine, config, self._counters, deliver, wake)
        self._decode = DecodeSide(engine, config, self._counters, host, deliver, wake)

    @property
    def address(self) -> str:
        """Where other engines send KV to."""
        return self._decode.address

    @property
    def open(self) -> int:
        """Hand-offs under way, on either side."""
        return self._prefill.open + self._decode.open

    def submit(self, request: GenerateRequest) -> None:
        """Take a request, whether its KV goes elsewhere, comes from elsewhere, or neither."""
        if request.kv_target is not None:
            self._prefill.submit(request)
        elif request.kv_source:
            self._decode.submit(request)
        else:
            self._engine.submit(request)

    def abort(self, request_id: str) -> None:
        if not self._decode.abort(request_id):
            self._engine.abort(request_id)

    def release(self, session_id: str) -> None:
        self._prefill.release(session_id)
        self._decode.release(session_id)
        self._engine.release(session_id)

    def stepped(self, chunks: list[TokenChunk]) -> list[TokenChunk]:
        """After a step of the engine that made ``chunks``; returns those that go to the clients now."""
        return self._prefill.stepped(chunks)

    def committed(self) -> None:
        """After a commit: hand-offs of the version before are given up where the KV policy leaves them no sense."""
        self._prefill.pump()

    def health(self, health: EngineHealth) -> EngineHealth:
        """The engine's health with what is known here."""
        return msgspec.structs.replace(health, role=self.role, **self._counters.snapshot())

    def close(self) -> None:
        self._prefill.close()
        self._decode.close()
