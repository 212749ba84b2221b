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
        """The head with initial weights.

        Args:
            config: of the model that it is a part of.

        Raises:
            ConfigError: such a model cannot have this head.
        """

    def by_sequence(self, outputs: Any, layout: Layout) -> Sequence[Tensor]:
        """What the head says of each sequence of a pack, in its order: here, the rows of it.

        Args:
            outputs: of the head, for all rows of the pack.
            layout: of the rows.
        """
        rows: Tensor = outputs
        return rows[: layout.num_tokens].split(list(layout.lengths))


class Head(nn.Module):
    """Predicts something from the hidden rows of a pack. `Model.forward` alone calls it.

    Attributes:
        needs_attentions: it reads the attention maps of all layers.
        shared: modules of the model that this head uses and does not own.
    """

    needs_attentions = False

    def __init__(self) -> None:
        super().__init__()
        self.shared: tuple[nn.Module, ...] = ()

    @property
    def num_first(self) -> int | None:
        """First rows of each sequence that are all it reads of the trunk's last; None where it may read any."""
        return None

    def tie(self, embedding: EmbeddingLayer, pool: PoolLayer | None) -> None:
        """Put into `shared` what this head shares with the rest of the model; called once, when the model is built.

        An attribute of its own would register a shared module, and its weights would be in the state of the model
        twice; a bare parameter would be out of date once weights are loaded. Copies of the whole model copy the tuple
        too, and with the right modules.

        Args:
            embedding: of the model.
            pool: the model's own; None where it has none.
        """

    @abstractmethod
    def forward(self, hidden: Hidden, batch: PackedBatch, request: HeadRequest) -> Any:
        """Outputs of the head; the loss where the request has targets and the head can give it.

        Args:
            hidden: rows of the pack, or of its first rows where `num_first` says that they suffice.
            batch: what the trunk read.
            request: what is asked for.
        """
