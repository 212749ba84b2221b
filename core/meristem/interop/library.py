"""Other libraries whose model directories are read and written, some of which build models by name.

A package lists a `Library` as an entry point of the group `meristem.libraries`. Its name there is what
`meristem export --to NAME` says, and `meristem import NAME:MODEL` where the library builds models by name.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meristem.errors import ConfigError
from meristem.registry import find, find_all

GROUP = "meristem.libraries"


@dataclass(frozen=True)
class FetchOptions:
    """Options for a model that a library builds by name.

    Attributes:
        random_weights: draw the weights at random; otherwise they must be on this machine already.
        seed: random seed of the draw.
    """

    random_weights: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Library:
    """A library whose model directories can be read and written.

    Attributes:
        name: name in messages.
        line_that_loads: a line of Python that loads a directory, of the directory and its `config.json`.
        fetch: writes the model of a name as a directory of the library into a new folder, and returns what the user
            must know, such as where the weights come from. It never downloads. None for a library without names.
    """

    name: str
    line_that_loads: Callable[[Path, Mapping[str, Any]], str]
    fetch: Callable[[str, Path, FetchOptions], list[str]] | None = None


HUGGING_FACE = Library(
    name="Hugging Face",
    line_that_loads=lambda folder, config: (
        f"transformers.{config['architectures'][0]}.from_pretrained({str(folder)!r})"
    ),
)


def is_named(source: str) -> bool:
    """Whether a source is `LIBRARY:MODEL` and no path that exists."""
    return re.fullmatch(r"[a-z][\w.-]+:.+", source) is not None and not Path(source).exists()


def fetch_model(source: str, folder: Path, options: FetchOptions) -> list[str]:
    """Build the model that `LIBRARY:MODEL` names and write it as a directory of that library.

    Args:
        folder: folder to write; must not exist.

    Returns:
        Notes for the user: where the weights come from.

    Raises:
        ConfigError: no such library is installed, or it has no such model, or no weights of it on this machine.
    """
    key, _, name = source.partition(":")
    library: Library = find(GROUP, key)
    if library.fetch is None:
        known = ", ".join(name for name, other in find_all(GROUP).items() if other.fetch) or "none"
        raise ConfigError(f"{source}: {key} must be a library that builds models by name ({known}); give a directory")
    return library.fetch(name, folder, options)
