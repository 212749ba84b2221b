"""Config files with the line of every key, so that an error can say where it comes from."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from meristem.errors import ConfigError
from meristem.model.plain import merge


@dataclass
class ReadConfig:
    """Several config files as one; a later file goes over an earlier one, key by key.

    Attributes:
        values: nested, as the files have them.
        places: `file:line` of each dotted key.
    """

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def place(self, key: str) -> str:
        """`file:line: ` of a key, or of the nearest key around it; empty where no file has it."""
        while key:
            if key in self.places:
                return f"{self.places[key]}: "
            key = key.rpartition(".")[0]
        return ""


def read_configs(
    paths: Sequence[Path], change: Callable[[dict[str, Any], ReadConfig], None] = lambda values, read: None
) -> ReadConfig:
    """Read config files in order.

    Args:
        change: is given the values of each file before they go over those of the files before it, to change them.

    Raises:
        ConfigError: a file that is no YAML mapping, or has a key twice; or from `change`.
    """
    read = ReadConfig()
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ConfigError(f"{path}:{line}: must be YAML; {error.problem}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}:1: must be YAML text; {str(error).splitlines()[0]}") from error
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:1: must be a mapping of model, data, trainer; got something else")
        _take_places(node, path, "", read.places)
        values = yaml.load(text, Loader=NumberLoader)
        change(values, read)
        merge(read.values, values)
    return read


class NumberLoader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a word; here it is a number."""


NumberLoader.yaml_implicit_resolvers = {
    key: list(resolvers) for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
NumberLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _take_places(node: yaml.Node, path: Path, prefix: str, places: dict[str, str]) -> None:
    if isinstance(node, yaml.SequenceNode):
        for i, entry in enumerate(node.value):
            _take_places(entry, path, f"{prefix}.{i}", places)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line, name = key_node.start_mark.line + 1, str(key_node.value)
        if name in lines:
            raise ConfigError(f"{path}:{line}: key {name!r} must stand once; it stands in line {lines[name]} already")
        lines[name] = line
        key = f"{prefix}.{name}" if prefix else name
        places[key] = f"{path}:{line}"
        _take_places(value_node, path, key, places)
