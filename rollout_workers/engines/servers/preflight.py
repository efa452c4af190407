"""A look of seconds, before a run makes anything, at whether its servers can be started or found."""

from __future__ import annotations

from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.servers.bring_up import ServerTimes, join_server
from rollout_workers.engines.servers.environment import check_environment, interpreter_of
from rollout_workers.engines.servers.registry import make_adapter, server_settings

PATIENCE = ServerTimes(startup_timeout_s=10.0, request_timeout_s=10.0)
"""With external servers, which must run before the run does."""


async def look_at_servers(config: EnginesConfig) -> None:
    """On the machine of the engines, for a ``config.kind`` that is a server. Changes nothing.

    Raises EnvironmentUnfit if the environment is missing or holds another version, ServerNotStarted if an external
    server is not there.
    """
    settings, adapter = server_settings(config), make_adapter(config)
    if not settings.urls:
        await check_environment(interpreter_of(config.kind, settings.python), adapter)
    for url in settings.urls:
        server = await join_server(adapter, url, config.max_len, PATIENCE)
        await server.close()
