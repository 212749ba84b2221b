"""What data and architecture must agree on: symbols, features of patches, positions."""

import math
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.errors import ConfigError
from meristem.model.config import Learned, Position, Rotary, SinCos2D, Sinusoidal, TransformerConfig


def fill_in(values: dict[str, Any], tokenizer: Tokenizer, said: dict[str, Any]) -> None:
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


def check_fit(config: TransformerConfig, tokenizer: Tokenizer, domain: str) -> None:
    """Refuse an architecture that cannot read what the tokenizer gives.

    Raises:
        ConfigError: says what must be equal.
    """
    got = config.embedding.vocab_size
    if got < len(tokenizer.vocab):
        raise ConfigError(
            f"architecture.embedding.vocab_size must be {len(tokenizer.vocab)} or more, as {domain} has so many "
            f"symbols; got {got}"
        )
    if (wanted := tokenizer.num_features) != config.embedding.patch_features:
        raise ConfigError(
            f"architecture.embedding.patch_features must be {wanted}, as data.tokenizer makes patches of so many "
            f"values; got {config.embedding.patch_features}"
        )
    positions = {config.position, *(config.layer(index).position for index in range(config.total_layers))}
    for position in positions:
        _check_position(position, tokenizer)


def _check_position(position: Position, tokenizer: Tokenizer) -> None:
    axes, kind = tokenizer.num_axes, type(position).__name__
    if isinstance(position, Learned) and position.grid != tokenizer.grid:
        own = list(tokenizer.grid) or "none: each payload has its own"
        raise ConfigError(
            f"architecture.position.grid must be that of data.tokenizer, {own}; got {list(position.grid) or 'none'}"
        )
    if isinstance(position, Rotary) and position.num_axes != axes:
        raise ConfigError(f"architecture.position.num_axes must be {axes}, as of the data; got {position.num_axes}")
    if (isinstance(position, SinCos2D) and axes != 2) or (isinstance(position, Sinusoidal) and axes != 1):
        raise ConfigError(f"architecture.position must be of {axes} axes, as the data is; got {kind}")
