"""Tiny models and random inputs for the tests of embedding."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from meristem.framing import frame_of
from meristem.model.config import Attention, Embedding, FeedForward, TokenHead, TransformerConfig
from meristem.model.heads import Readout
from meristem.model.model import Model
from meristem.types import TokenColumn

RESIDUES = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", np.uint8)

READOUTS = (
    Readout(name="ss", level="token", classes=tuple("HEC")),
    Readout(name="disorder", level="token", task="regression", mean=(0.5,), std=(2.0,)),
    Readout(name="place", classes=("cytosol", "membrane", "nucleus"), hidden_width=20),
    Readout(name="fitness", task="regression", mean=(3.0,), std=(2.0,)),
)


def tiny_config(width: int = 32, num_heads: int = 4, num_layers: int = 2, **parts: object) -> TransformerConfig:
    """A small ESM-2."""
    values: dict = {
        "embedding": Embedding(vocab_size=33, mask_id=32, mask_dropout_frac=0.12),
        "attention": Attention(num_heads=num_heads),
        "feedforward": FeedForward(width=2 * width),
        "head": TokenHead(),
    }
    return TransformerConfig(width=width, num_layers=num_layers, **(values | parts))


def redraw(model: Model) -> Model:
    """Every parameter away from its initial value, so that nothing that is left out goes unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def tiny_model(**parts: object) -> Model:
    return redraw(Model(tiny_config(**parts)))


def column_of(sequences: list[np.ndarray]) -> TokenColumn:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])]).astype(np.int64)
    is_special = frame_of(offsets, (1, 1))
    return TokenColumn(ids=np.concatenate(sequences).astype(np.int16), offsets=offsets, is_special=is_special)


def random_ids(rng: np.random.Generator, num_residues: int) -> np.ndarray:
    """Class row, residues, end row."""
    return np.concatenate([[0], rng.integers(4, 24, num_residues), [2]]).astype(np.int16)


def random_protein(rng: np.random.Generator, low: int = 5, high: int = 60) -> str:
    return rng.choice(RESIDUES, rng.integers(low, high)).tobytes().decode()


def write_fasta(path: Path, records: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records))
    return path


def records_with_repeats(rng: np.random.Generator, count: int = 90) -> list[tuple[str, str]]:
    """Ids and sequences, both with repeats near and far."""
    pool = [random_protein(rng) for _ in range(count * 2 // 3)]
    return [(f"p{rng.integers(count)}", pool[rng.integers(len(pool))]) for _ in range(count)]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Rows of every part."""
    return {part.name: str(pq.read_table(part).to_pydict()).encode() for part in sorted(folder.glob("part-*"))}
