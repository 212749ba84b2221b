"""From rows of a batch to vectors: a table for symbols, a linear map for patches."""

import torch
from torch import nn

from meristem.model.config import TransformerConfig
from meristem.model.norm import build_norm
from meristem.model.position import PositionLayer
from meristem.shapes import Float, Tensor
from meristem.types import PackedBatch


class EmbeddingLayer(nn.Module):
    """Symbols and patches to `[T, D]`, with token dropout, positions, a norm and dropout, in this order."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config.embedding
        self.symbols = nn.Embedding(self.config.vocab_size, config.width)
        self.patches = nn.Linear(self.config.patch_features, config.width) if self.config.patch_features else None
        self.norm = build_norm(config.norm, config.width) if self.config.is_normed else nn.Identity()
        self.dropout = nn.Dropout(self.config.dropout)

    def forward(self, batch: PackedBatch, position: PositionLayer) -> Float[Tensor, "T D"]:
        x_TD = self.symbols(batch.ids.clamp(min=0))
        if self.patches is not None:
            assert batch.features is not None, "a model of patches needs features"
            x_TD = torch.where(batch.ids[:, None] < 0, self.patches(batch.features.to(x_TD.dtype)), x_TD)
        if self.config.mask_dropout_frac:
            x_TD = self._drop_masked(x_TD, batch)
        return self.dropout(self.norm(position.add(x_TD, batch.positions)))

    def _drop_masked(self, x_TD: Float[Tensor, "T D"], batch: PackedBatch) -> Float[Tensor, "T D"]:
        """Zero masked rows and scale each sequence for the share of masks it has.

        Counted in each sequence on its own: the scale of one never depends on another. Lengths count
        special rows too, as the reference does.
        """
        layout = batch.layout
        assert self.config.mask_id is not None
        is_mask = batch.ids.eq(self.config.mask_id)
        segment = layout.segment_of_row
        # float sums of zeros and ones are exact, in any order
        num_masks = torch.zeros(len(layout.segments), device=x_TD.device).index_add_(0, segment, is_mask.float())
        # the spare rows may be no row at all
        lengths = torch.tensor(layout.segments, dtype=torch.float32, device=x_TD.device).clamp(min=1)
        scale_S = (1 - self.config.mask_dropout_frac) / (1 - num_masks / lengths)
        x_TD = x_TD.masked_fill(is_mask[:, None], 0.0)
        return (x_TD * scale_S[segment, None]).to(x_TD.dtype)
