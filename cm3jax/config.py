"""Configuration: a mutable mapping at the door, one frozen nested dataclass inside.

A config file holds `get_config(arg) -> ml_collections.ConfigDict`; `build` turns it into the dataclass that the
program uses. Unknown keys and wrong types are errors that name the key, the value and the nearest field.
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names key, value and what was expected."""


def build(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Builds the frozen dataclass `cls` from nested mappings.

    Raises:
      ConfigError: unknown or missing key, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.4)
            hint = f"; did you mean {path}{near[0]}?" if near else f"; known keys: {', '.join(sorted(fields))}"
            raise ConfigError(f"unknown config key {path}{key}{hint}")
    built = {}
    for name, field in fields.items():
        if name in values:
            built[name] = _convert(hints[name], values[name], f"{path}{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing config key {path}{name} ({_type_name(hints[name])})")
    try:
        return cls(**built)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config {path.rstrip('.') or cls.__name__}: {error}") from error


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        failures = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _convert(option, value, path)
            except ConfigError as error:
                failures.append(error)
        raise failures[0]
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"config {path}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ConfigError(f"config {path}: expected a group of keys, found {value!r}")
        return build(kind, dict(value.items()), f"{path}.")
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ConfigError(f"config {path}: expected a tuple, found {value!r}")
        items = tuple(value)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(items))
        if len(items) != len(args):
            raise ConfigError(f"config {path}: expected {len(args)} items, found {value!r}")
        return tuple(_convert(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, items, strict=True)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float, str, bool) and type(value) is not kind:
        raise ConfigError(f"config {path}: expected {kind.__name__}, found {value!r} ({type(value).__name__})")
    return value


def _type_name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def to_dict(config: Any) -> Any:
    """The dataclass as plain JSON values, tuples as lists."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, list | tuple):
        return [to_dict(v) for v in config]
    return config


def fingerprint(config: Any) -> str:
    """Sixteen hex digits that change when any value of the config (dataclass or JSON value) changes."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dumps(config: Any) -> str:
    """Readable JSON of the resolved config, with its fingerprint."""
    return json.dumps({"fingerprint": fingerprint(config), "config": to_dict(config)}, indent=2) + "\n"
