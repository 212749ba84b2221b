"""The architecture of a run: a preset, what goes over it, and what the tokenizer decides."""

import math
from collections.abc import Mapping
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.domain import Domain
from meristem.errors import ConfigError, require
from meristem.model.config import Learned, Rotary, SinCos2D, Sinusoidal, TransformerConfig
from meristem.model.plain import from_json, merge, to_json
from meristem.objectives.objective import Objective


def resolve_architecture(
    wanted: Mapping[str, Any], domain: Domain, tokenizer: Tokenizer, objective: type[Objective] | None = None
) -> TransformerConfig:
    """The whole architecture of a run.

    Args:
        wanted: plain values of an architecture; with `preset`, those that differ from that preset of the domain.
        objective: that the model is trained for; it may need a head that nothing is said of.

    Raises:
        ConfigError: a preset that the domain does not have, or fields that do not fit each other or the tokenizer.
    """
    wanted = merge({}, wanted)
    preset = wanted.pop("preset", None)
    values: dict[str, Any] = {}
    if preset is not None:
        rule = f"architecture.preset must be one of {', '.join(domain.presets) or 'none'}"
        require(preset in domain.presets, rule, repr(preset))
        values = merge({}, to_json(domain.presets[preset]))
    elif not wanted:
        raise ConfigError(
            f"model.architecture must be set (a preset: {', '.join(domain.presets)}; or width, num_layers ...), "
            "or model.init_from a model directory"
        )
    merge(values, wanted)
    _fill_in(values, tokenizer, wanted)
    config = from_json(TransformerConfig, values)
    _check_fit(config, tokenizer, domain.name)
    return config if objective is None else objective.complete(config)


def _fill_in(values: dict[str, Any], tokenizer: Tokenizer, said: dict[str, Any]) -> None:
    """Fill in, in the plain values of an architecture, what the tokenizer decides.

    Args:
        said: what the user said of the architecture, which is not changed; the rest may be a preset's.
    """
    embedding = values.setdefault("embedding", {})
    if isinstance(embedding, dict):
        embedding.setdefault("vocab_size", len(tokenizer.vocab))
        if embedding.get("mask_dropout_frac") and embedding.get("mask_id") is None:
            embedding["mask_id"] = tokenizer.mask_id
        if tokenizer.num_features and "patch_features" not in (said.get("embedding") or {}):
            embedding["patch_features"] = tokenizer.num_features
    if tokenizer.num_axes == 1:
        return
    if "position" not in values:
        values["position"] = {"kind": Learned.__name__ if tokenizer.grid else SinCos2D.__name__}
    position, asked = values["position"], said.get("position")
    is_table = isinstance(position, dict) and position.get("kind") == Learned.__name__
    if is_table and tokenizer.grid and "grid" not in (asked if isinstance(asked, dict) else {}):
        position["grid"] = list(tokenizer.grid)
        position["max_positions"] = position.get("offset", 0) + math.prod(tokenizer.grid)


def _check_fit(config: TransformerConfig, tokenizer: Tokenizer, domain: str) -> None:
    """Refuse an architecture that cannot read what the tokenizer gives."""
    got, wanted = config.embedding.vocab_size, len(tokenizer.vocab)
    rule = f"architecture.embedding.vocab_size must be {wanted} or more, as {domain} has so many symbols"
    require(got >= wanted, rule, got)
    got, wanted = config.embedding.patch_features, tokenizer.num_features
    rule = f"architecture.embedding.patch_features must be {wanted}, as data.tokenizer makes patches of so many values"
    require(got == wanted, rule, got)
    positions = {config.position, *(config.layer(index).position for index in range(config.total_layers))}
    axes, own_grid = tokenizer.num_axes, list(tokenizer.grid) or "none: each payload has its own"
    for position in positions:
        if isinstance(position, Learned):
            rule = f"architecture.position.grid must be that of data.tokenizer, {own_grid}"
            require(position.grid == tokenizer.grid, rule, list(position.grid) or "none")
        if isinstance(position, Rotary):
            rule = f"architecture.position.num_axes must be {axes}, as of the data"
            require(position.num_axes == axes, rule, position.num_axes)
        is_wrong = (isinstance(position, SinCos2D) and axes != 2) or (isinstance(position, Sinusoidal) and axes != 1)
        rule = f"architecture.position must be of {axes} axes, as the data is"
        require(not is_wrong, rule, type(position).__name__)
