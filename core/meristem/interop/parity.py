"""The same input through both libraries, and how far the results lie apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from meristem.data.tokenizer import Tokenizer
from meristem.interop.runners import Results, Runner, run_ours
from meristem.model.model import Model
from meristem.shapes import Tensor


@dataclass(frozen=True)
class Parity:
    """Largest absolute differences, in fp32 on the CPU.

    Attributes:
        differences: by name of the result, layers first; only what both libraries have.
    """

    differences: Mapping[str, float]

    @property
    def layers(self) -> tuple[float, ...]:
        """Of each hidden state, in order; those of a source side first."""
        return tuple(value for name, value in self.differences.items() if _is_layer(name))

    @property
    def outputs(self) -> dict[str, float]:
        """Of what heads and pools give."""
        return {name: value for name, value in self.differences.items() if not _is_layer(name)}

    @property
    def logits(self) -> float | None:
        """Of the symbol head."""
        return self.differences.get("logits")


def compare(model: Model, tokenizer: Tokenizer, reference: Any, rng: np.random.Generator, runner: Runner) -> Parity:
    """Run both on random inputs: here packed, there padded with an attention mask."""
    sequences = runner.draw(model, tokenizer, rng)
    with torch.inference_mode():
        ours, theirs = run_ours(model, tokenizer, sequences), runner.theirs(reference, sequences)
    return distances(ours, theirs)


def distances(ours: Results, theirs: Results) -> Parity:
    """Largest differences of two runs; hidden states that one of them lacks are a difference without bound."""
    layers = [name for name in {**ours, **theirs} if _is_layer(name)]
    outputs = [name for name in ours if not _is_layer(name) and name in theirs]
    return Parity(
        {name: _largest(ours.get(name), theirs.get(name)) for name in (*sorted(layers, key=_order), *outputs)}
    )


def _is_layer(name: str) -> bool:
    return name.removeprefix("source ").startswith("layer ")


def _order(name: str) -> tuple[bool, int]:
    return (not name.startswith("source "), int(name.rpartition(" ")[2]))


def _largest(ours: list[Tensor] | None, theirs: list[Tensor] | None) -> float:
    if ours is None or theirs is None:
        return float("inf")
    return max(_distance(a, b) for a, b in zip(ours, theirs, strict=True))


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    distance = (a.double() - b.double()).abs().max().item()
    return float("inf") if distance != distance else distance
