"""Packing samples that share prefixes: what counts is the tokens of the forest, and what shares a prefix stays together."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import partial

from learner.batching import Sample, balance, pack, tokens_of
from learner.packing import Packer
from learner.prefix_tree import Sharing, build_forest, sorted_order


def computed_tokens(samples: Sequence[Sample], sharing: Sharing | None) -> int:
    """Tokens that one pass over these samples runs on."""
    if sharing is None or len(samples) < 2:
        return tokens_of(samples)
    return len(build_forest([sample.inputs for sample in samples], sharing))


def segment_lengths(samples: Sequence[Sample], sharing: Sharing) -> list[int]:
    """Lengths of the runs of tokens that one pass over these samples runs on."""
    return [segment.end - segment.start for segment in build_forest([s.inputs for s in samples], sharing).segments]


def packer_for(sharing: Sharing | None, largest: int | None = None) -> Packer[Sample]:
    """How samples are packed where their prefixes are shared in this way; None: not at all. ``largest``: see `pack_shared`."""
    if sharing is None:
        return Packer(pack, balance)
    return Packer(
        pack=partial(pack_shared, sharing=sharing, largest=largest),
        balance=partial(balance_shared, sharing=sharing),
        lengths=partial(segment_lengths, sharing=sharing),
    )


def families(samples: Sequence[Sample], sharing: Sharing, limit: int) -> list[list[Sample]]:
    """Samples that share a prefix, in families of at most ``limit`` computed tokens (or one longer sample alone).

    A family that is larger is cut where its members, in lexicographic order, have filled the limit: members that are next to
    each other share the most.
    """
    found: list[list[Sample]] = []
    inputs = [sample.inputs for sample in samples]
    forest = build_forest(inputs, sharing)
    root: int | None = None
    for index in sorted_order(inputs):
        mine = forest.path(index)[0].start
        if mine != root:
            found.append([])
            root = mine
        found[-1].append(samples[index])
    return [run for family in found for run in _runs(family, sharing, limit)]


def _runs(family: list[Sample], sharing: Sharing, limit: int) -> list[list[Sample]]:
    runs = []
    while family:
        count = _most(family, sharing, limit)
        runs.append(family[:count])
        family = family[count:]
    return runs


def _most(family: list[Sample], sharing: Sharing, limit: int) -> int:
    """How many from the front fit (at least one), by bisection: more members never compute fewer tokens."""
    fits, too_many = 1, len(family) + 1
    while too_many - fits > 1:
        middle = len(family) if too_many > len(family) else (fits + too_many) // 2
        if computed_tokens(family[:middle], sharing) <= limit:
            fits = middle
        else:
            too_many = middle
    return fits


def pack_shared(
    samples: Sequence[Sample], token_budget: int, sharing: Sharing | None, largest: int | None = None
) -> list[list[Sample]]:
    """As `batching.pack`, with families kept together; ``sharing=None`` is `batching.pack`.

    A family of more than ``token_budget`` computed tokens runs alone, and is cut only if it has more than ``largest`` (None:
    ``token_budget``): every cut computes its prefix once more.
    """
    if sharing is None:
        return pack(samples, token_budget)
    limit = max(token_budget, largest or 0)
    sized = [(computed_tokens(family, sharing), family) for family in families(samples, sharing, limit)]
    bins: list[list[Sample]] = []
    room: list[int] = []
    for size, family in sorted(sized, key=lambda item: item[0], reverse=True):
        index = next((i for i, left in enumerate(room) if left >= size), len(bins))
        if index == len(bins):
            bins.append([])
            room.append(token_budget)
        bins[index].extend(family)
        room[index] -= size
    return [sorted(members, key=len, reverse=True) for members in bins]


def balance_shared(samples: Sequence[Sample], count: int, sharing: Sharing | None) -> list[list[Sample]]:
    """As `batching.balance`, in computed tokens; ``sharing=None`` is `batching.balance`.

    Whole families go to the emptiest bin, the largest first. As long as that leaves a bin over the mean, single samples then
    move from the fullest to the emptiest while it helps, though each of them takes a copy of its prefix along.
    """
    if sharing is None:
        return balance(samples, count)
    bins: list[list[Sample]] = [[] for _ in range(count)]
    if not samples:
        return bins
    limit = -(-computed_tokens(samples, sharing) // count)
    sized = [(computed_tokens(family, sharing), family) for family in families(samples, sharing, limit)]
    loads = [(0, index) for index in range(count)]
    for size, family in sorted(sized, key=lambda item: item[0], reverse=True):
        load, index = heapq.heappop(loads)
        bins[index].extend(family)
        heapq.heappush(loads, (load + size, index))
    _even_out(bins, sharing)
    return [sorted(members, key=len, reverse=True) for members in bins]


TOLERATED = 0.02
"""Load of the fullest bin over the mean that is left as it is."""


def _even_out(bins: list[list[Sample]], sharing: Sharing) -> None:
    """Move samples from the fullest bin to the emptiest, as long as the fuller of the two gets smaller by it."""
    loads = [computed_tokens(members, sharing) for members in bins]
    for _ in range(4 * len(bins)):
        full, empty = loads.index(max(loads)), loads.index(min(loads))
        if len(bins[full]) < 2 or loads[full] <= sum(loads) / len(loads) * (1 + TOLERATED):
            return
        moved = _best_move(bins[full], bins[empty], loads[full], sharing)
        if moved is None:
            return
        bins[empty].append(bins[full].pop(moved))
        loads[full], loads[empty] = computed_tokens(bins[full], sharing), computed_tokens(bins[empty], sharing)


MOST_TRIED = 8
"""Samples of a bin that are considered for a move, spread over its lengths."""


def _best_move(full: list[Sample], empty: list[Sample], load: int, sharing: Sharing) -> int | None:
    """Which sample to move so that the fuller of the two bins is left with the least; None if none helps."""
    order = sorted(range(len(full)), key=lambda index: len(full[index]))
    tried = order[:: -(-len(order) // MOST_TRIED)]
    outcomes = []
    for index in tried:
        without = full[:index] + full[index + 1 :]
        after = max(computed_tokens(without, sharing), computed_tokens([*empty, full[index]], sharing))
        outcomes.append((after, index))
    after, index = min(outcomes)
    return index if after < load else None
