"""Model directories that are fresh in every run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_models import redraw, tiny_config

from meristem.inference import chunks, run
from meristem.model.heads import Readout
from meristem.model_directory import ModelCard, save_model
from meristem_domains.protein import domain
from model_runs import specs


@pytest.fixture
def make_model_directory(tmp_path: Path, rng: np.random.Generator) -> Callable[..., Path]:
    """Writes a model directory with weights of this run's own."""

    def make(name: str = "model", readouts: tuple[Readout, ...] = (), **parts: object) -> Path:
        card = ModelCard(tiny_config(**parts), domain.tokenizer(), specs(("tokens",), readouts), domain=domain.name)
        save_model(tmp_path / name, card, redraw(card.build()))
        return tmp_path / name

    return make


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks in little time."""
    monkeypatch.setattr(chunks, "CHUNK_RECORDS", 16)
    monkeypatch.setattr(run, "CHUNK_RECORDS", 16)
