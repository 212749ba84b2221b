"""Finding the pieces that installed packages offer: by group and name, among their entry points.

A package lists a piece in its own `pyproject.toml`, and nothing else is needed for Meristem to know it:

    [project.entry-points."meristem.tokenizers"]
    codons = "lab_rna.codons:CodonTokenizer"

The pieces that come with Meristem are listed the same way. Names are read from the metadata of the installed packages;
a piece is imported when it is asked for. A model directory names pieces by group and name, never by an import path, so
opening one can only run code that somebody installed.
"""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from meristem.errors import ConfigError

GROUPS: Mapping[str, str] = {
    "meristem.domains": "domain",
    "meristem.tokenizers": "kind of tokenizer",
    "meristem.heads": "kind of head",
    "meristem.families": "family of foreign models",
    "meristem.libraries": "library of foreign models",
    "meristem.objectives": "objective",
}
"""Groups of entry points, and what a piece of each is called in messages."""


def installed(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name, in the order of the names; none is imported.

    Args:
        group: one of `GROUPS`.
    """
    assert group in GROUPS, f"{group} is no group of entry points"
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda point: point.name)}


def find(group: str, name: str) -> Any:
    """The piece that an installed package offers under a name.

    Args:
        group: one of `GROUPS`.

    Raises:
        ConfigError: no installed package offers it, or the package that does cannot be imported.
    """
    points = installed(group)
    if name not in points:
        known = ", ".join(points) or "none"
        raise ConfigError(
            f"no installed package offers the {GROUPS[group]} {name!r}; installed: {known} (entry points {group})"
        )
    return _load(points[name])


def find_all(group: str) -> dict[str, Any]:
    """Every piece of a group by name.

    Args:
        group: one of `GROUPS`.

    Raises:
        ConfigError: a package that offers one cannot be imported.
    """
    return {name: _load(point) for name, point in installed(group).items()}


@cache
def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        raise ConfigError(
            f"{GROUPS[point.group]} {point.name!r} of the installed package {package} cannot be imported: {error}; "
            "mend or uninstall that package"
        ) from error
