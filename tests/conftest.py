"""Shared by all tests: one thread per process, and a local Ray cluster for the modules that ask for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says nothing about the code when other processes want the cores. The same examples every time;
# `pytest --hypothesis-profile=explore` looks at others.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("millrace", settings.get_profile("explore"), derandomize=True)
settings.load_profile("millrace")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TERM"] = "xterm-256color"  # what is shown must not depend on the terminal that the tests run in
for variable in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
    os.environ.pop(variable, None)


@pytest.fixture(scope="module")
def ray_local() -> Iterator[None]:
    """A Ray cluster of this machine's own, whatever else runs on it. Others start theirs: it ends with its module."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()
