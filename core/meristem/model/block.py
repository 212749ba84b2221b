"""One transformer block: attention, cross-attention in a decoder, feed-forward, each in a residual branch."""

import torch
from torch import nn

from meristem.model.attention import AttentionLayer, Context, CrossAttentionLayer, KeptRows
from meristem.model.compiler import has_compiler
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

    def forward(self, x: Float[Tensor, "T D"], context: Context, kept: KeptRows | None = None) -> Float[Tensor, "M D"]:
        """Run the block; return all rows, or only the kept ones where some are named.

        Every row is a key and a value. What follows attention is computed for the kept rows alone.
        """
        placement, rows = self.residual.placement, context if kept is None else kept
        normed = x if placement == "after" else self.attention_norm(x)
        attended = self._join(self.attention(normed, context, kept), self.attention_scale, rows)
        if kept is not None:
            x = x.index_select(0, kept.rows)
        x = x + attended
        if placement == "parallel":
            normed = normed if kept is None else normed.index_select(0, kept.rows)
            return x + self._join(self._feed(normed, context), self.feedforward_scale, rows)
        del (
            normed,
            attended,
        )  # held, their memory could not be used again at once: 6 % of a ViT-S pass on a CPU
        if placement == "before":
            if self.has_source:
                x = x + self._join(self.cross(self.cross_norm(x), context), self.cross_scale, rows)
            return x + self._join(self._feed(self.feedforward_norm(x), context), self.feedforward_scale, rows)
        x = self.attention_norm(x)
        if self.has_source:
            x = self.cross_norm(x + self._join(self.cross(x, context), self.cross_scale, rows))
        return self.feedforward_norm(x + self._join(self._feed(x, context), self.feedforward_scale, rows))

    def _feed(self, x: Float[Tensor, "T D"], context: Context) -> Float[Tensor, "T D"]:
        return self._ask_experts(x, context) if self.has_experts else self.feedforward(x)

    def _ask_experts(self, x: Float[Tensor, "T D"], context: Context) -> Float[Tensor, "T D"]:
        fed, context.routing[self.layer] = self.experts(x, context.layout)
        return fed

    def _join(
        self, branch: Float[Tensor, "T D"], scale: Tensor | None, rows: Context | KeptRows
    ) -> Float[Tensor, "T D"]:
        """The output of a branch as it is added to the residual stream: dropped out, scaled, or left out."""
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


AS_IT_STANDS: dict[type[nn.Module], tuple[str, ...]] = {
    AttentionLayer: ("_attend",),
    CrossAttentionLayer: ("forward",),
    Block: ("_ask_experts", "_drop_sequences"),
}
"""Methods that are not compiled, by class: they depend on the lengths of sequences, which lie on the host."""


def compile_blocks(trunk: nn.Module, device: torch.device | str) -> bool:
    """Compile each block of a trunk, once for packs of any size; without a compiler, say so and return False.

    Norms, maps, rotations and activations are fused. Names of parameters do not change.
    """
    if not has_compiler(device):
        return False
    for module in trunk.modules():
        for name in AS_IT_STANDS.get(type(module), ()):
            setattr(module, name, torch.compiler.disable(getattr(module, name)))
        if isinstance(module, Block):
            module.compile(dynamic=True)
    return True
