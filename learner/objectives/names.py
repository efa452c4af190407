"""Kinds of advantages, and what they need."""

from __future__ import annotations

ADVANTAGES = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "riskpo", "gae")
GROUP_RELATIVE = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")
"""Kinds that compare the episodes of a group: one alone, or all with one reward, teach nothing."""
STEP_NORMALISED = ("reinforce_pp", "reinforce_pp_baseline")
"""Kinds that are normalised over all tokens of the step."""
WHOLE_STEP = (*STEP_NORMALISED, "riskpo", "gae")
"""Kinds whose advantages are known only when the whole step is there."""
