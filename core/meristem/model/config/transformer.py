"""`TransformerConfig`, its embedding and its initial weights."""

from dataclasses import dataclass, field
from typing import Any

from meristem.errors import ConfigError, require
from meristem.model.config.checks import require_all
from meristem.model.config.heads import AttentionPool, Pool, TokenHead
from meristem.model.config.layer import Attention, Experts, FeedForward, LayerNorm, LayerRule, Norm, Residual
from meristem.model.config.position import AddedPosition, Learned, Position, Rotary, SinCos2D


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """How rows become vectors: a table for symbols, a linear map for patches.

    Attributes:
        vocab_size: number of rows in the table (symbols and special rows, such as a class token or registers).
        patch_features: number of features of a patch (P); 0 for a model without patches.
        feature_bias: whether the map of patches has a bias.
        token_types: rows of a second table, for the kind of each token (first or second sentence); 0 for no such table.
        scale: factor of the vectors of symbols, before positions are added.
        is_normed: whether a norm follows the positions.
        mask_id: the symbol whose rows are zeroed when `mask_dropout_frac` is set.
        mask_dropout_frac: share of tokens masked in pre-training (rate times share of mask symbols). When
            set, each sequence is scaled by `(1 - mask_dropout_frac) / (1 - its own share of masks)`, also at
            inference ("token dropout").
        dropout: dropout rate of the result, in training.
    """

    vocab_size: int
    patch_features: int = 0
    feature_bias: bool = True
    token_types: int = 0
    scale: float = 1.0
    is_normed: bool = False
    mask_id: int | None = None
    mask_dropout_frac: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_all(self, "embedding.", "positive", "vocab_size", "scale")
        require_all(self, "embedding.", "0 or more", "patch_features", "token_types")
        require_all(self, "embedding.", "in [0, 1)", "mask_dropout_frac", "dropout")
        if not self.patch_features and not self.feature_bias:
            raise ConfigError("embedding.feature_bias has no effect without embedding.patch_features")
        if self.mask_dropout_frac:
            require(self.mask_id is not None, "embedding.mask_dropout_frac needs embedding.mask_id", "no mask_id")
        elif self.mask_id is not None:
            raise ConfigError("embedding.mask_id has no effect without embedding.mask_dropout_frac; set both or none")
        if self.mask_id is not None:
            require(0 <= self.mask_id < self.vocab_size, "embedding.mask_id must be a symbol", self.mask_id)


@dataclass(frozen=True, kw_only=True)
class Init:
    """Initial weights.

    Attributes:
        std: standard deviation of linear maps and tables (truncated at two deviations).
        is_depth_scaled: whether the output maps of the branches are divided by sqrt(2 L).
    """

    std: float = 0.02
    is_depth_scaled: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """The parts of one layer, all rules applied.

    Attributes:
        width: width of the trunk (D).
        head_width: width of one head (E).
        drop_path: share of sequences whose branches are left out, in training.
        has_source: whether this is a layer of a decoder that also attends to a source.
    """

    width: int
    head_width: int
    attention: Attention
    attention_norm: Norm
    feedforward: FeedForward
    experts: Experts | None
    position: Position
    norm: Norm
    residual: Residual
    drop_path: float
    has_source: bool


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """One transformer, wholly described.

    Attributes:
        width: width of the trunk (D).
        num_layers: number of blocks; in an encoder-decoder, of the encoder.
        embedding: how rows become vectors.
        attention: attention of every block.
        feedforward: feed-forward layer of every block.
        num_decoder_layers: number of blocks of a decoder that attends to the first stack; 0 for a model of one stack.
        experts: replaces each feed-forward layer by a mixture of experts; None for none.
        position: how the trunk knows the place of a row.
        norm: the norm used throughout.
        residual: how branches are added to the residual stream.
        layers: other parts for some layers.
        final_norm: whether a norm follows the last block of a stack; post-norm stacks usually have none.
        head: predicts symbols; None for a trunk alone.
        pool: the model's own pooling; None where it has none.
        init: initial weights.
    """

    width: int
    num_layers: int
    embedding: Embedding
    attention: Attention
    feedforward: FeedForward
    num_decoder_layers: int = 0
    experts: Experts | None = None
    position: Position = field(default_factory=Rotary)
    norm: Norm = field(default_factory=LayerNorm)
    residual: Residual = field(default_factory=Residual)
    layers: tuple[LayerRule, ...] = ()
    final_norm: bool = True
    head: TokenHead | None = None
    pool: Pool | None = None
    init: Init = field(default_factory=Init)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        require_all(self, "", "positive", "width", "num_layers")
        require_all(self, "", "0 or more", "num_decoder_layers")
        if self.residual.placement == "parallel" and self.num_decoder_layers:
            raise ConfigError("residual.placement must be before or after in an encoder-decoder; got parallel")
        if isinstance(self.position, SinCos2D):
            require(self.width % 4 == 0, "position SinCos2D needs a width that 4 divides", self.width)
        for index, rule in enumerate(self.layers):
            got = f"{rule.start}: the rule has no effect"
            is_layer = rule.start < self.total_layers
            require(is_layer, f"layers[{index}].start must be a layer, below {self.total_layers}", got)
            if isinstance(rule.position, AddedPosition):
                kind = type(rule.position).__name__
                raise ConfigError(f"layers[{index}].position must act in each layer; {kind} is added once")
        for parts in map(self.layer, range(self.total_layers)):
            position, attention = parts.position, parts.attention
            if isinstance(position, Rotary):
                turned = position.width or parts.head_width
                got = f"{turned} of {parts.head_width}" if position.width else f"{turned}"
                is_even = turned % (2 * position.num_axes) == 0 and turned <= parts.head_width
                require(is_even, "rotary positions need an even head width", got)
            is_equal = attention.qk_norm != "full" or attention.kv_heads == attention.num_heads
            require(is_equal, "attention.qk_norm full needs as many key heads as query heads", attention.kv_heads)
        if isinstance(self.pool, AttentionPool):
            require(self.width % self.pool.num_heads == 0, "pool.num_heads must divide the width", self.pool.num_heads)

    def layer(self, index: int) -> LayerParts:
        """The parts of one layer, counted from 0 through both stacks."""
        names = ("attention", "feedforward", "experts", "position", "norm", "residual")
        parts: dict[str, Any] = {name: getattr(self, name) for name in names} | {"attention_norm": self.norm}
        for rule in self.layers:
            stop = self.total_layers if rule.stop is None else rule.stop
            if index in range(rule.start, stop, rule.step):
                parts |= rule.parts
        is_decoder = index >= self.num_layers
        place, depth = (index - self.num_layers, self.num_decoder_layers) if is_decoder else (index, self.num_layers)
        return LayerParts(
            width=self.width,
            head_width=parts["attention"].width_of_heads(self.width),
            drop_path=self.residual.drop_path * place / max(depth - 1, 1),
            has_source=is_decoder,
            **parts,
        )

    @property
    def total_layers(self) -> int:
        """Number of blocks in both stacks."""
        return self.num_layers + self.num_decoder_layers

    @property
    def head_width(self) -> int:
        """Width of one head (E) in layers that no rule changes."""
        return self.attention.width_of_heads(self.width)

    @property
    def num_kv_heads(self) -> int:
        """Number of key and value heads (K) in layers that no rule changes."""
        return self.attention.kv_heads

    @property
    def max_length(self) -> int | None:
        """Number of tokens in the longest sequence that positions allow; None for no limit."""
        if isinstance(self.position, Learned) and not self.position.grid:
            return self.position.max_positions - self.position.offset
        return None
