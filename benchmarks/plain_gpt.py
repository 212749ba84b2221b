"""A GPT as people write it in one file of plain PyTorch: padded batches, one fused projection, SDPA, a tied head.

Pre-norm blocks with biases, learned positions, the tanh form of GELU (Radford 2019). It is the peer of
`training.py`, and takes the weights of ours.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from meristem.shapes import Float, Int, Tensor
from meristem.types import IGNORE

NAMES = (
    ("trunk.embedding.symbols", "symbols"),
    ("trunk.embedding.position.table", "places"),
    ("trunk.final_norm", "norm"),
    ("trunk.blocks", "blocks"),
    ("attention_norm", "norm_1"),
    ("feedforward_norm", "norm_2"),
    ("attention.qkv", "qkv"),
    ("attention.out", "out"),
    ("feedforward.up", "up"),
    ("feedforward.down", "down"),
)
"""Parts of our names, and what they are called here."""


class PlainBlock(nn.Module):
    """Attention and feed-forward, each behind its norm."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "B n D"]) -> Float[Tensor, "B n D"]:
        batch, length, width = x.shape
        parts = self.qkv(self.norm_1(x)).split(width, dim=2)
        q, k, v = (part.view(batch, length, self.num_heads, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """The whole model, and its loss.

    Args:
        max_length: positions that there are.
    """

    def __init__(self, vocab_size: int, max_length: int, width: int, num_layers: int, num_heads: int):
        super().__init__()
        self.symbols, self.places = nn.Embedding(vocab_size, width), nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(PlainBlock(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Int[Tensor, "B n"], labels: Int[Tensor, "B n"]) -> Float[Tensor, ""]:
        """Mean cross-entropy (nats) of the symbols behind each; right padding is never seen by what lies before it.

        Args:
            labels: the ids, `IGNORE` in the padding.
        """
        x = self.symbols(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.symbols.weight)
        behind = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        return F.cross_entropy(logits.flatten(0, 1).float(), behind.flatten(), ignore_index=IGNORE)

    def take(self, tensors: Mapping[str, Tensor]) -> "PlainGPT":
        """Take over the weights of a model of ours, all of them."""
        renamed = {}
        for name, tensor in tensors.items():
            for own, plain in NAMES:
                name = name.replace(own, plain)
            renamed[name] = tensor
        self.load_state_dict(renamed, strict=True)
        return self
