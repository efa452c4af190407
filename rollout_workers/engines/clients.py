"""Who uses an engine: which client each request and session belongs to. Pure bookkeeping, for every kind of engine."""

from __future__ import annotations

from collections import Counter

from rollout_workers.engines.protocol import EngineHealth, EngineLoad
from rollout_workers.submission import SubmitBatch


class ClientBook:
    """Sessions count from their first request until they are released, whatever the engine has kept of their KV.

    >>> book = ClientBook()
    >>> book.load("w0").sessions
    0
    """

    def __init__(self) -> None:
        self._client_of: dict[str, str] = {}
        """Of each request in flight."""
        self._sessions: dict[str, str] = {}
        self._of_client: Counter[str] = Counter()
        """Sessions by client."""
        self._in_flight: Counter[str] = Counter()
        """Requests by client."""
        self.finished = 0
        """Requests that ended since the engine began."""
        self.kv_drops = 0
        """Times that the KV of all sessions between two turns was dropped."""

    def took(self, batch: SubmitBatch) -> None:
        """A submission has arrived. Its releases are meant for sessions before its requests."""
        for session in batch.releases:
            self._release(session)
        for request in batch.requests:
            if request.session_id not in self._sessions:
                self._sessions[request.session_id] = batch.client
                self._of_client[batch.client] += 1
            if request.request_id not in self._client_of:
                self._client_of[request.request_id] = batch.client
                self._in_flight[batch.client] += 1

    def ended(self, request_id: str) -> str | None:
        """A request has ended; returns whose it was."""
        client = self._client_of.pop(request_id, None)
        if client is not None:
            self._in_flight[client] -= 1
            self.finished += 1
        return client

    def client_of(self, request_id: str) -> str | None:
        """Whose request this is; None when it is not in flight."""
        return self._client_of.get(request_id)

    def sessions_of(self, client: str) -> list[str]:
        return [session for session, owner in self._sessions.items() if owner == client]

    def forget(self, client: str) -> tuple[list[str], list[str]]:
        """A client is gone; returns its requests in flight, to be aborted, and its sessions, to be released."""
        requests = [request for request, owner in self._client_of.items() if owner == client]
        sessions = self.sessions_of(client)
        for request_id in requests:
            del self._client_of[request_id]
        for session in sessions:
            del self._sessions[session]
        del self._of_client[client], self._in_flight[client]
        return requests, sessions

    def load(self, client: str, health: EngineHealth | None = None) -> EngineLoad:
        """What to tell ``client``."""
        return EngineLoad(
            sessions=len(self._sessions),
            requests=len(self._client_of),
            own_sessions=self._of_client[client],
            own_requests=self._in_flight[client],
            waiting=health.waiting if health is not None else 0,
            kv_used=health.kv_used if health is not None else 0.0,
            lost=health.evicted_sessions if health is not None else 0,
            finished=self.finished,
            kv_drops=self.kv_drops,
        )

    def _release(self, session: str) -> None:
        client = self._sessions.pop(session, None)
        if client is not None:
            self._of_client[client] -= 1
