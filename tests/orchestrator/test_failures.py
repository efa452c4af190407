from __future__ import annotations

from orchestrator.failures import FailureMonitor, RestartBudget, SignalMonitor


def test_single_failures_never_end_a_run() -> None:
    monitor = FailureMonitor(minimum=4, window=20, share=0.5)
    for _ in range(50):
        monitor.episode_ended(2)
        monitor.episode_failed("loop_fault", "boom")
        assert monitor.verdict() is None
    assert monitor.failed == 50


def test_systematic_failure_ends_it_with_the_first_cause() -> None:
    monitor = FailureMonitor(minimum=4, window=20, share=0.9)
    monitor.episode_failed("loop_fault", "the first")
    for _ in range(3):
        monitor.episode_failed("reward_fault", "a later one")
    verdict = monitor.verdict()
    assert verdict is not None
    assert "the first cause: the first" in verdict
    assert "reward_fault: 3" in verdict


def test_a_run_that_worked_and_then_breaks_ends_too() -> None:
    monitor = FailureMonitor(minimum=4, window=10, share=0.9)
    monitor.episode_ended(100)
    for _ in range(8):
        monitor.episode_failed("engine_fault", "no engine")
    assert monitor.verdict() is None
    monitor.episode_failed("engine_fault", "no engine")
    assert monitor.verdict() is not None


def test_restarts_are_bounded_within_a_window_of_time() -> None:
    budget = RestartBudget(limit=2, window_s=10)
    assert [budget.allow("engine", at) for at in (0.0, 1.0, 2.0)] == [True, True, False]
    assert budget.allow("worker", 2.0)
    assert budget.allow("engine", 11.5)


def test_a_run_in_which_nothing_has_signal_ends_and_one_with_a_little_does_not() -> None:
    monitor = SignalMonitor(limit=3)
    for _ in range(20):
        monitor.dropped()
        monitor.dropped()
        assert monitor.verdict() is None
        monitor.ready()
    for _ in range(3):
        monitor.dropped()
    verdict = monitor.verdict()
    assert verdict is not None
    assert verdict.startswith("3 groups in a row had no signal")
    assert "queue.require_signal=false" in verdict
