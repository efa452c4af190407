"""What can go wrong with an inference server, by what is done about it.

=====================  ==============================================  ==============================================
error                  cause                                           consequence
=====================  ==============================================  ==============================================
EnvironmentUnfit       no environment, or another version in it        the run does not start; ``make engines``
ServerNotStarted       the process ended or was not ready in time      the engine is replaced, a few times
ServerUnreachable      no connection, or one that broke                the call is made again; then as ServerDied
ServerRefused          an answer with status 4xx                       the request fails as EngineFault, the server is well
ServerFailed           an answer with status 5xx                       the call is made again; then the request fails
ServerAnswerError      an answer that is not what the protocol allows  as ServerFailed
ServerSilent           no byte within ``request_timeout_s``            as ServerFailed; all silent: as ServerDied
ServerDied             a process ended, or failed again and again      requests continue elsewhere; the engine is replaced
=====================  ==============================================  ==============================================
"""

from __future__ import annotations

from rollout_workers.engines.servers.adapter import ServerAnswerError
from rollout_workers.errors import EngineFault

__all__ = [
    "EnvironmentUnfit",
    "ServerAnswerError",
    "ServerDied",
    "ServerFailed",
    "ServerNotStarted",
    "ServerNotThere",
    "ServerRefused",
    "ServerSilent",
    "ServerUnreachable",
]


class EnvironmentUnfit(EngineFault):
    """The engine's environment is missing or holds another version; the text names both and the remedy."""


class ServerNotStarted(EngineFault):
    """The first line names the cause; the following ones are the last of its log."""


class ServerUnreachable(EngineFault):
    """No connection, or one that broke before the answer was complete."""


class ServerNotThere(ServerUnreachable):
    """Nothing listens at its address."""


class ServerRefused(EngineFault):
    """Status 4xx: asking again would be refused again."""


class ServerFailed(EngineFault):
    """Status 5xx."""


class ServerSilent(EngineFault):
    """Not a byte for too long."""


class ServerDied(EngineFault):
    """The server is gone, or of no use any more."""
