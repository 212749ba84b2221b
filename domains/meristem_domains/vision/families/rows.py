"""Rows of key tables that image models share: special tokens with their positions, and the linear map of patches.

A special token of ours is a symbol. Others keep each as a tensor of its own, and often a row of positions with it,
which is added to a constant: here both are one row. Written back, such rows of positions are zero.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from meristem.interop.table import Row, Transform
from meristem.model.config import Learned, TransformerConfig
from meristem.shapes import Tensor


def embedding_rows(
    config: TransformerConfig,
    tokens: Mapping[str, int],
    positions: str,
    patches: str,
    patch: tuple[int, int],
    folded: Sequence[int] = (0,),
    mask: str | None = None,
    mask_axes: int = 2,
) -> tuple[Row, ...]:
    """Rows for the symbol table, the position table and the linear map of patches.

    Args:
        config: our architecture; its symbols are those of the prefix, and one that hides a patch if there is another.
        tokens: tensors of the prefix `[1, n, D]` by name, in order, and how many tokens each holds.
        positions: name of the table of positions `[1, n, D]`, for models that have one.
        patches: name of the convolution that cuts patches `[D, C, p, p]`.
        patch: channels and side of a patch.
        folded: rows for the prefix that the table of positions may begin with; the first number is written.
        mask: name of the tensor that hides a patch; None for none: our symbol is zero then, and stays behind.
        mask_axes: number of axes of that tensor.
    """
    prefix = _Prefix(list(tokens.values()), folded, mask_axes if mask else 0)
    has_table = _num_places(config) > 0
    # the last one tells where the rows of the prefix end; with no positions it tells the device alone
    foreign = (*tokens, *([mask] if mask else []), positions if has_table else f"{patches}.weight")
    rows = [
        Row("trunk.embedding.symbols.weight", foreign, Transform(prefix.read_symbols, prefix.write_symbols)),
        Row("trunk.embedding.patches", (patches,), _cut(*patch)),
    ]
    if has_table:
        places = Transform(prefix.read_places, prefix.write_places)
        rows.append(Row("trunk.embedding.position.table.weight", (positions,), places))
    return tuple(rows)


def _num_places(config: TransformerConfig) -> int:
    """Places of patches in the table of positions; 0 without one."""
    return math.prod(config.position.grid) if isinstance(config.position, Learned) else 0


@dataclass(frozen=True)
class _Prefix:
    """Special tokens before the patches.

    Attributes:
        counts: tokens in each foreign tensor of the prefix.
        folded: rows for the prefix that the table of positions may begin with; the first number is written.
        mask_axes: number of axes of the tensor that hides a patch; 0 for none.
    """

    counts: Sequence[int]
    folded: Sequence[int]
    mask_axes: int

    def num_folded(self, table: Tensor, config: TransformerConfig) -> int:
        count = table.shape[1] - _num_places(config)
        if count not in self.folded:
            raise ValueError(f"the table of positions must have {_num_places(config)} places")
        return count

    def read_symbols(self, found: Sequence[Tensor], config: TransformerConfig) -> Tensor:
        *parts, last = found
        if [part.shape[1] for part in parts[: len(self.counts)]] != list(self.counts):
            raise ValueError("special tokens of another number")
        given = [part.reshape(-1, config.width) for part in parts]
        lacking = config.embedding.vocab_size - sum(map(len, given))
        rows = torch.cat([*given, last.new_zeros(lacking, config.width)])
        if _num_places(config) and (count := self.num_folded(last, config)):
            rows = torch.cat([rows[:count] + last[0, :count], rows[count:]])
        return rows

    def write_symbols(self, tensor: Tensor, config: TransformerConfig) -> list[Tensor | None]:
        *parts, rest = tensor.split([*self.counts, len(tensor) - sum(self.counts)])
        hides = rest[0] if len(rest) else tensor.new_zeros(config.width)
        hidden = [hides.view(*[1] * (self.mask_axes - 1), -1)] if self.mask_axes else []
        return [*(part[None] for part in parts), *hidden, None]

    def read_places(self, found: Sequence[Tensor], config: TransformerConfig) -> Tensor:
        return found[0][0, self.num_folded(found[0], config) :]

    def write_places(self, tensor: Tensor, config: TransformerConfig) -> list[Tensor | None]:
        return [torch.cat([tensor.new_zeros(self.folded[0], config.width), tensor])[None]]


def _cut(channels: int, side: int) -> Transform:
    """A convolution that cuts patches `[D, C, p, p]`, as a map of patches; a bias, of one axis, stays as it is."""
    return Transform(
        lambda found, _: found[0].flatten(1) if found[0].ndim > 1 else found[0],
        lambda tensor, _: [tensor.view(-1, channels, side, side) if tensor.ndim > 1 else tensor],
    )


def shaped(*shape: int) -> Transform:
    """A vector of ours that the other library keeps in this shape."""
    return Transform(lambda found, _: found[0].flatten(), lambda tensor, _: [tensor.view(*shape)])
