"""A trunk and its heads: what a model directory holds and every verb runs."""

from collections.abc import Sequence

from torch import nn

from meristem.errors import ConfigError
from meristem.model.config import TransformerConfig
from meristem.model.heads import ContactHead, LabelHead, SymbolHead
from meristem.model.pool import build_pool
from meristem.model.readout import Readout
from meristem.model.transformer import Encoder, build_trunk
from meristem.shapes import Float, Tensor
from meristem.types import Hidden, Layout

SYMBOLS = "tokens"
"""Name of the head that predicts symbols."""

CONTACTS = "contacts"
"""Name of the head that predicts contacts from attention maps."""


def payload_maps(hidden: Hidden, num_special: tuple[int, int]) -> list[list[Float[Tensor, "H n n"]]]:
    """Attention between the tokens of each payload: by sequence, the maps of each layer kept."""
    before, behind = num_special
    inner = [slice(before, length - behind) for length in hidden.layout.lengths]
    return [
        [hidden.attentions[layer][index][:, rows, rows] for layer in sorted(hidden.attentions)]
        for index, rows in enumerate(inner)
    ]


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
        self.trunk = build_trunk(config)
        self.pool = None if config.pool is None else build_pool(config.pool, config)
        self.heads = nn.ModuleDict()
        if SYMBOLS in heads:
            self.heads[SYMBOLS] = SymbolHead(config)
        if CONTACTS in heads:
            self.heads[CONTACTS] = ContactHead(config)
        for readout in readouts:
            if readout.level == "record" and readout.pool is None and config.pool is None:
                raise ConfigError(f"label {readout.name!r} takes the model's own pool (pool: null), and it has none")
            self.heads[readout.name] = LabelHead(config, readout)

    def symbol_logits(self, hidden: Hidden) -> Float[Tensor, "T V"]:
        """Logits of every row; training scores only the rows that have a target."""
        logits: Tensor = self.heads[SYMBOLS](hidden.final, self.trunk.embedding.symbols.weight)
        return logits

    def label_outputs(
        self, name: str, rows: Float[Tensor, "T D"], layout: Layout, num_special: tuple[int, int]
    ) -> Float[Tensor, "R C"]:
        """Logits or scaled values of a label: `[S, C]` for records, `[T, C]` for tokens.

        Args:
            rows: the trunk's last.
            num_special: special rows before and behind each payload, left out of a mean.
        """
        outputs: Tensor = self.heads[name](self.pooled(name, rows, layout, num_special).to(rows.dtype))
        return outputs

    def pooled(
        self, name: str, rows: Float[Tensor, "T D"], layout: Layout, num_special: tuple[int, int]
    ) -> Float[Tensor, "R W"]:
        """What the head of a label reads: one vector a record, or every row; arguments as above."""
        head = self.heads[name]
        assert isinstance(head, LabelHead)
        if head.readout.level == "token":
            return rows
        pool = self.pool if head.pool is None else head.pool
        assert pool is not None
        vectors: Tensor = pool(rows, layout, num_special)
        return vectors

    def num_first(self, names: Sequence[str]) -> int | None:
        """First rows of each sequence that are all that the heads of these labels read of the trunk's last.

        None where they read others, or the last block makes all rows anyway.
        """
        heads = [self.heads[name] for name in names]
        pools = [head.pool or self.pool for head in heads if isinstance(head, LabelHead) and head.is_pooled]
        counts = [pool.num_first for pool in pools if pool is not None]
        known = [count for count in counts if count is not None]
        may = isinstance(self.trunk, Encoder) and self.trunk.may_leave_rows
        return max(known) if may and len(known) == len(names) else None

    def contact_logits(self, hidden: Hidden, num_special: tuple[int, int]) -> list[Float[Tensor, "n n"]]:
        """Logits of contact between the tokens of each payload, one map a sequence.

        Args:
            hidden: with the attention maps of all layers.
            num_special: special rows before and behind each payload, left out.
        """
        return [self.heads[CONTACTS](maps) for maps in payload_maps(hidden, num_special)]
