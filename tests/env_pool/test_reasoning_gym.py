from __future__ import annotations

import pytest

from env_pool.reasoning_gym_env import ReasoningGymEnvironment, extract_answer, is_held_out
from env_pool.registry import TaskSource

OPTIONS = {"family": "chain_sum", "max_terms": 3}


@pytest.mark.parametrize(
    ("text", "source", "answer"),
    [
        (r"so \boxed{1} or \boxed{\frac{1}{2}}.", "auto", r"\frac{1}{2}"),
        ("<answer>7</answer> no, <answer> 8 </answer>", "auto", "8"),
        ("long\nthought\nAnswer: 42", "auto", "42"),
        ("<think>\\boxed{1}</think>5", "auto", "5"),
        (r"\boxed{3", "boxed", ""),
        ("5", "tag", ""),
        ("a\nb", "all", "a\nb"),
        ("", "auto", ""),
    ],
)
def test_the_answer_is_found(text: str, source: str, answer: str) -> None:
    assert extract_answer(text, source) == answer


def test_the_verifier_of_the_family_judges() -> None:
    task = ReasoningGymEnvironment.make_task(0, 3, "train", OPTIONS)
    terms = task.payload["question"].split(": ")[1].removesuffix(" =").split()
    right = sum(int(sign + n) for sign, n in zip(["+", *terms[1::2]], terms[::2], strict=True))
    for text, reward in ((f"It is \\boxed{{{right}}}", 1.0), (f"{right + 1}", 0.0)):
        environment = ReasoningGymEnvironment()
        assert environment.reset(task).messages[0]["content"] == task.payload["question"]
        assert environment.step(text).done
        assert ReasoningGymEnvironment.verify(task, environment.outcome()).reward == pytest.approx(reward, abs=0.02)


def test_no_question_is_in_both_splits() -> None:
    questions = {}
    for split in ("train", "held_out"):
        source = TaskSource("reasoning_gym", split, 0, OPTIONS)  # type: ignore[arg-type]
        questions[split] = {source.task(index).payload["question"] for index in range(60)}
    assert not questions["train"] & questions["held_out"]
    assert all(is_held_out(question) for question in questions["held_out"])
    assert len(questions["train"]) > 55


def test_an_unknown_family_or_setting_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no family 'chain_sun'.*Did you mean 'chain_sum'"):
        ReasoningGymEnvironment.make_task(0, 0, "train", {"family": "chain_sun"})
    with pytest.raises(ValueError, match=r"tasks.options.max_term: .*Did you mean 'max_terms'"):
        ReasoningGymEnvironment.make_task(0, 0, "train", {"family": "chain_sum", "max_term": 3})
    with pytest.raises(ValueError, match="refuses its settings"):
        ReasoningGymEnvironment.make_task(0, 0, "train", {"family": "chain_sum", "max_terms": 1})
