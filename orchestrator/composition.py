"""Composing a typed configuration from YAML files and dotted overrides.

Layers apply left to right: each file's ``defaults`` first (depth first), then the file, then the overrides. A later
layer wins; mappings merge, lists are replaced. The schema is any plain dataclass; what its keys mean is not known here.

Every error is a :class:`ConfigError` that says where (file and line, or the override), which key, and what would be
right.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

ConfigType = TypeVar("ConfigType")

ENVIRONMENT_REFERENCE = "${oc.env:"
"""What a value read from an environment variable starts with; such a value is written back as the reference."""


class ConfigError(ValueError):
    """A configuration that cannot be used. The message is complete: show it without a traceback."""


@dataclass(frozen=True)
class Origin:
    """Where a key got its value: the layer's position (later wins) and words that name the place."""

    layer: int
    where: str


@dataclass(frozen=True)
class Composed(Generic[ConfigType]):
    """A composed configuration, where each key that was set came from, and which values are environment variables."""

    config: ConfigType
    origins: dict[str, Origin]
    references: dict[str, str]


@dataclass(frozen=True)
class _Layer:
    where: str
    values: dict[str, Any]
    lines: Mapping[str, int]

    def place(self, key: str) -> str:
        """The file and, where known, the line of a dotted key or of its nearest parent."""
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            line = self.lines.get(".".join(parts[:end]))
            if line is not None:
                return f"{self.where}:{line}"
        return self.where


def compose(schema: type[ConfigType], paths: Sequence[str], overrides: Sequence[str]) -> Composed[ConfigType]:
    """Compose ``paths`` and ``overrides`` over the defaults of the dataclass ``schema``.

    Args:
        schema: A dataclass that OmegaConf accepts as a structured config, with a default for every field.
        paths: YAML files, or bare names of packaged ones (``quickstart``).
        overrides: ``key.path=value`` strings; the value is YAML.

    Raises:
        ConfigError: A file is missing or not YAML, a key is unknown, or a value has the wrong type.
    """
    merged: DictConfig = OmegaConf.structured(schema)
    origins: dict[str, Origin] = {}
    layers = [layer for path in paths for layer in _file_layers(locate(path), ())]
    for position, layer in enumerate(layers):
        for key, _value in leaves(layer.values):
            check_key(schema, key, layer.place(key))
            origins[key] = Origin(position, layer.place(key))
        try:
            merged = OmegaConf.merge(merged, layer.values)  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            raise _refused(layer.place(str(error.full_key or "")), error) from None
    for override in overrides:
        key, value = parse_override(override)
        where = f"override {override!r}"
        for leaf, _value in leaves(value, key):
            check_key(schema, leaf, where)
            origins[leaf] = Origin(len(layers), where)
        try:
            OmegaConf.update(merged, key, value, merge=True)
        except (OmegaConfBaseException, IndexError, TypeError, ValueError) as error:
            raise _refused(where, error, key) from None
    return _resolved(merged, origins)


def _resolved(merged: DictConfig, origins: dict[str, Origin]) -> Composed[Any]:
    raw = OmegaConf.to_container(merged, resolve=False)
    references = {key: value for key, value in leaves(raw) if isinstance(value, str) and ENVIRONMENT_REFERENCE in value}
    try:
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        origin = origins.get(key)
        raise _refused(origin.where if origin else "config", error) from None
    return Composed(config, origins, references)


def _refused(where: str, error: Exception, key: str = "") -> ConfigError:
    reason = str(getattr(error, "msg", None) or error).strip().split("\n")[0]
    if "is not a ListConfig" in reason:
        reason = "must be a list, written [first,second]"
    full_key = key or str(getattr(error, "full_key", "") or "")
    return ConfigError(f"{where}: {full_key}: {reason}" if full_key else f"{where}: {reason}")


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``(dotted key, value)`` for every value that is not itself a non-empty mapping or list."""
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from leaves(child, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value:
        for index, child in enumerate(value):
            yield from leaves(child, f"{prefix}.{index}")
    elif prefix:
        yield prefix, value


# --- files ----------------------------------------------------------------------------------------------------------


def packaged_names() -> list[str]:
    """The bare names of the configurations that come with Millrace."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files("configs").iterdir()
        if entry.name.endswith(".yaml")
    )


def locate(name: str) -> Path:
    """The file that a command-line argument means: a path, or the bare name of a packaged configuration."""
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(
            f"{name} is a directory, not a config file; for the config of a run give {path / 'config.yaml'}"
        )
    bare = len(path.parts) == 1 and path.suffix in ("", ".yaml")
    if bare and path.stem in packaged_names():
        return Path(str(resources.files("configs"))) / f"{path.stem}.yaml"
    packaged = Path(str(resources.files("configs"))) / f"{name.removesuffix('.yaml')}.yaml"
    if len(path.parts) == 2 and path.parts[0] == "objectives" and packaged.is_file():
        return packaged
    near = difflib.get_close_matches(path.stem, packaged_names(), n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}? " if near and bare else ""
    raise ConfigError(
        f"config file {name!r} does not exist; {hint}packaged configs: {', '.join(packaged_names()) or 'none'} "
        "(to set a key write key.path=value)"
    )


def _file_layers(path: Path, parents: tuple[Path, ...]) -> list[_Layer]:
    """The layers of one file: those of its ``defaults`` and then its own."""
    resolved = path.resolve()
    if resolved in parents:
        chain = " -> ".join(str(p.name) for p in (*parents, resolved))
        raise ConfigError(f"{path}: defaults form a cycle: {chain}; remove one of these entries")
    values, lines = _read(path)
    defaults = values.pop("defaults", [])
    place = f"{path}:{lines.get('defaults', 1)}"
    if not isinstance(defaults, list) or not all(isinstance(entry, str) for entry in defaults):
        raise ConfigError(
            f"{place}: defaults must be a list of file names, such as [quickstart.yaml], got {defaults!r}"
        )
    layers: list[_Layer] = []
    for entry in defaults:
        layers += _file_layers(_default_path(path, entry, place), (*parents, resolved))
    return [*layers, _Layer(str(path), values, lines)]


def _default_path(path: Path, entry: str, place: str) -> Path:
    for candidate in (path.parent / entry, path.parent / f"{entry}.yaml"):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"{place}: defaults names {entry!r}, but {path.parent / entry} does not exist")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The values of a YAML file and the line (from 1) of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if root is not None else {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem or error}") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path}: not a valid config: {str(error).splitlines()[0]}") from None
    if not isinstance(root, yaml.MappingNode | None) or not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, such as 'seed: 0'")
    return {str(key): value for key, value in values.items()}, dict(_lines(root))


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
            yield key, key_node.start_mark.line + 1
            yield from _lines(value_node, key)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield f"{prefix}.{index}", child.start_mark.line + 1
            yield from _lines(child, f"{prefix}.{index}")


# --- overrides and keys ---------------------------------------------------------------------------------------------


def parse_override(override: str) -> tuple[str, Any]:
    """``key.path=value`` as the dotted key and the YAML value."""
    key, equals, text = override.partition("=")
    key = key.strip().replace("[", ".").replace("]", "")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write key.path=value, such as run.steps=100")
    try:
        # Hugging Face style numbers such as 1e-4 are floats for OmegaConf's loader, strings for plain YAML.
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {str(error).splitlines()[0]}") from None
    assert isinstance(parsed, dict)
    return key, parsed["value"]


def check_key(schema: type[Any], key: str, where: str) -> None:
    """Refuse a dotted key that the dataclass ``schema`` does not have, naming the nearest one that it has."""
    kind: Any = schema
    walked: list[str] = []
    for part in key.split("."):
        kind = _without_none(kind)
        if dataclasses.is_dataclass(kind):
            hints = get_type_hints(kind)
            names = [field.name for field in dataclasses.fields(kind)]
            if part not in names:
                raise ConfigError(f"{where}: {_unknown('.'.join([*walked, part]), part, walked, names, schema)}")
            kind = hints[part]
        elif get_origin(kind) in (list, dict):
            kind = get_args(kind)[-1]
        elif kind is not Any:
            raise ConfigError(
                f"{where}: {'.'.join(walked)} is a single value ({_type_name(kind)}); it has no key {part!r}"
            )
        walked.append(part)


def _unknown(full: str, part: str, walked: list[str], names: list[str], schema: type[Any]) -> str:
    parent = ".".join(walked)
    near = difflib.get_close_matches(part, names, n=1, cutoff=0.6)
    elsewhere = [key for key in schema_keys(schema) if key.rsplit(".", 1)[-1] == part]
    if near or elsewhere:
        best = f"{parent}.{near[0]}" if near and parent else near[0] if near else elsewhere[0]
        return f"unknown key {full!r}; did you mean {best!r}?"
    return f"unknown key {full!r}; {parent or 'the config'} has: {', '.join(names)}"


def schema_keys(schema: type[Any], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a dataclass and of the dataclasses inside it."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key = f"{prefix}.{field.name}" if prefix else field.name
        yield key
        kind = _without_none(hints[field.name])
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from schema_keys(kind, key)


def _without_none(kind: Any) -> Any:
    """``Optional[X]`` as ``X``."""
    if get_origin(kind) is Union or type(kind).__name__ == "UnionType":
        options = [option for option in get_args(kind) if option is not type(None)]
        return options[0] if len(options) == 1 else Any
    return kind


def _type_name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))
