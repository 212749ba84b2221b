"""Packs and configs for tests of the trunk."""

from typing import Any

import numpy as np

from meristem.data.pack import pack
from meristem.model.config import Attention, Embedding, FeedForward, TokenHead, TransformerConfig
from meristem.types import PackedBatch, Tokens

VOCAB = 33
MASK = 32


def config(**changes: Any) -> TransformerConfig:
    """A tiny trunk with a symbol head."""
    values: dict[str, Any] = {
        "width": 32,
        "num_layers": 2,
        "embedding": Embedding(vocab_size=VOCAB, mask_id=MASK, mask_dropout_frac=0.12),
        "attention": Attention(num_heads=4),
        "feedforward": FeedForward(width=64),
        "head": TokenHead(),
    }
    return TransformerConfig(**{**values, **changes})


def tokens(ids: np.ndarray) -> Tokens:
    return Tokens(positions=np.arange(len(ids))[:, None], ids=np.asarray(ids, np.int64))


def random_pack(rng: np.random.Generator, lengths: list[int]) -> PackedBatch:
    """Sequences of random symbols, masks among them; sorted by length, as every pack is."""
    sequences = [tokens(rng.integers(0, VOCAB, length)) for length in lengths]
    return pack(sequences, range(len(sequences)))
