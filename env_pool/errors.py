"""Whose fault it was: the agent's, the environment's or the system's.

=================  ==========================================  ====================================================
fault              cause                                       consequence
=================  ==========================================  ====================================================
AgentFault         wrong tool, bad arguments, bad syntax       an error observation; the episode goes on
EnvironmentFault   environment code raised, hung or diverged   the episode ends as ``system_error``, never reward 0
SystemFault        the actor died and nothing could restore    the episode ends as ``system_error``, is replaced
=================  ==========================================  ====================================================
"""

from __future__ import annotations

from enum import StrEnum


class Blame(StrEnum):
    """Which of the three parties a fault is charged to."""

    AGENT = "agent"
    ENVIRONMENT = "environment"
    SYSTEM = "system"


class Fault(Exception):
    """Base of the three faults; ``blame`` says whose it is."""

    blame: Blame = Blame.SYSTEM


class AgentFault(Fault):
    """The agent asked for something impossible. A tool raises it to answer with an error instead of a result."""

    blame = Blame.AGENT


class EnvironmentFault(Fault):
    """Environment code raised, hung past its time-out, or did not repeat itself when replayed.

    ``environment`` and ``method`` say where; ``detail`` is the tail of the traceback, where there is one.
    """

    blame = Blame.ENVIRONMENT

    def __init__(self, environment: str, method: str, reason: str, detail: str = "") -> None:
        self.environment = environment
        self.method = method
        self.reason = reason
        self.detail = detail
        text = f"environment {environment!r}, {method}: {reason}"
        super().__init__(f"{text}\n{detail}" if detail else text)


class SystemFault(Fault):
    """An actor, or the state of an environment on it, was lost for good."""

    blame = Blame.SYSTEM
