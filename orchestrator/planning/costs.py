"""What the trajectories of a scripted workload cost on modelled accelerators: w and tau from the cost model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from env_pool.registry import TaskSource
from env_pool.workloads.environment import script_of
from env_pool.workloads.scripts import EpisodeScript, carried_tokens
from orchestrator.bound import Calibration
from orchestrator.config import Config
from rollout_workers.engines.synthetic.cost_model import CostModel

SAMPLED_EPISODES = 2048
"""Episodes whose mean stands for the workload."""


@dataclass(frozen=True)
class EpisodeCosts:
    """Means over the episodes of a workload. Tokens are carried ones, seconds modelled."""

    episodes: int
    prompt_tokens: float
    """Computed once each: the first prompt and the observations."""
    output_tokens: float
    context_tokens: float
    """Of the finished trajectory."""
    mean_context_tokens: float
    """While it is decoded: what an episode holds of the KV cache, on average."""
    tool_s: float
    turns: float

    @classmethod
    def of(cls, scripts: Iterable[EpisodeScript], token_scale: float, max_tokens: int) -> EpisodeCosts:
        """From scripts; trajectories end at ``max_tokens`` carried tokens. Raises ValueError without any script."""
        sums = [0.0] * 6
        count = 0
        for script in scripts:
            count += 1
            for place, value in enumerate(walk(script, token_scale, max_tokens)):
                sums[place] += value
        if not count:
            raise ValueError("a workload needs at least one episode")
        return cls(count, *(value / count for value in sums))

    def rollout_s(self, cost: CostModel, concurrency: float) -> float:
        """Accelerator-seconds of a trajectory while ``concurrency`` sequences decode: P / prefill + D (c + c0) / (peak c).

        Prompts count once: what a full KV cache evicts and computes again comes on top.
        """
        decode = (concurrency + cost.half_concurrency) / (cost.decode_peak * concurrency)
        return self.prompt_tokens / cost.prefill_rate + self.output_tokens * decode

    def saturated_concurrency(self, cost: CostModel) -> float:
        """Sequences that an accelerator decodes at most: its slots, or what its KV holds."""
        return max(1.0, min(cost.slots, cost.kv_tokens / max(1.0, self.mean_context_tokens)))


def walk(script: EpisodeScript, scale: float, max_tokens: int) -> tuple[float, ...]:
    """(prompt, output, context, mean context, tool seconds, turns) of one episode, cut where the run would cut it."""
    length = prompt = carried_tokens(script.prompt_tokens, scale)
    output, held, tool_s, turns = 0, 0.0, script.reset_s, 0
    for turn in script.turns:
        room = max_tokens - length
        if room <= 0:
            break
        made = min(carried_tokens(turn.output_tokens, scale), room)
        held += (length + made / 2) * made
        length, output, turns = length + made, output + made, turns + 1
        tool_s += turn.tool_s
        if turns < len(script.turns):
            observation = carried_tokens(turn.observation_tokens, scale)
            prompt, length = prompt + observation, length + observation
    return prompt, output, length, held / max(1, output), tool_s, turns


def workload_scripts(config: Config, episodes: int = SAMPLED_EPISODES) -> Iterator[EpisodeScript]:
    """The first ``episodes`` episodes of a run's workload, in the order of their dispatch."""
    source = TaskSource.from_config(config.tasks, "train", config.seed)
    size = config.rollout.group_size
    for place in range(episodes):
        yield script_of(source.task(place // size).payload, place % size)


def workload_costs(config: Config, episodes: int = SAMPLED_EPISODES) -> EpisodeCosts:
    """Mean costs of a run's workload."""
    scale = config.engines.synthetic.token_scale
    return EpisodeCosts.of(workload_scripts(config, episodes), scale, config.rollout.max_episode_tokens)


def calibrate(costs: EpisodeCosts, cost: CostModel, seconds_per_token: float, accelerators: float) -> Calibration:
    """w with every slot of an accelerator decoding, tau per carried token of the trajectory."""
    w = costs.rollout_s(cost, costs.saturated_concurrency(cost))
    return Calibration(w, costs.context_tokens * seconds_per_token, accelerators)
