"""A coefficient of the entropy bonus that is moved so that the policy's entropy stays at a target."""

from __future__ import annotations


class EntropyController:
    """Raises the coefficient by ``rate`` after a step whose entropy is below ``target``, lowers it otherwise.

    ``coefficient`` is what the next step uses: the value reached, and 0 while the entropy is above the target, so that the
    bonus works only where it is needed. He et al. 2025, "Skywork Open Reasoner 1", arXiv:2505.22312, adaptive entropy
    control. Entropies are in nats a token.

    >>> controller = EntropyController(target=0.2, rate=0.01, largest=0.05)
    >>> controller.observe(0.1); controller.coefficient
    0.01
    >>> controller.observe(0.3); controller.coefficient
    0.0
    """

    def __init__(self, target: float, rate: float, largest: float, reached: float = 0.0) -> None:
        self._target, self._rate, self._largest = target, rate, largest
        self.reached = reached
        """The coefficient as it has been moved so far: what a checkpoint keeps."""
        self.coefficient = 0.0

    def observe(self, entropy: float) -> None:
        """The mean entropy of a trained step."""
        below = entropy < self._target
        moved = self.reached + (self._rate if below else -self._rate)
        self.reached = min(max(moved, 0.0), self._largest)
        self.coefficient = self.reached if below else 0.0
