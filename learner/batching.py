"""From groups to micro-batches: advantages, loss masks, and packing by a token budget.

A *sample* is one trajectory with its advantage and the positions that carry loss. Samples are packed longest first,
each into the first micro-batch that has room (first-fit decreasing), and lie end to end in one row without padding.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from experience.records import Group, Status, Trajectory
from experience.staleness import loss_mask
from learner.attention import RaggedLayout, make_layout
from learner.objectives.advantages import trajectory_advantages
from learner.prefix_tree import PrefixForest, Sharing, build_forest
from learner.tree_attention import TreeLayout, make_tree_layout

Item = TypeVar("Item", bound=Sized)
"""What is packed by its length."""


@dataclass(frozen=True)
class Sample:
    """One trajectory, cut after the last token that carries loss."""

    trajectory_id: str
    group_id: str
    inputs: npt.NDArray[np.int32]
    """[T]: the tokens that the model reads."""
    positions: npt.NDArray[np.int64]
    """[n]: where in ``inputs`` the model predicts a token that carries loss."""
    targets: npt.NDArray[np.int64]
    """[n]: those tokens."""
    behaviour: npt.NDArray[np.float32]
    """[n]: their log-probabilities when they were sampled."""
    lags: npt.NDArray[np.int64]
    """[n]: learner version minus the version that sampled them."""
    advantage: float
    temperature: float
    stays: npt.NDArray[np.bool_] | None = None
    """[n]: tokens that the second-moment mask of the step leaves in; None where there is no such mask."""
    episode_id: str = ""
    reward: float = 0.0
    """Of its episode."""
    token_advantages: npt.NDArray[np.float32] | None = None
    """[n]: a critic's; None: ``advantage`` is that of every token."""
    proximal: npt.NDArray[np.float32] | None = None
    """[n]: log-probabilities at the beginning of the step; None where they are not needed."""
    values: npt.NDArray[np.float32] | None = None
    returns: npt.NDArray[np.float32] | None = None
    """[n]: a critic's values at the beginning of the step, and what it is trained towards."""

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class GroupSamples:
    """What one group contributes to a step."""

    group_id: str
    samples: list[Sample]
    sampled_tokens: int
    """Tokens of the group that an engine sampled for training."""
    usable_tokens: int
    """Those among them that may carry loss."""
    rewards: dict[str, float]
    """Reward of each episode that has one, by ``episode_id``."""
    version_spans: list[int]
    """Number of different versions among the sampled tokens, for each trajectory that has any."""
    unrewarded: int
    """Episodes without a reward, or ended by a system error: they carry no loss."""

    @property
    def has_signal(self) -> bool:
        return any(sample.advantage != 0.0 for sample in self.samples)


def episode_rewards(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """The reward of each episode: the mean over its trajectories that carry one. Failed episodes are left out."""
    found: dict[str, list[float]] = {}
    for trajectory in trajectories:
        if trajectory.reward is not None and trajectory.status is not Status.SYSTEM_ERROR:
            found.setdefault(trajectory.episode_id, []).append(trajectory.reward)
    return {episode: sum(rewards) / len(rewards) for episode, rewards in found.items()}


def make_samples(group: Group, version: int, max_lag: int, advantage: str) -> GroupSamples:
    """The samples of one group at learner ``version``: no token of a lag over ``max_lag`` is among the targets."""
    rewards = episode_rewards(group.trajectories)
    rewarded = [t for t in group.trajectories if t.episode_id in rewards and t.status is not Status.SYSTEM_ERROR]
    advantages = trajectory_advantages(
        [group.group_id] * len(rewarded),
        [t.episode_id for t in rewarded],
        [rewards[t.episode_id] for t in rewarded],
        advantage,
    )
    samples = [
        _make_sample(t, float(a), rewards[t.episode_id], version, max_lag)
        for t, a in zip(rewarded, advantages, strict=True)
    ]
    kept = [sample for sample in samples if sample is not None]
    return GroupSamples(
        group_id=group.group_id,
        samples=kept,
        sampled_tokens=group.sampled_tokens,
        usable_tokens=sum(len(sample.targets) for sample in kept),
        rewards=rewards,
        version_spans=[len(set(t.versions[t.trainable].tolist())) for t in group.trajectories if t.sampled_tokens],
        unrewarded=len({t.episode_id for t in group.trajectories} - rewards.keys()),
    )


def _make_sample(trajectory: Trajectory, advantage: float, reward: float, version: int, max_lag: int) -> Sample | None:
    mask = loss_mask(trajectory, version, max_lag)
    # Nothing predicts the first token.
    where = np.flatnonzero(mask[1:])
    if not len(where):
        return None
    return Sample(
        trajectory_id=trajectory.trajectory_id,
        group_id=trajectory.group_id,
        inputs=trajectory.tokens[: where[-1] + 1],
        positions=where,
        targets=trajectory.tokens[where + 1].astype(np.int64),
        behaviour=trajectory.logprobs[where + 1],
        lags=(version - trajectory.versions[where + 1]).astype(np.int64),
        advantage=advantage,
        temperature=trajectory.temperature,
        episode_id=trajectory.episode_id,
        reward=reward,
    )


def tokens_of(samples: Sequence[Sample]) -> int:
    """Input tokens of some samples."""
    return sum(map(len, samples))


def pack(samples: Sequence[Item], token_budget: int) -> list[list[Item]]:
    """Micro-batches of at most ``token_budget`` input tokens (or one longer sample alone), each longest first."""
    bins: list[list[Item]] = []
    room: list[int] = []
    for sample in sorted(samples, key=len, reverse=True):
        index = next((i for i, left in enumerate(room) if left >= len(sample)), len(bins))
        if index == len(bins):
            bins.append([])
            room.append(token_budget)
        bins[index].append(sample)
        room[index] -= len(sample)
    return bins


def balance(samples: Sequence[Item], count: int) -> list[list[Item]]:
    """``count`` bins with as even a number of input tokens as can be had, each longest first; some may be empty.

    The longest sample that is left goes to the emptiest bin (Graham 1969, longest processing time first): the fullest bin
    has at most 4/3 - 1/(3 count) times what the best division would give it.
    """
    bins: list[list[Item]] = [[] for _ in range(count)]
    loads = [(0, index) for index in range(count)]
    for sample in sorted(samples, key=len, reverse=True):
        load, index = heapq.heappop(loads)
        bins[index].append(sample)
        heapq.heappush(loads, (load + len(sample), index))
    return bins


@dataclass(frozen=True)
class Predictions:
    """What a model is asked where samples that share a prefix train the same tokens of it: each of m once."""

    positions: torch.Tensor
    """int64 [m]: columns of the row."""
    targets: torch.Tensor
    """int64 [m]."""
    inverse_temperatures: torch.Tensor
    """float32 [m]."""
    of: torch.Tensor
    """int64 [n]: which of the m each of the n is."""


@dataclass(frozen=True)
class MicroBatch:
    """Samples in one row of T tokens, n of whose positions carry loss: end to end, or a forest of their prefixes."""

    inputs: torch.Tensor
    """int64 [1, T]."""
    position_ids: torch.Tensor
    """int64 [1, T], from 0 in each sequence."""
    layout: RaggedLayout | TreeLayout
    positions: torch.Tensor
    """int64 [n]: columns of ``inputs`` where a target is predicted."""
    targets: torch.Tensor
    """int64 [n]."""
    behaviour: torch.Tensor
    """float32 [n]."""
    advantages: torch.Tensor
    """float32 [n]."""
    weights: torch.Tensor
    """float32 [n]: 1, or 1 / (targets of the trajectory) when every trajectory counts the same."""
    inverse_temperatures: torch.Tensor
    """float32 [n]; greedy samples count as temperature 1."""
    lags: torch.Tensor
    """int64 [n]."""
    sample_of: torch.Tensor
    """int64 [n]: index into ``samples``."""
    stays: torch.Tensor | None
    """bool [n]: see `Sample.stays`."""
    proximal: torch.Tensor | None
    """float32 [n]: see `Sample.proximal`."""
    positive: torch.Tensor
    """bool [n]: tokens to imitate where the objective does that: of positive advantage, with a critic of positive reward."""
    samples: tuple[Sample, ...]
    normaliser: float
    """What the batch adds to the step's normaliser: its targets, or its trajectories."""
    distinct: Predictions | None = None
    """The n predictions without repeats; None where none is repeated."""

    @property
    def asked(self) -> Predictions | MicroBatch:
        """What to ask the model: ``positions``, ``targets`` and ``inverse_temperatures`` of m <= n predictions."""
        return self if self.distinct is None else self.distinct

    def spread(self, answers: torch.Tensor) -> torch.Tensor:
        """One answer for each prediction asked, ``[m, ...]``, to one for each target, ``[n, ...]``."""
        return answers if self.distinct is None else answers.index_select(0, self.distinct.of)

    def samples_at(self, tokens: torch.Tensor) -> tuple[str, ...]:
        """The samples that some tokens (bool [n]) belong to, as ``group_id/trajectory_id tokens FIRST to LAST``.

        All samples, without tokens, if there are none.
        """
        where = self.position_ids[0, self.positions] + 1  # what is predicted at a position is the next token
        named = []
        for index in self.sample_of[tokens].unique().tolist():
            mine = where[tokens & (self.sample_of == index)]
            sample = self.samples[index]
            named.append(f"{sample.group_id}/{sample.trajectory_id} tokens {int(mine.min())} to {int(mine.max())}")
        return tuple(named) or tuple(f"{sample.group_id}/{sample.trajectory_id}" for sample in self.samples)


def token_weights(counts: Sequence[int], aggregation: str, constant_length: int | None) -> list[float]:
    """What a token of each trajectory weighs in the sum that the step divides; ``counts``: their trained tokens.

    - ``token``: 1, and the step divides by its tokens (Yu et al. 2025, "DAPO", section 3.3);
    - ``sequence``: 1 / tokens of the trajectory, divided by trajectories (Shao et al. 2024, "DeepSeekMath");
    - ``constant``: 1 / ``constant_length``, divided by trajectories (Liu et al. 2025, "Understanding R1-Zero-Like Training").
    """
    if aggregation == "token":
        return [1.0] * len(counts)
    if aggregation == "sequence":
        return [1.0 / count for count in counts]
    if aggregation == "constant":
        if constant_length is None:
            raise ValueError("learner.aggregation=constant needs learner.constant_length")
        return [1.0 / constant_length] * len(counts)
    raise ValueError(f"unknown aggregation {aggregation!r}: use token, sequence or constant")


@dataclass(frozen=True)
class _Row:
    """How samples lie in one row."""

    inputs: npt.NDArray[np.int32]
    position_ids: npt.NDArray[np.int64]
    layout: RaggedLayout | TreeLayout
    positions: npt.NDArray[np.int64]
    """[n]: columns where targets are predicted."""


def _end_to_end(samples: Sequence[Sample], device: torch.device | str) -> _Row:
    lengths = [len(sample) for sample in samples]
    offsets = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    return _Row(
        inputs=np.concatenate([s.inputs for s in samples]),
        position_ids=np.concatenate([np.arange(n) for n in lengths]),
        layout=make_layout(lengths, device),
        positions=np.concatenate([s.positions + o for s, o in zip(samples, offsets, strict=True)]),
    )


def _as_forest(samples: Sequence[Sample], forest: PrefixForest, device: torch.device | str) -> _Row:
    return _Row(
        inputs=forest.tokens,
        position_ids=forest.positions,
        layout=make_tree_layout(forest, device),
        positions=np.concatenate([forest.columns(i, s.positions) for i, s in enumerate(samples)]),
    )


def _make_row(samples: Sequence[Sample], device: torch.device | str, sharing: Sharing | None) -> _Row:
    if sharing is not None and len(samples) > 1:
        forest = build_forest([sample.inputs for sample in samples], sharing)
        if len(forest) < tokens_of(samples):
            return _as_forest(samples, forest, device)
    return _end_to_end(samples, device)


def collate(
    samples: Sequence[Sample],
    aggregation: str,
    device: torch.device | str = "cpu",
    constant_length: int | None = None,
    sharing: Sharing | None = None,
) -> MicroBatch:
    """The micro-batch of samples that are sorted longest first; ``aggregation`` as in `token_weights`.

    With ``sharing`` the row is a forest of the samples' prefixes where any is worth sharing.
    """
    counts = [len(sample.targets) for sample in samples]
    per_sample_weight = token_weights(counts, aggregation, constant_length)
    row = _make_row(samples, device, sharing)

    def repeated(values: Sequence[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values, dtype=np.float32), counts)).to(device)

    def joined(arrays: Iterable[npt.NDArray[np.generic]], dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(list(arrays)).astype(dtype)).to(device)

    targets = joined((s.targets for s in samples), np.int64)
    positions = torch.from_numpy(row.positions).to(device)
    inverse_temperatures = repeated([1.0 / s.temperature if s.temperature > 0 else 1.0 for s in samples])
    distinct: Predictions | None = None
    if isinstance(row.layout, TreeLayout):
        distinct = _without_repeats(row.positions, targets, inverse_temperatures)
    return MicroBatch(
        inputs=torch.from_numpy(row.inputs.astype(np.int64)).to(device)[None],
        position_ids=torch.from_numpy(row.position_ids).to(device)[None],
        layout=row.layout,
        positions=positions,
        targets=targets,
        behaviour=joined((s.behaviour for s in samples), np.float32),
        advantages=joined((_advantages(s) for s in samples), np.float32),
        weights=repeated(per_sample_weight),
        inverse_temperatures=inverse_temperatures,
        lags=joined((s.lags for s in samples), np.int64),
        sample_of=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)).to(device),
        stays=_all_or_none([s.stays for s in samples], "a second-moment mask", device),
        proximal=_all_or_none([s.proximal for s in samples], "a proximal policy", device),
        positive=repeated([_is_positive(s) for s in samples]).bool(),
        samples=tuple(samples),
        normaliser=float(sum(counts) if aggregation == "token" else len(samples)),
        distinct=distinct,
    )


def _without_repeats(
    positions: npt.NDArray[np.int64], targets: torch.Tensor, inverse_temperatures: torch.Tensor
) -> Predictions | None:
    """The distinct predictions; None if all differ."""
    device = targets.device
    tokens = targets.cpu().numpy()
    values, temperature_of = np.unique(inverse_temperatures.cpu().numpy(), return_inverse=True)
    keys = (positions * (int(tokens.max()) + 1) + tokens) * len(values) + temperature_of
    _, first, of = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) == len(keys):
        return None
    chosen = torch.from_numpy(first).to(device)
    return Predictions(
        positions=torch.from_numpy(positions[first]).to(device),
        targets=targets[chosen],
        inverse_temperatures=inverse_temperatures[chosen],
        of=torch.from_numpy(of).to(device),
    )


def _advantages(sample: Sample) -> npt.NDArray[np.float32]:
    """[n]."""
    if sample.token_advantages is not None:
        return sample.token_advantages
    return np.full(len(sample.targets), sample.advantage, dtype=np.float32)


def _is_positive(sample: Sample) -> bool:
    return (sample.reward if sample.token_advantages is not None else sample.advantage) > 0


def _all_or_none(
    arrays: Sequence[npt.NDArray[np.generic] | None], what: str, device: torch.device | str
) -> torch.Tensor | None:
    """The arrays end to end; None if there are none."""
    found = [array for array in arrays if array is not None]
    if not found:
        return None
    if len(found) != len(arrays):
        raise ValueError(f"some samples of a micro-batch have {what} and others have none")
    return torch.from_numpy(np.concatenate(found)).to(device)


def idle_batch(device: torch.device | str = "cpu") -> MicroBatch:
    """One token that nobody trains: what a rank computes on to take part in the others' pass. Its normaliser is 0."""
    sample = Sample(
        trajectory_id="",
        group_id="",
        inputs=np.zeros(1, np.int32),
        positions=np.zeros(1, np.int64),
        targets=np.zeros(1, np.int64),
        behaviour=np.zeros(1, np.float32),
        lags=np.zeros(1, np.int64),
        advantage=0.0,
        temperature=1.0,
    )
    return replace(collate([sample], "token", device), normaliser=0.0)
