"""Checks that parts of a config make of themselves: each refuses in one line."""

from typing import Any, get_args

from meristem.errors import ConfigError


def require(condition: bool, rule: str, got: object) -> None:
    """Refuse unless `condition` holds.

    Raises:
        ConfigError: says the rule and what was got.
    """
    if not condition:
        raise ConfigError(f"{rule}; got {got}")


def require_frac(value: float, name: str) -> None:
    """Refuse what is not in [0, 1)."""
    require(0 <= value < 1, f"{name} must be in [0, 1)", value)


def require_one_of(value: object, choices: Any, name: str) -> None:
    """Refuse what is not one of the values of a `Literal`."""
    words = get_args(choices)
    require(value in words, f"{name} must be one of {', '.join(map(str, words))}", repr(value))
