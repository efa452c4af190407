from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from megatron_fixtures import ARCHITECTURES, Ranks, make_model_of

TESTS = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Its processes can import what these tests hand to them."""
    known = [str(TESTS.parent), str(TESTS / "learner"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(known))
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def two(cluster: None) -> Ranks:
    return Ranks(2)


@pytest.fixture(scope="module")
def four(cluster: None) -> Ranks:
    return Ranks(4)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each architecture."""
    return {name: make_model_of(name, tmp_path_factory.mktemp(name)) for name in ARCHITECTURES}
