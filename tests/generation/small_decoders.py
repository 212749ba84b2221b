"""Tiny models that generate, every parameter redrawn."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from meristem.data.pack import pack
from meristem.model.config import (
    Attention,
    BucketBias,
    Causal,
    Embedding,
    FeedForward,
    InPrefix,
    LayerRule,
    Learned,
    LinearBias,
    Residual,
    RMSNorm,
    Rotary,
    TokenHead,
    TransformerConfig,
    Window,
)
from meristem.model.model import Model
from meristem.types import SOURCE, Tokens
from model_runs import outputs_of, specs

VOCAB = 37


def decoder(**changes: Any) -> TransformerConfig:
    """A causal stack with a plain head."""
    values: dict[str, Any] = {
        "width": 32,
        "num_layers": 2,
        "embedding": Embedding(vocab_size=VOCAB),
        "attention": Attention(num_heads=4, pattern=Causal()),
        "feedforward": FeedForward(width=48, activation="silu", is_gated=True),
        "norm": RMSNorm(),
        "head": TokenHead(activation=None, bias=False),
    }
    return TransformerConfig(**{**values, **changes})


def encoder_decoder(**changes: Any) -> TransformerConfig:
    """Two stacks with relative positions, the second one causal."""
    attention = Attention(num_heads=4, scale=1.0)
    rule = LayerRule(
        start=2,
        attention=replace(attention, pattern=Causal()),
        position=BucketBias(num_buckets=8, max_distance=20, is_two_sided=False),
    )
    values = {
        "attention": attention,
        "position": BucketBias(num_buckets=8, max_distance=20),
        "num_decoder_layers": 3,
        "layers": (rule,),
    }
    return decoder(**{**values, **changes})


CONFIGS = {
    "rotary": decoder(),
    "rotary, partly and interleaved, parallel": decoder(
        position=Rotary(width=4, is_interleaved=True), residual=Residual(placement="parallel")
    ),
    "learned": decoder(position=Learned(max_positions=64, offset=2)),
    "slopes": decoder(position=LinearBias()),
    "window, grouped": decoder(
        attention=Attention(num_heads=4, num_kv_heads=2, head_width=6, pattern=Causal() & Window(left=4))
    ),
    "prefix, window": decoder(
        attention=Attention(num_heads=4, pattern=(Causal() & Window(left=2)) | InPrefix()), position=LinearBias()
    ),
    "encoder-decoder": encoder_decoder(),
}


def redrawn(config: TransformerConfig) -> Model:
    """No parameter at its initial value; logits as sharp as those of trained models."""
    model = Model(config, specs(("tokens",)))
    for parameter in model.parameters():
        draw = torch.randn_like(parameter)
        parameter.data = draw / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + 0.3 * draw
    nn.init.normal_(model.trunk.embedding.symbols.weight, std=0.4)
    return model.eval()


def random_prompts(rng: np.random.Generator, count: int, low: int = 1, high: int = 14) -> list[np.ndarray]:
    return [rng.integers(2, VOCAB, int(rng.integers(low, high))) for _ in range(count)]


def tokens(ids: np.ndarray, side: str = "") -> Tokens:
    return Tokens(positions=np.arange(len(ids))[:, None], ids=np.asarray(ids, np.int64), side=side)


@torch.inference_mode()
def slow_logits(model: Model, prompt: np.ndarray, made: list[int], start_id: int = 0) -> torch.Tensor:
    """Logits of what comes next, of the whole sequence computed at once."""
    if model.config.num_decoder_layers:
        sequences = [tokens(prompt, side=SOURCE), tokens(np.array([start_id, *made]))]
        batch = pack(sequences, [0, 0])
    else:
        whole = tokens(np.concatenate([prompt, np.array(made, np.int64)]))
        batch = pack([replace(whole, prefix_length=len(prompt))], [0])
    return outputs_of(model, batch)[batch.layout.num_tokens - 1]
