"""A trunk and its heads: what a model directory holds and every verb runs."""

from collections.abc import Sequence

from torch import nn

from meristem.model.config import TransformerConfig
from meristem.model.heads import ContactHead, LabelHead, SymbolHead
from meristem.model.readout import Readout
from meristem.model.transformer import Encoder
from meristem.shapes import Float, Tensor
from meristem.types import Hidden

SYMBOLS = "tokens"
"""Name of the head that predicts symbols."""

CONTACTS = "contacts"
"""Name of the head that predicts contacts from attention maps."""


class Model(nn.Module):
    """A trunk and its heads by name.

    Args:
        config: of the trunk and the symbol head.
        heads: heads that are no label's: `tokens`, `contacts`.
        readouts: the labels; each has a head of its name.
    """

    def __init__(self, config: TransformerConfig, heads: Sequence[str] = (), readouts: Sequence[Readout] = ()):
        super().__init__()
        self.config = config
        self.readouts = tuple(readouts)
        self.trunk = Encoder(config)
        self.heads = nn.ModuleDict()
        if SYMBOLS in heads:
            self.heads[SYMBOLS] = SymbolHead(config)
        if CONTACTS in heads:
            self.heads[CONTACTS] = ContactHead(config)
        for readout in readouts:
            self.heads[readout.name] = LabelHead(config, readout)

    def symbol_logits(self, hidden: Hidden) -> Float[Tensor, "T V"]:
        """Logits of every row; training scores only the rows that have a target."""
        return self.heads[SYMBOLS](hidden.final, self.trunk.embedding.symbols.weight)
