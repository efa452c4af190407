"""What the servers' answers to single calls have in common."""

from __future__ import annotations

from typing import Any

import msgspec

from rollout_workers.engines.servers.adapter import ServerAnswerError
from rollout_workers.engines.servers.event_stream import shown


def json_object(body: bytes, path: str) -> dict[str, Any]:
    """The JSON object in an answer of ``path``. Raises ServerAnswerError for anything else."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ServerAnswerError(f"{path} answered no JSON ({error}): {shown(body)}") from None
    if not isinstance(answer, dict):
        raise ServerAnswerError(f"{path} answered no object: {shown(body)}")
    return answer


def served_version(body: bytes, path: str, server: str) -> int:
    """The version that ``server`` says it serves. Raises ServerAnswerError for one that Millrace never named."""
    version = json_object(body, path).get("weight_version")
    try:
        return int(str(version))
    except ValueError:
        raise ServerAnswerError(f"{server} serves weight version {version!r}, which Millrace never gave it") from None
