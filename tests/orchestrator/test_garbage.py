from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from orchestrator.garbage import FULL_EVERY_S, RareCollections


@pytest.fixture(autouse=True)
def default_thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


class Node:
    """Something that can be part of a cycle."""

    def __init__(self) -> None:
        self.itself = self


def test_old_cycles_are_collected_when_it_is_time_and_not_before() -> None:
    collections = RareCollections(100.0)
    node = Node()
    gc.collect()  # it is old now
    alive = weakref.ref(node)
    del node
    for _ in range(3):
        gc.collect(1)
    assert not collections.tick(100.0 + FULL_EVERY_S - 1)
    assert alive() is not None
    assert collections.tick(100.0 + FULL_EVERY_S)
    assert alive() is None
    assert not collections.tick(101.0 + FULL_EVERY_S)
