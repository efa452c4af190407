"""Running episodes. A rollout loop needs one name of this package: ``Episode``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollout_workers.episode import Episode

__all__ = ["Episode"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the configuration imports this package too, and needs none of it.
    if name == "Episode":
        from rollout_workers.episode import Episode

        return Episode
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
