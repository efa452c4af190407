"""A thread that answers requests for the bytes of publications, one connection a thread."""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
from collections.abc import Callable
from contextlib import suppress

from weight_sync.errors import WeightTransferError
from weight_sync.relay.frames import Answer, Request, receive_frame, send_frame

logger = logging.getLogger(__name__)

IDLE_S = 600.0
"""A connection on which nothing was asked for so long is closed."""

Lookup = Callable[[str], memoryview]
"""The bytes of a publication. Raises WeightTransferError if it is not held."""
Stage = Callable[[bytes], bytes]
"""Hold an offered version; returns the offer of its file in shared memory. Raises WeightTransferError."""


class VersionServer:
    """Listens on a free port of ``host`` until `close`. ``stage`` is None where nothing can be staged."""

    def __init__(self, host: str, lookup: Lookup, stage: Stage | None = None) -> None:
        server = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                server._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True
            block_on_close = False

        self._lookup, self._stage = lookup, stage
        self._server = Server((host, 0), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="weights-relay", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(IDLE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(ConnectionError):  # an engine that dies while it reads is its supervisor's matter
            while True:
                try:
                    request = receive_frame(connection, Request)
                    if request is None:
                        return
                    self._answer(connection, request)
                except (WeightTransferError, TimeoutError) as error:
                    logger.info("a connection is closed: %s", error)
                    return

    def _answer(self, connection: socket.socket, request: Request) -> None:
        try:
            if request.kind == "stage" and self._stage is not None:
                send_frame(connection, Answer(shared=self._stage(request.offer)))
                return
            if request.kind != "read":
                raise WeightTransferError(f"{request.kind!r} is nothing that can be asked for here")
            data = self._lookup(request.key)
            if not 0 <= request.start <= request.end <= len(data):
                raise WeightTransferError(f"bytes {request.start}:{request.end} of {len(data)} were asked for")
        except WeightTransferError as error:
            send_frame(connection, Answer(error=str(error)))
            return
        send_frame(connection, Answer(nbytes=request.end - request.start))
        connection.sendall(data[request.start : request.end])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
