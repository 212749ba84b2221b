"""Optimiser steps, ours and those of peers, and what of the machine they reach."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from harness import Options, agree, hardware, timed
from torch import nn
from torch.nn import functional as F

from meristem.data.pack import pack
from meristem.data.parts import Encoder
from meristem.model.config import Full, TransformerConfig
from meristem.model.flops import flops_per_token
from meristem.objectives.objective import Objective
from meristem.train.optim import OptimizerConfig
from meristem.train.task import Task
from meristem.types import INPUT, PackedBatch, Record, Tokens

OPTIMIZER = OptimizerConfig(lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), warmup_steps=0, schedule="constant")
CLIP = 1.0
TOLERANCES = {"cpu": 1e-4, "cuda": 5e-2}
"""Of losses and logarithms of probabilities: rounding of fp32, and of bf16."""
STEP_TOLERANCES = {"cpu": 0.02, "cuda": 0.2}
"""Of what a step changes a loss by: timm learns a class token and its position apart, which move it twice."""


def autocast(options: Options) -> AbstractContextManager[Any]:
    """The precision that both sides train in: bf16 products on a GPU, fp32 on a CPU."""
    return torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda")


@dataclass
class Loop:
    """What a task asks of Lightning's trainer in a step."""

    precision: str
    global_step: int = 0
    global_rank: int = 0
    world_size: int = 1
    accumulate_grad_batches: int = 1
    max_steps: int = 1_000_000
    ckpt_path: None = None
    strategy: Any = None


class OurStep:
    """An optimiser step as `meristem fit` takes it, without Lightning's loop around it.

    Args:
        task: without a model yet.
    """

    def __init__(self, task: Task, options: Options):
        self.task, self.options = task, options
        place = SimpleNamespace(root_device=torch.device(options.device))
        self.loop = Loop("bf16-mixed" if options.device == "cuda" else "32-true", strategy=place)
        task.trainer = self.loop  # type: ignore[assignment]
        task.configure_model()
        task.to(options.device).train()
        chosen = task.configure_optimizers()
        self.optimizer, self.schedule = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]

    def compiled(self) -> "OurStep":
        """Another of the same weights, as `model.compile` makes it."""
        task = self.task
        twin = Task(replace(task.spec, architecture=task.architecture, compile=True))
        other = OurStep(twin, self.options)
        twin.model.load_state_dict(task.model.state_dict())
        return other

    def loss(self, batch: PackedBatch) -> torch.Tensor:
        """The loss of a pack that is a step."""
        with autocast(self.options):
            return self.task.training_step(batch, 0)

    def __call__(self, batch: PackedBatch) -> None:
        self.task.optimizer_step(0, 0, self.optimizer, partial(self._closure, batch))
        self.schedule.step()
        self.loop.global_step += 1

    def _closure(self, batch: PackedBatch) -> torch.Tensor:
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.task.configure_gradient_clipping(self.optimizer, CLIP)
        return loss


class PeerStep:
    """The same step as people write it.

    Args:
        model: trained.
        loss: of the model and one batch.
        is_fused: AdamW in one kernel.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., torch.Tensor], options: Options, is_fused: bool = False):
        self.model, self.options, self._loss = model.to(options.device).train(), options, loss
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            OPTIMIZER.lr,
            OPTIMIZER.betas,
            OPTIMIZER.eps,
            OPTIMIZER.weight_decay,
            fused=is_fused or options.device == "cuda",
        )

    def loss(self, *batch: Any) -> torch.Tensor:
        """The loss of a batch."""
        with autocast(self.options):
            return self._loss(self.model, *batch)

    def __call__(self, *batch: Any) -> None:
        self.optimizer.zero_grad()
        self.loss(*batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Move norms and biases off ones and zeros, and make maps sharper: else a wrong one would hardly show."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.mul_(3.0)


def packed(
    objective: Objective, sequences: Sequence[Tokens], options: Options, labels: Sequence[Mapping[str, Any]] = ()
) -> PackedBatch:
    """A pack of sequences that is a whole step, prepared as the loader does it.

    Args:
        labels: of each record, where there are any.
    """
    rng = np.random.default_rng(0)
    prepared = [
        objective.prepare(Record.of("", b"", one), Encoder({INPUT: tokens}), rng)[0]
        for tokens, one in zip(sequences, labels or [{}] * len(sequences), strict=True)
    ]
    batch = pack(prepared, range(len(prepared)))
    return replace(batch, step_counts=objective.counts(batch)).to(options.device)


def agreed(ours: OurStep, own: Sequence[Any], peers: Mapping[str, PeerStep], batch: Sequence[Any]) -> str:
    """How far losses differ before a step, and what the step changes them by, if it is little enough.

    Args:
        own: the batch of ours.
        batch: that of the peers.
    """

    def losses() -> tuple[float, dict[str, float]]:
        return ours.loss(*own).item(), {name: one.loss(*batch).item() for name, one in peers.items()}

    loss, others = losses()
    before = max(
        agree(f"loss of {name}", loss, other, TOLERANCES[ours.options.device]) for name, other in others.items()
    )
    ours(*own)
    for one in peers.values():
        one(*batch)
    after, others_after = losses()
    change = loss - after
    within = STEP_TOLERANCES[ours.options.device]
    worst = max(
        agree(f"a step of {name}", 1.0, (others[name] - other) / change, within) for name, other in others_after.items()
    )
    return (
        f"Losses differ by {before:.1e}, and what a step changes them by ({change:.2g}) by {worst:.1e} of it, at most."
    )


def precision(options: Options) -> str:
    return "bf16 autocast" if options.device == "cuda" else "fp32"


DATA_SHEET = {"h100": 989e12, "h200": 989e12, "a100": 312e12}
"""Operations a second in bf16 as the maker states them, without sparsity: what the field's MFU is a share of. It counts
all keys for every query, causal or not."""


def achieved(
    architecture: TransformerConfig, tokens: int, length: int, seconds: Sequence[float], options: Options
) -> dict[str, str]:
    """Operations of a step, and the rate they run at over that of a product of the model's shape run alone."""
    flops = 3 * flops_per_token(architecture, length) * tokens
    took = statistics.median(seconds)
    rate, peak = flops / took, matrix_peak(tokens, architecture.width, options)
    values = {
        "operations of a step": f"{flops / 1e9:,.0f} GFLOP",
        "rate": f"{rate / 1e9:,.0f} GFLOP/s",
        f"product of [{tokens}, {architecture.width}] and [{architecture.width}, {4 * architecture.width}] alone": (
            f"{peak / 1e9:,.0f} GFLOP/s"
        ),
        "share of it reached": f"{rate / peak:.0%}",
    }
    stated = DATA_SHEET.get(hardware(options.device)) if options.device == "cuda" else None
    if stated:
        counted = replace(architecture, attention=replace(architecture.attention, pattern=Full()))
        mfu = 3 * flops_per_token(counted, length) * tokens / took / stated
        values[f"MFU (Chowdhery 2022, appendix B), of {stated / 1e12:.0f} TFLOP/s"] = f"{mfu:.1%}"
    return values


@torch.no_grad()
def matrix_peak(rows: int, width: int, options: Options) -> float:
    """Operations a second of the feed-forward's first product."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    x, weight = (torch.randn(count, width, device=options.device, dtype=dtype) for count in (rows, 4 * width))
    repeats = 3 if options.device == "cpu" else 30

    def products() -> None:
        for _ in range(repeats):
            F.linear(x, weight)

    products()
    return 2 * rows * width * 4 * width * repeats / min(timed(products, options.device) for _ in range(7))
