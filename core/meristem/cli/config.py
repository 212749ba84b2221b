"""`meristem config --print [--config FILE]`: every key of a config, with its type, its default and its help."""

import argparse
import inspect
import json
import re
from abc import ABC
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from shutil import get_terminal_size
from textwrap import fill
from typing import Any, get_type_hints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--print", action="store_true", required=True, help="list every key")
    parser.add_argument(
        "--config", metavar="FILE", help="show the values of this config, and the arguments of its objective, as well"
    )


def run(args: argparse.Namespace) -> int:
    from meristem.cli.run_config import parse
    from meristem.model.config import TransformerConfig
    from meristem.train.spec import RunSpec

    spec = parse(["--config", args.config]) if args.config else None
    width = get_terminal_size().columns
    for key, kind, default, text in (*_keys(RunSpec, "", spec), *_keys(TransformerConfig, "model.architecture.", None)):
        if not key:
            print(f"\n{fill(text, width)}")
            continue
        print(fill(f"{key}: {kind}, {default}", width, initial_indent="  ", subsequent_indent=" " * 4))
        print(fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return 0


def _keys(kind: type, prefix: str, value: Any) -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and help of each field of a dataclass and of the dataclasses in it.

    Each dataclass begins with a line of its own, without a key.

    Args:
        value: of that class; None where no config is shown.
    """
    from docstring_parser import parse

    from meristem.objectives.objective import Objective
    from meristem.train.spec import plain

    hints, text = get_type_hints(kind), parse(kind.__doc__ or "")
    helps = {one.arg_name: " ".join((one.description or "").split()) for one in text.params}
    yield "", "", "", f"{prefix.removesuffix('.') or 'a config'}: {text.short_description}"
    inner = []
    for one in fields(kind):
        given = getattr(value, one.name, None)
        hint = hints[one.name]
        if isinstance(hint, type) and is_dataclass(hint) and ABC not in hint.__bases__:
            inner.append((hint, f"{prefix}{one.name}.", given))
            continue
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        said = "required" if default is MISSING else f"default {_shown(default)}"
        if value is not None and given != default and not isinstance(given, Objective):
            said += f", here {_shown(plain(given))}"
        yield f"{prefix}{one.name}", _type(hint), said, helps.get(one.name, "")
        if isinstance(given, Objective):
            yield from _arguments(given, f"{prefix}{one.name}.init_args.")
    for part in inner:
        yield from _keys(*part)


def _arguments(objective: Any, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and help of each argument of an objective."""
    from docstring_parser import parse

    from meristem.train.spec import plain

    helps = {one.arg_name: one.description or "" for one in parse(type(objective).__doc__ or "").params}
    parameters = inspect.signature(type(objective).__init__).parameters
    for name, given in objective.arguments.items():
        parameter = parameters[name]
        is_required = parameter.default is parameter.empty
        said = "required" if is_required else f"default {_shown(plain(parameter.default))}"
        if is_required or given != parameter.default:
            said += f", here {_shown(plain(given))}"
        yield f"{prefix}{name}", _type(parameter.annotation), said, " ".join(helps.get(name, "").split())


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def _type(hint: Any) -> str:
    """A type as a user would name it."""
    if ABC in getattr(hint, "__bases__", ()):
        return f"kind {' | '.join(kind.__name__ for kind in hint.__subclasses__())}"
    named = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
    return re.sub(r"typing\.|\b[a-z_]\w*(?:\.\w+)*\.(?=[A-Z])", "", named).replace("NoneType", "None")
