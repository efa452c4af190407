"""What every benchmark writes: one JSON document with machine, versions and seeds, one table, one figure."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

PACKAGES = ("millrace", "torch", "ray", "transformers", "msgspec", "numpy")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "load_average_1m": round(os.getloadavg()[0], 2),
    }


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def document(
    bench: str,
    *,
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    results: Any,
    packages: Iterable[str] = PACKAGES,
) -> dict[str, Any]:
    """The JSON document of a benchmark."""
    return {
        "bench": bench,
        "machine": machine(),
        "versions": versions(packages),
        "seeds": list(seeds),
        "settings": dict(settings),
        "results": results,
    }


def table_console(width: int) -> Console:
    """A console for tables ``width`` characters wide: as wide as a terminal is, but never narrower when piped."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, width))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a document, making its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_figure(path: Path, figure: Any) -> None:
    """Save a matplotlib figure (the suffix chooses the format: ``.svg`` or ``.png``), making its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", dpi=144)
