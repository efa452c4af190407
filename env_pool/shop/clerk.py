"""A clumsy clerk: demonstrations with habitual slips, for warming a model up to where reinforcement can take over.

Every slip makes a single skill go wrong. Slips are drawn independently, so each skill is shown right in a good share of
the episodes; but from depth `never_right_from` on a whole episode is never right, so a
model that only imitates has not seen those chains succeed and has to find them.
"""

from __future__ import annotations

import random
from collections.abc import Set
from dataclasses import dataclass
from enum import StrEnum

from env_pool.shop.kinds import KIND_BY_NAME, Kind
from env_pool.shop.tasks import Facts, answer, parse_facts, spell
from experience.records import Task


class Slip(StrEnum):
    """One skill gone wrong."""

    HASTY_ANSWER = "hasty_answer"
    """Ends with `ok` where something was to be reported."""
    NO_CHECK = "no_check"
    """Takes the condition as given, without looking."""
    NO_REFUND = "no_refund"
    """Ends without the refund that was all there was to do when it was due."""
    NO_NOTE = "no_note"
    """Refunds but forgets the note."""
    NO_ELSE = "no_else"
    """Does nothing where the condition fails, forgetting what was to be noted otherwise."""


@dataclass(frozen=True, kw_only=True)
class ClumsyClerk:
    """How clumsy: the probability of each possible slip, and from which depth on at least one always happens."""

    slip_rate: float = 0.5
    never_right_from: int = 5

    def act(self, task: Task, rng: random.Random) -> list[str]:
        """Actions of one demonstration in the word syntax, the last one the answer."""
        kind, facts = KIND_BY_NAME[task.domain], parse_facts(task.payload)
        slips = {slip for slip in Slip if slip in possible_slips(kind) and rng.random() < self.slip_rate}
        failing = failing_slips(kind, facts)
        if kind.depth >= self.never_right_from and failing and not slips & set(failing):
            slips.add(rng.choice(failing))
        return clumsy_chain(kind, facts, slips)


def possible_slips(kind: Kind) -> list[Slip]:
    """The slips there is occasion for, whatever the facts."""
    occasions = {
        Slip.HASTY_ANSWER: kind.say is not None,
        Slip.NO_CHECK: kind.condition is not None,
        Slip.NO_REFUND: kind.refund and kind.say is None,
        Slip.NO_NOTE: kind.refund and kind.note,
        Slip.NO_ELSE: kind.otherwise,
    }
    return [slip for slip in Slip if occasions[slip]]


def failing_slips(kind: Kind, facts: Facts) -> list[Slip]:
    """Those of the possible slips that, alone, fail this task."""
    when_due = (Slip.HASTY_ANSWER, Slip.NO_REFUND, Slip.NO_NOTE)
    otherwise = (Slip.HASTY_ANSWER, Slip.NO_CHECK, Slip.NO_ELSE)
    relevant = when_due if facts.holds(kind.condition) else otherwise
    return [slip for slip in possible_slips(kind) if slip in relevant]


def clumsy_chain(kind: Kind, facts: Facts, slips: Set[Slip]) -> list[str]:
    """The golden chain with these slips; without any it is the golden chain."""
    number = spell(facts.order)
    looks = Slip.NO_CHECK not in slips
    reports = kind.say is not None and Slip.HASTY_ANSWER not in slips
    chain = []
    if kind.target == "customer":
        chain.append(f"find_user {facts.customer}")
    if kind.reads_order and (reports or (kind.condition and looks)):
        chain.append(f"find_order {number}")
    if kind.condition == "gone" and looks:
        chain.append(f"check_stock {facts.item}")
    if facts.holds(kind.condition) or not looks:
        if kind.refund and Slip.NO_REFUND not in slips:
            chain.append(f"refund {number}")
        if kind.note and Slip.NO_NOTE not in slips:
            chain.append(f"note {facts.note} {number}")
    elif kind.otherwise and Slip.NO_ELSE not in slips:
        chain.append(f"note {facts.note} {number}")
    if kind.say == "stock" and reports:
        chain.append(f"check_stock {facts.item}")
    return [*chain, f"done {answer(kind, facts) if reports or not kind.say else 'ok'}"]
