"""Modules whose weights lie in the order in which a CPU's product reads them: for inference alone.

MKL packs the weights of a product anew in each call; oneDNN takes weights that were packed once, and adds the bias and
takes the activation where the product is still in registers. Measured on one core: embedding with the shapes of ESM-2
8M and 35M takes 0.91 of the time in fp32 and 0.83 to 0.90 in bf16; a step of 8 rows of GPT-2 124M, which waits for its
weights alone, 0.57.
"""

import copy
from collections.abc import Callable, Collection
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from meristem.model.experts import ExpertsLayer
from meristem.model.feedforward import ACTIVATIONS, FeedForwardLayer
from meristem.shapes import Float, Tensor

AnyModule = TypeVar("AnyModule", bound=nn.Module)

MIN_REORDERED_ROWS = 2
"""Rows from which on a reordered product rounds a row alike, however many there are; one alone is another path."""

PROBED_ROWS = (2, 3, 8, 16, 130)
"""Numbers of rows that are tried on this CPU, beside one more than the last, before its rounding is trusted."""

FUSED: dict[Callable[[Tensor], Tensor], tuple[str, str]] = {
    F.gelu: ("gelu", "none"),
    ACTIVATIONS["gelu_tanh"]: ("gelu", "tanh"),
    F.relu: ("relu", ""),
}
"""Activations as oneDNN names them: kind and way."""


class ReorderedLinear(nn.Module):
    """A linear layer of reordered weights, and an activation behind it.

    Args:
        weight: of the layer it stands for, in fp32 or bf16, on a CPU.
        bias: likewise, shared.
        activation: a value of `FUSED`.
    """

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, "out"] | None,
        activation: tuple[str, str] = ("none", ""),
    ):
        super().__init__()
        self.bias, self.num_inputs, self.activation = bias, weight.shape[1], activation
        self._reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PROBED_ROWS[-1])

    def forward(self, x: Float[Tensor, "T in"]) -> Float[Tensor, "T out"]:
        kind, way = self.activation
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._reordered, self.bias, kind, [], way)
        return y

    def rounds_alike(self) -> bool:
        """Whether rows come out the same, bit for bit, whatever their number."""
        rows = torch.randn(PROBED_ROWS[-1] + 1, self.num_inputs, generator=torch.Generator().manual_seed(0))
        rows = rows.to(self._reordered.dtype)
        wanted = self(rows)
        return all(torch.equal(self(rows[:count]), wanted[:count]) for count in PROBED_ROWS)


class ReorderedFeedForward(nn.Module):
    """A feed-forward layer without a gate, its activation taken within the product of the way up."""

    def __init__(self, layer: FeedForwardLayer):
        super().__init__()
        self.up = ReorderedLinear(layer.up.weight, layer.up.bias, FUSED[layer.activation])
        self.down = ReorderedLinear(layer.down.weight, layer.down.bias)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down(self.up(x))


_MADE: "WeakKeyDictionary[nn.Module, dict[str, tuple[list[tuple[int, int]], Any]]]" = WeakKeyDictionary()
"""What was made of each living module, by what it is for, and the state of its parameters then."""


def remembered(module: nn.Module, purpose: str, make: Callable[[], AnyModule | None]) -> AnyModule | None:
    """What was made of a module for a purpose (never the module itself); made anew when parameters have changed."""
    state = [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in module.parameters()]
    made = _MADE.setdefault(module, {})
    if purpose not in made or made[purpose][0] != state:
        made[purpose] = (state, make())
    found: AnyModule | None = made[purpose][1]
    return found


def can_reorder(module: nn.Module) -> bool:
    """Whether torch has oneDNN's product here, and the weights are of the kind that is reordered."""
    has_product = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    kinds = {(one.device.type, one.dtype) for one in module.parameters()}
    return has_product and kinds in ({("cpu", torch.float32)}, {("cpu", torch.bfloat16)})


@torch.inference_mode()
def reordered(
    module: AnyModule, kept: Collection[nn.Module | None] = (), must_round_alike: bool = True
) -> AnyModule | None:
    """A copy whose linear layers are reordered and which shares all other parameters; experts stay as they are.

    Args:
        module: in evaluation mode; one that `can_reorder` allows.
        kept: layers that stay as they are, and are the same ones in the copy.
        must_round_alike: rows must not depend on their number; in bf16 they often do, reordered or not.

    Returns:
        None where there is nothing to reorder, or this CPU does not round all rows alike then, and must.
    """
    # a router reads its weight itself, and what else is in such a layer works on a few rows of a pack
    experts = [part for layer in module.modules() if isinstance(layer, ExpertsLayer) for part in layer.modules()]
    left = {id(layer) for layer in (*experts, *kept)}
    stand_ins: dict[int, nn.Module] = {}
    for layer in module.modules():
        if id(layer) in left:
            continue
        if isinstance(layer, FeedForwardLayer) and not layer.is_gated and layer.activation in FUSED:
            stand_ins[id(layer)] = ReorderedFeedForward(layer)
            left |= {id(layer.up), id(layer.down)}
        elif type(layer) is nn.Linear:
            stand_ins[id(layer)] = ReorderedLinear(layer.weight, layer.bias)
    if not stand_ins:
        return None
    products = [part for made in stand_ins.values() for part in made.modules() if isinstance(part, ReorderedLinear)]
    by_shape = {(part._reordered.shape, part.activation): part for part in products}
    if must_round_alike and not all(part.rounds_alike() for part in by_shape.values()):
        return None
    # whatever is known to the memo stands in the copy as it stands there
    shared: dict[int, Any] = {id(one): one for one in (*module.parameters(), *module.buffers(), *kept)}
    return copy.deepcopy(module, shared | stand_ins)
