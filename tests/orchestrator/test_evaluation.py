from __future__ import annotations

from experience.records import Status, Task
from orchestrator.evaluation import Evaluation
from rollout_workers.assignments import EpisodeReport, Purpose


def make_evaluation(tasks: int = 4) -> Evaluation:
    domains = ["find", "refund"]
    return Evaluation(
        50,
        50,
        [
            Task(task_id=f"t{i}", environment="shop", payload={}, domain=domains[i % 2], difficulty=i % 2 + 1)
            for i in range(tasks)
        ],
        seed=0,
    )


def report(group_id: str, reward: float | None, domain: str = "find", difficulty: int = 1) -> EpisodeReport:
    return EpisodeReport(
        group_id=group_id,
        episode_id=f"{group_id}/0",
        purpose=Purpose.EVALUATE,
        status=Status.FINISHED if reward is not None else Status.SYSTEM_ERROR,
        reward=reward,
        domain=domain,
        difficulty=difficulty,
    )


def test_tasks_are_spread_over_the_workers_once_with_the_version_pinned() -> None:
    evaluation = make_evaluation()
    given = evaluation.assign(["a", "b"])
    assert {worker: len(assignments) for worker, assignments in given.items()} == {"a": 2, "b": 2}
    assert {assignment.pinned_version for some in given.values() for assignment in some} == {50}
    assert evaluation.assign(["a", "b"]) == {}


def test_the_tasks_of_a_lost_worker_are_given_out_again_unless_reported() -> None:
    evaluation = make_evaluation()
    first = evaluation.assign(["a"])["a"]
    evaluation.report(report(first[0].header.group_id, 1.0))
    evaluation.worker_lost("a")
    assert len(evaluation.assign(["b"])["b"]) == 3


def test_failed_episodes_do_not_count_as_failures_of_the_agent() -> None:
    evaluation = make_evaluation()
    groups = [assignment.header.group_id for assignment in evaluation.assign(["a"])["a"]]
    assert not evaluation.report(report("e000099-0000", 1.0))
    evaluation.report(report(groups[0], 1.0, "find", 1))
    evaluation.report(report(groups[1], 0.0, "refund", 2))
    evaluation.report(report(groups[2], None, "find", 1))
    assert not evaluation.complete
    evaluation.report(report(groups[3], 1.0, "refund", 2))
    assert evaluation.complete
    result = evaluation.result()
    assert (result["tasks"], result["failed"]) == (3, 1)
    assert result["success"] == 2 / 3
    assert result["by_domain"] == {"find": {"n": 1, "success": 1.0}, "refund": {"n": 2, "success": 0.5}}
    assert result["by_difficulty"]["2"] == {"n": 2, "success": 0.5}


def test_seeds_are_the_same_at_every_step() -> None:
    first, later = make_evaluation(), Evaluation(100, 100, [Task(task_id="t0", environment="shop", payload={})], seed=0)
    seed = first.assign(["a"])["a"][0].header.seed
    assert later.assign(["a"])["a"][0].header.seed == seed
