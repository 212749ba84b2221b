"""The contract of a head: a spec that a model directory keeps, and the module that it builds."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from meristem.model.config import TransformerConfig
from meristem.model.embed import EmbeddingLayer
from meristem.model.outputs import HeadRequest
from meristem.model.pool import PoolLayer
from meristem.shapes import Tensor
from meristem.types import Hidden, Layout, PackedBatch


@dataclass(frozen=True, kw_only=True)
class HeadSpec(ABC):
    """What a head predicts, as plain values that travel in a model directory.

    A package registers a subclass, itself a frozen dataclass, in the group `meristem.heads` under its `kind`. Fields
    are numbers, strings, flags, tuples of these, or parts of a config.
    """

    group: ClassVar[str] = "meristem.heads"
    kind: ClassVar[str]

    @abstractmethod
    def build(self, config: TransformerConfig) -> "Head":
        """The head with initial weights, in a model of this config.

        Raises:
            ConfigError: a model of this config cannot have the head.
        """

    def by_sequence(self, outputs: Any, layout: Layout) -> Sequence[Tensor]:
        """Divide the outputs for a pack into those of each sequence, in order; by default, at its rows."""
        return outputs[: layout.num_tokens].split(list(layout.lengths))


class Head(nn.Module):
    """Predicts something from the hidden rows of a pack. `Model.forward` alone calls it.

    Attributes:
        needs_attentions: whether the head reads the attention maps of all layers.
        shared: modules of the model that this head uses and does not own.
    """

    needs_attentions = False

    def __init__(self) -> None:
        super().__init__()
        self.shared: tuple[nn.Module, ...] = ()

    @property
    def num_first(self) -> int | None:
        """Number of first rows of each sequence that the head reads; None where it may read any row."""
        return None

    def tie(self, embedding: EmbeddingLayer, pool: PoolLayer | None) -> None:
        """Put into `shared` what this head shares with the rest of the model; called once, when the model is built.

        An attribute of its own would register a shared module, and its weights would be in the state of the model
        twice; a bare parameter would be out of date once weights are loaded. Copies of the whole model copy the tuple
        too, and with the right modules.
        """

    @abstractmethod
    def forward(self, hidden: Hidden, batch: PackedBatch, request: HeadRequest) -> Any:
        """Outputs of the head; the loss instead, where the request has targets and the head supports that.

        Args:
            hidden: rows of the pack, or of its first rows where `num_first` says that they suffice.
        """
