"""Prefill and decode on different SGLang servers: their arguments, the request to a pair of them, the router's command.

A request goes to both servers of a pair at the same time with the same *room*. The prefill server offers the KV under
the room at its bootstrap port, the decode server fetches it there and answers with the tokens; the prefill server's own
answer has no token that counts. Both must serve the same policy version: the pair is chosen by Millrace, which knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.servers.adapter import Call, Launch
from rollout_workers.engines.sglang.requests import generate_call

ROLES = ("mixed", "prefill", "decode")
BACKENDS = ("mooncake", "nixl", "ascend", "mori", "mooncake_tcp")
"""Transfer backends of SGLang; ``fake`` moves nothing and is refused."""


@dataclass(frozen=True)
class PrefillAddress:
    """Where decode servers fetch what a prefill server has computed."""

    host: str
    bootstrap_port: int


def role_arguments(launch: Launch, cpu: bool) -> dict[str, Any]:
    """Arguments that a server of ``launch.role`` has beside those of a mixed one (defaults: the user's win)."""
    if launch.role not in ROLES:
        raise ValueError(f"role {launch.role!r} of an SGLang server: must be one of {', '.join(ROLES)}")
    if launch.role == "mixed":
        return {}
    if launch.kv_port <= 0:
        raise ValueError(f"an SGLang server with role {launch.role} needs a port for its bootstrap service")
    arguments: dict[str, Any] = {
        "disaggregation_mode": launch.role,
        "disaggregation_bootstrap_port": launch.kv_port,
        "disaggregation_transfer_backend": "nixl" if cpu else "mooncake",
    }
    if cpu and launch.role == "decode":
        # The default keeps retracted KV in memory that CUDA has pinned.
        arguments["disaggregation_decode_retraction_backup"] = "cpu_tensor"
    return arguments


def role_environment(launch: Launch, cpu: bool) -> dict[str, str]:
    """UCX without devices that a machine with a CPU alone does not have."""
    return {"UCX_TLS": "tcp,sm,self"} if cpu and launch.role != "mixed" else {}


def check_split(args: Mapping[str, Any], prefill: int, decode: int) -> None:
    """Raise ValueError if the pass-through arguments and the split contradict each other."""
    backend = args.get("disaggregation_transfer_backend")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"engines.sglang.args.disaggregation_transfer_backend={backend}: must be one of {', '.join(BACKENDS)}"
        )
    if (prefill > 0) != (decode > 0):
        raise ValueError(
            f"engines.prefill={prefill}, engines.decode={decode}: SGLang needs at least one server of each role, or "
            "none of either"
        )
    stray = [name for name in args if name.replace("-", "_").startswith("disaggregation_")]
    if stray and not prefill:
        raise ValueError(f"engines.sglang.args.{stray[0]}: set engines.prefill and engines.decode as well")


def pair_calls(request: GenerateRequest, served: int, prefill: PrefillAddress, room: int) -> tuple[Call, Call]:
    """The calls to the prefill and to the decode server of a pair, to be made at the same time.

    ``room`` must be new for every request to this prefill server. The decode server's answer is the one to parse; the
    prefill server is asked for one token, which is the decode server's first.
    """
    if not 0 <= room < 2**63:
        raise ValueError(f"room {room}: must be between 0 and 2**63 - 1")
    call = generate_call(
        request,
        served,
        bootstrap_host=prefill.host,
        bootstrap_port=prefill.bootstrap_port,
        bootstrap_room=room,
    )
    return call, call


def router_command(
    python: str,
    host: str,
    port: int,
    prefill: Sequence[tuple[str, int]],
    decode: Sequence[str],
    metrics_port: int,
) -> list[str]:
    """SGLang's own router over a split fleet, for clients other than Millrace.

    ``prefill``: the URL and bootstrap port of each prefill server; ``decode``: the URLs of the decode servers;
    ``metrics_port``: for its metrics, also on ``host`` (by itself the router takes 29000 of every interface).
    """
    if not prefill or not decode:
        raise ValueError("the router needs at least one prefill and one decode server")
    words = [python, "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    for url, bootstrap_port in prefill:
        words += ["--prefill", url, str(bootstrap_port)]
    for url in decode:
        words += ["--decode", url]
    words += ["--host", host, "--port", str(port)]
    return [*words, "--prometheus-host", host, "--prometheus-port", str(metrics_port)]
