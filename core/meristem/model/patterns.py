"""Which keys a query may see, as one mask function a pattern.

A mask function says, for places `i` of queries and `j` of keys within one sequence, whether `i` sees `j`. The
reference kernel evaluates it densely; other kernels compile it, or know the pattern by its `is_causal`.
"""

import torch

from meristem.model.config import Causal, Full, Pattern
from meristem.shapes import Bool, Int, Tensor


def visible(pattern: Pattern, i: Int[Tensor, "m 1"], j: Int[Tensor, "1 n"]) -> Bool[Tensor, "m n"]:
    """Whether the query at place `i` of a sequence sees the key at place `j`.

    Places count from the sequence's first key. Queries are the last ones where there are fewer than keys; where
    there are more, as across two sides, the first of them stand before 0.
    """
    match pattern:
        case Full():
            return torch.ones(len(i), j.shape[1], dtype=torch.bool, device=i.device)
        case Causal():
            return j <= i
        case _:
            raise AssertionError(pattern)
