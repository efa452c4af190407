"""Which engines prefill and which decode, by measured load (``engines.roles: auto``). Pure; time is an argument.

What goes round in engines and tools is measured, and `Circulation` says what another division of the same engines would
yield. The KV of sessions that wait for tools is part of that: a flip to prefill takes the room of KV away, and what then does
not fit any more is computed again.

An engine flips when the best division promises at least ``gain`` more turns and the flip is a step there that gains, when the
engine has kept its role for a while, when the last flip has shown its effect, and never when it is the last of its role. A flip
that takes back the last one needs loads averaged for longer, the longer the more often that happened, and the promise that was
not kept must be surpassed before it is believed again: loads with heavy tails go up and down over any window, every model is
wrong somewhere, and each flip costs KV that is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rollout_workers.disaggregation.circulation import SATURATED, Circulation
from rollout_workers.disaggregation.role_trust import FlipTrust
from rollout_workers.engines.protocol import EngineRole

__all__ = ["Decision", "Flip", "RoleController", "RoleLoad", "RolePolicy"]

LONGEST_WINDOWS = 10.0
"""Windows over which loads are averaged at most."""
LEAST_USEFUL, MOST_USEFUL = 0.05, 4.0
"""Tokens handed over for each token that engines to prefill compute, as far as that is believed."""


@dataclass
class RolePolicy:
    """When roles flip (``engines.role_policy``). Seconds are those of the engines' clock."""

    gain: float = 0.05
    """Least share of further turns a second that the best division must promise: keeps roles from flipping to and fro."""
    window_s: float = 30.0
    """Over which loads are averaged; nothing is decided sooner after a flip."""
    min_residence_s: float = 60.0
    """An engine keeps its role at least so long."""
    cool_down_s: float = 30.0
    """Between two flips of any engines."""
    half_concurrency: float = 16.0
    """Sequences at which an engine decodes at half its peak (kind synthetic: as `engines.synthetic.half_concurrency` says)."""
    flip_timeout_s: float = 600.0
    """An engine that has not taken its new role after so long is counted under its old one again."""

    def validate(self) -> None:
        """Raise ValueError naming the key, if any setting is out of range."""
        for name in ("gain", "window_s", "flip_timeout_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"engines.role_policy.{name}={getattr(self, name)}: must be greater than 0")
        for name in ("min_residence_s", "cool_down_s", "half_concurrency"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"engines.role_policy.{name}={getattr(self, name)}: must not be negative")

    def scaled(self, factor: float) -> RolePolicy:
        """The same policy on a clock whose seconds are ``factor`` times as many."""
        return replace(
            self,
            window_s=self.window_s * factor,
            min_residence_s=self.min_residence_s * factor,
            cool_down_s=self.cool_down_s * factor,
            flip_timeout_s=self.flip_timeout_s * factor,
        )


@dataclass(frozen=True)
class RoleLoad:
    """One engine at one moment. Counts of tokens, seconds and requests that "so far" says of are cumulative."""

    name: str
    role: EngineRole
    queued: float = 0
    """Requests whose prompt is not computed yet."""
    backlog_tokens: float = 0.0
    """Prompt tokens of theirs still to compute."""
    prefilled_tokens: float = 0.0
    """So far."""
    prefill_s: float = 0.0
    """Seconds spent on it so far."""
    handed_tokens: float | None = None
    """Prompt tokens that it handed to engines that lacked them so far, if known."""
    local_cost: float = 1.0
    """Seconds of decoding that a second of prompts costs an engine that decodes: less than 1 where both share steps."""
    decoding: float = 0
    """Sequences that decode."""
    slots: float = math.inf
    """Most of them at once."""
    half_concurrency: float = 0.0
    """Sequences at which this engine decodes at half its peak."""
    generated_tokens: float = 0.0
    """So far."""
    finished: float = 0
    """Requests decoded to their end so far."""
    suspended: float = 0
    """Sessions between two turns that live here."""
    kv_capacity: float = math.inf
    """Tokens of KV that it holds, host memory for parked sessions included."""
    kv_running: float = 0.0
    kv_suspended: float = 0.0
    """KV of sessions between two turns."""
    kv_lost: float = 0.0
    """KV that living sessions had and that was evicted: their next turns compute it again."""
    first_token_s: float | None = None
    """Mean seconds to the first token of late, if known."""
    inter_token_s: float | None = None
    """Mean seconds between two tokens of a sequence of late, if known."""


@dataclass(frozen=True)
class Flip:
    """``name`` is to take the role ``to``, for this reason."""

    name: str
    to: EngineRole
    reason: str


@dataclass(frozen=True)
class Decision:
    """What to do now, and what was not done although it looked good."""

    flips: tuple[Flip, ...] = ()
    refused: str = ""


@dataclass
class _Engine:
    """What the controller remembers of an engine."""

    load: RoleLoad
    since: float
    """When it took its role, or was first seen."""


@dataclass
class _Averages:
    """Exponentially weighted means over all engines of a role since the last change of roles."""

    began_at: float
    at: float
    values: dict[str, float] = field(default_factory=dict)

    def add(self, now: float, window_s: float, values: dict[str, float]) -> None:
        """``values`` held since the last call. The first ones count fully, as nothing is known before.

        The longer nothing has changed, the longer they are averaged: else any window will once look like a reason to flip.
        """
        window_s = min(LONGEST_WINDOWS * window_s, max(window_s, (now - self.began_at) / 2))
        weight = 1.0 if not self.values else 1.0 - math.exp(-(now - self.at) / window_s)
        for name, value in values.items():
            before = self.values.get(name, value)
            self.values[name] = before + weight * (value - before)
        self.at = now


class RoleController:
    """Feed it loads with `observe`, carry out the flips that it returns, and go on telling the roles as they are.

    An engine that was told to flip is counted under its new role at once; until its load says that role (it may have
    requests to end first), nothing else is decided.
    """

    def __init__(self, policy: RolePolicy) -> None:
        self.policy = policy
        self._engines: dict[str, _Engine] = {}
        self._pending: dict[str, tuple[EngineRole, float]] = {}
        self._averages: _Averages | None = None
        self._last_flip = -math.inf
        self._trust = FlipTrust(policy.gain, policy.window_s)
        self._patience = 1.0
        """How long queues were when engines to prefill last had no time (see `Circulation.patience`)."""
        self.flips = 0
        """How many were decided."""

    def observe(self, loads: Sequence[RoleLoad], now: float) -> Decision:
        """The loads of all engines at ``now`` (which never runs backwards); engines of mixed role are left alone."""
        split = [load for load in loads if load.role is not EngineRole.MIXED]
        changed = self._learn_roles(split, now)
        if self._pending:
            return Decision()
        prefill = [load for load in split if load.role is EngineRole.PREFILL]
        decode = [load for load in split if load.role is EngineRole.DECODE]
        if not prefill or not decode:
            return self._refill(split, now)
        if changed or self._averages is None:
            self._averages = _Averages(now, now)
            self._remember(split)
            return Decision()
        if now > self._averages.at:
            self._averages.add(now, self.policy.window_s, self._rates(prefill, decode, now - self._averages.at))
            self._remember(split)
        if now - self._averages.began_at < self.policy.window_s or now - self._last_flip < self.policy.cool_down_s:
            return Decision()
        return self._decide(prefill, decode, now)

    # Who is there

    def _learn_roles(self, loads: Sequence[RoleLoad], now: float) -> bool:
        """Note engines that came, went or took a role. Returns whether any did."""
        names = {load.name for load in loads}
        gone = self._engines.keys() - names
        for name in gone:
            del self._engines[name]
            self._pending.pop(name, None)
        changed = bool(gone)
        for load in loads:
            known = self._engines.get(load.name)
            if known is None or known.load.role is not load.role:
                self._engines[load.name] = _Engine(load, now)
                changed = True
            wanted = self._pending.get(load.name)
            if wanted is not None and (load.role is wanted[0] or now - wanted[1] >= self.policy.flip_timeout_s):
                del self._pending[load.name]
                changed = True
        return changed

    def _remember(self, loads: Sequence[RoleLoad]) -> None:
        for load in loads:
            self._engines[load.name].load = load

    def _refill(self, loads: Sequence[RoleLoad], now: float) -> Decision:
        """A role has lost its last engine: the idlest of the others takes it, however short it has had its own."""
        self._averages = None
        if len(loads) < 2:
            return Decision()
        empty = EngineRole.DECODE if loads[0].role is EngineRole.PREFILL else EngineRole.PREFILL
        return self._flip(loads, empty, now, f"no engine is left to {empty.value}", rested_only=False)

    # What they do

    def _rates(self, prefill: list[RoleLoad], decode: list[RoleLoad], elapsed: float) -> dict[str, float]:
        """What happened since the last call, per second, and how things stand."""
        finished = self._growth(decode, "finished") / elapsed
        generated = self._growth(decode, "generated_tokens") / elapsed
        first_s, inter_s = _mean(prefill + decode, "first_token_s"), _mean(decode, "inter_token_s")
        queued = sum(load.queued for load in prefill + decode)
        decoding = sum(load.decoding for load in decode)
        return {
            "prefill_s": self._growth(prefill, "prefill_s") / elapsed,
            "prefilled": self._growth(prefill, "prefilled_tokens") / elapsed,
            "handed": self._growth([load for load in prefill if load.handed_tokens is not None], "handed_tokens")
            / elapsed,
            "local_s": self._growth(decode, "prefill_s") / elapsed,
            "local": self._growth(decode, "prefilled_tokens") / elapsed,
            "finished": finished,
            "queued": queued if first_s is None else finished * first_s,
            "decoding": decoding if inter_s is None else generated * inter_s,
            "backlog": sum(load.backlog_tokens for load in prefill),
            "suspended": sum(load.suspended for load in prefill + decode),
            "kv_kept": sum(load.kv_running + load.kv_suspended for load in decode),
            "kv_lost": sum(load.kv_lost for load in prefill + decode),
        }

    def _growth(self, loads: list[RoleLoad], counter: str) -> float:
        """How much a cumulative counter of these engines has grown; one that began anew counts from 0."""
        grown = 0.0
        for load in loads:
            value, before = (float(getattr(one, counter) or 0.0) for one in (load, self._engines[load.name].load))
            grown += value - before if value >= before else value
        return grown

    def circulation(self, prefill: Sequence[RoleLoad], decode: Sequence[RoleLoad]) -> Circulation | None:
        """The network as it was measured; None while too little went round to tell."""
        if self._averages is None:
            return None
        mean = self._averages.values
        turns = mean.get("finished", 0.0)
        if turns <= 0:
            return None
        computed_s, computed = mean["prefill_s"] + mean["local_s"], mean["prefilled"] + mean["local"]
        wanted = mean["kv_kept"] + mean["kv_lost"]
        sessions = mean["queued"] + mean["decoding"] + mean["suspended"]
        speed = computed / computed_s if computed_s > 0 and computed > 0 else math.inf
        context_s = turns * wanted / sessions / speed if sessions > 0 else 0.0
        capacity = _mean(decode, "kv_capacity") or math.inf
        # what new weights have made useless is computed again in any division; only what did not fit is not
        lost = max(0.0, min(mean["kv_lost"], wanted - len(decode) * capacity)) / wanted if wanted > 0 else 0.0
        if mean["prefill_s"] >= SATURATED * len(prefill) and mean["decoding"] > 0:
            self._patience = max(0.0, mean["queued"] / len(prefill) / (mean["decoding"] / len(decode)))
        known = mean["prefilled"] > 0 and mean["handed"] > 0
        return Circulation(
            prefill_s=mean["prefill_s"],
            queued=mean["queued"],
            decoding=mean["decoding"],
            suspended=mean["suspended"],
            engines=len(decode),
            half_concurrency=_mean(decode, "half_concurrency") or 0.0,
            slots=_mean(decode, "slots") or math.inf,
            kv_wanted=wanted,
            kv_capacity=capacity,
            context_s=context_s,
            prefillers=len(prefill),
            local_s=mean["local_s"],
            useful=min(MOST_USEFUL, max(LEAST_USEFUL, mean["handed"] / mean["prefilled"])) if known else 1.0,
            local_cost=_mean(decode, "local_cost") or 0.0,
            patience=self._patience,
            again=lost * context_s,
        )

    # What to do

    def _decide(self, prefill: list[RoleLoad], decode: list[RoleLoad], now: float) -> Decision:
        measured = self.circulation(prefill, decode)
        if measured is None:
            return Decision()
        m, n = len(prefill), len(decode)
        present = measured.turns(m, n)
        if present <= 0:
            return Decision()
        turns = {prefills: measured.turns(prefills, m + n - prefills) for prefills in range(1, m + n)}
        sides = {EngineRole.PREFILL: range(m + 1, m + n), EngineRole.DECODE: range(m - 1, 0, -1)}
        best = {
            to: max(side, key=lambda prefills: turns[prefills])
            for to, side in sides.items()
            if side and turns[side[0]] > present
        }
        gains = {to: turns[prefills] / present - 1.0 for to, prefills in best.items()}
        assert self._averages is not None
        rate, averaged_s = self._averages.values["finished"], now - self._averages.began_at
        trusted = [to for to, gain in gains.items() if self._trust.allows(to, gain, rate, averaged_s, now)]
        if not trusted:
            return Decision(refused=self._refusal(measured, m, n, present))
        to = max(trusted, key=lambda to: gains[to])
        reason = self._reason(to, turns[sides[to][0]] / present - 1.0, m, n)
        if abs(best[to] - m) > 1:
            reason += f" ({best[to]} to prefill and {m + n - best[to]} to decode: {gains[to]:+.1%})"
        decision = self._flip(decode if to is EngineRole.PREFILL else prefill, to, now, reason)
        if decision.flips:
            self._trust.flipped(to, gains[to], rate, now)
        return decision

    def _flip(
        self, candidates: Sequence[RoleLoad], to: EngineRole, now: float, reason: str, rested_only: bool = True
    ) -> Decision:
        """Have the one flip that loses least by it, of those that may."""
        least_s = self.policy.min_residence_s if rested_only else 0.0
        rested = [load for load in candidates if now - self._engines[load.name].since >= least_s]
        if not rested:
            return Decision()
        chosen = min(rested, key=_stake)
        self._pending[chosen.name] = (to, now)
        self._last_flip = now
        self._averages = None
        self.flips += 1
        return Decision((Flip(chosen.name, to, reason),))

    def _reason(self, to: EngineRole, gain: float, m: int, n: int) -> str:
        assert self._averages is not None
        mean = self._averages.values
        return (
            f"{m} prefill engines are busy {mean['prefill_s'] / m:.0%} of the time with {mean['backlog']:.0f} tokens "
            f"waiting, {n} decode {mean['decoding'] / n:.1f} sequences each, {mean['suspended']:.0f} sessions are in tools: "
            f"one more to {to.value} promises {gain:+.1%} turns"
        )

    def _refusal(self, measured: Circulation, m: int, n: int, present: float) -> str:
        """Why a flip to prefill was not made that only the KV of suspended sessions speaks against; empty when none was."""
        more = measured.lost_share(n - 1) - measured.lost_share(n)
        if n < 2 or more <= 0:
            return ""
        without = measured.turns(m + 1, n - 1, measured.lost_share(n)) / present - 1.0
        if without < self.policy.gain:
            return ""
        gain = measured.turns(m + 1, n - 1) / present - 1.0
        return (
            f"one more engine to prefill would evict {more * measured.kv_wanted:.0f} tokens of KV of suspended sessions: "
            f"to compute them again takes {more * measured.context_s:.2f} of its seconds each second, and "
            f"{without:+.1%} turns would become {gain:+.1%}"
        )


def _stake(load: RoleLoad) -> tuple[float, float, str]:
    """What a flip of this engine disturbs: KV that must move or be computed again, work that goes elsewhere."""
    return load.kv_running + load.kv_suspended, load.backlog_tokens, load.name


def _mean(loads: Sequence[RoleLoad], name: str) -> float | None:
    known = [value for load in loads if (value := getattr(load, name)) is not None]
    return sum(known) / len(known) if known else None
