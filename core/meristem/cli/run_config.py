"""The config of a run: files and arguments, put together and read as a `RunSpec`."""

import argparse
import inspect
import re
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from meristem.cli.config_reader import NumberLoader, ReadConfig, read_configs
from meristem.cli.configs import find_config
from meristem.errors import ConfigError
from meristem.model.plain import merge
from meristem.objectives.objective import Objective
from meristem.registry import GROUPS, find, find_all, installed
from meristem.train.run_directory import RunDirectory
from meristem.train.spec import RunSpec, values_of
from meristem.train.suite import Suite

GROUP, OBJECTIVE = "meristem.objectives", "model.objective"
SUITES = "meristem.suites"
BASES: dict[str, type] = {GROUP: Objective, SUITES: Suite}
"""The base class that every class offered in a group of entry points must have, by group."""


def parse(argv: list[str]) -> RunSpec | None:
    """The run that arguments say; None where help or the config was asked for, which is then printed.

    Raises:
        ConfigError: with file and line of the key, where a file has it.
    """
    read = read_arguments(argv)
    if read is None:
        return None
    with read.placing():
        return spec_of(read)


def read_arguments(argv: list[str], verb: argparse.ArgumentParser | None = None) -> ReadConfig | None:
    """The values of config files with those of `--key.sub VALUE` over them; None as in `parse`.

    Args:
        verb: has the name, the line and the example that help shows.
    """
    if asked_help := _asked_help(argv):
        find_all(GROUP)  # help lists the classes that are imported
        run_parser(verb).parse_args(asked_help)
    words = [word for word in argv if word != "--print_config"]
    names, overrides = _sorted(words)
    paths = [find_config(name) for name in names]
    read = read_configs(paths, _tidy)
    for key, text in overrides:
        read.places[key] = ""
        merge(read.values, _nested(key, text))
    if paths and not read.values.get("run_dir"):
        read.values["run_dir"] = f"runs/{paths[-1].stem}"
    if len(words) == len(argv):
        return read
    with read.placing():
        print(yaml.safe_dump(values_of(spec_of(read)), sort_keys=False), end="")
    return None


def _asked_help(argv: list[str]) -> list[str]:
    """The arguments that ask for help: of all keys, or of those of an objective, by name or import path."""
    for word, following in zip(argv, [*argv[1:], ""]):
        if word in ("-h", "--help"):
            return [word]
        key, _, name = word.partition("=")
        if key == f"--{OBJECTIVE}.help":
            name = name or following.partition("--")[0]
            return [f"{key}={_path_of(name)}" if name else key]
    return []


def spec_of(read: ReadConfig) -> RunSpec:
    """The run that a config says.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or values that do not go together.
    """
    parser = run_parser()
    try:
        return RunSpec(**vars(parser.instantiate(parser.parse_object(read.values))))
    except argparse.ArgumentError as error:
        raise ConfigError(_explain(str(error), read)) from error


CONFIG_HELP = """--config is a file, or a config that ships with Meristem. It may be repeated: each config goes over
those before it, and single keys, such as --trainer.max_steps 50, go over all of them."""


def run_parser(verb: argparse.ArgumentParser | None = None) -> ArgumentParser:
    """Reads a `RunSpec`, and shows its keys with `--help`, under the name of a verb."""
    parser = ArgumentParser(prog=verb.prog if verb else None, exit_on_error=False)
    if verb:
        parser.usage = f"{verb.prog} --config CONFIG [--KEY.SUB VALUE ...]"
        parser.description, parser.epilog = f"{verb.description}. {CONFIG_HELP}", verb.epilog
    parser.add_class_arguments(RunSpec)
    return parser


def _sorted(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Split arguments into the names of config files, and pairs of key and value that override them."""
    names: list[str] = []
    overrides: list[tuple[str, str]] = []
    left = list(argv)
    while left:
        key, has_value, value = left.pop(0).partition("=")
        if not key.startswith("--") and key != "-c":
            raise ConfigError(f"arguments must be --config FILE or --key.sub VALUE; got {key!r}")
        if not has_value:
            if not left or left[0].startswith("--"):
                raise ConfigError(f"{key} needs a value")
            value = left.pop(0)
        if key in ("--config", "-c"):
            names.append(value)
        else:
            overrides.append((key.removeprefix("--"), value))
    return names, overrides


def _nested(key: str, text: str) -> dict[str, Any]:
    """Turn one argument into nested values, as in a config file. Plain values stay text until their type is known."""
    said: Any = text
    with suppress(yaml.YAMLError):
        said = yaml.load(text, Loader=NumberLoader)
    if key.startswith(f"{OBJECTIVE}.") and not key.startswith((f"{OBJECTIVE}.class_path", f"{OBJECTIVE}.init_args")):
        key = key.replace(OBJECTIVE, f"{OBJECTIVE}.init_args", 1)
    if not isinstance(said, dict) and not key.startswith(("model.architecture.", "evals")):
        said = text
    for part in reversed(key.split(".")):
        said = {part: said}
    _tidy_evals(said)
    _tidy_model(said)
    return dict(said)


def _tidy(values: dict[str, Any], path: Path, read: ReadConfig) -> None:
    """Replace short names in the values of one config file by what the parser expects, such as a `class_path`."""
    run = RunDirectory(path.parent)
    split = (values.get("data") or {}).get("split")
    if path == run.config and run.metrics.exists() and isinstance(split, dict) and split["method"] != "similarity":
        split |= {"k": None, "threshold": None}  # runs of earlier versions wrote the numbers out, without effect
    for key, tidy in (("evals", _tidy_evals), (OBJECTIVE, _tidy_model)):
        try:
            tidy(values)
        except ConfigError as error:
            raise ConfigError(f"{read.place(key)}{error}") from error


def _tidy_evals(values: dict[str, Any]) -> None:
    if isinstance(values.get("evals"), list):
        values["evals"] = [with_class_path(one, SUITES) for one in values["evals"]]


def _tidy_model(values: dict[str, Any]) -> None:
    model = values.get("model")
    if not isinstance(model, dict):
        return
    if "objective" in model:
        model["objective"] = with_class_path(model["objective"])
    if isinstance(model.get("architecture"), str):
        model["architecture"] = {"preset": model["architecture"]}


def with_class_path(said: Any, group: str = GROUP) -> Any:
    """Turn an objective or a suite of a config into `class_path` and `init_args`; installed names become import paths.

    Args:
        group: of the entry points that names are looked up in.

    Raises:
        ConfigError: several packages offer a name, the one that does cannot be imported, or offers something else.
    """
    if isinstance(said, str):
        return {"class_path": _path_of(said, group)}
    if not isinstance(said, dict):
        return said
    inner = {key: with_class_path(value) for key, value in said.items() if isinstance(value, dict)}
    path = {"class_path": _path_of(said["class_path"], group)} if "class_path" in said else {}
    return {**said, **inner, **path}  # the arguments of an objective may be objectives


def _path_of(name: str, group: str = GROUP) -> str:
    if name not in installed(group) and (group == GROUP or "." in name):
        return name
    found, base = find(group, name), BASES[group]
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f"{GROUPS[group]} {name!r} must be a subclass of {base.__name__}; its package offers {found!r}"
        )
    return f"{found.__module__}.{found.__qualname__}"


def _explain(text: str, read: ReadConfig) -> str:
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
    """Names of the keys in a section of a config; if its keys are not fixed, those of the section around it."""
    kind: Any = RunSpec
    for name in filter(None, group.split(".")):
        inner = get_type_hints(kind).get(name)
        if not is_dataclass(inner):
            break
        kind = inner
    return ", ".join(one.name for one in fields(kind))
