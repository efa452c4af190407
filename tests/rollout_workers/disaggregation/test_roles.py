"""Roles by load: what the controller may never do, and that it finds the division that goes round fastest."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_workers.disaggregation.circulation import Circulation
from rollout_workers.disaggregation.role_trust import FlipTrust
from rollout_workers.disaggregation.roles import Decision, Flip, RoleController, RoleLoad, RolePolicy
from rollout_workers.engines.protocol import EngineRole

PREFILL, DECODE = EngineRole.PREFILL, EngineRole.DECODE
POLICY = RolePolicy(gain=0.05, window_s=10.0, min_residence_s=30.0, cool_down_s=15.0, flip_timeout_s=200.0)


@dataclass
class Plant:
    """Engines that do what the closed network says: a turn of ``prompt`` tokens and ``output`` tokens, then a tool.

    Of prompts ``local`` are computed where they are decoded, and as in a run, those for which the engines to prefill have no time:
    ``patience`` requests at most queue at each of these, about as many as decode at one of the others. An engine to prefill computes ``redone`` times as much as it hands over.
    """

    roles: dict[str, EngineRole]
    episodes: float = 100.0
    prompt: float = 1000.0
    output: float = 200.0
    tool_s: float = 5.0
    prefill_rate: float = 5000.0
    peak: float = 2000.0
    half_concurrency: float = 8.0
    context: float = 2000.0
    kv_capacity: float = 1e9
    local: float = 0.1
    redone: float = 1.0
    counters: dict[str, list[float]] = field(default_factory=dict)

    @property
    def patience(self) -> float:
        return max(10.0, self.episodes / len(self.roles))

    def count(self, role: EngineRole) -> int:
        return list(self.roles.values()).count(role)

    def flow(self, prefill: int, decode: int) -> tuple[float, float, float, float]:
        """Turns a second, requests in prefill, sequences in decoding, and the share of KV lost, by bisection."""
        lost = max(0.0, 1 - decode * self.kv_capacity / (self.episodes * self.context))
        low, high = 0.0, 1e6
        for _ in range(100):
            turns = (low + high) / 2
            held = self.stages(turns, prefill, decode)
            fits = held is not None and sum(held) + turns * self.tool_s <= self.episodes
            low, high = (turns, high) if fits else (low, turns)
        queued, decoding = self.stages(low, prefill, decode) or (0.0, 0.0)
        decoding += max(
            0.0, self.episodes - queued - decoding - low * self.tool_s
        )  # the bottleneck holds everybody else
        return low, queued, decoding, lost

    def prompts(self, turns: float, prefill: int, decode: int) -> tuple[float, float]:
        """Engine-seconds a second of prompts where they are handed over from, and where they are decoded."""
        lost = max(0.0, 1 - decode * self.kv_capacity / (self.episodes * self.context))
        work = turns * (self.prompt + lost * self.context) / self.prefill_rate
        busiest = self.patience / (1 + self.patience)
        sent = min((1 - self.local) * work, prefill * busiest / self.redone)
        return sent * self.redone, work - sent

    def stages(self, turns: float, prefill: int, decode: int) -> tuple[float, float] | None:
        """Requests in prefill and in decoding; None: more than the engines can do."""
        sent, stays = self.prompts(turns, prefill, decode)
        busy, time, token_s = sent / prefill, decode - stays, self.output / self.peak
        if turns * token_s >= 0.9999 * time:
            return None
        load = turns * token_s / time
        return prefill * busy / (1 - busy), decode * self.half_concurrency * load / (1 - load)

    def best(self) -> float:
        return max(self.flow(m, len(self.roles) - m)[0] for m in range(1, len(self.roles)))

    def loads(self, elapsed: float) -> list[RoleLoad]:
        m, n = self.count(PREFILL), self.count(DECODE)
        turns, queued, decoding, lost = self.flow(m, n)
        suspended = turns * self.tool_s
        sent, stays = self.prompts(turns, m, n)
        made = []
        for name, role in self.roles.items():
            counts = self.counters.setdefault(name, [0.0] * 5)
            if role is PREFILL:
                counts[0] += sent / m * self.prefill_rate * elapsed
                counts[1] += sent / m * elapsed
                counts[4] += sent / m * self.prefill_rate / self.redone * elapsed
                mine = RoleLoad(name, role, queued=queued / m, backlog_tokens=queued / m * self.prompt)
            else:
                counts[0] += stays / n * self.prefill_rate * elapsed
                counts[1] += stays / n * elapsed
                counts[2] += turns / n * self.output * elapsed
                counts[3] += turns / n * elapsed
                mine = RoleLoad(
                    name,
                    role,
                    decoding=decoding / n,
                    suspended=suspended / n,
                    kv_running=(1 - lost) * decoding / n * self.context,
                    kv_suspended=(1 - lost) * (queued + suspended) / n * self.context,
                    kv_lost=lost * self.episodes / n * self.context,
                )
            made.append(
                replace(
                    mine,
                    half_concurrency=self.half_concurrency,
                    kv_capacity=self.kv_capacity,
                    prefilled_tokens=counts[0],
                    prefill_s=counts[1],
                    handed_tokens=counts[4],
                    generated_tokens=counts[2],
                    finished=counts[3],
                )
            )
        return made


def make_plant(prefill: int, decode: int, **changed: float) -> Plant:
    roles = {f"engine-{index}": PREFILL if index < prefill else DECODE for index in range(prefill + decode)}
    return Plant(roles, **changed)  # type: ignore[arg-type]


def drive(
    plant: Plant, controller: RoleController, seconds: float, now: float = 0.0, every: float = 1.0
) -> list[tuple[float, Decision]]:
    """Observe every second; flips take effect at once. Returns the decisions that said anything."""
    said, end = [], now + seconds
    while now < end:
        decision = controller.observe(plant.loads(every), now)
        for flip in decision.flips:
            plant.roles[flip.name] = flip.to
        if decision.flips or decision.refused:
            said.append((now, decision))
        now += every
    return said


def circulation_of(controller: RoleController, plant: Plant) -> Circulation | None:
    loads = plant.loads(1.0)
    return controller.circulation(*([load for load in loads if load.role is role] for role in (PREFILL, DECODE)))


def flips_of(said: list[tuple[float, Decision]]) -> list[float]:
    return [at for at, decision in said for _ in decision.flips]


loads_of_a_turn = {
    "episodes": st.floats(10, 400),
    "prompt": st.floats(10, 20_000),
    "output": st.floats(10, 2000),
    "tool_s": st.floats(0.0, 60.0),
    "half_concurrency": st.floats(1.0, 64.0),
    "kv_capacity": st.sampled_from([1e9, 60_000.0, 20_000.0]),
}


@settings(max_examples=40, deadline=None)
@given(prefill=st.integers(1, 5), decode=st.integers(1, 5), load=st.fixed_dictionaries(loads_of_a_turn))
def test_under_a_stationary_load_it_settles_near_the_best_division(
    prefill: int, decode: int, load: dict[str, float]
) -> None:
    plant, controller = make_plant(prefill, decode, **load), RoleController(POLICY)
    said = drive(plant, controller, 600.0, every=2.0)
    assert plant.count(PREFILL) >= 1
    assert plant.count(DECODE) >= 1
    late = flips_of(drive(plant, controller, 200.0, now=600.0, every=2.0))
    assert not late, f"still flipping after {len(flips_of(said))} flips"
    neighbours = [
        plant.flow(m, prefill + decode - m)[0]
        for m in (plant.count(PREFILL) - 1, plant.count(PREFILL) + 1)
        if 1 <= m < prefill + decode
    ]
    reached = plant.flow(plant.count(PREFILL), plant.count(DECODE))[0]
    assert reached >= max([*neighbours, reached]) / (1 + 2 * POLICY.gain)


@pytest.mark.parametrize(("output", "factor"), [(200.0, 1.5), (400.0, 2.5)])
def test_it_finds_the_best_of_all_divisions_from_the_worst(output: float, factor: float) -> None:
    plant = make_plant(7, 1, prompt=400.0, output=output)
    before = plant.flow(7, 1)[0]
    drive(plant, RoleController(POLICY), 600.0)
    reached = plant.flow(plant.count(PREFILL), plant.count(DECODE))[0]
    assert reached > factor * before
    assert reached >= plant.best() / (1 + POLICY.gain)


def test_where_the_better_direction_is_not_trusted_the_other_one_is_taken() -> None:
    """One engine to prefill would be nearly as good as five, and three, the beginning, is the worst of all."""
    plant = make_plant(3, 3, episodes=217.0, prompt=3018.0, output=10.0, tool_s=23.0, half_concurrency=1.0)
    said = drive(plant, RoleController(POLICY), 600.0, every=2.0)
    assert plant.count(PREFILL) == 5
    assert [flip.to for _, decision in said for flip in decision.flips] == [PREFILL, PREFILL]
    assert all("evict 0 tokens" not in decision.refused for _, decision in said)


def test_it_follows_a_shift_of_the_load() -> None:
    plant, controller = make_plant(2, 6, prompt=200.0, output=400.0, redone=0.3), RoleController(POLICY)
    drive(plant, controller, 600.0)
    few = plant.count(PREFILL)
    plant.prompt, plant.output = 8000.0, 50.0
    drive(plant, controller, 600.0, now=600.0)
    many = plant.count(PREFILL)
    assert many >= few + 3
    plant.prompt, plant.output = 200.0, 400.0
    drive(plant, controller, 900.0, now=1200.0)
    assert plant.count(PREFILL) <= few + 1


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.fixed_dictionaries(loads_of_a_turn), st.integers(1, 40), st.sampled_from(["", "", "lose", "add"])),
        min_size=1,
        max_size=12,
    ),
    prefill=st.integers(1, 3),
    decode=st.integers(1, 4),
)
def test_whatever_the_load_flips_are_bounded_rested_and_leave_no_role_empty(
    steps: list[tuple[dict[str, float], int, str]], prefill: int, decode: int
) -> None:
    plant, controller = make_plant(prefill, decode), RoleController(POLICY)
    since = dict.fromkeys(plant.roles, 0.0)
    now, names, ordinary = 0.0, prefill + decode, []
    for load, seconds, event in steps:
        for name, value in load.items():
            setattr(plant, name, value)
        if event == "add":
            plant.roles[f"engine-{names}"], since[f"engine-{names}"] = DECODE, now
            names += 1
        elif event == "lose" and len(plant.roles) > 2:
            plant.roles.pop(next(iter(plant.roles)))
        for _ in range(seconds):
            both = plant.count(PREFILL) and plant.count(DECODE)
            loads = plant.loads(1.0) if both else [RoleLoad(name, role) for name, role in plant.roles.items()]
            for flip in controller.observe(loads, now).flips:
                assert plant.roles[flip.name] is not flip.to
                assert flip.reason
                if both:
                    assert now - since[flip.name] >= POLICY.min_residence_s
                    ordinary.append(now)
                plant.roles[flip.name], since[flip.name] = flip.to, now
            if len(plant.roles) >= 2:
                assert plant.count(PREFILL) >= 1
                assert plant.count(DECODE) >= 1
            now += 1.0
    assert all(later - earlier >= POLICY.cool_down_s for earlier, later in itertools.pairwise(ordinary))
    assert len(ordinary) <= now / POLICY.cool_down_s + 1


def test_a_flip_that_evicts_more_than_it_gains_is_refused_and_says_so() -> None:
    """Prompts queue, so another prefill engine looks good; but the KV that it takes away would all be computed again."""
    fits = {"episodes": 100.0, "context": 8000.0, "prompt": 8000.0, "output": 50.0, "redone": 0.3}
    roomy = make_plant(2, 6, **fits)
    assert flips_of(drive(roomy, RoleController(POLICY), 100.0))
    tight = make_plant(2, 6, **fits, kv_capacity=100.0 * 8000.0 / 6)
    said = drive(tight, RoleController(POLICY), 300.0)
    assert not flips_of(said)
    assert tight.count(PREFILL) == 2
    reason = said[-1][1].refused
    assert "KV of suspended sessions" in reason
    assert "compute them again" in reason


def test_lost_kv_counts_as_prefill_that_an_engine_more_to_decode_would_save() -> None:
    plant = make_plant(
        4, 2, episodes=60.0, context=8000.0, prompt=300.0, output=50.0, tool_s=5.0, kv_capacity=60.0 * 8000.0 / 4
    )
    said = drive(plant, RoleController(POLICY), 400.0)
    assert flips_of(said)
    assert plant.count(DECODE) >= 4


def test_kv_that_new_weights_have_made_useless_stays_prefill_whoever_decodes() -> None:
    plant, controller = make_plant(2, 4, context=4000.0), RoleController(POLICY)
    for second in range(20):
        stale = [replace(load, kv_lost=load.kv_suspended, kv_suspended=0.0) for load in plant.loads(1.0)]
        controller.observe(stale, float(second))
    measured = circulation_of(controller, plant)
    assert measured is not None
    assert measured.again == 0.0
    prompts_s = plant.flow(2, 4)[0] * plant.prompt / plant.prefill_rate
    assert measured.prefill_s + measured.local_s == pytest.approx(prompts_s, rel=1e-6)


def test_an_engine_takes_its_time_to_flip_and_nothing_else_is_decided_meanwhile() -> None:
    plant, controller = make_plant(7, 1, prompt=400.0), RoleController(POLICY)
    asked: list[Flip] = []
    now = 0.0
    while now < 150.0:
        asked += controller.observe(plant.loads(1.0), now).flips
        now += 1.0
    assert len(asked) == 1, "the engine has not flipped, so nothing may follow"
    plant.roles[asked[0].name] = asked[0].to
    while len(asked) == 1 and now < 300.0:
        asked += controller.observe(plant.loads(1.0), now).flips
        now += 1.0
    assert len(asked) == 2
    assert asked[1].name != asked[0].name


def test_an_engine_that_never_flips_is_given_up_after_the_timeout() -> None:
    plant, controller = make_plant(3, 1, prompt=400.0), RoleController(replace(POLICY, flip_timeout_s=60.0))
    asked: list[float] = []
    for second in range(400):
        asked += [second for _ in controller.observe(plant.loads(1.0), float(second)).flips]
    assert len(asked) > 1
    assert min(later - earlier for earlier, later in itertools.pairwise(asked)) >= 60.0


def test_a_role_whose_last_engine_is_gone_gets_another_one_at_once() -> None:
    controller = RoleController(POLICY)
    controller.observe([RoleLoad("a", PREFILL), RoleLoad("b", DECODE), RoleLoad("c", DECODE, kv_running=5.0)], 0.0)
    (flip,) = controller.observe([RoleLoad("b", DECODE), RoleLoad("c", DECODE, kv_running=5.0)], 1.0).flips
    assert (flip.name, flip.to) == ("b", PREFILL)
    assert "no engine is left to prefill" in flip.reason
    assert controller.observe([RoleLoad("b", DECODE)], 2.0).flips == ()


def test_engines_that_do_both_are_left_alone() -> None:
    controller = RoleController(POLICY)
    for second in range(100):
        assert controller.observe([RoleLoad("a", EngineRole.MIXED)], float(second)) == Decision()


def test_times_to_tokens_replace_what_one_look_sees() -> None:
    """By Little's law: a queue that is empty whenever one looks, and yet makes requests wait, is counted."""
    controller = RoleController(POLICY)
    plant = make_plant(2, 2)
    for second in range(30):
        loads = [
            replace(load, queued=0.0, decoding=0.0, first_token_s=3.0, inter_token_s=0.01) for load in plant.loads(1.0)
        ]
        controller.observe(loads, float(second))
    measured = circulation_of(controller, plant)
    assert measured is not None
    turns = plant.flow(2, 2)[0]
    assert measured.queued == pytest.approx(3.0 * turns, rel=0.05)
    assert measured.decoding == pytest.approx(0.01 * turns * plant.output, rel=0.05)


def circulation(**changed: float) -> Circulation:
    plain: dict[str, float] = {
        "prefill_s": 1.0,
        "queued": 2.0,
        "decoding": 20.0,
        "suspended": 10.0,
        "engines": 4,
        "half_concurrency": 8.0,
        "slots": math.inf,
        "kv_wanted": 1000.0,
        "kv_capacity": 250.0,
        "context_s": 2.0,
    }
    return Circulation(**{**plain, **changed})  # type: ignore[arg-type]


def test_turns_never_exceed_what_a_stage_can_do() -> None:
    measured = circulation(queued=500.0)
    assert measured.turns(1, 4) == pytest.approx(1.0, rel=0.01)
    assert measured.turns(2, 4) <= 2.0
    assert circulation(decoding=1e6, queued=0.0).turns(4, 2) < circulation(decoding=1e6, queued=0.0).turns(4, 4)
    assert circulation(slots=2.0, queued=500.0).turns(50, 4) < circulation(queued=500.0).turns(50, 4)


def test_kv_that_does_not_fit_is_computed_again() -> None:
    measured = circulation()
    assert measured.lost_share(4) == 0.0
    assert measured.lost_share(2) == pytest.approx(0.5)
    assert measured.turns(2, 2) < measured.turns(2, 2, lost_share=0.0)


def test_nothing_going_round_is_no_reason_to_change() -> None:
    idle = circulation(prefill_s=0.0, decoding=0.0, queued=0.0, kv_wanted=0.0)
    assert idle.turns(1, 4) == idle.turns(2, 3) == 1.0


def test_what_engines_to_prefill_have_no_time_for_is_computed_where_it_is_decoded() -> None:
    """So a busy engine to prefill is no bottleneck: one more of them takes from the others what it gives."""
    full = circulation(prefill_s=1.0, local_s=1.0, decoding=60.0, queued=15.0, suspended=25.0, kv_wanted=0.0)
    assert full.turns(1, 4) == pytest.approx(1.0, rel=0.02)
    assert full.turns(2, 3) < 1.05
    assert replace(full, useful=3.0).turns(2, 3) > full.turns(2, 3), "what it computes saves others more than it costs"
    assert replace(full, local_cost=0.5).turns(2, 3) < full.turns(2, 3), (
        "prompts that share steps cost less where they are"
    )


def test_prompts_under_way_of_which_none_is_done_are_no_division_by_zero() -> None:
    controller = RoleController(POLICY)
    for second in range(40):
        loads = [
            RoleLoad("a", PREFILL, queued=1.0, prefill_s=float(second)),
            RoleLoad("b", DECODE, decoding=1.0, finished=float(second), kv_running=10.0),
        ]
        controller.observe(loads, float(second))
    assert controller.flips == 0


def test_a_load_with_heavy_tails_does_not_make_roles_flip_to_and_fro() -> None:
    """Every turn's work is drawn anew: some window always looks like a reason to flip, the long run never does."""
    rng = random.Random(7)
    plant, controller = make_plant(3, 5, prompt=400.0, output=400.0), RoleController(POLICY)
    ordinary, flips = plant.output, []
    for second in range(3000):
        if second % 10 == 0:
            plant.output = ordinary * rng.lognormvariate(0.0, 0.5)
            plant.prompt = ordinary * rng.lognormvariate(0.0, 0.8)
        for flip in controller.observe(plant.loads(1.0), float(second)).flips:
            plant.roles[flip.name] = flip.to
            flips.append(second)
    plant.prompt, plant.output = ordinary * math.exp(0.32), ordinary * math.exp(0.125)
    assert len([at for at in flips if at > 600]) <= 2, flips
    assert plant.flow(plant.count(PREFILL), plant.count(DECODE))[0] >= plant.best() / (1 + 2 * POLICY.gain)


def test_a_flip_that_brought_what_it_promised_is_not_taken_back_for_less() -> None:
    trust = FlipTrust(0.05, 10.0)
    trust.flipped(PREFILL, 0.2, 10.0, 0.0)
    assert not trust.allows(DECODE, 0.3, 12.0, 20.0, 20.0)
    assert trust.allows(DECODE, 0.5, 12.0, 20.0, 20.0)
    assert trust.allows(PREFILL, 0.05, 12.0, 20.0, 20.0)


def test_a_promise_that_was_not_kept_must_be_surpassed_and_taking_back_takes_longer_each_time() -> None:
    trust = FlipTrust(0.05, 10.0)
    trust.flipped(PREFILL, 0.1, 10.0, 0.0)
    assert trust.allows(DECODE, 0.06, 9.0, 10.0, 10.0)
    trust.flipped(DECODE, 0.06, 9.0, 10.0)
    assert trust.least_gain(PREFILL, 10.0) == pytest.approx(0.2, rel=0.01)
    assert not trust.allows(PREFILL, 0.15, 10.0, 100.0, 20.0)
    assert not trust.allows(PREFILL, 0.4, 9.0, 10.0, 20.0), "loads averaged for one window are not enough any more"
    assert trust.allows(PREFILL, 0.4, 9.0, 20.0, 30.0)
    assert trust.least_gain(PREFILL, 1e6) == pytest.approx(0.05)


@pytest.mark.parametrize(("name", "value"), [("gain", 0.0), ("window_s", -1.0), ("min_residence_s", -0.1)])
def test_bad_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"engines.role_policy.{name}"):
        replace(POLICY, **{name: value}).validate()
