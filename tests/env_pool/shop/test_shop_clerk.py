"""The clumsy clerk: which slips fail, and what is never shown."""

from __future__ import annotations

import random
from collections import defaultdict

from env_pool.shop.clerk import ClumsyClerk, Slip, clumsy_chain, failing_slips, possible_slips
from env_pool.shop.environment import ShopEnvironment
from env_pool.shop.kinds import KIND_BY_NAME
from env_pool.shop.tasks import parse_facts
from experience.records import Task


def succeeds(task: Task, actions: list[str]) -> bool:
    shop = ShopEnvironment()
    shop.reset(task)
    for action in actions:
        shop.step(action)
    reward = ShopEnvironment.verify(task, shop.outcome()).reward
    shop.close()
    return reward == 1.0


def test_failing_slips_fail_and_the_others_do_not() -> None:
    seen: set[Slip] = set()
    for index in range(400):
        task = ShopEnvironment.make_task(index, 0, "train", {})
        kind, facts = KIND_BY_NAME[task.domain], parse_facts(task.payload)
        assert clumsy_chain(kind, facts, set()) == task.payload["golden"]
        failing = failing_slips(kind, facts)
        for slip in possible_slips(kind):
            assert succeeds(task, clumsy_chain(kind, facts, {slip})) == (slip not in failing), (task, slip)
            seen.add(slip)
    assert seen == set(Slip)


def test_the_deepest_chains_are_never_shown_right_and_shallow_ones_often() -> None:
    clerk, rng = ClumsyClerk(), random.Random(0)
    right: dict[int, list[bool]] = defaultdict(list)
    for index in range(1000):
        task = ShopEnvironment.make_task(index, 5, "train", {})
        right[task.difficulty].append(succeeds(task, clerk.act(task, rng)))
    shares = {depth: sum(results) / len(results) for depth, results in right.items()}
    assert clerk.never_right_from == 5
    assert shares[5] == 0.0
    assert 0.1 < shares[4] < 0.4
    assert all(0.25 < shares[depth] < 0.65 for depth in (1, 2, 3)), shares


def test_a_clerk_repeats_itself_with_the_same_seed() -> None:
    clerk = ClumsyClerk()
    made = [ShopEnvironment.make_task(index, 0, "train", {}) for index in range(50)]
    first = [clerk.act(task, random.Random(index)) for index, task in enumerate(made)]
    assert first == [clerk.act(task, random.Random(index)) for index, task in enumerate(made)]
