"""A model that runs few rows fast: its weights in the order in which they are read, for a CPU in fp32.

A decoding step has one row a sequence and reads every weight, so it costs at least what reading them costs. Measured on
one core at the shapes of GPT-2 124M, head and all, 8 rows: 77 ms; 67 at the 16 rows that MKL needs to round a row
alike; 44 with weights that were reordered once, where reading them takes 33.
"""

import torch

from meristem.model.experts import ExpertsLayer
from meristem.model.heads import Head
from meristem.model.heads.symbols import SymbolHead
from meristem.model.model import SYMBOLS, Model
from meristem.model.outputs import HeadRequest
from meristem.model.reordered import MIN_REORDERED_ROWS, ReorderedLinear, can_reorder, remembered, reordered
from meristem.shapes import Float, Tensor
from meristem.types import MIN_ROWS, Hidden, PackedBatch


class ReorderedSymbolHead(Head):
    """A symbol head whose map onto the vocabulary is reordered; it gives logits alone.

    Args:
        head: what comes before the map.
        out: the map.
    """

    def __init__(self, head: SymbolHead, out: ReorderedLinear):
        super().__init__()
        self.head, self.out = head, out

    def forward(self, hidden: Hidden, batch: PackedBatch, request: HeadRequest) -> Float[Tensor, "M V"]:
        assert request.targets is None, "a head for generation gives no loss"
        logits: Tensor = self.out(self.head.features(hidden, request))
        return logits


def for_few_rows(model: Model) -> Model:
    """The model as sequences are made with it: reordered where this CPU is the better for it, else itself.

    What comes back shares the parameters of the model and holds reordered weights beside them, so it takes their size
    once more, for as long as the model lives. It is made once, and anew when parameters have changed. Experts stay as
    they are.

    Args:
        model: in evaluation mode, on its device, with a symbol head.
    """
    is_exact = can_reorder(model) and next(model.parameters()).dtype == torch.float32
    return (remembered(model, "few rows", lambda: _reorder(model)) if is_exact else None) or model


def _reorder(model: Model) -> Model | None:
    """A copy with reordered weights, the map onto the vocabulary among them; None where rows would not round alike."""
    head = model.heads[SYMBOLS]
    assert isinstance(head, SymbolHead)
    fast = reordered(model, kept=[head.out])
    out = ReorderedLinear(head.weight, head.bias)
    if fast is None or not out.rounds_alike():
        return None
    before = fast.heads[SYMBOLS]
    assert isinstance(before, SymbolHead)
    fast.heads[SYMBOLS] = ReorderedSymbolHead(before, out)
    return fast


def min_rows_of(model: Model) -> int:
    """Rows that a batch of this model must have, so that none rounds by how many there are."""
    has_experts = any(isinstance(layer, ExpertsLayer) for layer in model.modules())
    is_reordered = SYMBOLS in model.heads and isinstance(model.heads[SYMBOLS], ReorderedSymbolHead)
    return MIN_REORDERED_ROWS if is_reordered and not has_experts else MIN_ROWS
