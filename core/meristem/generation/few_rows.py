"""A model that runs few rows fast: its weights in the order in which they are read, for a CPU in fp32.

A decoding step has one row a sequence and reads every weight, so it costs at least what reading them costs. Measured on
one core at the shapes of GPT-2 124M, head and all: 77 ms at 8 rows, 67 at 16 (`MIN_ROWS`); 44 with weights that were
reordered once, where reading them takes 33.
"""

import torch
from torch import nn

from meristem.model import reordered as fast
from meristem.model.exact import MIN_REORDERED_ROWS
from meristem.model.experts import ExpertsLayer
from meristem.model.heads import Head
from meristem.model.heads.symbols import SymbolHead
from meristem.model.model import SYMBOLS, Model
from meristem.model.outputs import HeadRequest
from meristem.shapes import Float, Tensor
from meristem.types import MIN_ROWS, Hidden, PackedBatch


class ReorderedSymbolHead(Head):
    """A symbol head whose map onto the vocabulary, `out`, is reordered; it gives logits alone."""

    def __init__(self, head: SymbolHead, out: fast.ReorderedLinear):
        super().__init__()
        self.head, self.out = head, out

    def forward(self, hidden: Hidden, batch: PackedBatch, request: HeadRequest) -> Float[Tensor, "M V"]:
        assert request.targets is None, "a head for generation gives no loss"
        logits: Tensor = self.out(self.head.features(hidden, request))
        return logits


def for_few_rows(model: Model) -> Model:
    """The model as sequences are made with it: reordered where this CPU is the better for it, else itself.

    What comes back shares the parameters of the model and holds reordered weights beside them, so it takes their size
    once more, for as long as the model lives. It is made once, and anew when the model has changed. Experts, and layers
    that are not the project's own, stay as they are.

    Args:
        model: in evaluation mode, on its device, with a symbol head.
    """
    is_exact = fast.can_reorder(model) and next(model.parameters()).dtype == torch.float32
    return (fast.remembered(model, "few rows", lambda: _reorder(model)) if is_exact else None) or model


def _reorder(model: Model) -> Model | None:
    """A copy with reordered weights, the map onto the vocabulary among them; None where it would not be exact."""
    head = model.heads[SYMBOLS]
    others = [one for one in model.heads.values() if one is not head]
    if not isinstance(head, SymbolHead) or not fast.is_own(head):
        return fast.reordered(model, kept=[head, *others])
    if not (fast.is_plain(head.weight) if head.out is None else fast.is_own_linear(head.out)):
        return fast.reordered(model, kept=[head.out, *others])
    out = fast.ReorderedLinear(head.weight, head.bias)
    before = fast.reordered(head, kept=[head.out]) or head
    return fast.reordered(model, kept=others, given={head: ReorderedSymbolHead(before, out)})


def min_rows_of(model: Model) -> int:
    """Rows that a batch of this model must have for exact results (`model/exact.py`).

    Fewer will do where every product of the trunk and of the symbol head is reordered.
    """
    head = dict(model.heads.items()).get(SYMBOLS)
    if not isinstance(head, ReorderedSymbolHead):
        return MIN_ROWS
    called = [layer for layer in (*model.trunk.modules(), *head.head.modules()) if layer is not head.head.out]
    is_reordered = all(fast.is_own(layer) and not isinstance(layer, nn.Linear | ExpertsLayer) for layer in called)
    return MIN_REORDERED_ROWS if is_reordered else MIN_ROWS
