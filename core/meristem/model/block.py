"""One block: attention and feed-forward, each joined to the trunk with a norm."""

from torch import nn

from meristem.model.attention import AttentionLayer, Context
from meristem.model.config import TransformerConfig
from meristem.model.feedforward import FeedForwardLayer
from meristem.model.norm import build_norm
from meristem.shapes import Float, Tensor


class Block(nn.Module):
    """Attention, then feed-forward; the norm stands before each branch or after each sum."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.is_before = config.residual.placement == "before"
        self.attention_norm = build_norm(config.norm, config.width)
        self.attention = AttentionLayer(config)
        self.feedforward_norm = build_norm(config.norm, config.width)
        self.feedforward = FeedForwardLayer(config)
        self.dropout = nn.Dropout(config.residual.dropout)

    def forward(
        self, x: Float[Tensor, "T D"], context: Context, maps: list[Tensor] | None = None
    ) -> Float[Tensor, "T D"]:
        if self.is_before:
            x = x + self.dropout(self.attention(self.attention_norm(x), context, maps))
            return x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, context, maps)))
        return self.feedforward_norm(x + self.dropout(self.feedforward(x)))
