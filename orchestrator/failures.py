"""When do failures of single episodes or actors add up to a failed run? Pure decisions."""

from __future__ import annotations

from collections import Counter, deque


class FailureMonitor:
    """Ends a run when failure is systematic, with the first cause; single failures never do.

    Systematic is: the first ``minimum`` episodes all failed, or at least ``share`` of the last ``window`` did.

    >>> monitor = FailureMonitor(minimum=2)
    >>> monitor.episode_failed("loop_fault", "KeyError: 'x'"); monitor.verdict() is None
    True
    >>> monitor.episode_failed("loop_fault", "KeyError: 'y'"); monitor.verdict()
    "2 of the last 2 episodes failed (loop_fault: 2); the first cause: KeyError: 'x'"
    """

    def __init__(self, minimum: int = 16, window: int = 128, share: float = 0.9) -> None:
        self._minimum = minimum
        self._share = share
        self._recent: deque[str | None] = deque(maxlen=window)
        self._first_cause: str | None = None
        self.failed = 0
        self.counts: Counter[str] = Counter()

    @property
    def first_cause(self) -> str | None:
        """What the first failed episode failed of."""
        return self._first_cause

    def episode_ended(self, count: int = 1) -> None:
        """Episodes ended as they should."""
        self._recent.extend([None] * count)

    def episode_failed(self, reason: str, cause: str) -> None:
        """An episode was given up after all its attempts."""
        self.failed += 1
        self.counts[reason] += 1
        self._recent.append(reason)
        if self._first_cause is None:
            self._first_cause = cause

    def verdict(self) -> str | None:
        """Why the run must end, or None."""
        failures = [reason for reason in self._recent if reason is not None]
        if len(failures) < self._minimum or len(failures) < self._share * len(self._recent):
            return None
        reasons = ", ".join(f"{reason}: {n}" for reason, n in Counter(failures).most_common())
        return (
            f"{len(failures)} of the last {len(self._recent)} episodes failed ({reasons}); "
            f"the first cause: {self._first_cause}"
        )


class SignalMonitor:
    """Ends a run in which no group has any signal, so that refilling cannot go on for ever.

    >>> monitor = SignalMonitor(limit=2)
    >>> monitor.dropped(); monitor.verdict() is None
    True
    >>> monitor.dropped(); monitor.verdict().startswith("2 groups in a row had no signal")
    True
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row = 0

    def dropped(self) -> None:
        """A group was dropped for want of signal."""
        self._in_a_row += 1

    def ready(self) -> None:
        """A group had signal."""
        self._in_a_row = 0

    def verdict(self) -> str | None:
        """Why the run must end, or None."""
        if self._in_a_row < self._limit:
            return None
        return (
            f"{self._in_a_row} groups in a row had no signal: all episodes of each had the same reward, and queue.require_signal "
            "drops such groups. The tasks are too easy or too hard for the model, or the reward is constant: choose other tasks, "
            "larger groups (rollout.group_size), or queue.require_signal=false"
        )


class RestartBudget:
    """How often an actor may be replaced: ``limit`` times within any ``window_s`` seconds, per role."""

    def __init__(self, limit: int = 5, window_s: float = 120.0) -> None:
        self._limit = limit
        self._window_s = window_s
        self._times: dict[str, deque[float]] = {}

    def allow(self, role: str, now: float) -> bool:
        """Whether one more replacement at ``now`` (seconds) is within the budget; counts it if so."""
        times = self._times.setdefault(role, deque())
        while times and now - times[0] > self._window_s:
            times.popleft()
        if len(times) >= self._limit:
            return False
        times.append(now)
        return True

    @property
    def limit(self) -> int:
        return self._limit
