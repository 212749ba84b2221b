"""Options of the command line that are the fields of a dataclass."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from meristem.cli.tokenizer_options import as_flag
from meristem.errors import ConfigError


def add_options(parser: argparse.ArgumentParser, options: type, title: str, but: Sequence[str] = ()) -> None:
    """Add a group with an option for each field of a dataclass, named like the field, with dashes.

    Args:
        options: a dataclass whose fields have defaults and metadata `help`; types as `Scorer.options` lists them.
        but: fields that get no option here.

    Raises:
        ConfigError: a field has no default or another type, or the parser has an option of its name.
    """
    group = parser.add_argument_group(title)
    hints = get_type_hints(options)
    for field in (one for one in fields(options) if one.name not in but):
        how = _kind_of(hints[field.name])
        if how is None or field.default is MISSING:
            raise ConfigError(
                f"{options.__name__}.{field.name} must have a default and be a bool, int, float, str or a Literal of "
                f"strings, or one of them or None; got {hints[field.name]}"
            )
        try:
            group.add_argument(
                as_flag(field.name), default=field.default, dest=field.name, help=field.metadata.get("help"), **how
            )
        except argparse.ArgumentError as error:
            raise ConfigError(f"{options.__name__}.{field.name} needs another name: {error.message}") from error


def options_of(args: argparse.Namespace, options: type) -> Any:
    """The dataclass with the values that were given.

    Raises:
        ConfigError: the dataclass refuses them.
    """
    return options(**{field.name: getattr(args, field.name) for field in fields(options)})


def flags_of(options: type) -> list[str]:
    """The options of the command line that a dataclass stands for."""
    return [as_flag(field.name) for field in fields(options)]


def _kind_of(hint: Any) -> dict[str, Any] | None:
    """How argparse reads a value of a type; None for a type that it does not."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    is_union = get_origin(hint) in (Union, UnionType)
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if is_union else [hint]
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        return {"choices": get_args(kinds[0])}
    if len(kinds) == 1 and kinds[0] in (int, float, str):
        return {"type": kinds[0], "metavar": kinds[0].__name__.upper()}
    return None
