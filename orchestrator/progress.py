"""The course of a run in numbers: metrics on disk, the snapshot for the terminal, the summary at the end."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from orchestrator.accounting.accountant import Accountant
from orchestrator.config import Config
from orchestrator.dispatcher import Dispatcher
from orchestrator.run_directory import RunDirectory
from orchestrator.snapshot import Snapshot
from orchestrator.supervisor import Supervisor
from orchestrator.telemetry import Metrics
from rollout_workers.assignments import EpisodeReport

logger = logging.getLogger(__name__)

HISTORY = 400
PACKAGES = ("millrace", "torch", "transformers", "ray", "omegaconf", "msgspec", "numpy")


class Progress:
    """Gathers what happens; knows nothing of why."""

    def __init__(self, config: Config, run: RunDirectory, version: int, started_at: float) -> None:
        self._config = config
        self._run = run
        self._started_at = started_at
        self._metrics = Metrics(run, began_at=started_at)
        self._base_version = version
        self._version = version
        self.phase = "starting"
        """What the run is doing, see `Snapshot.phase`."""
        self._events: deque[str] = deque(maxlen=50)
        self._rewards: deque[float] = deque(maxlen=HISTORY)
        self._success: deque[float] = deque(maxlen=HISTORY)
        self._step_times: deque[float] = deque(maxlen=50)
        self._token_times: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=50)
        self._last: dict[str, float] = {}
        self._evaluations: list[dict[str, Any]] = sorted(
            (run.read_json(path) for path in run.evaluations.glob("step-*.json")), key=lambda result: result["step"]
        )
        self._dropped: Counter[str] = Counter()
        self._episodes: Counter[str] = Counter()
        self._lag_sum = 0.0
        self._lag_max = 0
        self._lag_tokens = 0.0

    def event(self, text: str) -> None:
        """Something a person should notice."""
        logger.warning("%s", text)
        self._events.append(f"{time.time() - self._started_at:6.1f} s  {text}")

    def dropped(self, reason: str) -> None:
        if not self._dropped[reason]:
            self.event(f"first group dropped ({reason})")
        self._dropped[reason] += 1

    def episode(self, report: EpisodeReport) -> None:
        self._episodes["ended"] += 1
        if report.reason is not None:
            if not self._episodes[report.reason]:
                self.event(f"episode {report.episode_id} failed: {(report.cause or report.reason)[:300]}")
            self._episodes[report.reason] += 1
            self._episodes["failed"] += 1

    def evaluation(self, result: dict[str, Any]) -> None:
        self._evaluations.append(result)
        values = {"eval/success": result["success"], "eval/reward_mean": result["reward_mean"]}
        self._metrics.log(result["step"], values, now=time.time())

    def step(
        self,
        version: int,
        metrics: dict[str, float],
        ledger: dict[str, Any],
        dispatcher: Dispatcher,
        accountant: Accountant,
    ) -> None:
        """A learner step: one line of metrics. The shares ``idle/CAUSE`` are over the training so far."""
        now = time.monotonic()
        self._version = version
        self._step_times.append(now)
        tokens = ledger["tokens"]
        self._token_times.append((now, tokens["generated"]))
        self._rewards.append(metrics.get("reward/mean", 0.0))
        self._success.append(metrics.get("success", 0.0))
        trained = metrics.get("tokens/trained", 0.0)
        self._lag_sum += metrics.get("lag/mean", 0.0) * trained
        self._lag_tokens += trained
        self._lag_max = max(self._lag_max, int(metrics.get("lag/max", 0)))
        values = {
            **metrics,
            "throughput/tokens_per_s": self._tokens_per_s() or 0.0,
            "groups/dispatched": ledger["groups"]["dispatched"],
            "groups/trained": ledger["groups"]["trained"],
            "groups/dropped": sum(ledger["groups"]["dropped"].values()),
            "groups/live": ledger["groups"]["live"],
            "tokens/generated_total": tokens["generated"],
            "tokens/trained_total": tokens["trained"],
            "tokens/masked_total": tokens["masked"],
            "tokens/wasted_total": tokens["wasted"],
            "lengths/ks": ledger["ks"],
            "dispatch/in_flight": dispatcher.in_flight,
            "dispatch/starved_s": accountant.attribution.starved_s,
            **{f"idle/{cause}": share for cause, share in accountant.idle().items()},
        }
        self._last = values
        self._metrics.log(version, values, now=time.time())

    def snapshot(
        self, supervisor: Supervisor, live: Mapping[str, dict[str, Any]], dispatcher: Dispatcher
    ) -> dict[str, Any]:
        """``live``: the last answer of each actor."""
        by_role: dict[str, list[dict[str, Any]]] = {}
        for name, actor in supervisor.actors.items():
            entry = {"name": name, "state": actor.state, **live.get(name, {})}
            by_role.setdefault(actor.role.name, []).append(entry)
        learner = dict((by_role.get("learner") or [{}])[0])
        seconds = learner.pop("seconds", {})
        busy = sum(seconds.values()) - seconds.get("waiting", 0.0)
        learner |= {
            "groups_per_update": self._config.rollout.groups_per_update,
            "busy": busy / sum(seconds.values()) if sum(seconds.values()) else None,
            "masked": self._masked_share(),
        }
        return Snapshot(
            run_dir=self._config.run.dir,
            mode=self._config.mode,
            phase=self.phase,
            step=self._version,
            steps=self._config.run.steps,
            version=self._version,
            wall_s=time.time() - self._started_at,
            eta_s=self._eta_s(),
            reward_mean=self._last.get("reward/mean"),
            success_rate=self._last.get("success"),
            reward_history=list(self._rewards),
            success_history=list(self._success),
            lag_mean=self._last.get("lag/mean"),
            lag_max=self._lag_max if self._last else None,
            max_lag=self._config.staleness.max_lag,
            tokens_per_s=self._tokens_per_s(),
            step_s=self._step_s(),
            engines=by_role.get("engine", []),
            workers=by_role.get("worker", []),
            environments=by_role.get("environment", []),
            rewards=by_role.get("reward", []),
            queue={**(by_role.get("queue") or [{}])[0], "in_flight": dispatcher.in_flight},
            learner=learner,
            evals=[
                {
                    "step": result["step"],
                    "success": result["success"],
                    "reward": result["reward_mean"],
                    "tasks": result["tasks"],
                }
                for result in self._evaluations
            ],
            events=list(self._events)[-8:],
        ).to_dict()

    def finish(
        self,
        status: str,
        error: str | None,
        ledger: dict[str, Any],
        first_token_at: float | None,
        replaced: int,
        accountant: Accountant,
        stalls: list[dict[str, Any]],
        prefix_hit: float | None = None,
        fleet: Mapping[str, Any] | None = None,
        kv: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Write `summary.json` and return it."""
        self.phase = status
        tokens = dict(ledger.get("tokens", {}))
        evaluations = self._evaluations
        summary = {
            "status": status,
            "error": error,
            "steps": self._version,
            "wall_s": round(time.time() - self._started_at, 2),
            "startup_s": None if first_token_at is None else round(first_token_at - self._started_at, 2),
            "success_before": evaluations[0]["success"] if evaluations else None,
            "success_after": evaluations[-1]["success"] if len(evaluations) > 1 else None,
            "eval_tasks": evaluations[-1]["tasks"] if evaluations else 0,
            "seed": self._config.seed,
            "mode": self._config.mode,
            "lag_max": self._lag_max,
            "lag_mean": self._lag_sum / self._lag_tokens if self._lag_tokens else 0.0,
            "max_lag": self._config.staleness.max_lag,
            "ledger": ledger.get("groups", {}),
            "tokens": {key: tokens.get(key, 0) for key in ("generated", "trained", "masked", "wasted")},
            "lengths_ks": ledger.get("ks"),
            "prefix_hit": prefix_hit,
            "kv": dict(kv or {}),
            "episodes": dict(self._episodes),
            "actors_replaced": replaced,
            "learner_starved_s": round(accountant.attribution.starved_s, 2),
            "idle": accountant.idle(),
            "accounting": accountant.lanes(),
            "cpu_s": accountant.cpu_s(),
            "stalls": stalls,
            "fleet": dict(fleet or {}),
            **scale_of(self._config),
            "versions": {"python": platform.python_version(), **versions()},
        }
        self._run.write_summary(summary)
        return summary

    def close(self) -> None:
        self._metrics.close()

    def _masked_share(self) -> float | None:
        trained, masked = self._last.get("tokens/trained_total"), self._last.get("tokens/masked_total")
        if not trained:
            return None
        return (masked or 0.0) / (trained + (masked or 0.0))

    def _step_s(self) -> float | None:
        if len(self._step_times) < 2:
            return None
        return (self._step_times[-1] - self._step_times[0]) / (len(self._step_times) - 1)

    def _eta_s(self) -> float | None:
        step_s = self._step_s()
        return None if step_s is None else step_s * (self._config.run.steps - self._version)

    def _tokens_per_s(self) -> float | None:
        (began_at, began), (ended_at, ended) = self._token_times[0], self._token_times[-1]
        return None if ended_at <= began_at else (ended - began) / (ended_at - began_at)


def scale_of(config: Config) -> dict[str, Any]:
    """``scale``: how many accelerators a synthetic run models and by what factors; nothing in a real one."""
    if config.engines.kind != "synthetic":
        return {}
    modelled = config.engines.synthetic
    return {
        "scale": {
            "rollout_accelerators": config.engines.count * modelled.accelerators,
            "learner_accelerators": config.learner.synthetic.accelerators,
            "time_scale": modelled.time_scale,
            "token_scale": modelled.token_scale,
        }
    }


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
