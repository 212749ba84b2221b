"""Rows of key tables that image models share: special tokens with their positions, and the linear map of patches.

A special token of ours is a symbol. Others keep each as a tensor of its own, and often a row of positions with it,
which is added to a constant: here both are one row. Written back, such rows of positions are zero.
"""

import math
from collections.abc import Mapping, Sequence

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
    counts = list(tokens.values())
    num_places = math.prod(config.position.grid) if isinstance(config.position, Learned) else 0

    def num_folded(table: Tensor) -> int:
        count = table.shape[1] - num_places
        if count not in folded:
            raise ValueError(f"the table of positions must have {num_places} places")
        return count

    def read_symbols(found: Sequence[Tensor], _: TransformerConfig) -> Tensor:
        *parts, last = found
        if [part.shape[1] for part in parts[: len(counts)]] != counts:
            raise ValueError("special tokens of another number")
        given = [part.reshape(-1, config.width) for part in parts]
        lacking = config.embedding.vocab_size - sum(map(len, given))
        rows = torch.cat([*given, last.new_zeros(lacking, config.width)])
        if num_places and (count := num_folded(last)):
            rows = torch.cat([rows[:count] + last[0, :count], rows[count:]])
        return rows

    def write_symbols(tensor: Tensor, _: TransformerConfig) -> list[Tensor | None]:
        *parts, rest = tensor.split([*counts, len(tensor) - sum(counts)])
        hides = rest[0] if len(rest) else tensor.new_zeros(config.width)
        hidden = [hides.view(*[1] * (mask_axes - 1), -1)] if mask else []
        return [*(part[None] for part in parts), *hidden, None]

    # the last one tells where the rows of the prefix end; with no positions it tells the device alone
    foreign = (*tokens, *([mask] if mask else []), positions if num_places else f"{patches}.weight")
    rows = [
        Row("trunk.embedding.symbols.weight", foreign, Transform(read_symbols, write_symbols)),
        Row("trunk.embedding.patches", (patches,), _cut(*patch)),
    ]
    if num_places:
        places = Transform(
            lambda found, _: found[0][0, num_folded(found[0]) :],
            lambda tensor, _: [torch.cat([tensor.new_zeros(folded[0], config.width), tensor])[None]],
        )
        rows.append(Row("trunk.embedding.position.table.weight", (positions,), places))
    return tuple(rows)


def _cut(channels: int, side: int) -> Transform:
    """A convolution that cuts patches `[D, C, p, p]`, as a map of patches; a bias, of one axis, stays as it is."""
    return Transform(
        lambda found, _: found[0].flatten(1) if found[0].ndim > 1 else found[0],
        lambda tensor, _: [tensor.view(-1, channels, side, side) if tensor.ndim > 1 else tensor],
    )


def shaped(*shape: int) -> Transform:
    """A vector of ours that the other library keeps in this shape."""
    return Transform(lambda found, _: found[0].flatten(), lambda tensor, _: [tensor.view(*shape)])
