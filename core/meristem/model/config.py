"""`TransformerConfig` and its parts: a family of models is a value of it, not a class.

Variation is a part, not a flag. Parts that come in kinds (a position, a norm, a pattern) are subclasses of
one base; every other part is one dataclass. All are frozen and keyword-only, and check themselves when made.
"""

import math
from abc import ABC
from dataclasses import dataclass, field
from typing import Literal, get_args

from meristem.errors import ConfigError

Activation = Literal["gelu", "relu", "silu"]
Rounding = Literal["fp32", "fp16", "bf16"]


def _require(condition: bool, rule: str, got: str) -> None:
    if not condition:
        raise ConfigError(f"{rule}; got {got}")


def _require_frac(value: float, name: str) -> None:
    _require(0 <= value < 1, f"{name} must be in [0, 1)", str(value))


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """How rows become vectors: a table for symbols, a linear map for patches.

    Attributes:
        vocab_size: rows of the table (symbols and special rows).
        patch_features: features of a patch (P); 0 for a model without patches.
        is_normed: a norm follows the positions.
        mask_id: the symbol whose rows are zeroed and accounted for when `mask_dropout_frac` is set.
        mask_dropout_frac: share of tokens masked in pre-training (rate times share of mask symbols). When
            set, each sequence is scaled by `(1 - mask_dropout_frac) / (1 - its own share of masks)`, also at
            inference ("token dropout").
        dropout: of the result, in training.
    """

    vocab_size: int
    patch_features: int = 0
    is_normed: bool = False
    mask_id: int | None = None
    mask_dropout_frac: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require(self.vocab_size > 0, "embedding.vocab_size must be positive", str(self.vocab_size))
        _require(self.patch_features >= 0, "embedding.patch_features must be 0 or more", str(self.patch_features))
        _require_frac(self.mask_dropout_frac, "embedding.mask_dropout_frac")
        _require_frac(self.dropout, "embedding.dropout")
        if self.mask_dropout_frac:
            _require(self.mask_id is not None, "embedding.mask_dropout_frac needs embedding.mask_id", "no mask_id")
        elif self.mask_id is not None:
            raise ConfigError("embedding.mask_id has no effect without embedding.mask_dropout_frac; set both or none")
        if self.mask_id is not None:
            _require(0 <= self.mask_id < self.vocab_size, "embedding.mask_id must be a symbol", str(self.mask_id))


@dataclass(frozen=True, kw_only=True)
class Position(ABC):
    """How the trunk knows where a row stands."""


@dataclass(frozen=True, kw_only=True)
class Rotary(Position):
    """Rotary positions (Su 2021, arXiv 2104.09864): queries and keys are rotated, half against half.

    Attributes:
        base: of the geometric series of wavelengths.
        rounding: precision that the frequencies were rounded to when the model was trained; angles are fp32
            in any case. Checkpoints kept in half precision carry rounded frequencies, and were trained to them.
    """

    base: float = 10000.0
    rounding: Rounding = "fp32"

    def __post_init__(self) -> None:
        _require(self.base > 0, "position.base must be positive", str(self.base))
        _require(
            self.rounding in get_args(Rounding),
            f"position.rounding must be one of {', '.join(get_args(Rounding))}",
            repr(self.rounding),
        )


@dataclass(frozen=True, kw_only=True)
class Learned(Position):
    """A learned table of positions, added to the embedding; rows that have no place (-1) get nothing.

    Attributes:
        max_positions: rows of the table.
        offset: row of the first place; some models leave the first rows unused.
        grid: places along each position axis, numbered row after row; empty for a sequence.
    """

    max_positions: int = 1024
    offset: int = 0
    grid: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        _require(
            0 <= self.offset < self.max_positions,
            "position.offset must be within the table",
            str(self.offset),
        )
        _require(
            self.offset + math.prod(self.grid) <= self.max_positions,
            "position.max_positions must hold the grid behind the offset",
            f"max_positions={self.max_positions}, offset={self.offset}, grid={list(self.grid)}",
        )


@dataclass(frozen=True, kw_only=True)
class NoPosition(Position):
    """Rows are a set."""


@dataclass(frozen=True, kw_only=True)
class Pattern(ABC):
    """Which keys a query may see, within its own sequence; `patterns.py` has the masks."""


@dataclass(frozen=True, kw_only=True)
class Full(Pattern):
    """Every key of the sequence."""


@dataclass(frozen=True, kw_only=True)
class Causal(Pattern):
    """Keys up to the query's own place; with fewer queries than keys, queries are the last ones."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Multi-head attention.

    Attributes:
        num_heads: query heads (H).
        num_kv_heads: key and value heads (K); each serves H / K query heads. None: as many as `num_heads`.
        head_width: of one head (E); None: width / num_heads.
        qkv_bias: biases on queries, keys and values.
        out_bias: bias on the output projection.
        pattern: which keys a query may see.
        dropout: of the attention weights, in training.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_width: int | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    pattern: Pattern = field(default_factory=Full)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require(self.num_heads > 0, "attention.num_heads must be positive", str(self.num_heads))
        if self.num_kv_heads is not None:
            divides = self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0
            _require(
                divides,
                "attention.num_kv_heads must divide num_heads",
                f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}",
            )
        if self.head_width is not None:
            _require(self.head_width > 0, "attention.head_width must be positive", str(self.head_width))
        _require_frac(self.dropout, "attention.dropout")


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """The feed-forward layer, plain or gated (`activation(gate) * value`, Shazeer 2020, arXiv 2002.05202).

    Attributes:
        width: hidden width (F).
        activation: gelu is the exact one (erf).
        is_gated: two input maps, one of them through the activation.
        in_bias: bias of the input map.
        out_bias: bias of the output map.
        dropout: of the hidden values, in training.
    """

    width: int
    activation: Activation = "gelu"
    is_gated: bool = False
    in_bias: bool = True
    out_bias: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require(self.width > 0, "feedforward.width must be positive", str(self.width))
        _require(
            self.activation in get_args(Activation),
            f"feedforward.activation must be one of {', '.join(get_args(Activation))}",
            repr(self.activation),
        )
        _require_frac(self.dropout, "feedforward.dropout")


@dataclass(frozen=True, kw_only=True)
class Norm(ABC):
    """How the rows of the trunk are normalised."""


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm):
    """Layer normalisation (Ba 2016)."""

    eps: float = 1e-5
    bias: bool = True


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm):
    """Root-mean-square normalisation (Zhang 2019)."""

    eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Residual:
    """How a branch joins the trunk.

    Attributes:
        placement: the norm stands before the branch (pre-norm) or after the sum (post-norm).
        dropout: of the branch, in training.
    """

    placement: Literal["before", "after"] = "before"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require(
            self.placement in ("before", "after"),
            "residual.placement must be before or after",
            repr(self.placement),
        )
        _require_frac(self.dropout, "residual.dropout")


@dataclass(frozen=True, kw_only=True)
class TokenHead:
    """The head that predicts symbols: dense, activation, norm, then a map onto the vocabulary.

    Attributes:
        activation: of the dense layer.
        is_tied: the map onto the vocabulary is the embedding table.
        bias: a bias for each symbol.
    """

    activation: Activation = "gelu"
    is_tied: bool = True
    bias: bool = True


@dataclass(frozen=True, kw_only=True)
class Pool(ABC):
    """How the rows of one sequence become one vector."""


@dataclass(frozen=True, kw_only=True)
class Mean(Pool):
    """The mean over the payload's own tokens; special rows are left out."""


@dataclass(frozen=True, kw_only=True)
class Max(Pool):
    """The maximum of each feature over the payload's own tokens."""


@dataclass(frozen=True, kw_only=True)
class Prefix(Pool):
    """The first row of the sequence (the class token)."""


@dataclass(frozen=True, kw_only=True)
class Init:
    """Initial weights.

    Attributes:
        std: standard deviation of linear maps and tables (truncated at two deviations).
        is_depth_scaled: output maps of the branches are divided by sqrt(2 L).
    """

    std: float = 0.02
    is_depth_scaled: bool = False


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """One transformer, wholly described.

    Attributes:
        width: of the trunk (D).
        num_layers: blocks of the encoder.
        embedding: how rows become vectors.
        attention: of every block.
        feedforward: of every block.
        position: how the trunk knows where a row stands.
        norm: the norm used throughout.
        residual: how branches join the trunk.
        final_norm: a norm after the last block; post-norm stacks usually have none.
        head: predicts symbols; None for a trunk alone.
        pool: the model's own pooling; None where it has none.
        init: initial weights.
    """

    width: int
    num_layers: int
    embedding: Embedding
    attention: Attention
    feedforward: FeedForward
    position: Position = field(default_factory=Rotary)
    norm: Norm = field(default_factory=LayerNorm)
    residual: Residual = field(default_factory=Residual)
    final_norm: bool = True
    head: TokenHead | None = None
    pool: Pool | None = None
    init: Init = field(default_factory=Init)

    def __post_init__(self) -> None:
        _require(self.width > 0, "width must be positive", str(self.width))
        _require(self.num_layers > 0, "num_layers must be positive", str(self.num_layers))
        heads = self.attention.num_heads
        if self.attention.head_width is None and self.width % heads:
            nearest = max(heads, round(self.width / heads) * heads)
            raise ConfigError(
                f"width must be divisible by num_heads; got width={self.width}, num_heads={heads}; "
                f"nearest: {nearest} (architecture.width), or set attention.head_width"
            )
        if isinstance(self.position, Rotary):
            _require(self.head_width % 2 == 0, "rotary positions need an even head width", str(self.head_width))

    @property
    def head_width(self) -> int:
        """E, resolved."""
        return self.attention.head_width or self.width // self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        """K, resolved."""
        return self.attention.num_kv_heads or self.attention.num_heads

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest sequence that positions allow; None for no limit."""
        if isinstance(self.position, Learned) and not self.position.grid:
            return self.position.max_positions - self.position.offset
        return None
