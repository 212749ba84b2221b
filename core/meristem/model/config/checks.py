"""Checks that parts of a config make of themselves: each refuses in one line."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

from meristem.errors import require

RANGES: Mapping[str, Callable[[float], bool]] = {
    "positive": lambda value: value > 0,
    "1 or more": lambda value: value >= 1,
    "0 or more": lambda value: value >= 0,
    "in [0, 1)": lambda value: 0 <= value < 1,
}


def require_all(part: object, where: str, expected: str, *names: str) -> None:
    """Refuse a part of a config if one of its numbers is out of range; None is always allowed.

    Args:
        where: what the part is called in a config, with the dot behind it.
        expected: one of `RANGES`.
    """
    for name in names:
        value = getattr(part, name)
        require(value is None or RANGES[expected](value), f"{where}{name} must be {expected}", value)


def require_frac(value: float, name: str) -> None:
    """Refuse what is not in [0, 1)."""
    require(0 <= value < 1, f"{name} must be in [0, 1)", value)


def require_one_of(value: object, choices: Any, name: str) -> None:
    """Refuse what is not one of the values of a `Literal`."""
    words = get_args(choices)
    require(value in words, f"{name} must be one of {', '.join(map(str, words))}", repr(value))
