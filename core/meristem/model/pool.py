"""From the rows of each sequence to one vector.

Each sequence is reduced on its own: a sum over a pack with `index_add` would round by what lies beside it.
"""

import torch

from meristem.model.config import Max, Mean, Pool, Prefix
from meristem.shapes import Float, Tensor
from meristem.types import Layout


def pool_rows(
    pool: Pool, x: Float[Tensor, "T D"], layout: Layout, num_special: tuple[int, int] = (0, 0)
) -> Float[Tensor, "S D"]:
    """One vector a sequence, in fp32.

    Args:
        num_special: special rows before and behind each payload; means and maxima leave them out, unless
            there is nothing else.
    """
    before, behind = num_special
    vectors = []
    for start, length in zip(layout.starts, layout.lengths):
        inner = (
            slice(start + before, start + length - behind) if length > before + behind else slice(start, start + length)
        )
        match pool:
            case Mean():
                vectors.append(x[inner].float().mean(0))
            case Max():
                vectors.append(x[inner].float().amax(0))
            case Prefix():
                vectors.append(x[start].float())
            case _:
                raise AssertionError(pool)
    return torch.stack(vectors)
