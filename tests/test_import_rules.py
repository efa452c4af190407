"""The folders import only downwards, and processes that need no torch do not load it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIGHT_MODULES = [
    "experience.queue",
    "experience.wire",
    "env_pool.actor",
    "env_pool.pool",
    "env_pool.shop",
    "env_pool.rewards",
    "weight_sync.membership",
    "rollout_workers",
    "rollout_workers.worker",
    "rollout_workers.engines.actor",
    "rollout_workers.engines.protocol",
    "rollout_workers.engines.servers.actor",
    "learner.actor",
    "learner.config",
    "orchestrator.config",
    "orchestrator.controller",
    "orchestrator.dispatcher",
    "orchestrator.view",
    "orchestrator.show",
    "orchestrator.plan",
    "orchestrator.telemetry",
    "orchestrator.cli",
]


def test_import_contracts_hold() -> None:
    command = Path(sysconfig.get_path("scripts")) / "lint-imports"
    result = subprocess.run(
        [str(command), "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Contracts: 2 kept, 0 broken" in result.stdout


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_module_loads_without_torch(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'tensorflow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
