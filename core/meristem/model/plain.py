"""Configs as plain values, for JSON and YAML, and back: strict, whatever the dataclass."""

from abc import ABC
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from meristem.errors import require
from meristem.model.config.checks import require_one_of
from meristem.registry import find

ConfigPart = TypeVar("ConfigPart")


def to_json(part: Any) -> Any:
    """A config or part of one as plain values; parts that come in kinds carry theirs.

    The kind is the name of the class, or the name under which an installed package registers it where the base of the
    kinds names a `group` of entry points.
    """
    if is_dataclass(part) and not isinstance(part, type):
        values = {f.name: to_json(getattr(part, f.name)) for f in fields(part)}
        if hasattr(part, "group"):
            return {"kind": part.kind, **values}  # type: ignore[attr-defined]
        return {"kind": type(part).__name__, **values} if _kinds_of(type(part).__mro__[1]) else values
    if isinstance(part, (tuple, list)):
        return [to_json(item) for item in part]
    return part


def from_json(part_type: type[ConfigPart], values: Mapping[str, Any], where: str = "architecture") -> ConfigPart:
    """The config that `to_json` wrote: every field known, every kind known, every value of its type.

    Raises:
        ConfigError: an unknown or missing field, a kind that is unknown or not installed, or a value of the wrong type.
    """
    require(isinstance(values, Mapping), f"{where} must be a mapping", repr(values))
    chosen: Any = part_type
    values = dict(values)
    group = getattr(part_type, "group", None)
    if group is not None or (kinds := _kinds_of(part_type)):
        kind = str(values.pop("kind", None))
        if group is None:
            require(kind in kinds, f"{where}.kind must be one of {', '.join(kinds)}", kind)
        chosen = kinds[kind] if group is None else find(group, kind)
        require(issubclass(chosen, part_type), f"{where} must be a {part_type.__name__}", f"the kind {kind!r}")
    hints = get_type_hints(chosen)
    known = {f.name: f for f in fields(chosen)}
    unknown = sorted(set(values) - set(known))
    require(not unknown, f"{where} takes {', '.join(known)}", ", ".join(unknown))
    needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    require(not missing, f"{where} needs {', '.join(missing)}", "no value")
    return chosen(**{name: _read_value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Put `over` on `base`, key by key; a part of another kind replaces the old one as a whole."""
    for key, value in over.items():
        if not isinstance(value, Mapping):
            base[key] = value
            continue
        kinds = ("kind", "class_path")
        old: Any = base.get(key)
        is_same = isinstance(old, dict) and all(value.get(name, old.get(name)) == old.get(name) for name in kinds)
        base[key] = merge(old if is_same else {}, value)
    return base


def _kinds_of(base: type[Any]) -> dict[str, type[Any]]:
    """Subclasses by name, of a part that comes in kinds."""
    return {kind.__name__: kind for kind in base.__subclasses__()} if ABC in base.__bases__ else {}


def _read_value(hint: Any, value: Any, where: str) -> Any:
    is_union = get_origin(hint) in (Union, UnionType)
    options = [option for option in get_args(hint) if option is not type(None)] if is_union else [hint]
    if value is None:
        require(is_union and type(None) in get_args(hint), f"{where} must be set", "null")
        return None
    chosen = options[0]
    if get_origin(chosen) is tuple:
        require(isinstance(value, (list, tuple)), f"{where} must be a list", repr(value))
        item = get_args(chosen)[0]
        return tuple(_read_value(item, entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if isinstance(chosen, type) and is_dataclass(chosen):
        return from_json(chosen, value, where)
    if chosen in (int, float, bool, str):
        is_number = chosen is float and type(value) is int
        require(type(value) is chosen or is_number, f"{where} must be {chosen.__name__}", repr(value))
        return float(value) if is_number else value
    require_one_of(value, chosen, where)
    return value
