"""What the names of timm's vision transformers stand for, where neither a config nor the shape of a tensor says it.

`timm_architectures.csv` holds facts of timm 1.0.31, all architectures that are supported: plain pre-norm blocks with
LayerNorm. A test compares every one of them with the models that timm builds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow.csv import ConvertOptions, read_csv

from meristem.model.config import Activation


@dataclass(frozen=True)
class Named:
    """What the name of an architecture says about its models.

    Attributes:
        num_heads: heads of attention, in the trunk and in an attention pool.
        eps: epsilon of every norm.
        is_gated: whether feed-forward layers are gated, by the first half of their packed map.
        is_distilled: whether there is a distillation token, and a classifier on it.
    """

    num_heads: int
    activation: Activation
    eps: float
    is_gated: bool
    is_distilled: bool


_TYPES = {"is_gated": pa.bool_(), "is_distilled": pa.bool_()}
_ROWS = read_csv(
    Path(__file__).with_name("timm_architectures.csv"), convert_options=ConvertOptions(column_types=_TYPES)
)

ARCHITECTURES: Mapping[str, Named] = {row.pop("name"): Named(**row) for row in _ROWS.to_pylist()}
"""What each name stands for."""
