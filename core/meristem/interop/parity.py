"""Run our model and its reference implementation on the same input and measure how far the results differ."""

import math
from typing import Any

import numpy as np
import torch

from meristem.data.tokenizer import Tokenizer
from meristem.interop.runners import Runner, run_ours
from meristem.model.model import Model
from meristem.shapes import Tensor


def compare(
    model: Model, tokenizer: Tokenizer, reference: Any, rng: np.random.Generator, runner: Runner
) -> dict[str, float]:
    """Run both on random inputs, ours packed and the reference padded, in fp32 on the CPU.

    Returns:
        Largest absolute difference by name of the result: each hidden state in order (those of a source side first),
        then outputs of heads and pools that both libraries have. A hidden state that one of them lacks is infinitely
        far away.
    """
    sequences = runner.draw(model, tokenizer, rng)
    with torch.inference_mode():
        ours, theirs = run_ours(model, tokenizer, sequences), runner.theirs(reference, sequences)
    layers = sorted((name for name in {**ours, **theirs} if is_layer(name)), key=_order)
    outputs = [name for name in ours if not is_layer(name) and name in theirs]
    return {name: _distance(ours.get(name), theirs.get(name)) for name in (*layers, *outputs)}


def is_layer(name: str) -> bool:
    return name.removeprefix("source ").startswith("layer ")


def _order(name: str) -> tuple[bool, int]:
    return (not name.startswith("source "), int(name.rpartition(" ")[2]))


def _distance(ours: list[Tensor] | None, theirs: list[Tensor] | None) -> float:
    """The largest difference; infinite where tensors are missing, of another shape, or not numbers."""
    if ours is None or theirs is None or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return math.inf
    worst = torch.stack([(a.double() - b.double()).abs().max() for a, b in zip(ours, theirs)]).max()
    return worst.nan_to_num(math.inf, math.inf).item()
