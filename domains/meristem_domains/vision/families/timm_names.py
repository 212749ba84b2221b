"""What the names of timm's vision transformers stand for, where neither a config nor the shape of a tensor says it.

`timm_architectures.csv` holds facts of timm 1.0.31, all architectures that are supported: plain pre-norm blocks with
LayerNorm. A test compares every one of them with the models that timm builds.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from meristem.model.config import Activation


@dataclass(frozen=True)
class Named:
    """What the name of an architecture says about its models.

    Attributes:
        num_heads: heads of attention, in the trunk and in an attention pool.
        activation: activation of feed-forward layers.
        eps: epsilon of every norm.
        is_gated: whether feed-forward layers are gated, by the first half of their packed map.
        is_distilled: whether there is a distillation token, and a classifier on it.
    """

    num_heads: int
    activation: Activation
    eps: float
    is_gated: bool
    is_distilled: bool


def _read() -> dict[str, Named]:
    with Path(__file__).with_name("timm_architectures.csv").open(encoding="utf-8", newline="") as file:
        return {
            row["name"]: Named(
                num_heads=int(row["num_heads"]),
                activation=cast(Activation, row["activation"]),
                eps=float(row["eps"]),
                is_gated=row["is_gated"] == "1",
                is_distilled=row["is_distilled"] == "1",
            )
            for row in csv.DictReader(file)
        }


ARCHITECTURES: Mapping[str, Named] = _read()
"""What each name stands for."""
