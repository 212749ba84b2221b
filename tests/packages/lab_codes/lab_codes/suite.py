"""How far the vectors of some codes lie from each other, at each validation of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import meristem
from meristem.errors import ConfigError
from meristem.train.spec import DataSpec
from meristem.train.suite import Suite


@dataclass(frozen=True, kw_only=True)
class Spread(Suite):
    """Mean distance between the vectors of codes.

    Attributes:
        codes: two or more, each with its inputs by name.
        name: begins the names of the figures.
    """

    codes: list[dict[str, str]]
    name: str = "spread"

    def read(self, data: DataSpec) -> list[str]:
        if len(self.codes) < 2:
            raise ConfigError(f"codes must be two or more; got {self.codes}")
        return ["distance"]

    def run(self, model: Path, data: DataSpec) -> Mapping[str, float | None]:
        vectors = meristem.load(model, device="cpu").embed(self.codes, precision="fp32").astype(np.float64)
        distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
        return {"distance": float(distances[np.triu_indices(len(vectors), 1)].mean())}
