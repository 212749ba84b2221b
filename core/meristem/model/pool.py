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
    # split once: the gradient of a slice would be a tensor of all rows, and that for each sequence
    sequences = x.split([*layout.lengths, x.shape[0] - layout.num_tokens])[:-1]
    vectors = []
    for rows_nD in sequences:
        has_inner = len(rows_nD) > before + behind
        inner_nD = rows_nD[before : len(rows_nD) - behind] if has_inner else rows_nD
        match pool:
            case Mean():
                vectors.append(inner_nD.float().mean(0))
            case Max():
                vectors.append(inner_nD.float().amax(0))
            case Prefix():
                vectors.append(rows_nD[0].float())
            case _:
                raise AssertionError(pool)
    return torch.stack(vectors)
