"""Tiny models and labelled tables for the tests of probing."""

import csv
from pathlib import Path

import image_table
import numpy as np
import torch

from meristem.model.config import Attention, Embedding, FeedForward, Learned, TokenHead, TransformerConfig
from meristem.model.model import Model
from meristem.model_directory import ModelCard, save_model
from meristem_domains.protein import domain as protein
from model_runs import specs

RESIDUES = "LAGVSERTIDPKQNFYMHWC"


def random_vectors(rng: np.random.Generator, count: int, width: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors whose classes overlap, and the classes."""
    codes = np.concatenate([np.arange(num_classes), rng.integers(0, num_classes, count - num_classes)])
    centres = rng.standard_normal((num_classes, width))
    scales, shift = np.exp(rng.standard_normal(width)), 3 * rng.standard_normal(width)
    noise = 1.5 * rng.standard_normal((count, width))
    return ((centres[codes] + noise) * scales + shift).astype(np.float32), codes


def save_protein_model(folder: Path) -> Path:
    config = TransformerConfig(
        width=32,
        num_layers=2,
        embedding=Embedding(vocab_size=33, mask_id=32, mask_dropout_frac=0.12),
        attention=Attention(num_heads=4),
        feedforward=FeedForward(width=64),
        head=TokenHead(),
    )
    card = ModelCard(config, protein.tokenizer(), specs(("tokens",)), domain="protein")
    save_model(folder, card, _redraw(card.build()))
    return folder


def image_card() -> ModelCard:
    tokens = image_table.tokenizer()
    config = TransformerConfig(
        width=32,
        num_layers=2,
        embedding=Embedding(vocab_size=1, patch_features=tokens.num_channels * tokens.patch_px**2),
        position=Learned(max_positions=int(np.prod(tokens.grid)), grid=tokens.grid),
        attention=Attention(num_heads=4),
        feedforward=FeedForward(width=64),
    )
    return ModelCard(config, tokens, domain="vision")


def save_image_model(folder: Path) -> tuple[Path, Model]:
    card = image_card()
    model = _redraw(card.build())
    save_model(folder, card, model)
    return folder, model


def _redraw(model: Model) -> Model:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def protein_of(rng: np.random.Generator, kind: int) -> str:
    """A protein that has its kind's favourite residues more often."""
    weights = np.ones(len(RESIDUES))
    weights[4 * kind : 4 * kind + 4] = 4
    return "".join(rng.choice(list(RESIDUES), rng.integers(20, 60), p=weights / weights.sum()))


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))
