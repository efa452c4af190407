"""Gates that a test closes and opens: code that comes to a closed one waits there."""

from __future__ import annotations

import os
import time
from pathlib import Path

DIRECTORY = "MILLRACE_TEST_GATES"


def wait_at(name: str) -> None:
    """Until the file ``name`` is gone from the directory that the environment variable names."""
    gate = Path(os.environ[DIRECTORY]) / name
    while gate.exists():
        time.sleep(0.02)
