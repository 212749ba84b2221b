"""The optimiser: AdamW, its groups, and a learning rate that is a pure function of the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from meristem.errors import require
from meristem.model.config.checks import require_all
from meristem.model.embed import EmbeddingLayer
from meristem.model.transformer import Stack


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov 2019, arXiv 1711.05101) with warm-up and decay of the learning rate.

    Attributes:
        lr: the highest learning rate, reached after warm-up.
        weight_decay: weight decay of matrices; biases, norms and embedding tables are not decayed.
        betas: decay rates of the moving averages of the gradient and of its square.
        eps: added to the denominator of a step, against division by zero.
        warmup_steps: steps over which the learning rate rises linearly.
        schedule: after warm-up: a cosine down to `min_lr_frac` at `trainer.max_steps`, or the inverse square
            root of the step, or a constant.
        min_lr_frac: share of `lr` below which no schedule falls.
        layer_decay: each layer learns this many times as fast as the one above it, from the heads down to the
            embedding (Clark 2020, arXiv 2003.10555; Bao 2021, arXiv 2106.08254); 1 for the same rate everywhere.
    """

    lr: float = 4e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup_steps: int = 100
    schedule: Literal["cosine", "inverse_sqrt", "constant"] = "cosine"
    min_lr_frac: float = 0.1
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        require_all(self, "optimizer.", "positive", "lr", "eps")
        require_all(self, "optimizer.", "0 or more", "weight_decay", "warmup_steps")
        require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas must be in [0, 1)", self.betas)
        require(0 <= self.min_lr_frac <= 1, "optimizer.min_lr_frac must be in [0, 1]", self.min_lr_frac)
        require(0 < self.layer_decay <= 1, "optimizer.layer_decay must be above 0 and at most 1", self.layer_decay)


def lr_factor(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """The share of `lr` that step n (from 0) is taken with."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        match config.schedule:
            case "cosine":
                span = max(1, total_steps - config.warmup_steps)
                done = min(1.0, (step - config.warmup_steps) / span)
                return config.min_lr_frac + (1 - config.min_lr_frac) * 0.5 * (1 + math.cos(math.pi * done))
            case "inverse_sqrt":
                start = max(1, config.warmup_steps)
                return max(config.min_lr_frac, math.sqrt(start / max(start, step)))
            case _:
                return 1.0

    return factor


def layer_depths(model: nn.Module) -> tuple[dict[int, int], int]:
    """How far above the inputs each parameter of a trunk stands.

    Returns:
        Depths by `id`: the embedding and what all blocks share 0, block i (counted through both stacks) i + 1, the
        final norm of a stack as what follows its last block. What is not listed (heads, pools) stands on top; and that
        depth.
    """
    depths: dict[int, int] = {}
    top = 1
    for module in model.modules():
        placed: list[tuple[nn.Module, int]] = [(module, 0)] if isinstance(module, EmbeddingLayer) else []
        if isinstance(module, Stack):
            first, end = module.first + 1, module.first + len(module.blocks) + 1
            top = max(top, end)
            placed = [(module.positions, 0), *zip(module.blocks, range(first, end)), (module.final_norm, end)]
        for part, depth in placed:
            depths |= {id(parameter): depth for parameter in part.parameters()}
    return depths, top


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Trainable parameters in groups: linear maps are decayed; biases, norms and tables are not.

    Args:
        layer_decay: below 1, each depth is a group of its own, with the factor of its learning rate as `lr_scale`.
    """
    is_map: dict[nn.Parameter, bool] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # biases of experts stand side by side in two dimensions
            is_weight = parameter.ndim >= 2 and not isinstance(module, nn.Embedding) and not name.endswith("bias")
            # a parameter that two modules share must be in one group
            is_map[parameter] = is_weight and is_map.get(parameter, True)
    depths, top = layer_depths(model) if layer_decay < 1 else ({}, 0)
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for is_decayed in (True, False):
        for parameter in (one for one, is_own in is_map.items() if one.requires_grad and is_own == is_decayed):
            key = (depths.get(id(parameter), top), weight_decay if is_decayed else 0.0)
            groups.setdefault(key, []).append(parameter)
    covered = {parameter for parameters in groups.values() for parameter in parameters}
    assert covered == {one for one in model.parameters() if one.requires_grad}, "a trainable parameter is in no group"
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": layer_decay ** (top - depth)}
        for (depth, decay), parameters in groups.items()
    ]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, total_steps: int, is_fused: bool = True
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW and the schedule of its learning rate.

    Args:
        is_fused: all of a parameter's update in one kernel (the 22 million of a ViT-S on one core: 27 ms, not 96).
            It takes a loss scaler's factor from the gradients itself, behind what would clip them.
    """
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    for group in groups:
        # the schedule multiplies the rate a group begins with; nothing of torch reads `lr_scale`
        group["lr"] = config.lr * group.pop("lr_scale")
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=is_fused)
    return optimizer, LambdaLR(optimizer, lr_factor(config, total_steps))
