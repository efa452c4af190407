from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_sync.errors import WeightTransferError
from weight_sync.plan import ALIGNMENT, ITEM_SIZES, Bucket, make_plan

shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
tensor_lists = st.lists(st.tuples(shapes, st.sampled_from(sorted(ITEM_SIZES))), max_size=25).map(
    lambda items: [(f"layer.{i}", shape, dtype) for i, (shape, dtype) in enumerate(items)]
)


@given(tensors=tensor_lists, bucket_bytes=st.integers(1, 100_000))
def test_every_tensor_lies_whole_and_aligned_in_one_bucket(
    tensors: list[tuple[str, tuple[int, ...], str]], bucket_bytes: int
) -> None:
    plan = make_plan(3, tensors, bucket_bytes)
    plan.check()
    assert [(s.name, s.shape, s.dtype) for s in plan.tensors] == tensors
    assert all(s.offset % ALIGNMENT == 0 for s in plan.tensors)
    assert sum(b.nbytes for b in plan.buckets) == plan.total_bytes
    for bucket in plan.buckets:
        assert bucket.last - bucket.first == 1 or bucket.nbytes <= bucket_bytes + ALIGNMENT


def test_layout_of_a_known_list() -> None:
    plan = make_plan(7, [("a", (4, 4), "float32"), ("b", (3,), "bfloat16"), ("c", (1000,), "float32")], 256)
    assert [(s.offset, s.nbytes) for s in plan.tensors] == [(0, 64), (64, 6), (128, 4000)]
    assert plan.buckets == (Bucket(0, 128, 0, 2), Bucket(128, 4160, 2, 3))
    assert plan.largest_bucket == 4032


def test_a_dtype_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(WeightTransferError, match="tensor w has dtype complex64"):
        make_plan(0, [("w", (2,), "complex64")], 64)


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(WeightTransferError, match="w was given twice"):
        make_plan(0, [("w", (2,), "float32"), ("w", (2,), "float32")], 64)


@pytest.mark.parametrize(
    "change",
    [
        {"total_bytes": 10_000},
        {"buckets": ()},
        {"buckets": (Bucket(0, 64, 0, 2), Bucket(64, 4160, 2, 3))},
        {"checksums": (1, 2)},
    ],
)
def test_a_contradictory_manifest_is_refused(change: dict[str, object]) -> None:
    plan = make_plan(7, [("a", (4, 4), "float32"), ("b", (3,), "bfloat16"), ("c", (1000,), "float32")], 256)
    with pytest.raises(WeightTransferError, match="manifest of version 7"):
        msgspec.structs.replace(plan, **change).check()


def test_a_tensor_whose_size_does_not_match_its_shape_is_refused() -> None:
    plan = make_plan(7, [("a", (4, 4), "float32")], 256)
    grown = msgspec.structs.replace(plan.tensors[0], shape=(400, 4))
    with pytest.raises(WeightTransferError, match="tensor a has a wrong place or size"):
        msgspec.structs.replace(plan, tensors=(grown,)).check()
