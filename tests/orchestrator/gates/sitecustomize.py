"""Read by every Python process of a run that has this folder on its path: gates in Millrace's own parts, see `gate`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from gate import wait_at

GATED = {
    "weight_sync.transports.select": ("AnyReceiver", "fetch", "transfer"),
    "learner.learner": ("Learner", "finish_save", "saving"),
}
TRAINING = ("Learner", "finish_step", "training")


class GateFinder:
    """Puts the gates into modules as they are imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in GATED:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            put_gate(module, *GATED[name])
            if name == "learner.learner":
                put_gate(module, *TRAINING)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def put_gate(module: ModuleType, kind: str, method: str, name: str) -> None:
    """``kind.method`` of the module waits at the gate ``name`` first."""
    owner = getattr(module, kind)
    original = getattr(owner, method)

    def gated(*args: Any, **kwargs: Any) -> Any:
        wait_at(name)
        return original(*args, **kwargs)

    setattr(owner, method, gated)


sys.meta_path.insert(0, GateFinder())  # type: ignore[arg-type]
