"""Tasks of the shop: pure, solvable, split by construction, not guessable."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from env_pool.shop.environment import ShopEnvironment
from env_pool.shop.kinds import KINDS, MAX_DEPTH
from env_pool.shop.tasks import in_held_out, is_held_out_number, parse_facts
from experience.records import Task


def tasks(split: str, count: int, seed: int = 0, **options: object) -> list[Task]:
    return [ShopEnvironment.make_task(index, seed, split, options) for index in range(count)]  # type: ignore[arg-type]


def play(task: Task, actions: list[str]) -> float:
    shop = ShopEnvironment()
    shop.reset(task)
    for action in actions:
        shop.step(action)
    reward = ShopEnvironment.verify(task, shop.outcome()).reward
    shop.close()
    return reward


def test_a_task_is_a_pure_function_of_its_index_seed_and_split() -> None:
    assert tasks("train", 20, seed=3) == tasks("train", 20, seed=3)
    assert tasks("train", 20, seed=3) != tasks("train", 20, seed=4)
    assert [task.payload for task in tasks("train", 20)] != [task.payload for task in tasks("held_out", 20)]


@pytest.mark.parametrize("style", ["terse", "natural"])
def test_every_golden_chain_succeeds_and_no_chain_without_its_last_call_does(style: str) -> None:
    for task in tasks("train", 300, style=style):
        golden = task.payload["golden"]
        assert play(task, golden) == 1.0, task
        expected = task.payload["expected"]
        if expected["refunds"] or expected["notes"]:
            acting = [step for step in golden if step.startswith(("refund", "note"))]
            without = [step for step in golden if step != acting[-1]]
            assert play(task, without) == 0.0, task


def test_something_done_too_much_fails() -> None:
    for task in tasks("train", 60):
        golden = task.payload["golden"]
        number = " ".join(str(parse_facts(task.payload).order))
        assert play(task, [f"note vip {number}", *golden]) == 0.0
        assert play(task, [f"refund {number}", *golden]) == 0.0


def test_training_and_held_out_orders_never_meet() -> None:
    seen: dict[str, set[tuple[str, str]]] = defaultdict(set)
    numbers: dict[str, set[int]] = defaultdict(set)
    for split in ("train", "held_out"):
        for task in tasks(split, 1500):
            facts = parse_facts(task.payload)
            seen[split].add((facts.customer, facts.item))
            numbers[split].add(facts.order)
            assert in_held_out(facts.customer, facts.item) == (split == "held_out")
            assert is_held_out_number(facts.order) == (split == "held_out")
    assert not seen["train"] & seen["held_out"]
    assert not numbers["train"] & numbers["held_out"]
    for position in range(3):
        digits = {str(number)[position] for number in numbers["train"]}
        assert digits >= set("123456789"), "held-out numbers must be made of digits that are trained"


def test_depths_take_turns_and_every_kind_occurs() -> None:
    made = tasks("held_out", 1000)
    assert Counter(task.difficulty for task in made) == dict.fromkeys(range(1, MAX_DEPTH + 1), 200)
    assert {task.domain for task in made} == {kind.name for kind in KINDS}
    longest: dict[str, int] = defaultdict(int)
    for task in made:
        longest[task.domain] = max(longest[task.domain], len(task.payload["golden"]) - 1)
    assert longest == {kind.name: kind.depth for kind in KINDS}


def test_levels_select_depths_and_a_wrong_level_is_refused() -> None:
    assert {task.difficulty for task in tasks("train", 50, levels=[2, 5])} == {2, 5}
    with pytest.raises(ValueError, match=r"tasks\.options\.levels.*1 to 5.*\[6\]"):
        tasks("train", 1, levels=[6])
    with pytest.raises(ValueError, match=r"tasks\.options\.style.*'terse'"):
        tasks("train", 1, style="baroque")


def test_a_constant_answer_without_tools_is_almost_never_right() -> None:
    made = tasks("held_out", 4000, seed=1)
    idle = [task for task in made if not task.payload["expected"]["refunds"] and not task.payload["expected"]["notes"]]
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for task in idle:
        by_kind[task.domain][task.payload["expected"]["answer"]] += 1
        overall[task.payload["expected"]["answer"]] += 1
    sizes = Counter(task.domain for task in made)
    best, count = overall.most_common(1)[0]
    assert count / len(made) <= 0.02
    assert sum(play(task, [f"done {best}"]) for task in made[:500]) / 500 <= 0.04
    best_by_kind = {kind: answers.most_common(1)[0][1] / sizes[kind] for kind, answers in by_kind.items()}
    assert max(best_by_kind.values()) <= 0.2, best_by_kind
    knowing_the_kind = sum(best_by_kind.get(kind, 0.0) * size for kind, size in sizes.items()) / len(made)
    assert knowing_the_kind <= 0.05, best_by_kind
