"""Configs of the parts of a block: norms, attention, feed-forward, experts, and the residual branches."""

from abc import ABC
from dataclasses import dataclass, field
from typing import Literal

from meristem.errors import ConfigError, require
from meristem.model.config.checks import require_all, require_one_of
from meristem.model.config.pattern import Full, Pattern
from meristem.model.config.position import Position

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
QueryKeyNorm = Literal["head", "full"]
Placement = Literal["before", "after", "parallel"]


@dataclass(frozen=True, kw_only=True)
class Norm(ABC):
    """How the rows of the trunk are normalised."""


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm):
    """Layer normalisation (Ba 2016).

    Attributes:
        eps: added to the variance, against division by zero.
        bias: whether a learned bias is added.
    """

    eps: float = 1e-5
    bias: bool = True


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm):
    """Root-mean-square normalisation (Zhang 2019).

    Attributes:
        eps: added to the mean square, against division by zero.
    """

    eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class NoNorm(Norm):
    """No norm: rows are not changed."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Multi-head attention.

    Attributes:
        num_heads: query heads (H).
        num_kv_heads: key and value heads (K); each serves H / K query heads. None for as many as `num_heads`.
        head_width: width of one head (E); None for width / num_heads.
        scale: factor of the scores; None for 1 / sqrt(head width).
        qkv_bias: whether the projections of queries, keys and values have biases.
        out_bias: whether the output projection has a bias.
        qk_norm: norm of queries and keys before their positions: over each head ("head"), or over all heads at once
            ("full"). It is of the kind of the trunk's norm, without a bias. None for no norm.
        pattern: which keys a query may see.
        dropout: dropout rate of the attention weights, in training.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_width: int | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    scale: float | None = None
    qk_norm: QueryKeyNorm | None = None
    pattern: Pattern = field(default_factory=Full)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_all(self, "attention.", "positive", "num_heads", "head_width", "scale")
        require_all(self, "attention.", "in [0, 1)", "dropout")
        is_right = self.num_kv_heads is None or (self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0)
        got = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        require(is_right, "attention.num_kv_heads must divide num_heads", got)
        if self.qk_norm is not None:
            require_one_of(self.qk_norm, QueryKeyNorm, "attention.qk_norm")

    def width_of_heads(self, width: int) -> int:
        """Width of one head (E) in a trunk of this width.

        Raises:
            ConfigError: the width is no multiple of the number of heads.
        """
        if self.head_width is not None:
            return self.head_width
        if width % self.num_heads:
            nearest = max(self.num_heads, round(width / self.num_heads) * self.num_heads)
            raise ConfigError(
                f"width must be divisible by num_heads; got width={width}, num_heads={self.num_heads}; "
                f"nearest: {nearest} (architecture.width), or set attention.head_width"
            )
        return width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads (K)."""
        return self.num_kv_heads or self.num_heads


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """The feed-forward layer, plain or gated (`activation(gate) * value`, Shazeer 2020, arXiv 2002.05202).

    Attributes:
        width: hidden width (F).
        activation: gelu is exact (erf), gelu_tanh its approximation by tanh, quick_gelu that by a sigmoid.
        is_gated: whether there are two input maps, one of them followed by the activation.
        in_bias: whether the input map has a bias.
        out_bias: whether the output map has a bias.
        dropout: dropout rate of the hidden values, in training.
    """

    width: int
    activation: Activation = "gelu"
    is_gated: bool = False
    in_bias: bool = True
    out_bias: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_all(self, "feedforward.", "positive", "width")
        require_all(self, "feedforward.", "in [0, 1)", "dropout")
        require_one_of(self.activation, Activation, "feedforward.activation")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Several feed-forward layers, of which a router chooses some for each token (Fedus 2021, arXiv 2101.03961).

    The output of an expert is scaled by its probability, a softmax in fp32 over all experts.

    Attributes:
        count: number of experts; each is a feed-forward layer as `feedforward` describes.
        top_k: number of experts that each token is sent to.
        capacity: tokens of one sequence that an expert takes at most, earlier ones first. Further tokens are dropped:
            only the residual carries them. None for no limit.
        num_shared: further experts that every token passes; their outputs are added unscaled.
        is_normalised: whether the probabilities of the chosen experts are divided by their sum.
        jitter: in training the input of the router is multiplied by a uniform draw from [1 - jitter, 1 + jitter].
        balance_weight: weight of the loss that asks for an even load (Fedus 2021, eq. 4).
        z_weight: weight of the loss that asks for small router logits (Zoph 2022, arXiv 2202.08906, eq. 5).
    """

    count: int
    top_k: int = 1
    capacity: int | None = None
    num_shared: int = 0
    is_normalised: bool = False
    jitter: float = 0.0
    balance_weight: float = 0.01
    z_weight: float = 0.001

    def __post_init__(self) -> None:
        require(self.count > 1, "experts.count must be 2 or more", self.count)
        require(1 <= self.top_k <= self.count, "experts.top_k must be in 1..count", self.top_k)
        require_all(self, "experts.", "positive", "capacity")
        require_all(self, "experts.", "0 or more", "num_shared")
        require_all(self, "experts.", "in [0, 1)", "jitter")
        if self.is_normalised and self.top_k == 1:
            raise ConfigError("experts.is_normalised needs top_k of 2 or more: one share of one is 1; got top_k=1")
        require(min(self.balance_weight, self.z_weight) >= 0, "experts' weights must be 0 or more", self.balance_weight)


@dataclass(frozen=True, kw_only=True)
class Residual:
    """How a branch is added to the residual stream.

    Attributes:
        placement: the norm comes before the branch (pre-norm) or after the sum (post-norm). In parallel, attention and
            feed-forward read the output of one norm, and both are added at once (Wang 2021).
        dropout: dropout rate of the branch, in training.
        drop_path: share of sequences whose branch is left out, in training (Huang 2016). This is the share in the last
            layer; it grows linearly from 0 in the first.
        layer_scale: initial value of a learned factor for each feature of a branch (Touvron 2021); None for no factor.
        scale: fixed factor of a branch.
    """

    placement: Placement = "before"
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_one_of(self.placement, Placement, "residual.placement")
        require_all(self, "residual.", "in [0, 1)", "dropout", "drop_path")
        require_all(self, "residual.", "positive", "scale")


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """Other parts for some layers: `start`, `start + step`, ... below `stop`.

    Layers count from 0, those of the encoder first, then those of the decoder. Where rules overlap, the last one holds.

    Attributes:
        start: first layer.
        stop: the layer behind the last one; None for the end.
        step: distance from one layer to the next.
        attention: replaces the attention of the model; None keeps it, as with the parts below.
        attention_norm: replaces the norm before attention.
        feedforward: replaces the feed-forward layer of the model, and describes the experts of these layers.
        experts: replaces the experts of the model.
        position: replaces the position of the model; it must be of a kind that acts in each layer.
    """

    start: int = 0
    stop: int | None = None
    step: int = 1
    attention: Attention | None = None
    attention_norm: Norm | None = None
    feedforward: FeedForward | None = None
    experts: Experts | None = None
    position: Position | None = None

    def __post_init__(self) -> None:
        require_all(self, "layers.", "0 or more", "start")
        require_all(self, "layers.", "positive", "step")
        require(self.stop is None or self.stop > self.start, "layers.stop must be above start", self.stop)
        require(bool(self.parts), "a rule of layers must name a part that it replaces", "none")

    @property
    def parts(self) -> dict[str, object]:
        """The parts that are replaced, by name."""
        names = ("attention", "attention_norm", "feedforward", "experts", "position")
        return {name: value for name in names if (value := getattr(self, name)) is not None}
