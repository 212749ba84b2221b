"""A trunk and its heads: what a model directory holds and every verb runs."""

import copy
from collections.abc import Collection, Mapping

import torch
from torch import nn

from meristem.errors import ConfigError
from meristem.model.attention import first_rows
from meristem.model.config import TransformerConfig
from meristem.model.heads import Head, HeadSpec, Readout, readouts_of
from meristem.model.outputs import Outputs, Wanted
from meristem.model.pool import PoolLayer, build_pool
from meristem.model.transformer import Encoder, EncoderDecoder, build_trunk
from meristem.types import Hidden, PackedBatch

SYMBOLS = "tokens"
"""Name of the head that predicts symbols."""


class Model(nn.Module):
    """A trunk and its heads by name. `forward` is the only way to run it, so that what wraps a model sees every run.

    Args:
        config: config of the trunk, the pool and the symbol head.
        heads: spec of each head by name; the head that predicts a label has the name of the label. Kept as `specs`.
    """

    def __init__(self, config: TransformerConfig, heads: Mapping[str, HeadSpec] | None = None):
        super().__init__()
        self.config, self.specs = config, dict(heads or {})
        self.trunk = build_trunk(config)
        self.pool: PoolLayer | None = None if config.pool is None else build_pool(config.pool, config)
        self.heads = nn.ModuleDict({name: spec.build(config) for name, spec in self.specs.items()})
        for name in self.heads:
            self.head(name).tie(self.trunk.embedding, self.pool)

    def forward(self, batch: PackedBatch, wanted: Wanted) -> Outputs:
        """Run the trunk over a pack, then the pool and the heads that are wanted.

        Raises:
            ConfigError: the model does not have a head, a layer or a pool that is wanted.
            DataError: a sequence longer than its positions allow.
        """
        heads = {name: self.head(name) for name in wanted.heads}
        if wanted.is_pooled and self.pool is None:
            raise ConfigError(
                "the model must have a pool of its own to be asked for it (architecture.pool); it has none"
            )
        if wanted.is_source_only and batch.source is not None:
            batch = batch.source
        hidden = wanted.hidden or self._run_trunk(batch, wanted, heads.values())
        pooled = self.pool(hidden.final, hidden.layout) if wanted.is_pooled and self.pool else None
        values = {name: head(hidden, batch, wanted.heads[name]) for name, head in heads.items()}
        return Outputs(hidden, values, pooled, is_training=self.training)

    def _run_trunk(self, batch: PackedBatch, wanted: Wanted, heads: Collection[Head]) -> Hidden:
        if any(head.needs_attentions for head in heads):
            wanted = wanted.but(attentions=range(self.config.num_layers))
        last_rows = None
        if isinstance(self.trunk, Encoder) and self.trunk.may_leave_rows_of(wanted):
            readers: list[Head | PoolLayer] = [*heads, *([self.pool] if wanted.is_pooled and self.pool else [])]
            # None where rows are used that are not among the first of a sequence
            counts = [wanted.num_first, *(reader.num_first for reader in readers)]
            known = [count for count in counts if count is not None]
            if len(known) == len(counts) and max(known):
                last_rows = first_rows(batch.layout, max(known))
        return self.trunk(batch, wanted, last_rows)

    @property
    def readouts(self) -> tuple[Readout, ...]:
        """Specs of the heads that predict labels."""
        return readouts_of(self.specs)

    def head(self, name: str) -> Head:
        """The head with this name.

        Raises:
            ConfigError: the model has no such head; the message lists those that it has.
        """
        if name not in self.heads:
            known = ", ".join(self.heads) or "none: the model is a trunk alone"
            raise ConfigError(f"head must be one of {known}; got {name!r}")
        head = self.heads[name]
        assert isinstance(head, Head)
        return head

    def over(self, trunk: Encoder | EncoderDecoder) -> "Model":
        """A model with another trunk, and with the pool and heads of this one, whose parameters both share."""
        other = copy.copy(self)
        other._modules = {**self._modules, "trunk": trunk}
        return other

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.trunk.embedding.symbols.weight.device
