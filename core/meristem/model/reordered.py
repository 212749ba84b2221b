"""Linear layers with weights pre-packed for the CPU's matrix product (oneDNN), and copies of models that use them.

Inference only. MKL packs the weights of a product anew in each call; oneDNN takes weights that were packed once, and
adds the bias and applies the activation where the product is still in registers. Measured on one core: embedding with
the shapes of ESM-2 8M and 35M takes 0.91 of the time in fp32 and 0.83 to 0.90 in bf16; a step of 8 rows of GPT-2 124M,
which waits for its weights alone, 0.57.

A copy takes over the project's own layers, as `is_own` tells them, and nothing else: a layer that was wrapped, hooked,
parametrized, quantized or subclassed (an adapter, say) is the same module in the copy and runs there as it is.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from meristem.model.exact import PROBED_ROWS, rounds_alike
from meristem.model.experts import ExpertsLayer
from meristem.model.feedforward import ACTIVATIONS, FeedForwardLayer
from meristem.shapes import Float, Tensor

AnyModule = TypeVar("AnyModule", bound=nn.Module)

FUSED: dict[Callable[[Tensor], Tensor], tuple[str, str]] = {
    F.gelu: ("gelu", "none"),
    ACTIVATIONS["gelu_tanh"]: ("gelu", "tanh"),
    F.relu: ("relu", ""),
}
"""Activations as oneDNN names them: kind and way."""


class ReorderedLinear(nn.Module):
    """A linear layer of reordered weights, in fp32 or bf16 on a CPU, with an activation of `FUSED` behind it."""

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
        return torch.ops.mkldnn._linear_pointwise(x, self._reordered, self.bias, kind, [], way)


class ReorderedFeedForward(nn.Module):
    """A feed-forward layer without a gate, its activation computed within the product of the map up."""

    def __init__(self, layer: FeedForwardLayer, activation: tuple[str, str]):
        super().__init__()
        self.up = ReorderedLinear(layer.up.weight, layer.up.bias, activation)
        self.down = ReorderedLinear(layer.down.weight, layer.down.bias)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down(self.up(x))


OWN_TORCH = (
    *(nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity),
    *(nn.ModuleList, nn.ModuleDict, nn.Sequential),
)
"""Modules of torch that the project's models are made of."""


def is_own(layer: nn.Module) -> bool:
    """Whether calling a module runs the forward of a class of `meristem.model` or `OWN_TORCH`, and nothing else.

    False for a subclass, a class of another package, forward hooks, a method replaced on the instance, and a parameter
    or buffer of a subclass of `Tensor` (quantized weights).
    """
    kind = type(layer)
    is_known = kind in OWN_TORCH or kind.__module__.startswith("meristem.model.")
    is_hooked = layer._forward_hooks or layer._forward_pre_hooks or any(hasattr(kind, name) for name in vars(layer))
    tensors = (one for one in (*layer._parameters.values(), *layer._buffers.values()) if one is not None)
    return is_known and not is_hooked and all(map(is_plain, tensors))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor or parameter is one of torch's own kind: a subclass may compute something else."""
    return type(tensor) in (nn.Parameter, Tensor)


def has_foreign(module: nn.Module) -> bool:
    """Whether any module in it is not the project's own."""
    return not all(map(is_own, module.modules()))


def is_own_linear(layer: nn.Module | None) -> bool:
    """Whether a module is a plain linear layer whose product may be replaced."""
    return type(layer) is nn.Linear and is_own(layer) and set(layer._parameters) == {"weight", "bias"}


def _own_layers(module: nn.Module, kept: Collection[int]) -> Iterator[nn.Module]:
    """A module and what is in it, without foreign modules, experts and those kept (by `id`), and what these hold."""
    # a router reads its weight itself, and what else is in a layer of experts works on a few rows of a pack
    if is_own(module) and not isinstance(module, ExpertsLayer) and id(module) not in kept:
        yield module
        for child in module.children():
            yield from _own_layers(child, kept)


def _fused(layer: nn.Module) -> tuple[str, str] | None:
    """Kind and way of a feed-forward layer's activation, where the whole layer can be taken over."""
    if type(layer) is not FeedForwardLayer or layer.is_gated or set(layer._modules) != {"up", "down", "dropout"}:
        return None
    is_whole = is_own_linear(layer.up) and is_own_linear(layer.down) and is_own(layer.dropout)
    return next((how for one, how in FUSED.items() if is_whole and layer.activation is one), None)


_MADE: "WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Any]]]" = WeakKeyDictionary()
"""What was made of each living module, by what it is for, and the state of the module then."""

SAMPLED_VALUES = 64
"""Values of a parameter that are compared; torch's version counter misses what is changed through `parameter.data`."""


def _state_of(module: nn.Module) -> Any:
    """Something that changes when a module in it is replaced or hooked, or a parameter takes other values."""
    layers = [(id(layer), is_own(layer)) for layer in module.modules()]
    tensors = [one.detach() for one in (*module.parameters(), *module.buffers()) if is_plain(one)]
    versions = [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors]
    values = [one.flatten()[:: max(1, one.numel() // SAMPLED_VALUES)].double() for one in tensors]
    return layers, versions, torch.cat(values).cpu().numpy().tobytes() if values else b""


def remembered(module: nn.Module, purpose: str, make: Callable[[], AnyModule | None]) -> AnyModule | None:
    """What was made of a module for a purpose (never the module itself); made anew when the module has changed."""
    state = _state_of(module)
    made = _MADE.setdefault(module, {})
    if purpose not in made or made[purpose][0] != state:
        made[purpose] = (state, make())
    return made[purpose][1]


def can_reorder(module: nn.Module) -> bool:
    """Whether torch has oneDNN's product here, and the weights of the own layers are of a kind that is reordered."""
    has_product = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    weights = (one for layer in _own_layers(module, ()) for one in layer.parameters(recurse=False))
    kinds = {(one.device.type, one.dtype) for one in weights}
    return has_product and kinds in ({("cpu", torch.float32)}, {("cpu", torch.bfloat16)})


@torch.inference_mode()
def reordered(
    module: AnyModule,
    kept: Collection[nn.Module | None] = (),
    must_round_alike: bool = True,
    given: Mapping[nn.Module, nn.Module] | None = None,
) -> AnyModule | None:
    """A copy whose own linear layers are reordered; every other layer is the same module in both.

    Args:
        module: in evaluation mode; one that `can_reorder` allows.
        kept: modules that stay as they are, with all that they hold.
        must_round_alike: results must be exact (`exact.rounds_alike`); in bf16 they often are not, reordered or not.
        given: modules that the copy has in the place of some of the module's own.

    Returns:
        None where there is nothing to reorder, or where results must be exact and would not be.
    """
    stand_ins: dict[int, nn.Module] = {id(layer): one for layer, one in (given or {}).items()}
    left = {id(layer) for layer in kept} | set(stand_ins)
    for layer in _own_layers(module, left):
        if (activation := _fused(layer)) is not None:
            assert isinstance(layer, FeedForwardLayer)
            stand_ins[id(layer)] = ReorderedFeedForward(layer, activation)
            left |= {id(layer.up), id(layer.down)}
        elif is_own_linear(layer):
            assert isinstance(layer, nn.Linear)
            stand_ins[id(layer)] = ReorderedLinear(layer.weight, layer.bias)
    products = [part for made in stand_ins.values() for part in made.modules() if isinstance(part, ReorderedLinear)]
    by_shape = {(part._reordered.shape, part.activation): part for part in products}
    are_alike = (rounds_alike(part, part.num_inputs, part._reordered.dtype) for part in by_shape.values())
    if not products or (must_round_alike and not all(are_alike)):
        return None
    return _copy_around(module, stand_ins, {id(layer) for layer in kept})  # type: ignore[return-value]


def _copy_around(module: nn.Module, stand_ins: dict[int, nn.Module], kept: Collection[int]) -> nn.Module:
    """A copy of the module with `stand_ins` (keyed by `id` of a layer) in place of layers; itself if it has none."""
    if id(module) in stand_ins or id(module) in kept or not is_own(module):
        return stand_ins.get(id(module), module)
    parts = {n: None if one is None else _copy_around(one, stand_ins, kept) for n, one in module._modules.items()}
    shared = tuple(stand_ins.get(id(one), one) for one in vars(module).get("shared", ()))  # of a head
    is_same = all(one is other for one, other in zip(shared, vars(module).get("shared", ())))
    if is_same and all(part is module._modules[name] for name, part in parts.items()):
        return module
    twin = copy.copy(module)
    vars(twin)["_modules"] = parts
    if not is_same:
        vars(twin)["shared"] = shared
    stand_ins[id(module)] = twin
    return twin
