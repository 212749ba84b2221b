"""Says in one line, with file and line, what is wrong with a config."""

import inspect
import re
from dataclasses import fields, is_dataclass
from importlib import import_module

from meristem.cli.config_reader import ReadConfig
from meristem.cli.run_keys import ARCHITECTURE, TOP_KEYS, TRAINER_KEYS, build_task
from meristem.errors import ConfigError
from meristem.registry import installed
from meristem.train.datamodule import DataModule, Split
from meristem.train.optim import OptimizerConfig
from meristem.train.watch import Watch


def placed(error: ConfigError, read: ReadConfig) -> ConfigError:
    """The error with file and line of the key it speaks of."""
    text = str(error)
    for word in re.findall(r"[a-z_]\w*(?:\.\w+)*", text.replace("architecture takes", "architecture")):
        for prefix in ("", "model.", "data.", f"{ARCHITECTURE}.", "model.optimizer."):
            place = _nested(f"{prefix}{word}", "", read)
            if place in read.places and "." in place:
                return ConfigError(f"{read.places[place]}: {text}")
    return error


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
        place = read.place(_nested(key, option, read))
        takes = _parameters_of(class_path) if class_path else TOP_KEYS
        option = option if class_path or key else option.partition(".")[0]
        return f"{place}{option} is no key{f' of {key}' if key else ''}; it takes {takes}"
    if missing := re.search(r"required: (.+)", text):
        return f"{missing.group(1)} must be set (--{missing.group(1).split(',')[0]} VALUE, or in the config)"
    if unknown := re.search(r"unrecognized arguments: (.+)", text):
        option = unknown.group(1).split()[0].removeprefix("--").partition("=")[0]
        parent = option.rpartition(".")[0]
        takes = f"{parent} takes {_keys_of(parent)}" if "." in option else f"keys are {TOP_KEYS}"
        return f"--{option} is no key; {takes}"
    place = read.place(_nested(key, "", read))
    if "Expected a dot import path string" in text:
        named = ", ".join(installed("meristem.objectives"))
        return f"{place}{key} must be one of {named}, or a dotted path to a class; got {text.rpartition(': ')[2]!r}"
    expected = list(dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\. Got value|$)", text, flags=re.MULTILINE)))
    got = re.search(r"Got value: (.+)", text) or re.search(r"Given value: (.+)", text)
    if expected:
        allowed = " or ".join(_plain(kind) for kind in expected)
        return f"{place}{key} must be {allowed}; got {got.group(1) if got else 'something else'}"
    return f"{place}{' '.join(text.split())}"


def _nested(key: str, option: str, read: ReadConfig) -> str:
    """A key as the file has it: classes stand with `init_args`, lists with numbers."""
    wanted = [part for part in f"{key}.{option}".split(".") if part]
    for place in read.places:
        parts = [part for part in place.split(".") if part != "init_args" and not part.isdigit()]
        if parts == wanted:
            return place
    return ".".join(wanted)


def _plain(kind: str) -> str:
    """A type as a user would name it."""
    if literal := re.fullmatch(r"typing\.Literal\[(.+)\]", kind):
        return f"one of {literal.group(1)}"
    named = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
    name = re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", kind)
    return named.get(name, f"a {name}")


def _keys_of(group: str) -> str:
    known = {
        "model": [*inspect.signature(build_task).parameters][:-1],
        "data": [*inspect.signature(DataModule.__init__).parameters][1:-1],
        "trainer": list(TRAINER_KEYS),
        "watch": [f.name for f in fields(Watch)],
        "data.split": [f.name for f in fields(Split)],
        "model.optimizer": [f.name for f in fields(OptimizerConfig)],
    }
    return ", ".join(known.get(group, known.get(group.partition(".")[0], ["model", "data", "trainer", "watch"])))


def _parameters_of(class_path: str) -> str:
    module, _, name = class_path.rpartition(".")
    found = getattr(import_module(module), name)
    if is_dataclass(found):
        return ", ".join(f.name for f in fields(found))
    return ", ".join(list(inspect.signature(found.__init__).parameters)[1:])
