from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from prefix_fixtures import Sequences, forests

from learner.prefix_tree import ALWAYS, PrefixForest, Sharing, block_table, build_forest

RULES = st.sampled_from([ALWAYS, Sharing(call=6.0, reader=0.1), Sharing(call=1e9)])


def tokens(text: str) -> np.ndarray:
    return np.array([ord(letter) for letter in text], dtype=np.int32)


def visible(forest: PrefixForest) -> np.ndarray:
    """[query, key], from the segments alone."""
    mask = np.zeros((len(forest), len(forest)), dtype=bool)
    for segment in forest.segments:
        length = segment.end - segment.start
        mask[segment.start : segment.end, segment.start : segment.end] = np.tril(np.ones((length, length), bool))
        parent = segment.parent
        while parent >= 0:
            above = forest.segments[parent]
            mask[segment.start : segment.end, above.start : above.end] = True
            parent = above.parent
    return mask


def test_a_group_with_a_prompt() -> None:
    forest = build_forest([tokens("promptabc"), tokens("promptxy"), tokens("promptab")], ALWAYS)
    assert [(s.start, s.end, s.last, s.parent, s.depth) for s in forest.segments] == [
        (0, 6, 11, -1, 0),
        (6, 9, 9, 0, 6),
        (9, 11, 11, 0, 6),
    ]
    assert forest.ends_in == (1, 2, 1)
    np.testing.assert_array_equal(forest.tokens, tokens("promptabcxy"))
    np.testing.assert_array_equal(forest.positions, [0, 1, 2, 3, 4, 5, 6, 7, 8, 6, 7])
    np.testing.assert_array_equal(forest.columns(1, np.array([0, 5, 6, 7])), [0, 5, 9, 10])


@given(sequences=forests(vocabulary=3), sharing=RULES)
def test_every_sequence_can_be_read_off_its_path(sequences: Sequences, sharing: Sharing) -> None:
    forest = build_forest(sequences, sharing)
    mask = visible(forest)
    for index, sequence in enumerate(sequences):
        columns = forest.columns(index, np.arange(len(sequence)))
        np.testing.assert_array_equal(forest.tokens[columns], sequence)
        np.testing.assert_array_equal(forest.positions[columns], np.arange(len(sequence)))
        # Its tokens see one another causally, and nothing else.
        for place, column in enumerate(columns):
            np.testing.assert_array_equal(np.flatnonzero(mask[column]), columns[: place + 1])


@given(sequences=forests(vocabulary=3), sharing=RULES)
def test_the_mask_by_the_end_of_the_readers_is_the_mask_by_segments(sequences: Sequences, sharing: Sharing) -> None:
    forest = build_forest(sequences, sharing)
    query, key = np.arange(len(forest))[:, None], np.arange(len(forest))[None, :]
    np.testing.assert_array_equal((key <= query) & (query < forest.last()[None, :]), visible(forest))


@given(sequences=forests(vocabulary=3))
def test_sharing_always_computes_each_distinct_prefix_once(sequences: Sequences) -> None:
    distinct = {tuple(sequence[: length + 1]) for sequence in sequences for length in range(len(sequence))}
    assert len(build_forest(sequences, ALWAYS)) == len(distinct)


@given(sequences=forests(vocabulary=3), sharing=RULES)
@example(sequences=[tokens("a"), tokens("b")], sharing=ALWAYS)
def test_no_rule_computes_more_than_unshared(sequences: Sequences, sharing: Sharing) -> None:
    assert len(build_forest(sequences, sharing)) <= sum(map(len, sequences))


def test_a_prefix_that_does_not_pay_is_computed_for_each_branch() -> None:
    rule = Sharing(call=10.0)
    short, long = "abc", "abcdefghijklm"
    for prefix, expected in ((short, 2 * 5), (long, 13 + 2 * 2)):
        branches = [tokens(prefix + "xx"), tokens(prefix + "yy")]
        assert len(build_forest(branches, rule)) == expected


def test_a_prefix_within_one_that_does_not_pay_is_still_shared() -> None:
    first = [tokens("-" + "a" * 20 + tail) for tail in ("x", "y")]
    second = [tokens("-" + "b" * 20 + tail) for tail in ("x", "y")]
    forest = build_forest(first + second, Sharing(call=10.0))
    assert [s.parent for s in forest.segments] == [-1, 0, 0, -1, 3, 3]
    assert len(forest) == 2 * (21 + 2)


def test_beginnings_of_others_and_repeats_are_free_under_any_rule() -> None:
    forest = build_forest([tokens("abcd"), tokens("ab"), tokens("abcd"), tokens("abc")], Sharing(call=1e9))
    assert len(forest) == 4
    assert forest.ends_in == (0, 0, 0, 0)


@given(sequences=forests(vocabulary=3), block=st.sampled_from([1, 4, 16]))
def test_blocks_are_those_of_the_dense_mask(sequences: Sequences, block: int) -> None:
    forest = build_forest(sequences, ALWAYS)
    count = -(-len(forest) // block)
    dense = np.zeros((count * block, count * block), dtype=bool)
    dense[: len(forest), : len(forest)] = visible(forest)
    blocks = dense.reshape(count, block, count, block)
    table = block_table(forest.last(), block)
    np.testing.assert_array_equal(table.partial | table.full, blocks.any(axis=(1, 3)))
    # A block on the diagonal is never taken for full, though one of a single pair is.
    off_diagonal = ~np.eye(count, dtype=bool)
    np.testing.assert_array_equal(table.full, blocks.all(axis=(1, 3)) & off_diagonal)


def test_a_long_chain_of_branches_needs_no_deep_recursion() -> None:
    trunk = np.arange(3000, dtype=np.int32)
    turns = [np.append(trunk[: 2 * i + 1], np.int32(10_000 + i)) for i in range(1, 1500)]
    forest = build_forest(turns, ALWAYS)
    assert len(forest) == 2999 + 1499
    path = forest.path(1400)
    assert (len(path), path[-1].end - path[-1].start) == (1402, 1)
