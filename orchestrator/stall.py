"""What a run that makes no progress waits for, in words."""

from __future__ import annotations

import asyncio

from orchestrator.config import Config
from orchestrator.dispatcher import Dispatcher
from orchestrator.progress import Progress
from orchestrator.stuck_actors import PROBE_S
from orchestrator.supervisor import Supervisor


async def describe_stall(
    idle: float, config: Config, progress: Progress, dispatcher: Dispatcher, supervisor: Supervisor
) -> str:
    """Name the actors that do not answer or, if all do, the groups, the queue and the learner. ``idle`` is in seconds."""
    said = f"nothing finished for {idle:.0f} s (run.stall_timeout_s={config.run.stall_timeout_s:g})"
    silent = progress.silent()
    if silent:
        return (
            f"{said}, and these actors do not answer: {', '.join(silent)}; see their logs in the logs directory of "
            f"{config.run.dir}"
        )
    async with asyncio.timeout(PROBE_S):
        stats = await supervisor.actors["queue-0"].handle.stats.remote()
        learner = await supervisor.actors["learner-0"].handle.stats.remote()
    waiting = ", ".join(dispatcher.oldest_in_flight(3)) or "no group"
    return (
        f"{said}: {dispatcher.in_flight} groups in flight (oldest: {waiting}), {stats['ready']} ready in the queue, the "
        f"learner is {learner['phase']}"
    )
