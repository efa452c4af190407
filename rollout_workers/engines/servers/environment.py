"""The Python environment that a server runs in: where it is, and whether it holds what the adapter was written for."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from rollout_workers.engines.servers.adapter import ServerAdapter, ServerIdentity
from rollout_workers.engines.servers.errors import EnvironmentUnfit

ROOT = Path(__file__).resolve().parents[3]
"""Where the repository's environments are, and what a server has on its PYTHONPATH for the weight plugin."""

PROBE_S = 60.0

_PROBE = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        continue
print(json.dumps(found))
"""


def interpreter_of(kind: str, configured: str | None) -> Path:
    """The interpreter of the environment for ``kind``; ``configured`` is `engines.KIND.python`.

    Raises EnvironmentUnfit if there is none.
    """
    path = Path(configured).expanduser() if configured else ROOT / f".venv-{kind}" / "bin" / "python"
    if not path.exists():
        told = f"engines.{kind}.python={configured}: there is no such file" if configured else f"{path} does not exist"
        raise EnvironmentUnfit(
            f"no environment for {kind}: {told}; run `make engines`, or set engines.{kind}.python to an interpreter that "
            f"has {kind}"
        )
    return path


async def check_environment(python: Path, adapter: ServerAdapter) -> str:
    """The version of the engine that ``python`` would run. Raises EnvironmentUnfit unless it is the expected one."""
    try:
        run = await asyncio.to_thread(
            subprocess.run,
            [str(python), "-I", "-c", _PROBE, *adapter.distributions],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentUnfit(f"{python} did not tell within {PROBE_S:.0f} s which {adapter.name} it has") from None
    except OSError as error:
        raise EnvironmentUnfit(f"{python} cannot be run: {error}") from None
    try:
        found: Mapping[str, str] = json.loads(run.stdout)
    except ValueError:
        told = (run.stderr.strip().splitlines() or ["it wrote nothing that can be read"])[-1][-300:]
        raise EnvironmentUnfit(f"{python} is not a Python that can run {adapter.name}: {told}") from None
    return judge_version(adapter, found, str(python))


def judge_version(adapter: ServerAdapter, found: Mapping[str, str], where: str) -> str:
    """The installed version among ``found`` (distribution -> version). Raises EnvironmentUnfit unless it is expected."""
    if not found:
        raise EnvironmentUnfit(
            f"{where} has no {' or '.join(adapter.distributions)}; run `make engines`, which installs {adapter.name} "
            f"{adapter.expected_version}"
        )
    for version in found.values():
        if same_release(version, adapter.expected_version):
            return version
    name, version = next(iter(found.items()))
    raise EnvironmentUnfit(
        f"{where} has {name} {version}, and Millrace drives {adapter.name} {adapter.expected_version}; run `make engines`"
    )


def judge_identity(adapter: ServerAdapter, identity: ServerIdentity, url: str, max_len: int) -> None:
    """Raises EnvironmentUnfit unless a running server is of the expected version and long enough."""
    if identity.version is not None and not same_release(identity.version, adapter.expected_version):
        raise EnvironmentUnfit(
            f"the server at {url} is {adapter.name} {identity.version}, and Millrace drives {adapter.name} "
            f"{adapter.expected_version}; start that version, or let Millrace start it (engines.{adapter.name}.urls=[])"
        )
    if identity.max_len is not None and identity.max_len < max_len:
        raise EnvironmentUnfit(
            f"the server at {url} holds sequences of at most {identity.max_len} tokens, and engines.max_len={max_len}: "
            f"lower that, or start the server with a longer context and more KV"
        )


def same_release(version: str, expected: str) -> bool:
    """Whether two versions agree up to local and post-release parts (``0.32.0+cpu`` is ``0.32.0``)."""
    return _release(version) == _release(expected)


def _release(version: str) -> str:
    match = re.match(r"v?(\d+(?:\.\d+)*(?:(?:a|b|rc)\d+)?)", version.strip())
    return match.group(1) if match else version
