"""Proteins for runs that need nothing but letters."""

import numpy as np

RESIDUES = np.array(list("LAGVSERTIDPKQNFYMHWC"))


def random_proteins(rng: np.random.Generator, count: int, longest: int = 90) -> list[str]:
    return ["".join(rng.choice(RESIDUES, rng.integers(20, longest))) for _ in range(count)]
