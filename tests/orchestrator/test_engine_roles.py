"""Roles by load in a run: what the engines tell becomes a load, and a flip reaches the engine before the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_processes import MillraceProcess, assert_balanced, summary_of

from orchestrator.engine_roles import EngineRoles, load_of
from orchestrator.fleet_log import read_fleet_events
from rollout_workers.disaggregation.roles import Flip, RolePolicy
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import EngineHealth, EngineRole
from rollout_workers.engines.synthetic.config import SyntheticEngineConfig

POLICY = RolePolicy(window_s=10.0, min_residence_s=5.0, cool_down_s=5.0, half_concurrency=4.0)
CONFIG = EnginesConfig(prefill=1, decode=2, roles="auto", slots=32, role_policy=POLICY)


class Remote:
    """One method of an actor: notes its calls."""

    def __init__(self, calls: list[tuple[str, ...]], *name: str) -> None:
        self._calls, self._name = calls, name

    async def remote(self, *arguments: str) -> None:
        self._calls.append((*self._name, *arguments))


class Handle:
    """An engine actor as the roles see it."""

    def __init__(self, calls: list[tuple[str, ...]], name: str) -> None:
        self.set_role = Remote(calls, name, "set_role")


class Engines:
    """Three engines with far too much to prefill, and what is asked of them and of the workers."""

    def __init__(self, config: EnginesConfig = CONFIG) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.flips: list[Flip] = []
        self.roles = {"p": EngineRole.PREFILL, "d": EngineRole.DECODE, "e": EngineRole.DECODE}
        handles: dict[str, Any] = {name: Handle(self.calls, name) for name in self.roles}
        self.shell = EngineRoles(config, handles, self._tell, self.flips.append)

    async def _tell(self, method: str, *arguments: Any) -> None:
        self.calls.append(("workers", method, *arguments))

    def health(self, second: float, time_scale: float = 1.0) -> dict[str, EngineHealth]:
        busy = {
            "prefill_tokens": int(1000 * second),
            "prefill_s": second / time_scale,
            "queued": 40,
            "backlog_tokens": 40_000,
        }
        idle = {
            "decoding": 1,
            "generated_tokens": int(20 * second),
            "finished": int(second),
            "sessions": 9,
            "running": 1,
        }
        return {
            name: EngineHealth(version=0, role=role, **(busy if name == "p" else idle))
            for name, role in self.roles.items()
        }


async def test_a_flip_reaches_the_engine_and_then_the_workers() -> None:
    engines = Engines()
    for second in range(30):
        await engines.shell.look(engines.health(second), float(second))
    (flip,) = engines.flips
    assert flip.to is EngineRole.PREFILL
    assert engines.calls == [(flip.name, "set_role", "prefill"), ("workers", "set_engine_role", flip.name, "prefill")]


async def test_engines_that_have_told_nothing_yet_do_not_count() -> None:
    engines = Engines()
    for second in range(30):
        told = engines.health(second)
        del told["e"]
        await engines.shell.look(told, float(second))
    assert engines.flips == [], "the last engine that decodes keeps its role"


async def test_modelled_engines_are_judged_in_modelled_time() -> None:
    config = EnginesConfig(kind="synthetic", prefill=1, decode=2, roles="auto", role_policy=POLICY)
    config.synthetic = SyntheticEngineConfig(accelerators=1, slots=32, time_scale=20.0, half_concurrency=4.0)
    engines = Engines(config)
    for tick in range(30):
        await engines.shell.look(engines.health(tick, time_scale=20), tick / 20)
    assert len(engines.flips) == 1, "a window of ten modelled seconds is half a second"


def test_what_an_engine_tells_becomes_its_load() -> None:
    health = EngineHealth(
        version=3,
        role=EngineRole.DECODE,
        running=4,
        sessions=10,
        parked_sessions=5,
        kv_capacity_tokens=500.0,
        kv_suspended_tokens=120.0,
        finished=17,
    )
    load = load_of("d", health, CONFIG)
    assert (load.suspended, load.slots, load.half_concurrency) == (11, 32, 4.0)
    assert (load.kv_capacity, load.kv_suspended, load.finished) == (500.0, 120.0, 17)
    assert load_of("d", EngineHealth(version=0), CONFIG).kv_capacity == float("inf")


def test_a_run_moves_its_engines_to_where_the_work_is(tmp_path: Path) -> None:
    """Short prompts, long answers, and three of four modelled engines that begin as prefill engines."""
    run = tmp_path / "run"
    settings = [
        "tasks.options.suite=reason",
        "engines.replicas=1",
        "engines.prefill=3",
        "engines.decode=1",
        "engines.roles=auto",
        "engines.synthetic.accelerators=1",
        "engines.role_policy.min_residence_s=60",
        "rollout.groups_per_update=8",
        "rollout.group_size=4",
        "rollout.concurrency=128",
        "staleness.target_lag=4",
        "run.steps=6",
    ]
    process = MillraceProcess("train", "configs/synthetic.yaml", f"run.dir={run}", *settings, directory=run)
    assert process.wait(180) == 0, process.output[-3000:]
    summary = summary_of(run)
    assert_balanced(summary)
    assert summary["ledger"]["trained"] == 6 * 8
    flips = [event for event in read_fleet_events(run / "fleet.jsonl") if event.event in ("prefill", "decode")]
    assert flips, "nothing flipped"
    assert flips[0].event == "decode"
    assert "busy" in flips[0].detail


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"prefill": 0, "decode": 0}, "set both to at least 1"),
        ({"role_policy": RolePolicy(gain=0)}, "role_policy.gain"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        EnginesConfig(**({"prefill": 1, "decode": 1, "roles": "auto"} | settings)).validate()
