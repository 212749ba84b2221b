"""Stacks of one `Block`."""

from collections.abc import Collection

import torch
from torch import nn

from meristem.errors import ConfigError, DataError
from meristem.model.attention import Context
from meristem.model.block import Block
from meristem.model.config import TransformerConfig
from meristem.model.embed import EmbeddingLayer
from meristem.model.init import init_weights
from meristem.model.norm import build_norm
from meristem.model.position import build_position
from meristem.shapes import Tensor
from meristem.types import Hidden, PackedBatch


class Encoder(nn.Module):
    """Embedding, blocks, final norm: packed rows to `[T, D]`.

    Built on the meta device it costs nothing; `init_weights` then fills what `to_empty` has made.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = EmbeddingLayer(config)
        self.position = build_position(config.position, config.width, config.head_width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = build_norm(config.norm, config.width) if config.final_norm else nn.Identity()
        init_weights(self, config.init, config.num_layers)

    def forward(self, batch: PackedBatch, layers: Collection[int] = (), attentions: Collection[int] = ()) -> Hidden:
        """Run the stack.

        Args:
            layers: hidden states to keep: 0 is the input of the first block, k the output of the k-th, the
                last one after the final norm. Negative ones count from the last; each is kept as it was asked for.
            attentions: blocks (from 0) whose attention maps to keep; these run on the slow reference kernel.

        Raises:
            ConfigError: a layer that the stack does not have.
            DataError: a sequence longer than its positions allow.
        """
        resolved = {layer: self.resolve_layer(layer) for layer in layers}
        longest, limit = max(batch.layout.lengths, default=0), self.config.max_length
        if limit is not None and longest > limit:
            raise DataError(f"a sequence must have {limit} tokens or fewer, as its positions allow; got {longest}")
        x_TD = self.embedding(batch, self.position)
        context = Context(batch.layout, self.position, self.position.tables(batch.positions))
        kept: dict[int, Tensor] = {0: x_TD}
        maps: dict[int, list[Tensor]] = {}
        for index, block in enumerate(self.blocks):
            if index in attentions:
                maps[index] = []
            x_TD = block(x_TD, context, maps.get(index))
            if index + 1 in resolved.values():
                kept[index + 1] = x_TD
        x_TD = self.final_norm(x_TD)
        kept[len(self.blocks)] = x_TD
        chosen = {layer: kept[index] for layer, index in resolved.items()}
        return Hidden(final=x_TD, layout=batch.layout, layers=chosen, attentions=maps)

    def resolve_layer(self, layer: int) -> int:
        """The layer counted from 0, of one that may be counted from the last.

        Raises:
            ConfigError: a layer that the stack does not have.
        """
        num_layers = len(self.blocks)
        resolved = layer + num_layers + 1 if layer < 0 else layer
        if not 0 <= resolved <= num_layers:
            raise ConfigError(f"layer must be in 0..{num_layers} or -{num_layers + 1}..-1; got {layer}")
        return resolved

    @property
    def device(self) -> torch.device:
        return self.embedding.symbols.weight.device
