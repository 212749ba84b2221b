"""Configs of what follows the trunk: the head that predicts symbols, and pooling."""

from abc import ABC
from dataclasses import dataclass

from meristem.errors import ConfigError
from meristem.model.config.checks import require_all
from meristem.model.config.layer import Activation


@dataclass(frozen=True, kw_only=True)
class TokenHead:
    """The head that predicts symbols: dense, activation, norm, then a map onto the vocabulary.

    Attributes:
        activation: activation of the dense layer; None for a head that is the last map alone.
        dense_bias: whether the dense layer has a bias.
        is_tied: whether the map onto the vocabulary is the embedding table.
        bias: whether each symbol has a bias.
        scale: factor of the rows before the map.
    """

    activation: Activation | None = "gelu"
    dense_bias: bool = True
    is_tied: bool = True
    bias: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_all(self, "head.", "positive", "scale")
        if self.activation is None and not self.dense_bias:
            raise ConfigError("head.dense_bias has no effect without head.activation: there is no dense layer")


@dataclass(frozen=True, kw_only=True)
class Pool(ABC):
    """How the rows of one sequence become one vector."""


@dataclass(frozen=True, kw_only=True)
class Mean(Pool):
    """The mean over the payload's own tokens; special rows are left out.

    Attributes:
        is_normed: whether a norm of the kind of the trunk follows.
    """

    is_normed: bool = False


@dataclass(frozen=True, kw_only=True)
class Max(Pool):
    """The maximum of each feature over the payload's own tokens."""


@dataclass(frozen=True, kw_only=True)
class Prefix(Pool):
    """The first rows of the sequence: the class token, or several side by side in one vector.

    Attributes:
        count: number of rows.
        is_dense: whether a linear map and tanh follow.
        has_mean: whether the mean over the payload's own tokens is appended to the rows.
    """

    count: int = 1
    is_dense: bool = False
    has_mean: bool = False

    def __post_init__(self) -> None:
        require_all(self, "pool.", "positive", "count")


@dataclass(frozen=True, kw_only=True)
class AttentionPool(Pool):
    """A learned query attends to the rows; a feed-forward layer with a residual follows (Zhai 2022, arXiv 2106.04560).

    Attributes:
        num_heads: attention heads; the width must be a multiple of it.
        feedforward_width: hidden width of the feed-forward layer.
        activation: activation of the feed-forward layer.
        has_special: whether special rows are attended to, besides the payload's own tokens.
    """

    num_heads: int
    feedforward_width: int
    activation: Activation = "gelu"
    has_special: bool = True

    def __post_init__(self) -> None:
        require_all(self, "pool.", "positive", "num_heads", "feedforward_width")
