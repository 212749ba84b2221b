"""The contract of a head."""

from abc import abstractmethod
from typing import Any

from torch import nn

from meristem.model.embed import EmbeddingLayer
from meristem.model.outputs import HeadRequest
from meristem.model.pool import PoolLayer
from meristem.types import Hidden, PackedBatch


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
