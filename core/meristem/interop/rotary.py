"""Rotary positions in configs of `transformers`, with the settings of version 5 and of earlier ones."""

from collections.abc import Mapping
from typing import Any

from meristem.errors import ConfigError, require
from meristem.interop.settings import Settings
from meristem.model.config import BandScaling, LinearScaling, NoScaling, Position, Rotary, Scaling

MAX_POSITIONS = 4096
"""The longest sequence that a foreign config is told, in tokens: our rotary positions have no limit."""

SCALINGS: Mapping[str, tuple[type[Scaling], Mapping[str, str]]] = {
    "default": (NoScaling, {}),
    "linear": (LinearScaling, {"factor": "factor"}),
    "llama3": (
        BandScaling,
        {
            "factor": "factor",
            "low_freq_factor": "low",
            "high_freq_factor": "high",
            "original_max_position_embeddings": "original_tokens",
        },
    ),
}
"""Kinds of scaling, and our fields by the settings that each has beside its name and base."""


def read_rotary(found: Settings) -> Rotary:
    """Read rotary positions from `rope_parameters` (since 5) or from `rope_theta` and `rope_scaling` (before).

    Feature i is paired with feature i + E/2.

    Raises:
        ConfigError: a kind of scaling that no part of ours can say, or a setting that it lacks or does not know.
    """
    found.require(partial_rotary_factor=1.0)
    # the older name goes first, as in the reference
    values = dict(found.get("rope_scaling") or found.get("rope_parameters") or {})
    older = values.pop("type", "default")
    kind = values.pop("rope_type", older)
    base = values.pop("rope_theta", None)
    if base is None:
        base = found.get("rope_theta") or 10000.0
    require(kind in SCALINGS, f"rope_type must be one of {', '.join(SCALINGS)}", repr(kind))
    if values.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ConfigError("rope_parameters must turn whole heads; got a partial_rotary_factor other than 1")
    if kind == "llama3":
        # a setting outside goes over the one inside; where there is neither, the length of now is that of then
        length = found.get("original_max_position_embeddings")
        if length is None:
            length = values.get("original_max_position_embeddings") or found["max_position_embeddings"]
        values["original_max_position_embeddings"] = length
    scaling, names = SCALINGS[kind]
    if set(values) != set(names):
        wanted = ", ".join(sorted(names)) or "nothing more"
        raise ConfigError(f"rope_type {kind} takes {wanted}; got {', '.join(sorted(values)) or 'nothing'}")
    fields = {own: values[name] if own == "original_tokens" else float(values[name]) for name, own in names.items()}
    return Rotary(base=float(base), scaling=scaling(**fields))


def write_rotary(position: Position) -> dict[str, Any]:
    """Settings for rotary positions, both new and old; none for other positions."""
    if not isinstance(position, Rotary):
        return {}
    scaling, length = position.scaling, MAX_POSITIONS
    kind, (_, names) = next(item for item in SCALINGS.items() if isinstance(scaling, item[1][0]))
    values: dict[str, Any] = {"rope_type": kind, **{name: getattr(scaling, own) for name, own in names.items()}}
    if isinstance(scaling, BandScaling):
        # the reference wants a length above the one before scaling
        length = max(length, int(scaling.factor * scaling.original_tokens), scaling.original_tokens + 1)
    values["rope_theta"] = position.base
    return {
        "max_position_embeddings": length,
        "rope_theta": position.base,
        "rope_scaling": None if isinstance(scaling, NoScaling) else values,
        "rope_parameters": values,
    }
