"""Says in one line, with file and line, what is wrong with a config."""

import inspect
import re
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, get_type_hints

from meristem.cli.config_reader import ReadConfig
from meristem.registry import installed
from meristem.train.spec import RunSpec


def explain(text: str, read: ReadConfig) -> str:
    """One line out of what jsonargparse says, with file and line where a file has the key."""
    key = ""
    for inner in re.findall(r'Parser key "([^"]+)"', text):
        key = inner if not key or inner.startswith(f"{key}.") else f"{key}.{inner}"
    class_path = (re.findall(r"Problem with given class_path '([^']+)'", text) or [""])[-1]
    if unknown := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        group, option = unknown.groups()
        parent = f"{group}.{option}".rpartition(".")[0]
        return f"{read.place(f'{group}.{option}')}{group}.{option} is no key; {parent} takes {_keys_of(parent)}"
    if unknown := re.search(r"Option '([^']+)' is not accepted", text):
        option = unknown.group(1)
        place = read.place(read.key_in_file(f"{key}.{option}"))
        takes = _keys_of("")
        if class_path:
            module, _, name = class_path.rpartition(".")
            takes = ", ".join([*inspect.signature(getattr(import_module(module), name).__init__).parameters][1:])
        option = option if class_path or key else option.partition(".")[0]
        return f"{place}{option} is no key{f' of {key}' if key else ''}; it takes {takes}"
    if missing := re.search(r"required: (.+)", text):
        if key:
            return f"{read.place(read.key_in_file(key))}{key} needs {missing.group(1)}"
        return f"{missing.group(1)} must be set (--{missing.group(1).split(',')[0]} VALUE, or in the config)"
    place = read.place(read.key_in_file(key))
    if "Expected a dot import path string" in text:
        named = ", ".join(installed("meristem.objectives"))
        return f"{place}{key} must be one of {named}, or a dotted path to a class; got {text.rpartition(': ')[2]!r}"
    expected = list(dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\. Got value|$)", text, flags=re.MULTILINE)))
    got = re.search(r"Got value: (.+)", text) or re.search(r"Given value: (.+)", text)
    if expected:
        allowed = " or ".join(_plain(kind) for kind in expected)
        return f"{place}{key} must be {allowed}; got {got.group(1) if got else 'something else'}"
    return f"{place}{' '.join(text.split())}"


def _plain(kind: str) -> str:
    """A type as a user would name it."""
    if literal := re.fullmatch(r"typing\.Literal\[(.+)\]", kind):
        return f"one of {literal.group(1)}"
    named = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
    name = re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", kind)
    return named.get(name, f"a {name}")


def _keys_of(group: str) -> str:
    """Keys of a part of a config, or of the nearest part around it that has a fixed list of them."""
    kind: Any = RunSpec
    for name in filter(None, group.split(".")):
        inner = get_type_hints(kind).get(name)
        if not is_dataclass(inner):
            break
        kind = inner
    return ", ".join(one.name for one in fields(kind))
