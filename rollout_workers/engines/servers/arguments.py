"""A server's command line from settings: defaults, the user's own arguments, and those that Millrace keeps for itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def check_arguments(key: str, args: Mapping[str, Any], owned: Mapping[str, str]) -> None:
    """Raise ValueError for pass-through arguments that Millrace sets itself.

    ``key`` is where they stand in the configuration (``engines.vllm.args``); ``owned`` gives the reason by name, with
    underscores.
    """
    for name in args:
        plain = normal(name)
        if not plain.replace("_", "").isalnum():
            raise ValueError(f"{key}: {name!r} is no argument name; write it as max_model_len or max-model-len")
        if plain in owned:
            raise ValueError(f"{key}.{name}: {owned[plain]}")


def merged(defaults: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with the user's arguments over them, by names with underscores; None and False leave one out."""
    return {normal(name): value for name, value in defaults.items()} | {
        normal(name): value for name, value in args.items()
    }


def to_command(args: Mapping[str, Any], *, lists_as_words: bool = False) -> list[str]:
    """``{"max_len": 5, "eager": True, "off": None}`` becomes ``["--max-len", "5", "--eager"]``.

    True is a flag, None and False are left out, mappings and lists travel as JSON. With ``lists_as_words`` a list
    becomes several words after its flag, for servers that read lists so.
    """
    words: list[str] = []
    for name, value in args.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is True:
            continue
        if isinstance(value, list | tuple) and lists_as_words:
            words.extend(str(item) for item in value)
        elif isinstance(value, Mapping | list | tuple):
            words.append(json.dumps(value, separators=(",", ":")))
        else:
            words.append(str(value))
    return words


def normal(name: str) -> str:
    """An argument's name with underscores and without leading dashes."""
    return name.lstrip("-").replace("-", "_")
