"""Random small models of every kind that has a likelihood, and likelihoods computed one token at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from meristem.data.tokenizer import AlphabetTokenizer
from meristem.model.config import (
    Attention,
    BucketBias,
    Causal,
    Embedding,
    FeedForward,
    Full,
    InPrefix,
    LayerNorm,
    LayerRule,
    Learned,
    LinearBias,
    Pattern,
    RMSNorm,
    Rotary,
    TokenHead,
    TransformerConfig,
    Window,
)
from meristem.model.model import Model
from meristem.types import SOURCE, Layout, PackedBatch, TokenColumn
from model_runs import outputs_of, specs

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
KINDS = ("masked", "causal", "prefix", "encoder-decoder")


def draw_tokenizer(rng: np.random.Generator, num_special: tuple[int, int] | None = None) -> AlphabetTokenizer:
    """Special symbols at random places of the vocabulary, and none to two of them at each end."""
    special = ["<first>", "<second>", "<last>", "<end>", "<mask>", "<pad>"]
    vocab = tuple(rng.permutation([*LETTERS, *special]).tolist())
    before, behind = num_special or (int(rng.integers(3)), int(rng.integers(3)))
    return AlphabetTokenizer(
        vocab=vocab, prefix=("<first>", "<second>")[:before], suffix=("<last>", "<end>")[:behind], mask="<mask>"
    )


def draw_model(kind: str, tokenizer: AlphabetTokenizer, rng: np.random.Generator) -> Model:
    """A model of this kind with random parts, every parameter redrawn, and logits as sharp as those of trained ones."""
    head_width, num_heads = int(rng.choice([4, 6, 8])), int(rng.choice([2, 4]))
    left = int(rng.integers(1, 6))
    seen: dict[str, list[Pattern]] = {
        "masked": [Full(), Window(left=left, right=int(rng.integers(1, 6)))],
        "causal": [Causal(), Causal() & Window(left=left)],
        "prefix": [Causal() | InPrefix(), (Causal() & Window(left=left)) | InPrefix()],
        "encoder-decoder": [Full(), Window(left=left, right=left)],
    }
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=int(rng.choice([n for n in (1, 2, 4) if num_heads % n == 0])),
        head_width=head_width,
        pattern=pick(rng, seen[kind]),
    )
    position = pick(rng, [Rotary(), Learned(max_positions=64), LinearBias()])
    # of a sequence that is nothing but masks, token dropout leaves nothing
    has_token_dropout = kind == "masked" and any(tokenizer.num_special) and rng.random() < 0.5
    values: dict[str, Any] = {
        "width": 24,
        "num_layers": 2,
        "embedding": Embedding(
            vocab_size=len(tokenizer.vocab),
            **({"mask_id": tokenizer.mask_id, "mask_dropout_frac": 0.12} if has_token_dropout else {}),
        ),
        "position": position,
        "attention": attention,
        "feedforward": FeedForward(width=40, is_gated=bool(rng.integers(2))),
        "norm": pick(rng, [LayerNorm(), RMSNorm()]),
        "head": pick(rng, [TokenHead(), TokenHead(activation=None, bias=False), TokenHead(is_tied=False)]),
    }
    if kind == "encoder-decoder":
        is_bucketed = rng.random() < 0.5
        rule: dict[str, Any] = {"start": 2, "attention": replace(attention, pattern=pick(rng, seen["causal"]))}
        if is_bucketed:
            values["position"] = BucketBias(num_buckets=8, max_distance=20)
            rule["position"] = BucketBias(num_buckets=8, max_distance=20, is_two_sided=False)
        values |= {"num_decoder_layers": 2, "layers": (LayerRule(**rule),)}
    return redrawn(Model(TransformerConfig(**values), specs(("tokens",))))


def small_config(**changes: Any) -> TransformerConfig:
    """One bidirectional layer over 26 symbols."""
    values: dict[str, Any] = {
        "width": 16,
        "num_layers": 1,
        "embedding": Embedding(vocab_size=26),
        "attention": Attention(num_heads=2),
        "feedforward": FeedForward(width=16),
        "head": TokenHead(),
    }
    return TransformerConfig(**{**values, **changes})


def redrawn(model: Model) -> Model:
    """No parameter at its initial value."""
    for parameter in model.parameters():
        draw = torch.randn_like(parameter)
        parameter.data = draw / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + 0.3 * draw
    nn.init.normal_(model.trunk.embedding.symbols.weight, std=0.6)
    return model.eval()


def pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def draw_column(
    tokenizer: AlphabetTokenizer, rng: np.random.Generator, count: int = 7, low: int = 1, high: int = 20
) -> TokenColumn:
    """Random sequences, some of them equally long."""
    lengths = rng.integers(low, high, count)
    lengths[-1] = lengths[0]
    return tokenizer.encode_values(["".join(rng.choice(list(LETTERS), n)) for n in lengths])


def ids_of(column: TokenColumn, row: int) -> list[int]:
    return column.ids[column.offsets[row] : column.offsets[row + 1]].tolist()


def alone(ids: Sequence[int], prefix_length: int = 0) -> PackedBatch:
    """One sequence, and nothing beside it."""
    layout = Layout.of([len(ids)], min_rows=0)
    layout = replace(layout, prefix_lengths=(prefix_length,) if prefix_length else ())
    return PackedBatch(layout, torch.arange(len(ids))[:, None], torch.tensor(ids))


@torch.inference_mode()
def log_probability(model: Model, batch: PackedBatch, row: int, symbol: int) -> float:
    """Of one symbol at one row, by definition."""
    logits = outputs_of(model, batch)[row].double()
    return float(logits[symbol] - logits.exp().sum().log())


def by_brute_force(
    kind: str,
    model: Model,
    tokenizer: AlphabetTokenizer,
    ids: list[int],
    source: list[int] | None = None,
    *,
    one_pass: bool = False,
    closing: bool = False,
    prefix_tokens: int = 0,
    start_id: int = 0,
) -> list[float]:
    """Log-probability of each scored token: one run of one sequence for each, which ends where the token stands."""
    before, behind = tokenizer.num_special
    stop = len(ids) if closing else len(ids) - behind
    found = []
    for place in range(before + prefix_tokens, stop):
        if kind == "masked":
            hidden = ids if one_pass else [*ids[:place], tokenizer.mask_id, *ids[place + 1 :]]
            found.append(log_probability(model, alone(hidden), place, ids[place]))
        elif kind == "encoder-decoder":
            assert source is not None
            read = [start_id, *ids[before:place]]
            batch = replace(alone(read), sides={SOURCE: alone(source)})
            found.append(log_probability(model, batch, len(read) - 1, ids[place]))
        elif place:  # the first token of all has nothing before it
            prefix_length = before + prefix_tokens if kind == "prefix" else 0
            found.append(log_probability(model, alone(ids[:place], prefix_length), place - 1, ids[place]))
    return found
