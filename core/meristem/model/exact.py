"""Results that are the same bit for bit whatever is computed beside them, on a CPU in fp32.

A vector must not depend on what its sequence is packed with. No sequence sees another one, but a kernel may still round
a row by the number of rows or by the place of a row among them. This module says where torch's kernels do so, and holds
what keeps them from it. All of it concerns inference on a CPU: with gradients, on a GPU, in half precision and under
`torch.compile` kernels run as they are, and vectors agree within 1e-5 of the root mean square of a layer.

* **Products of few rows.** MKL takes another path below 14 rows at a width of 320, and below 16 from 640 on. A pack,
  the rows that an expert is given, and those of a pool's linear layer are therefore `MIN_ROWS` or more. Spare rows
  belong to no sequence and are never read.
* **Products of 1,024 inputs or more.** MKL shares the inputs out among several threads, by the number of rows. Pools
  and heads of labels are run with reordered weights, which oneDNN does not share out.
* **Products with one output.** The last rows round otherwise where their number is no multiple of 4: `with_spare_rows`.
* **Products of reordered weights** (`reordered.py`). One row alone takes another path (`MIN_REORDERED_ROWS`), and not
  every CPU treats all other numbers alike. They are used only where `rounds_alike` finds that this one does.
* **SiLU, sigmoid and tanh** take other functions for the elements left over at the end of a thread's share. `silu`,
  `quick_gelu` and `gelu_tanh` are put together from functions that do not.
* **GELU over strided rows** rounds by the place of a row. The gate of a gated layer is made contiguous.
* **Complex products** round the elements at both ends of a thread's share otherwise. `multiply_rows` ends the shares
  where rows end.
* **Attention of fewer than 33 queries**: see `CPU_MIN_QUERIES`.
* **Sums over the rows of a pack** (`index_add`) depend on their order. Each sequence is pooled on its own, what the
  experts of a token give is added in the order of its choices, and what is counted over a pack are zeros and ones,
  whose sums in floats are exact.

Layer norms, embeddings, means over one sequence and attention over groups of equal lengths treat each row or sequence
alone as they are.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from meristem.shapes import Float, Tensor
from meristem.types import MIN_ROWS

CPU_MIN_QUERIES = 33
"""Queries that a sequence is given at least; the spare ones are not read.

SDPA cuts queries into blocks of 32 and gives each thread a buffer whose size, for fewer queries, depends on their
number: then the second thread's buffer is not aligned, the products in it round otherwise, and a vector depends on
which thread its sequence falls to (seen at head widths 6, 8 and 10 and odd lengths below 32). One block alone runs
outside of the threads and rounds otherwise as well; 33 queries are two."""

PARALLEL_GRAIN = 32_768
"""Elements that torch gives a CPU thread at least."""

MIN_REORDERED_ROWS = 2
"""Rows that a product of reordered weights needs; one alone takes another path."""

PROBED_ROWS = (2, 3, 8, 16, 130)
"""Numbers of rows that are tried on this CPU, beside one more than the last, before its rounding is trusted."""


def with_spare_rows(rows: Float[Tensor, "R D"]) -> Float[Tensor, "r D"]:
    """The rows, and zeros behind them up to a multiple of `MIN_ROWS`."""
    return F.pad(rows, (0, 0, 0, -len(rows) % MIN_ROWS))


def linear(rows: Float[Tensor, "R I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None) -> Tensor:
    """A linear map of any number of rows."""
    if len(rows) >= MIN_ROWS:
        return F.linear(rows, weight, bias)
    return F.linear(with_spare_rows(rows), weight, bias)[: len(rows)]


def with_spare_queries(queries: Tensor) -> Tensor:
    """Queries with zeros behind them up to `CPU_MIN_QUERIES`; the mask of their scores likewise."""
    return F.pad(queries, (0, 0, 0, max(0, CPU_MIN_QUERIES - queries.shape[-2])))


def is_exact(x: Tensor) -> bool:
    """Whether the results of this computation must be exact: inference on a CPU in fp32."""
    return not torch.is_grad_enabled() and x.is_cpu and x.dtype == torch.float32


def silu(x: Tensor) -> Tensor:
    return torch.div(x, (-x).exp_().add_(1.0)) if is_exact(x) else F.silu(x)


def quick_gelu(x: Tensor) -> Tensor:
    """GELU by a sigmoid (Hendrycks 2016, section 2)."""
    if is_exact(x):
        return torch.div(x, (-1.702 * x).exp_().add_(1.0))
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh (Hendrycks 2016, section 2)."""
    if is_exact(x):
        inner = (x * x).mul_(0.044715).add_(1.0).mul_(x).mul_(math.sqrt(2 / math.pi))
        return inner.tanh_().add_(1.0).mul_(x).mul_(0.5)
    return F.gelu(x, approximate="tanh")


def multiply_rows(x_THp: Tensor, table_T1p: Tensor) -> Tensor:
    """The complex product of each row with its row of a table; in place, but with gradients.

    As many rows are multiplied in a call as all threads take in whole rows, then what is left, one thread at a time.
    """
    if torch.is_grad_enabled():
        return x_THp * table_T1p
    rows = max(PARALLEL_GRAIN // x_THp[0].numel(), 1)
    together = rows * torch.get_num_threads()
    num_even = len(x_THp) // together * together
    for start in (*range(0, num_even, together), *range(num_even, len(x_THp), rows)):
        share = slice(start, start + (together if start < num_even else rows))
        x_THp[share].mul_(table_T1p[share])
    return x_THp


def rounds_alike(product: Callable[[Tensor], Tensor], num_inputs: int, dtype: torch.dtype) -> bool:
    """Whether rows come out of a linear map the same, bit for bit, whatever their number: tried on random ones."""
    rows = torch.randn(PROBED_ROWS[-1] + 1, num_inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = product(rows)
    return all(torch.equal(product(rows[:count]), wanted[:count]) for count in PROBED_ROWS)
