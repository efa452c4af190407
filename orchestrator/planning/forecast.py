"""What a run on given accelerators will be like: step time, E, lag, what limits it, and what masking will cost. Pure formulas.

M episodes in flight circulate between engines (m seconds each, which grow with the number that decode) and tools (Z seconds):
a closed network with throughput ``X = M / (m + Z)``, in which M is what concurrency and pacing allow. So rollout takes ``B / X``
a step, training ``B tau / N_l`` plus what does not shrink with accelerators; a step takes the longer of the two (their sum where
both share the accelerators).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.bound import Calibration, split_of
from orchestrator.planning.costs import EpisodeCosts
from rollout_workers.engines.synthetic.cost_model import CostModel

ITERATIONS = 60
NEARLY_ALL = 0.9
"""Share of the slots in use from which on the accelerators, not the episodes in flight, limit rollout."""


class Limit(StrEnum):
    """What a shorter step would need more of."""

    ROLLOUT = "rollout"
    LEARNER = "learner"
    KV = "KV cache"
    CONCURRENCY = "rollout.concurrency"
    PACING = "staleness.target_lag"
    ENVIRONMENT = "environment"
    QUEUE = "queue.budget_mb"
    STRAGGLERS = "slowest episodes"


@dataclass(frozen=True)
class Cluster:
    """The accelerators, in modelled seconds and carried tokens."""

    cost: CostModel
    rollout: int
    learner: int
    shared: bool
    seconds_per_token: float
    """Accelerator-seconds of training for a carried token."""
    fixed_s: float
    """Seconds of a step that do not shrink with accelerators."""


@dataclass(frozen=True)
class Demand:
    """What is asked of them."""

    trajectories: int
    """B."""
    concurrency: int
    """Episodes that the workers run at once."""
    paced: int
    """Episodes that pacing lets be started and not trained."""
    target_lag: float
    max_lag: int
    waits: bool = False
    """The learner waits for what would become too old (``on_violation: wait``)."""
    queued: float = math.inf
    """Finished episodes that the queue's budget holds."""


@dataclass(frozen=True)
class Forecast:
    """Expected figures. Seconds are those of the modelled cluster."""

    calibration: Calibration
    rollout: int
    learner: int
    best_rollout: int
    """The split with the shortest step that this workload allows."""
    best_learner: int
    best_step_s: float
    step_s: float
    rollout_s: float
    """Of a step, if training took no time."""
    straggler_s: float
    """Of a step, if only its slowest episode counted; 0.0 where nothing waits for it."""
    training_s: float
    efficiency: float
    best_efficiency: float
    episode_s: float
    """From an episode's start to its end."""
    in_flight: float
    """Episodes that run."""
    decoding: float
    """Sequences decoding on each accelerator."""
    slots: float
    """Sequences that an accelerator has room for."""
    mean_lag: float
    """Of sampled tokens when they are trained, in versions: Little's law for the time between the two."""
    masked: float
    """Expected share of sampled tokens that are older than max_lag when they are trained."""
    limit: Limit


@dataclass(frozen=True)
class _Rollout:
    step_s: float
    episode_s: float
    model_s: float
    in_flight: float
    decoding: float


def forecast(
    costs: EpisodeCosts,
    durations: Sequence[tuple[float, float, float]],
    cluster: Cluster,
    demand: Demand,
    group_size: int,
) -> Forecast:
    """Solve the network.

    Args:
        costs: Means of the workload.
        durations: (output tokens, prompt tokens, tool seconds) of sampled episodes, a group's members in succession.
        cluster: The accelerators.
        demand: Batch, concurrency, pacing.
        group_size: How many members in succession make a group.
    """
    slots = costs.saturated_concurrency(cluster.cost)
    total = cluster.rollout if cluster.shared else cluster.rollout + cluster.learner
    tau_s = costs.context_tokens * cluster.seconds_per_token
    calibration = Calibration(costs.rollout_s(cluster.cost, slots), tau_s, total)
    rollout = _rollout(costs, cluster.cost, cluster.rollout, slots, demand)
    straggler_s = _slowest_s(durations, costs, cluster.cost, demand) / (demand.max_lag + 1) if demand.waits else 0.0
    training_s = demand.trajectories * tau_s / cluster.learner + cluster.fixed_s
    pacing_s = _paced_s(durations, group_size, rollout, costs, demand)
    rollout_s = max(rollout.step_s, straggler_s, pacing_s)
    step_s = rollout_s + training_s if cluster.shared else max(rollout_s, training_s)
    best = _best_split(costs, cluster, slots, demand, tau_s, total, max(straggler_s, pacing_s))
    ages = _ages(durations, group_size, rollout, costs, step_s, demand.max_lag)
    masked = 0.0 if demand.waits else ages.masked
    waiting = training_s >= rollout_s
    return Forecast(
        calibration=calibration,
        rollout=cluster.rollout,
        learner=cluster.learner,
        best_rollout=best[1],
        best_learner=total - best[1],
        best_step_s=best[0],
        step_s=step_s,
        rollout_s=rollout_s,
        straggler_s=straggler_s,
        training_s=training_s,
        efficiency=calibration.efficiency(step_s, demand.trajectories),
        best_efficiency=calibration.efficiency(best[0], demand.trajectories),
        episode_s=rollout.episode_s,
        in_flight=rollout.in_flight,
        decoding=rollout.decoding,
        slots=slots,
        mean_lag=0.0
        if cluster.shared
        else max(ages.after_s, (demand.target_lag * step_s - ages.before_s) if waiting else 0.0) / step_s,
        masked=0.0 if cluster.shared else masked,
        limit=_limit(rollout, (straggler_s, pacing_s, training_s), slots, cluster, demand),
    )


def _rollout(costs: EpisodeCosts, cost: CostModel, accelerators: int, slots: float, demand: Demand) -> _Rollout:
    """The closed network with all episodes in flight that are allowed; damped iteration of the decoding concurrency."""
    in_flight = float(min(demand.concurrency, demand.paced))
    decoding = min(slots, in_flight / accelerators)
    model_s = 0.0
    for _ in range(ITERATIONS):
        each = max(1.0, decoding)
        work_s = costs.rollout_s(cost, each)
        model_s = work_s * each
        served = in_flight * model_s / (model_s + costs.tool_s) / accelerators
        decoding = 0.5 * (decoding + min(slots, served))
    throughput = min(in_flight / (model_s + costs.tool_s), accelerators / costs.rollout_s(cost, max(1.0, decoding)))
    episode_s = in_flight / throughput
    return _Rollout(demand.trajectories / throughput, episode_s, model_s, in_flight, decoding)


def _best_split(
    costs: EpisodeCosts, cluster: Cluster, slots: float, demand: Demand, tau_s: float, total: int, least_s: float
) -> tuple[float, int]:
    """(step, rollout accelerators) of the best asynchronous split."""
    if total < 2:
        return math.inf, total

    def step_s(rollout: int) -> float:
        training_s = demand.trajectories * tau_s / (total - rollout) + cluster.fixed_s
        return max(_rollout(costs, cluster.cost, rollout, slots, demand).step_s, training_s, least_s)

    low, high = 1, total - 1
    while low < high:  # rollout falls and training rises with the split: the first split at which training is longer
        middle = (low + high) // 2
        training_s = demand.trajectories * tau_s / (total - middle) + cluster.fixed_s
        if training_s >= _rollout(costs, cluster.cost, middle, slots, demand).step_s:
            high = middle
        else:
            low = middle + 1
    candidates = {max(1, low - 1), low, split_of(Calibration(costs.rollout_s(cluster.cost, slots), tau_s, total))[0]}
    return min((step_s(rollout), rollout) for rollout in candidates)


def _slowest_s(
    durations: Sequence[tuple[float, float, float]], costs: EpisodeCosts, cost: CostModel, demand: Demand
) -> float:
    """The longest of a step's episodes, alone on its accelerator; mean over as many steps as were sampled."""
    per_prompt, per_output = 1 / cost.prefill_rate, (1 + cost.half_concurrency) / cost.decode_peak
    alone = [output * per_output + prompt * per_prompt + tool_s for output, prompt, tool_s in durations]
    batch = min(demand.trajectories, len(alone))
    longest = [max(alone[first : first + batch]) for first in range(0, len(alone) - batch + 1, batch)]
    return sum(longest) / len(longest)


@dataclass(frozen=True)
class _Ages:
    """Seconds of a mean sampled token, and the share of tokens that get too old."""

    before_s: float
    """From the start of its episode."""
    after_s: float
    """Until the slowest member of its group has ended."""
    masked: float


def _seconds_a_token(rollout: _Rollout, costs: EpisodeCosts) -> float:
    """Engine seconds of an episode for each of its tokens, under the load that is expected."""
    return rollout.model_s / max(1e-9, costs.output_tokens + costs.prompt_tokens)


def _paced_s(
    durations: Sequence[tuple[float, float, float]],
    group_size: int,
    rollout: _Rollout,
    costs: EpisodeCosts,
    demand: Demand,
) -> float:
    """A step by Little's law for groups: a group keeps its pacing slot at least until its slowest member has ended."""
    per_token = _seconds_a_token(rollout, costs)
    lengths = [(output + prompt) * per_token + tool_s for output, prompt, tool_s in durations]
    lives = [max(lengths[first : first + group_size]) for first in range(0, len(lengths) - group_size + 1, group_size)]
    return demand.trajectories * sum(lives) / len(lives) / demand.paced


def _ages(
    durations: Sequence[tuple[float, float, float]],
    group_size: int,
    rollout: _Rollout,
    costs: EpisodeCosts,
    step_s: float,
    max_lag: int,
) -> _Ages:
    """Tokens come evenly over an episode; a group whose slowest member is late is trained as soon as that has ended.

    A token is taken as too old when it was sampled more than ``max_lag`` and a half steps before that.
    """
    per_work = _seconds_a_token(rollout, costs)
    before = after = old = total = 0.0
    for first in range(0, len(durations) - group_size + 1, group_size):
        group = durations[first : first + group_size]
        lengths = [(output + prompt) * per_work + tool_s for output, prompt, tool_s in group]
        slowest = max(lengths)
        horizon = slowest - (max_lag + 0.5) * step_s
        for (output, _, _), length in zip(group, lengths, strict=True):
            total += output
            before += output * length / 2
            after += output * (slowest - length / 2)
            old += output * min(1.0, max(0.0, horizon / max(length, 1e-9)))
    return _Ages(before / total, after / total, old / total) if total else _Ages(0.0, 0.0, 0.0)


def _limit(
    rollout: _Rollout, others: tuple[float, float, float], slots: float, cluster: Cluster, demand: Demand
) -> Limit:
    straggler_s, pacing_s, training_s = others
    slowest = max(rollout.step_s, straggler_s, pacing_s, 0.0 if cluster.shared else training_s)
    if slowest in (straggler_s, pacing_s) and slowest > rollout.step_s:
        return Limit.STRAGGLERS if slowest == straggler_s else Limit.PACING
    if not cluster.shared and training_s >= rollout.step_s:
        return Limit.LEARNER
    if demand.queued < demand.trajectories:
        return Limit.QUEUE
    if rollout.decoding >= NEARLY_ALL * slots:
        return Limit.KV if slots < NEARLY_ALL * cluster.cost.slots else Limit.ROLLOUT
    if cluster.shared:
        return Limit.LEARNER if training_s >= rollout.step_s else Limit.ROLLOUT
    if rollout.episode_s > 2 * rollout.model_s and demand.concurrency <= demand.paced:
        return Limit.ENVIRONMENT
    return Limit.CONCURRENCY if demand.concurrency < demand.paced else Limit.PACING
