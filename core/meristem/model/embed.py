"""The embedding: a table for symbols, a linear map for patches."""

import torch
from torch import nn

from meristem.model.config import TransformerConfig
from meristem.model.norm import build_norm
from meristem.model.position import build_added
from meristem.shapes import Float, Tensor
from meristem.types import PackedBatch


class EmbeddingLayer(nn.Module):
    """Embeds symbols and patches; then token dropout, token types, positions, a norm and dropout, in this order."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        part = self.config = config.embedding
        self.symbols = nn.Embedding(part.vocab_size, config.width)
        self.patches = nn.Linear(part.patch_features, config.width, part.feature_bias) if part.patch_features else None
        self.types = nn.Embedding(part.token_types, config.width) if part.token_types else None
        self.position = build_added(config.position, config.width)
        self.norm = build_norm(config.norm, config.width) if part.is_normed else nn.Identity()
        self.dropout = nn.Dropout(part.dropout)

    def forward(self, batch: PackedBatch) -> Float[Tensor, "T D"]:
        x_TD = self.symbols(batch.ids.clamp(min=0))
        if self.config.scale != 1.0:
            x_TD = x_TD * self.config.scale
        if self.patches is not None:
            assert batch.features is not None, "a model of patches needs features"
            x_TD = torch.where(batch.ids[:, None] < 0, self.patches(batch.features.to(x_TD.dtype)), x_TD)
        if self.config.mask_dropout_frac:
            x_TD = self._drop_masked(x_TD, batch)
        if self.types is not None:
            types = torch.zeros_like(batch.ids) if batch.token_types is None else batch.token_types
            x_TD = x_TD + self.types(types)
        if self.position is not None:
            x_TD = x_TD + self.position(batch.positions).to(x_TD.dtype)
        return self.dropout(self.norm(x_TD))

    def _drop_masked(self, x_TD: Float[Tensor, "T D"], batch: PackedBatch) -> Float[Tensor, "T D"]:
        """Zero masked rows and scale each sequence for the share of masks it has.

        Lengths count special rows too, as the reference does.
        """
        layout = batch.layout
        assert self.config.mask_id is not None
        is_mask = batch.ids.eq(self.config.mask_id)
        segment = layout.segment_of_row
        num_masks = torch.zeros(len(layout.segments), device=x_TD.device).index_add_(0, segment, is_mask.float())
        # the spare rows may be no row at all
        lengths = torch.tensor(layout.segments, dtype=torch.float32, device=x_TD.device).clamp(min=1)
        scale_S = (1 - self.config.mask_dropout_frac) / (1 - num_masks / lengths)
        x_TD = x_TD.masked_fill(is_mask[:, None], 0.0)
        return (x_TD * scale_S[segment, None]).to(x_TD.dtype)
