"""Finding the pieces that installed packages offer: by group and name, among their entry points.

A package lists a piece in its own `pyproject.toml`, and nothing else is needed for Meristem to know it:

    [project.entry-points."meristem.tokenizers"]
    syllables = "lab_speech.syllables:SyllableTokenizer"

The pieces that come with Meristem are listed the same way. Names are read from the metadata of the installed packages;
a piece is imported when it is asked for. A model directory names pieces by group and name, never by an import path, so
opening one can only run code that somebody installed.
"""

import warnings
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from meristem.errors import ConfigError, PackageWarning

GROUPS: Mapping[str, str] = {
    "meristem.domains": "domain",
    "meristem.tokenizers": "kind of tokenizer",
    "meristem.heads": "kind of head",
    "meristem.changes": "kind of change",
    "meristem.families": "family of foreign models",
    "meristem.libraries": "library of foreign models",
    "meristem.objectives": "objective",
    "meristem.suites": "suite",
}
"""Groups of entry points, one of which each function here asks for, and what a piece is called in messages."""


def installed(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """Entry points of a group by name, in the order of the names; none is imported.

    There is one entry point for a name, unless packages collide.
    """
    assert group in GROUPS, f"{group} is no group of entry points"
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, package_of(point))):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def find(group: str, name: str) -> Any:
    """The piece that an installed package offers under a name.

    Raises:
        ConfigError: no installed package offers it, several do, or the package that does cannot be imported.
    """
    points = installed(group)
    if name not in points:
        known = ", ".join(points) or "none"
        raise ConfigError(
            f"no installed package offers the {GROUPS[group]} {name!r}; installed: {known} (entry points {group})"
        )
    return _load(points[name])


def name_of(group: str, piece: type) -> str:
    """The name that an installed package offers a class under; the path of its import where none does."""
    path = f"{piece.__module__}:{piece.__qualname__}"
    return next((name for name, points in installed(group).items() if points[0].value == path), path)


def find_all(group: str) -> dict[str, Any]:
    """Every piece of a group by name. What cannot be imported is left out with a `PackageWarning`."""
    found = {}
    for name, points in installed(group).items():
        try:
            found[name] = _load(points)
        except ConfigError as error:
            warnings.warn(str(error), PackageWarning, stacklevel=2)
    return found


def package_of(point: EntryPoint) -> str:
    """Name and version of the package that an entry point comes from."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


@cache
def _load(points: tuple[EntryPoint, ...]) -> Any:
    what = f"{GROUPS[points[0].group]} {points[0].name!r}"
    if len(points) > 1:
        packages = " and ".join(map(package_of, points))
        raise ConfigError(f"the {what} must come from one installed package; got {packages}; uninstall all but one")
    try:
        return points[0].load()
    except Exception as error:  # a package may raise anything while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"the {what} of the installed package {package_of(points[0])} cannot be imported: {reason}; "
            "mend or uninstall that package"
        ) from error
