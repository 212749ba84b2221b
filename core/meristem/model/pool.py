"""Pooling: from the rows of each sequence to one vector.

On a CPU sequences are reduced one by one, on a GPU in one kernel, which adds up the rows of each in their order.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from meristem.model.config import AttentionPool, Full, Init, Mean, Pool, Prefix, TransformerConfig
from meristem.model.exact import with_spare_rows
from meristem.model.feedforward import ACTIVATIONS
from meristem.model.init import init_weights
from meristem.model.kernels import Packed, Scoring, attend
from meristem.model.norm import build_norm
from meristem.shapes import Float, Tensor
from meristem.types import Layout


def pool_rows(pool: Pool, x: Float[Tensor, "T D"], layout: Layout) -> Float[Tensor, "S W"]:
    """Pool each sequence into one fp32 vector, by a pool without weights; several prefix rows are concatenated.

    Means and maxima leave out the special rows of the layout, unless a sequence has no others.
    """
    if isinstance(pool, Prefix):
        assert min(layout.lengths) >= pool.count, "a sequence has the rows of a prefix"
        starts_S1 = torch.tensor(layout.starts[: layout.num_sequences])[:, None]
        rows_Sp = (starts_S1 + torch.arange(pool.count)).to(x.device, non_blocking=True)
        first_SW = x[rows_Sp].float().flatten(1)
        return torch.cat([first_SW, pool_rows(Mean(), x, layout)], 1) if pool.has_mean else first_SW
    rows, own = _payload_rows(x, layout)
    return (_together if x.is_cuda else _one_by_one)(pool, rows.float(), own.lengths)


def _one_by_one(pool: Pool, rows: Float[Tensor, "t D"], lengths: Sequence[int]) -> Float[Tensor, "S D"]:
    # split once: the gradient of a slice would be a tensor of all rows, and that for each sequence
    sequences = rows.split(list(lengths))
    return torch.stack([one.mean(0) if isinstance(pool, Mean) else one.amax(0) for one in sequences])


def _together(pool: Pool, rows: Float[Tensor, "t D"], lengths: Sequence[int]) -> Float[Tensor, "S D"]:
    """The same of all sequences at once: a GPU would wait for the launches of a loop."""
    lengths_S = torch.tensor(lengths).to(rows.device, non_blocking=True)
    return torch.segment_reduce(rows, "mean" if isinstance(pool, Mean) else "max", lengths=lengths_S, unsafe=True)


class PoolLayer(nn.Module):
    """Pools each sequence into one vector of `width`. This class serves pools without weights."""

    def __init__(self, pool: Pool, width: int):
        super().__init__()
        self.config = pool
        rows_aside = pool.count + pool.has_mean if isinstance(pool, Prefix) and not pool.is_dense else 1
        self.width = width * rows_aside

    @property
    def num_first(self) -> int | None:
        """Number of first rows of each sequence that the pool reads; None where it reads others too."""
        return self.config.count if isinstance(self.config, Prefix) and not self.config.has_mean else None

    def forward(self, x: Float[Tensor, "T D"], layout: Layout) -> Float[Tensor, "S W"]:
        """One fp32 vector for each sequence; see `pool_rows` for the special rows."""
        return pool_rows(self.config, x, layout)


class NormedMean(PoolLayer):
    """A mean, then a norm."""

    def __init__(self, pool: Mean, config: TransformerConfig):
        super().__init__(pool, config.width)
        self.norm = build_norm(config.norm, config.width)
        init_weights(self, config.init, config.num_layers)

    def forward(self, x: Float[Tensor, "T D"], layout: Layout) -> Float[Tensor, "S W"]:
        return self.norm(pool_rows(self.config, x, layout))


class DensePrefix(PoolLayer):
    """The first rows, a linear map, tanh (Devlin 2019)."""

    def __init__(self, pool: Prefix, config: TransformerConfig):
        super().__init__(pool, config.width)
        self.dense = nn.Linear(config.width * (pool.count + pool.has_mean), config.width)
        init_weights(self, config.init, config.num_layers)

    def forward(self, x: Float[Tensor, "T D"], layout: Layout) -> Float[Tensor, "S W"]:
        first_SW = pool_rows(self.config, x, layout)
        return self.dense(with_spare_rows(first_SW))[: layout.num_sequences].tanh()


class AttentionPoolLayer(PoolLayer):
    """A learned query attends to the rows of a sequence, then a feed-forward layer with a residual (Zhai 2022)."""

    def __init__(self, pool: AttentionPool, config: TransformerConfig):
        super().__init__(pool, config.width)
        width, self.num_heads, self.has_special = config.width, pool.num_heads, pool.has_special
        self.query = nn.Parameter(torch.empty(width))
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm = build_norm(config.norm, width)
        self.up, self.down = nn.Linear(width, pool.feedforward_width), nn.Linear(pool.feedforward_width, width)
        self.activation = ACTIVATIONS[pool.activation]
        init_weights(self, config.init, config.num_layers)

    def forward(self, x: Float[Tensor, "T D"], layout: Layout) -> Float[Tensor, "S W"]:
        x = x.float()
        kv_THE = self.kv(x).unflatten(-1, (2 * self.num_heads, -1))
        if not self.has_special:
            kv_THE, layout = _payload_rows(kv_THE, layout)
        k_THE, v_THE = kv_THE.chunk(2, dim=1)
        q_layout = Layout((1,) * layout.num_sequences, device=layout.device)
        q_SHE = self.q(self.query[None]).unflatten(-1, (self.num_heads, -1)).expand(layout.num_sequences, -1, -1)
        pooled_SD = attend(Packed(q_SHE.contiguous(), k_THE, v_THE, q_layout, layout), Scoring(Full())).flatten(1)
        pooled_SD = self.out(with_spare_rows(pooled_SD))
        fed_SD = pooled_SD + self.down(self.activation(self.up(self.norm(pooled_SD))))
        return fed_SD[: layout.num_sequences]

    def init_own_weights(self, config: Init) -> None:
        """Fill the query as a row of an embedding table."""
        nn.init.trunc_normal_(self.query, std=config.std, a=-2 * config.std, b=2 * config.std)


def _payload_rows(x: Float[Tensor, "T ..."], layout: Layout) -> tuple[Float[Tensor, "t ..."], Layout]:
    """The rows of the payloads' own tokens, and where they lie; of a sequence that has none, all."""
    is_inner = np.ones(layout.num_tokens, bool)
    is_inner[list(layout.special_rows)] = False
    sequences = np.repeat(np.arange(layout.num_sequences), layout.lengths)
    counts = np.bincount(sequences[is_inner], minlength=layout.num_sequences)
    is_inner |= (counts == 0)[sequences]
    lengths = np.where(counts == 0, layout.lengths, counts)
    rows = x[: layout.num_tokens]
    if not is_inner.all():
        rows = x.index_select(0, torch.from_numpy(np.flatnonzero(is_inner)).to(x.device, non_blocking=True))
    return rows, replace(layout, lengths=tuple(lengths.tolist()), num_spare=0, special_rows=())


def build_pool(pool: Pool, config: TransformerConfig) -> PoolLayer:
    """The module of a pool in a model of this config."""
    match pool:
        case AttentionPool():
            return AttentionPoolLayer(pool, config)
        case Mean() if pool.is_normed:
            return NormedMean(pool, config)
        case Prefix() if pool.is_dense:
            return DensePrefix(pool, config)
        case _:
            return PoolLayer(pool, config.width)
