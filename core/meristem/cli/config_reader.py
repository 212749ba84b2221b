"""Config files with the line of every key, so that an error can say where it comes from."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from meristem.errors import ConfigError
from meristem.model.plain import merge
from meristem.train.task import NotFinite


@dataclass
class ReadConfig:
    """Several config files as one; a later file goes over an earlier one, key by key.

    Attributes:
        values: nested, as the files have them.
        places: `file:line` of each dotted key; empty for one that the command line sets.
    """

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def place(self, key: str) -> str:
        """`file:line: ` of a key, or of the nearest key around it; empty where no file has it."""
        while key:
            if key in self.places:
                return f"{self.places[key]}: " if self.places[key] else ""
            key = key.rpartition(".")[0]
        return ""

    def key_in_file(self, key: str) -> str:
        """A key as the file has it: classes stand with `init_args`, lists with numbers."""
        wanted = [part for part in key.split(".") if part]
        for place in self.places:
            parts = [part for part in place.split(".") if part != "init_args" and not part.isdigit()]
            if parts == wanted:
                return place
        return ".".join(wanted)

    @contextmanager
    def placing(self) -> Iterator[None]:
        """Add file and line of the offending key to a `ConfigError` that is raised within, if a file sets that key."""
        try:
            yield
        except NotFinite:
            raise
        except ConfigError as error:
            for word in re.findall(r"[a-z_]\w*(?:\.\w+)*", str(error).replace("architecture takes", "architecture")):
                for prefix in ("", "model.", "data.", "model.architecture.", "model.optimizer."):
                    place = self.places.get(key := self.key_in_file(f"{prefix}{word}"))
                    if place and "." in key:
                        raise ConfigError(str(error) if place in str(error) else f"{place}: {error}") from error
            raise


def read_configs(paths: Sequence[Path], change: Callable[[dict[str, Any], Path, ReadConfig], None]) -> ReadConfig:
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
        change(values, path, read)
        merge(read.values, values)
    return read


class NumberLoader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a word; here it is a number."""


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
