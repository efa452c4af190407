"""Each engine is started once; all tests of the contract use it, one after another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from contract_engine import Engine
from contract_model import write_model

KINDS = [
    "torch",
    pytest.param("vllm", marks=pytest.mark.engines),
    pytest.param("sglang", marks=pytest.mark.engines),
]


@pytest.fixture(scope="session")
def contract_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("contract") / "model")


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=KINDS)
async def engine(request: pytest.FixtureRequest, contract_model: Path) -> AsyncIterator[Engine]:
    made = await Engine.start(request.param, contract_model, contract_model.parent / "logs")
    yield made
    await made.stop()
