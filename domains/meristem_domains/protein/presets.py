"""Architectures of published protein language models, by name.

ESM-2: Lin et al. 2023 (doi:10.1126/science.ade2574); ESM-1b: Rives et al. 2021 (doi:10.1073/pnas.2016239118).
"""

from dataclasses import replace

from meristem.interop.families.esm import MASK_DROPOUT_FRAC
from meristem.model import config as arch
from meristem_domains.protein.alphabet import VOCAB


def esm2(num_layers: int, width: int, num_heads: int) -> arch.TransformerConfig:
    """An ESM-2 of any size: pre-norm, rotary positions, exact GELU, biases everywhere."""
    return arch.TransformerConfig(
        width=width,
        num_layers=num_layers,
        embedding=arch.Embedding(
            vocab_size=len(VOCAB), mask_id=VOCAB.index("<mask>"), mask_dropout_frac=MASK_DROPOUT_FRAC
        ),
        position=arch.Rotary(),
        attention=arch.Attention(num_heads=num_heads),
        feedforward=arch.FeedForward(width=4 * width),
        norm=arch.LayerNorm(),
        head=arch.TokenHead(),
    )


def esm1b(num_layers: int = 33, width: int = 1280, num_heads: int = 20) -> arch.TransformerConfig:
    """An ESM-1b of any size: an ESM-2 with learned positions (1024 tokens) and a norm after the embedding."""
    config = esm2(num_layers, width, num_heads)
    embedding, position = replace(config.embedding, is_normed=True), arch.Learned(max_positions=1026, offset=2)
    return replace(config, embedding=embedding, position=position)


PRESETS = {
    "esm2_8m": esm2(6, 320, 20),
    "esm2_35m": esm2(12, 480, 20),
    "esm2_150m": esm2(30, 640, 20),
    "esm2_650m": esm2(33, 1280, 20),
    "esm2_3b": esm2(36, 2560, 40),
    "esm1b": esm1b(),
}
