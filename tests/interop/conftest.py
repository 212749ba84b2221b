"""Reference models at random weights, made once a session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import esm_reference
import numpy as np
import pytest
import torch

from meristem.interop.runners import load_transformers


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a reference model by shape name, every parameter redrawn."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"reference seed={seed}")

    @cache
    def make(shape: str) -> Path:
        model = esm_reference.redrawn(esm_reference.SHAPES[shape], np.random.default_rng(seed))
        return esm_reference.save(model, tmp_path_factory.mktemp(shape.replace(" ", "_")) / "hf")

    return make


@pytest.fixture(scope="session")
def reference_model(reference_folder: Callable[[str], Path]) -> Callable[[str], torch.nn.Module]:
    """The same as `transformers` loads it, in evaluation mode, not to be changed."""
    return cache(lambda shape: load_transformers(reference_folder(shape)))
