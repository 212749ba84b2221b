"""One transformer block: attention, cross-attention in a decoder, feed-forward, each in a residual branch."""

import torch
from torch import nn

from meristem.model.attention import AttentionLayer, Context, CrossAttentionLayer, KeptRows
from meristem.model.config import Init, LayerParts
from meristem.model.experts import ExpertsLayer
from meristem.model.feedforward import FeedForwardLayer
from meristem.model.norm import build_norm
from meristem.shapes import Float, Tensor


class Block(nn.Module):
    """One layer of a stack.

    Args:
        layer: number of the layer, counted through both stacks.
        position: index of its position among those of the stack.
    """

    attention_scale: Tensor | None
    cross_scale: Tensor | None
    feedforward_scale: Tensor | None

    def __init__(self, parts: LayerParts, layer: int = 0, position: int = 0):
        super().__init__()
        self.residual, self.drop_path, self.layer = parts.residual, parts.drop_path, layer
        self.attention_norm = build_norm(parts.attention_norm, parts.width)
        self.attention = AttentionLayer(parts, layer, position)
        if parts.has_source:
            self.cross_norm = build_norm(parts.norm, parts.width)
            self.cross = CrossAttentionLayer(parts, layer)
        self.has_source = parts.has_source
        if self.residual.placement != "parallel":
            self.feedforward_norm = build_norm(parts.norm, parts.width)
        if parts.experts is None:
            self.feedforward = FeedForwardLayer(parts.width, parts.feedforward)
        else:
            self.experts = ExpertsLayer(parts)
        self.has_experts = parts.experts is not None
        self.dropout = nn.Dropout(self.residual.dropout)
        names = ["attention_scale", *(["cross_scale"] if parts.has_source else []), "feedforward_scale"]
        for name in names:
            scaled = self.residual.layer_scale is not None
            self.register_parameter(name, nn.Parameter(torch.empty(parts.width)) if scaled else None)
        self.init_own_weights(None)

    def forward(self, x: Float[Tensor, "T D"], context: Context, kept: KeptRows | None = None) -> Float[Tensor, "T D"]:
        """Run the block; return all rows, or only the kept ones where some are named."""
        if kept is not None:
            return self._forward_kept(x, context, kept)
        match self.residual.placement:
            case "before":
                x = x + self._join(self.attention(self.attention_norm(x), context), self.attention_scale, context)
                if self.has_source:
                    x = x + self._join(self.cross(self.cross_norm(x), context), self.cross_scale, context)
                return x + self._join(self._feed(self.feedforward_norm(x), context), self.feedforward_scale, context)
            case "after":
                x = self.attention_norm(x + self._join(self.attention(x, context), self.attention_scale, context))
                if self.has_source:
                    x = self.cross_norm(x + self._join(self.cross(x, context), self.cross_scale, context))
                return self.feedforward_norm(x + self._join(self._feed(x, context), self.feedforward_scale, context))
            case _:  # parallel
                normed = self.attention_norm(x)
                attended = self._join(self.attention(normed, context), self.attention_scale, context)
                return x + attended + self._join(self._feed(normed, context), self.feedforward_scale, context)

    def _forward_kept(self, x: Float[Tensor, "T D"], context: Context, kept: KeptRows) -> Float[Tensor, "M D"]:
        """Every row is a key and a value; what follows attention is computed for the kept rows alone."""
        x_MD = x.index_select(0, kept.rows)
        is_after = self.residual.placement == "after"
        normed = x if is_after else self.attention_norm(x)
        attended_MD = self._join(self.attention(normed, context, kept), self.attention_scale, kept)
        if self.residual.placement == "parallel":
            fed_MD = self._feed(normed.index_select(0, kept.rows), context)
            return x_MD + attended_MD + self._join(fed_MD, self.feedforward_scale, kept)
        x_MD = self.attention_norm(x_MD + attended_MD) if is_after else x_MD + attended_MD
        fed_MD = self._feed(x_MD if is_after else self.feedforward_norm(x_MD), context)
        x_MD = x_MD + self._join(fed_MD, self.feedforward_scale, kept)
        return self.feedforward_norm(x_MD) if is_after else x_MD

    def _feed(self, x: Float[Tensor, "T D"], context: Context) -> Float[Tensor, "T D"]:
        if not self.has_experts:
            fed: Tensor = self.feedforward(x)
            return fed
        return self._ask_experts(x, context)

    def _ask_experts(self, x: Float[Tensor, "T D"], context: Context) -> Float[Tensor, "T D"]:
        fed, context.routing[self.layer] = self.experts(x, context.layout)
        return fed

    def _join(
        self, branch: Float[Tensor, "T D"], scale: Tensor | None, rows: Context | KeptRows
    ) -> Float[Tensor, "T D"]:
        """The output of a branch as it is added to the residual stream: dropped out, scaled, or left out.

        Args:
            rows: has the layout of the rows of the branch.
        """
        branch = self.dropout(branch)
        if scale is not None:
            branch = branch * scale
        if self.residual.scale != 1.0:
            branch = branch * self.residual.scale
        if self.training and self.drop_path:
            branch = self._drop_sequences(branch, rows)
        return branch

    def _drop_sequences(self, branch: Float[Tensor, "T D"], rows: Context | KeptRows) -> Float[Tensor, "T D"]:
        """Stochastic depth (Huang 2016, arXiv 1603.09382), drawn for each sequence."""
        kept = torch.rand(len(rows.layout.segments), device=branch.device) >= self.drop_path
        factor = (kept / (1 - self.drop_path)).to(branch.dtype)
        return branch * factor[rows.layout.segment_of_row, None]

    def init_own_weights(self, config: Init | None) -> None:
        """Set the learned factors of branches to the value in the config."""
        for name, parameter in self.named_parameters(recurse=False):
            assert name.endswith("_scale"), name
            nn.init.constant_(parameter, self.residual.layer_scale or 0.0)
