"""Self-attention and cross-attention: projections, positions, a kernel, the output projection."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from meristem.model.cache import Cache
from meristem.model.config import Full, LayerParts
from meristem.model.kernels import Packed, Scoring, Slotted, attend, attend_cached, attend_reference
from meristem.model.norm import build_norm
from meristem.model.position import BetweenLayer, ScoreBias, Tables
from meristem.shapes import Float, Int, Tensor
from meristem.types import Hidden, Layout, Routing


@dataclass(frozen=True)
class Placed:
    """A kind of position, with the tables and the bias that it computed once for the rows of a batch."""

    layer: BetweenLayer
    tables: Tables
    bias: ScoreBias | None


@dataclass(eq=False)
class KeptRows:
    """The rows of a stack's output that the caller will use. The last block computes only these.

    Not frozen: when torch 2.11 compiles, it looks at every field of a frozen value, lengths of sequences included, and
    compiles anew for each pack.

    Attributes:
        rows: `[M]` their places in the pack, in order.
        layout: where the sequences lie among these rows, spare ones included.
    """

    rows: Int[Tensor, "M"]
    layout: Layout


def first_rows(layout: Layout, count: int) -> KeptRows:
    """Choose the first `count` rows of each sequence, or all rows of a sequence that has fewer."""
    lengths = [min(count, length) for length in layout.lengths]
    rows = np.concatenate([np.arange(start, start + n) for start, n in zip(layout.starts, lengths)])
    chosen = Layout.of(lengths, is_special=np.isin(rows, layout.special_rows))
    rows = np.append(rows, np.zeros(chosen.num_spare, rows.dtype))
    return KeptRows(torch.from_numpy(rows).to(layout.device, non_blocking=True), chosen.to(layout.device))


class Context:
    """What the layers of a stack share within one batch, and where they leave what was asked for.

    A plain class: FSDP2 copies dataclass arguments and casts what they hold, so it would round the tables of positions
    and lose what layers leave here.

    Args:
        source: hidden rows that a decoder attends to.
        cache: keys and values of the tokens before these.
        attentions: layers whose attention weights to keep; these run on the slow reference kernel.

    Attributes:
        maps: attention weights `[H, n, n]` of each sequence, by layer, of the layers in `attentions`.
        routing: decisions of the routers, by layer.
    """

    def __init__(
        self,
        layout: Layout,
        placed: tuple[Placed, ...],
        source: Hidden | None = None,
        cache: Cache | None = None,
        attentions: Iterable[int] = (),
    ):
        self.layout, self.placed, self.source, self.cache = layout, placed, source, cache
        self.maps: dict[int, list[Tensor]] = {layer: [] for layer in attentions}
        self.routing: dict[int, Routing] = {}


class AttentionLayer(nn.Module):
    """Multi-head self-attention over packed sequences; `layer` and `position` are as in `Block`.

    Queries, keys and values come from one product; the rows of its weight are queries, keys, values in
    this order, each head after head.
    """

    def __init__(self, parts: LayerParts, layer: int = 0, position: int = 0):
        super().__init__()
        self.config, self.layer, self.position = parts.attention, layer, position
        self.head_width = parts.head_width
        self.num_heads, self.num_kv_heads = self._heads = self.config.num_heads, self.config.kv_heads
        out = (self.num_heads + 2 * self.num_kv_heads) * self.head_width
        self.qkv = nn.Linear(parts.width, out, bias=self.config.qkv_bias)
        if self.config.qk_norm is not None:
            is_full = self.config.qk_norm == "full"
            widths = [heads * self.head_width if is_full else self.head_width for heads in self._heads]
            self.q_norm, self.k_norm = (build_norm(parts.norm, width, has_bias=False) for width in widths)
        self.out = nn.Linear(self.num_heads * self.head_width, parts.width, bias=self.config.out_bias)

    def forward(self, x: Float[Tensor, "T D"], context: Context, kept: KeptRows | None = None) -> Float[Tensor, "T D"]:
        """Attend within each sequence. If `kept` names rows, only these are queries."""
        placed = context.placed[self.position]
        q_THE, k_TKE, v_TKE = self._project(x, placed)
        q_MHE = q_THE if kept is None else q_THE.index_select(0, kept.rows)
        return self.out(self._attend(q_MHE, k_TKE, v_TKE, context, placed.bias, kept).flatten(1))

    def _project(self, x: Float[Tensor, "T D"], placed: Placed) -> Sequence[Float[Tensor, "T X E"]]:
        """Queries, keys and values; the first two are rotated by their positions."""
        heads_TXE = self.qkv(x).unflatten(-1, (-1, self.head_width))
        if self.config.qk_norm is None and not placed.tables:  # one split, since the gradient of each is a copy
            return heads_TXE.split([*self._heads, self.num_kv_heads], dim=1)
        qk_TXE, v_TKE = heads_TXE.split([sum(self._heads), self.num_kv_heads], dim=1)
        if self.config.qk_norm is not None:
            q_THE, k_TKE = qk_TXE.split(self._heads, dim=1)
            qk_TXE = torch.cat([self._norm(self.q_norm, q_THE), self._norm(self.k_norm, k_TKE)], dim=1)
        return *placed.layer.turn(qk_TXE, placed.tables).split(self._heads, dim=1), v_TKE

    def _norm(self, norm: nn.Module, x_THE: Float[Tensor, "T H E"]) -> Float[Tensor, "T H E"]:
        if self.config.qk_norm == "head":
            return norm(x_THE)
        return norm(x_THE.flatten(1)).unflatten(-1, (-1, self.head_width))

    def _attend(
        self,
        q_THE: Float[Tensor, "T H E"],
        k_TKE: Float[Tensor, "T K E"],
        v_TKE: Float[Tensor, "T K E"],
        context: Context,
        bias: ScoreBias | None,
        kept: KeptRows | None,
    ) -> Float[Tensor, "T H E"]:
        layout, cache = context.layout, context.cache
        scoring = Scoring(self.config.pattern, bias, self.config.scale, self.config.dropout if self.training else 0.0)
        if cache is not None:
            k_RUKE, v_RUKE = cache.add(self.layer, k_TKE, v_TKE, layout)
            if not cache.is_empty:
                lengths = tuple(n + more for n, more in zip(cache.lengths, layout.lengths))
                return attend_cached(Slotted(q_THE, k_RUKE, v_RUKE, layout, lengths, cache.slots), scoring)
        packed = Packed(q_THE, k_TKE, v_TKE, layout if kept is None else kept.layout, layout)
        if self.layer not in context.maps:
            return attend(packed, scoring)
        o_THE, weights = attend_reference(packed, scoring)
        context.maps[self.layer].extend(weights)
        return o_THE


class CrossAttentionLayer(nn.Module):
    """Attention from each row of a decoder to all rows of its source sequence, without positions."""

    def __init__(self, parts: LayerParts, layer: int):
        super().__init__()
        self.config, self.layer, self.head_width = parts.attention, layer, parts.head_width
        q_width, kv_width = (heads * self.head_width for heads in (self.config.num_heads, self.config.kv_heads))
        self.q = nn.Linear(parts.width, q_width, bias=self.config.qkv_bias)
        self.kv = nn.Linear(parts.width, 2 * kv_width, bias=self.config.qkv_bias)
        self.out = nn.Linear(q_width, parts.width, bias=self.config.out_bias)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Float[Tensor, "T D"]:
        """Attend to the source of each sequence."""
        source, cache = context.source, context.cache
        assert source is not None, "a decoder layer needs a source"
        kv = None if cache is None else cache.cross.get(self.layer)
        if kv is None:
            kv = self.kv(source.final).unflatten(-1, (-1, self.head_width)).chunk(2, dim=1)
            if cache is not None:
                cache.cross[self.layer] = kv
        q_THE, (k_UKE, v_UKE) = self.q(x).unflatten(-1, (-1, self.head_width)), kv
        packed = Packed(q_THE, k_UKE, v_UKE, context.layout, source.layout)
        scoring = Scoring(Full(), scale=self.config.scale, dropout=self.config.dropout if self.training else 0.0)
        return self.out(attend(packed, scoring).flatten(1))
