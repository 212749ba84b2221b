"""The optimiser: AdamW, its groups, and a learning rate that is a pure function of the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from meristem.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov 2019, arXiv 1711.05101) with warm-up and decay of the learning rate.

    Attributes:
        lr: the highest learning rate, reached after warm-up.
        weight_decay: of matrices; biases, norms and embedding tables are not decayed.
        betas: of the moving averages.
        eps: of the division.
        warmup_steps: steps over which the learning rate rises linearly.
        schedule: after warm-up: a cosine down to `min_lr_frac` at `trainer.max_steps`, or the inverse square
            root of the step, or a constant.
        min_lr_frac: of `lr`, the least that either curve falls to.
    """

    lr: float = 4e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup_steps: int = 100
    schedule: Literal["cosine", "inverse_sqrt", "constant"] = "cosine"
    min_lr_frac: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for is_right, rule, got in (
            (self.lr > 0, "lr must be positive", self.lr),
            (self.weight_decay >= 0, "weight_decay must be 0 or more", self.weight_decay),
            (all(0 <= beta < 1 for beta in self.betas), "betas must be in [0, 1)", self.betas),
            (self.eps > 0, "eps must be positive", self.eps),
            (self.warmup_steps >= 0, "warmup_steps must be 0 or more", self.warmup_steps),
            (0 <= self.min_lr_frac <= 1, "min_lr_frac must be in [0, 1]", self.min_lr_frac),
        ):
            if not is_right:
                raise ConfigError(f"optimizer.{rule}; got {got}")


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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: linear maps are decayed; biases, norms and tables are not."""
    decayed: dict[str, nn.Parameter] = {}
    plain: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_map = parameter.ndim >= 2 and not isinstance(module, nn.Embedding)
                (decayed if is_map else plain)[f"{prefix}.{name}"] = parameter
    wanted = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    # a parameter that two modules share must be in one group
    shared = {id(parameter) for parameter in plain.values()}
    groups = [
        {
            "params": list({id(p): p for p in decayed.values() if id(p) not in shared}.values()),
            "weight_decay": weight_decay,
        },
        {"params": list({id(p): p for p in plain.values()}.values()), "weight_decay": 0.0},
    ]
    covered = [id(parameter) for group in groups for parameter in group["params"]]  # type: ignore[attr-defined]
    assert len(covered) == len(set(covered)), "a parameter is in two groups"
    assert set(covered) == wanted, "a trainable parameter is in no group"
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, total_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW and the schedule of its learning rate.

    Args:
        total_steps: steps that the run takes; where a cosine ends.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=config.betas, eps=config.eps
    )
    return optimizer, LambdaLR(optimizer, lr_factor(config, total_steps))
