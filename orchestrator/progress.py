"""The course of a run in numbers: metrics on disk, the snapshot for the terminal, the summary at the end."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import platform
import time
from collections import Counter, deque
from typing import Any

from experience.wire import decode
from orchestrator.config import Config
from orchestrator.dispatcher import Dispatcher
from orchestrator.fleet import Fleet
from orchestrator.run_directory import RunDirectory
from orchestrator.snapshot import Snapshot
from orchestrator.supervisor import Supervisor, first_line
from orchestrator.telemetry import Metrics
from rollout_workers.assignments import EpisodeReport, WorkerStats
from rollout_workers.engines.protocol import EngineHealth

logger = logging.getLogger(__name__)

STATS_EVERY_S = 1.0
SILENT_S = 10.0
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
        self._phase = "starting"
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
        self._no_dispatch_s = 0.0
        self._live: dict[str, Any] = {}
        self._asked_in_vain: dict[str, float] = {}
        self.touched_at = time.monotonic()

    def touch(self) -> None:
        """Something finished: the run is not stalled."""
        self.touched_at = time.monotonic()

    def phase(self, phase: str) -> None:
        self._phase = phase
        self.touch()

    def event(self, text: str) -> None:
        """Something a person should notice."""
        logger.warning("%s", text)
        self._events.append(f"{time.time() - self._started_at:6.1f} s  {text}")

    def dropped(self, reason: str) -> None:
        if not self._dropped[reason]:
            self.event(f"first group dropped ({reason})")
        self._dropped[reason] += 1

    def episode(self, report: EpisodeReport) -> None:
        self.touch()
        self._episodes["ended"] += 1
        if report.reason is not None:
            if not self._episodes[report.reason]:
                self.event(f"episode {report.episode_id} failed: {(report.cause or report.reason)[:300]}")
            self._episodes[report.reason] += 1
            self._episodes["failed"] += 1

    def evaluation(self, result: dict[str, Any]) -> None:
        self._evaluations.append(result)
        self.touch()
        values = {"eval/success": result["success"], "eval/reward_mean": result["reward_mean"]}
        self._metrics.log(result["step"], values, now=time.time())

    def step(self, version: int, metrics: dict[str, float], ledger: dict[str, Any], dispatcher: Dispatcher) -> None:
        """A learner step: one line of metrics."""
        self.touch()
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
            "dispatch/starved_s": self._no_dispatch_s,
        }
        self._last = values
        self._metrics.log(version, values, now=time.time())

    async def watch(self, supervisor: Supervisor) -> None:
        """Ask the actors what they are doing, for the view, once a second. An actor that does not answer is shown as such."""
        while True:
            began_at = time.monotonic()
            answers = await asyncio.gather(
                *(self._ask(name, actor.role.name, actor.handle) for name, actor in supervisor.actors.items())
            )
            self._live = {name: answer for name, answer in answers if answer is not None}
            self._account_dispatch(time.monotonic() - began_at)
            await asyncio.sleep(STATS_EVERY_S)

    def snapshot(self, supervisor: Supervisor, fleet: Fleet, dispatcher: Dispatcher) -> dict[str, Any]:
        by_role: dict[str, list[dict[str, Any]]] = {}
        for name, actor in supervisor.actors.items():
            entry = {"name": name, "state": actor.state, **self._live.get(name, {})}
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
            phase=self._phase,
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
        self, status: str, error: str | None, ledger: dict[str, Any], first_token_at: float | None, replaced: int
    ) -> dict[str, Any]:
        """Write `summary.json` and return it."""
        self._phase = status
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
            "episodes": dict(self._episodes),
            "actors_replaced": replaced,
            "learner_starved_s": round(self._no_dispatch_s, 2),
            "versions": {"python": platform.python_version(), **versions()},
        }
        self._run.write_summary(summary)
        return summary

    def close(self) -> None:
        self._metrics.close()

    async def _ask(self, name: str, role: str, handle: Any) -> tuple[str, dict[str, Any] | None]:
        call = handle.health if role in ("engine", "environment", "reward") else handle.stats
        try:
            async with asyncio.timeout(STATS_EVERY_S):
                answer = await call.remote()
        except TimeoutError:
            self._asked_in_vain.setdefault(name, time.monotonic())
            return name, self._live.get(name)
        except Exception as error:  # noqa: BLE001 - a dead actor is the supervisor's business
            logger.debug("%s did not say how it is: %s", name, first_line(error))
            return name, None
        self._asked_in_vain.pop(name, None)
        return name, _described(role, answer)

    def silent(self) -> list[str]:
        """Actors that have not answered for a while, with for how long."""
        now = time.monotonic()
        return [f"{name} ({now - at:.0f} s)" for name, at in self._asked_in_vain.items() if now - at >= SILENT_S]

    def _account_dispatch(self, seconds: float) -> None:
        """Count the time in which the learner waited and nothing was in flight: dispatching was too slow."""
        learner = self._live.get("learner-0", {})
        workers = [live for name, live in self._live.items() if name.startswith("worker")]
        idle = all(not worker.get("episodes") for worker in workers)
        if self._phase == "training" and learner.get("phase") == "waiting" and idle and workers:
            self._no_dispatch_s += STATS_EVERY_S + seconds

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


def _described(role: str, answer: Any) -> dict[str, Any]:
    """An actor's answer in the words of the view."""
    if role == "engine":
        health = decode(answer, EngineHealth)
        return {
            "version": health.version,
            "running": health.running,
            "waiting": health.waiting,
            "kv_used": health.kv_used,
            "generated_tokens": health.generated_tokens,
        }
    if role == "worker":
        stats = decode(answer, WorkerStats)
        return {
            "episodes": stats.running,
            "queued": stats.queued,
            "generating": stats.generating,
            "in_environment": stats.in_environment,
            "in_reward": stats.in_reward,
            "finished": stats.finished,
            "failed": stats.failed,
        }
    return dict(answer)


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
