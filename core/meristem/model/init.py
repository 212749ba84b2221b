"""Initial weights: one function, one table.

| module            | weight                                  | bias |
| ----------------- | --------------------------------------- | ---- |
| Linear            | normal(0, std), cut at two deviations   | 0    |
| Embedding         | normal(0, std), cut at two deviations   |      |
| LayerNorm, RMSNorm| 1                                       | 0    |
| last map of a branch (`out`, `down`) | std / sqrt(2 L) where `is_depth_scaled` | 0 |
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from meristem.model.config import Init

BRANCH_OUTPUTS = ("attention.out", "cross.out", "feedforward.down")


def init_weights(module: nn.Module, config: Init, num_layers: int) -> None:
    """Fill every parameter of `module`, a part of a stack of `num_layers` blocks (L), by the table above."""
    for name, child in module.named_modules():
        match child:
            case nn.Linear() | nn.Embedding():
                std = config.std
                if config.is_depth_scaled and name.endswith(BRANCH_OUTPUTS):
                    std /= math.sqrt(2 * num_layers)
                nn.init.trunc_normal_(child.weight, std=std, a=-2 * std, b=2 * std)
                if isinstance(child, nn.Linear) and child.bias is not None:
                    nn.init.zeros_(child.bias)
            case nn.LayerNorm() | nn.RMSNorm():
                if child.weight is not None:
                    nn.init.ones_(child.weight)
                if isinstance(child, nn.LayerNorm) and child.bias is not None:
                    nn.init.zeros_(child.bias)
            case _:
                own = [name for name, _ in child.named_parameters(recurse=False)]
                assert not own or hasattr(child, "init_own_weights"), f"no initial weights for {own} of {name}"
                if own:
                    child.init_own_weights(config)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are built within are on the meta device: they have shapes, but no weights.

    Initialisation is skipped. Torch would run it on the meta device too, and import its compiler for that, which takes
    a third of the start of `embed`.
    """
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
