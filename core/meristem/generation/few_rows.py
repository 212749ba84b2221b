"""A model that runs few rows fast: its weights in the order in which they are read, for a CPU in fp32.

A decoding step has one row a sequence and reads every weight, so it costs at least what reading them costs. MKL packs
the weights of a product anew in each call. Measured on one core at the shapes of GPT-2 124M, head and all, 8 rows:
77 ms; 67 at the 16 rows that it needs to round a row alike; 44 with oneDNN and weights that were reordered once, where
reading them takes 33. Products of many rows are as fast either way.
"""

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from meristem.model.experts import ExpertsLayer
from meristem.model.heads import SymbolHead
from meristem.model.model import SYMBOLS, Model
from meristem.shapes import Float, Tensor
from meristem.types import MIN_ROWS

MIN_REORDERED_ROWS = 2
"""Rows from which on a reordered product rounds a row alike, however many there are; one alone is another path."""

PROBED_ROWS = (2, 3, 8, 16)
"""Numbers of rows that are tried on this CPU, beside one more than the last, before its rounding is trusted."""


class ReorderedLinear(nn.Module):
    """A linear layer of reordered weights: for inference alone, in fp32, on a CPU.

    Args:
        weight: of the layer it stands for.
        bias: likewise, shared.
    """

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None):
        super().__init__()
        self.bias, self.num_inputs = bias, weight.shape[1]
        self._reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PROBED_ROWS[-1])

    def forward(self, x: Float[Tensor, "T in"]) -> Float[Tensor, "T out"]:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._reordered, self.bias, "none", [], "")
        return y

    def rounds_alike(self) -> bool:
        """Whether rows come out the same, bit for bit, whatever their number."""
        rows = torch.randn(PROBED_ROWS[-1] + 1, self.num_inputs, generator=torch.Generator().manual_seed(0))
        wanted = self(rows)
        return all(torch.equal(self(rows[:count]), wanted[:count]) for count in PROBED_ROWS)


class ReorderedSymbolHead(nn.Module):
    """A symbol head whose map onto the vocabulary is reordered; called as the head is.

    Args:
        head: what comes before the map.
        out: the map.
    """

    def __init__(self, head: SymbolHead, out: ReorderedLinear):
        super().__init__()
        self.head, self.out = head, out

    def forward(self, rows: Float[Tensor, "M D"], table: Float[Tensor, "V D"]) -> Float[Tensor, "M V"]:
        logits: Tensor = self.out(self.head.features(rows))
        return logits


_MADE: "WeakKeyDictionary[Model, tuple[list[tuple[int, int]], Model | None]]" = WeakKeyDictionary()
"""The state of the parameters of each living model, and what was made of it then, if anything."""


def for_few_rows(model: Model) -> Model:
    """The model as sequences are made with it: reordered where this CPU is the better for it, else itself.

    What comes back shares the parameters of the model and holds reordered weights beside them, so it takes their size
    once more, for as long as the model lives. It is made once, and anew when parameters have changed. Experts stay as
    they are.

    Args:
        model: in evaluation mode, on its device, with a symbol head.
    """
    if not _can_reorder(model):
        return model
    state = [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in model.parameters()]
    if model not in _MADE or _MADE[model][0] != state:
        _MADE[model] = (state, _reorder(model))
    return _MADE[model][1] or model


@torch.inference_mode()
def _reorder(model: Model) -> Model | None:
    """A copy with reordered weights; None where this CPU does not round all rows alike with them."""
    head = model.heads[SYMBOLS]
    assert isinstance(head, SymbolHead)
    out = ReorderedLinear(model.trunk.embedding.symbols.weight if head.out is None else head.out.weight, head.bias)
    # a router reads its weight itself, and what else is in such a layer works on a few rows of a pack
    experts = [part for layer in model.modules() if isinstance(layer, ExpertsLayer) for part in layer.modules()]
    kept = {id(layer) for layer in (*experts, head.out)}
    linear = [layer for root in (model.trunk, head) for layer in root.modules() if type(layer) is nn.Linear]
    reordered = {id(layer): ReorderedLinear(layer.weight, layer.bias) for layer in linear if id(layer) not in kept}
    by_shape = {layer._reordered.shape: layer for layer in (*reordered.values(), out)}
    if not all(layer.rounds_alike() for layer in by_shape.values()):
        return None
    # whatever is known to the memo stands in the copy as it stands there
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    fast = copy.deepcopy(model, shared | reordered)
    before = fast.heads[SYMBOLS]
    assert isinstance(before, SymbolHead)
    fast.heads[SYMBOLS] = ReorderedSymbolHead(before, out)
    return fast


def min_rows_of(model: Model) -> int:
    """Rows that a batch of this model must have, so that none rounds by how many there are."""
    has_experts = any(isinstance(layer, ExpertsLayer) for layer in model.modules())
    is_reordered = SYMBOLS in model.heads and isinstance(model.heads[SYMBOLS], ReorderedSymbolHead)
    return MIN_REORDERED_ROWS if is_reordered and not has_experts else MIN_ROWS


def _can_reorder(model: Model) -> bool:
    """Whether torch has oneDNN's product here, and the weights are of the kind that is reordered."""
    has_product = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_product and all(one.is_cpu and one.dtype == torch.float32 for one in model.parameters())
