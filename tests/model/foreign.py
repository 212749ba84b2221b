"""Layers that are not the project's own, planted in a model in the place of one whose results they change."""

import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize, prune


class Adapter(nn.Module):
    """A low-rank adapter around a layer, as libraries of adapters have it."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.scale = base, 1.0
        self.a = nn.Linear(4, 4)  # plain layers in a foreign one are not for taking over
        nn.init.normal_(self.a.weight)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        width = y.shape[-1] // 4 * 4
        more = self.a(y[..., :width].unflatten(-1, (-1, 4)) * self.scale).flatten(-2)
        return y + self.scale * nn.functional.pad(more, (0, y.shape[-1] - width))


class Subclassed(nn.Linear):
    """A linear layer that does something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flip(-1)


class Flipped(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flip(0) * 1.5


class Negated(torch.Tensor):
    """A weight of a class of its own, which says what a linear map with it is."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is nn.functional.linear:
            x, weight, *more = args
            return func(x, -weight.as_subclass(torch.Tensor), *more, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    def new_empty(self, *args, **kwargs):  # type: ignore[no-untyped-def]  # asked for by deepcopy
        return super().new_empty(*args, **kwargs).as_subclass(Negated)


def hook(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda layer, args, out: _flipped(out))


def hook_before(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_pre_hook(lambda layer, args: (_flipped(args[0]), *args[1:]))


def override(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    known = layer.forward
    layer.forward = lambda *args, **kwargs: _flipped(known(*args, **kwargs))


def adapt(model: nn.Module, name: str) -> None:
    _replace(model, name, Adapter(model.get_submodule(name)))


def subclass(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    layer.__class__ = Subclassed


def parametrized(model: nn.Module, name: str) -> None:
    parametrize.register_parametrization(model.get_submodule(name), "weight", Flipped())


def pruned(model: nn.Module, name: str) -> None:
    prune.random_unstructured(model.get_submodule(name), "weight", amount=0.5)


def negated(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Negated), requires_grad=False)


def quantized(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it will be another package's
        from torch.ao.nn.quantized.dynamic import Linear
        from torch.ao.quantization import default_dynamic_qconfig

        layer.qconfig = default_dynamic_qconfig
        made = Linear.from_float(layer)
    _replace(model, name, made)


LINEAR: dict[str, Callable[[nn.Module, str], None]] = {
    "adapter": adapt,
    "hook": hook,
    "hook before": hook_before,
    "forward of its own": override,
    "subclass": subclass,
    "parametrized": parametrized,
    "pruned": pruned,
    "tensor subclass": negated,
    "quantized": quantized,
}
"""Ways to make a linear layer foreign."""

OTHERS = {name: LINEAR[name] for name in ("hook", "forward of its own")}
"""Ways to make any module foreign."""


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer.eval())


def _flipped(value: object) -> object:
    """A tensor turned round; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.flip(-1) * 0.7 if value.is_floating_point() else value.roll(1, -1)
