"""Every objective that predicts symbols, with a model it can train that costs nothing."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from labelled import encoded
from meristem.data.pack import pack
from meristem.data.parts import Part, RunData
from meristem.data.tokenizer import AlphabetTokenizer
from meristem.model.config import (
    Attention,
    Embedding,
    Experts,
    FeedForward,
    InPrefix,
    LayerRule,
    Learned,
    TokenHead,
    TransformerConfig,
)
from meristem.model.config import (
    Causal as CausalPattern,
)
from meristem.model.config import (
    Prefix as PrefixPool,
)
from meristem.model.model import SYMBOLS, Model
from meristem.objectives.masked import MaskedTokens
from meristem.objectives.next_sentence import NextSentence
from meristem.objectives.next_token import NextToken, PrefixLM
from meristem.objectives.objective import Objective
from meristem.objectives.two_sided import Denoising, SequenceToSequence, SpanCorruption
from meristem.types import PackedBatch, Record, Tokens

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
NUM_SENTINELS = 30
VOCAB = (
    *("<cls>", "<sep>", "<mask>", "<pad>"),
    *RESIDUES,
    *(f"<extra_id_{i}>" for i in reversed(range(NUM_SENTINELS))),
)
TOKENIZER = AlphabetTokenizer(vocab=VOCAB, prefix=("<cls>",), suffix=("<sep>",), mask="<mask>", random=RESIDUES)
CLOSED = replace(TOKENIZER, prefix=())
"""As T5 has it: nothing before a payload, one special row behind it."""

CLS, SEP, MASK, PAD = range(4)
RESIDUE_IDS = slice(4, 24)
FIRST_SENTINEL = len(VOCAB) - 1

ENCODER = TransformerConfig(
    width=32,
    num_layers=2,
    embedding=Embedding(vocab_size=len(VOCAB)),
    attention=Attention(num_heads=4),
    feedforward=FeedForward(width=64),
    head=TokenHead(),
)
DECODER = replace(ENCODER, attention=replace(ENCODER.attention, pattern=CausalPattern()))
PREFIX_DECODER = replace(ENCODER, attention=replace(ENCODER.attention, pattern=CausalPattern() | InPrefix()))
BOTH = replace(ENCODER, num_decoder_layers=2, layers=(LayerRule(start=2, attention=DECODER.attention),))
PAIRS = replace(
    ENCODER,
    embedding=replace(ENCODER.embedding, token_types=2),
    position=Learned(max_positions=64),
    pool=PrefixPool(is_dense=True),
)

CASES: dict[str, tuple[Callable[..., Objective], TransformerConfig]] = {
    "masked": (MaskedTokens, ENCODER),
    "causal": (NextToken, DECODER),
    "prefix": (PrefixLM, PREFIX_DECODER),
    "spans": (SpanCorruption, BOTH),
    "denoising": (lambda **options: Denoising(delete_rate=0.1, **options), BOTH),
    "sequence to sequence": (SequenceToSequence, BOTH),
    "next sentence": (NextSentence, PAIRS),
}


def with_experts(config: TransformerConfig) -> TransformerConfig:
    return replace(config, experts=Experts(count=3, top_k=1, capacity=20))


def random_records(rng: np.random.Generator, count: int = 8, low: int = 3, high: int = 30) -> list[Record]:
    """Random residues, and others in the column `other`."""

    def residues() -> str:
        return "".join(rng.choice(list(RESIDUES), rng.integers(low, high)))

    return [Record.of(str(i), residues(), {"other": residues()}, f"x.csv:{i + 2}") for i in range(count)]


def suited(objective: Objective, record: Record) -> Record:
    """A record of `random_records` with the inputs that an objective reads."""
    payloads = [record.payload, record.labels.get("other")]
    return replace(record, inputs=dict(zip(objective.inputs, payloads)), labels={})


def bound(objective: Objective, config: TransformerConfig | None, records: list[Record], tokenizer=TOKENIZER):
    """The objective, after all that comes before training."""
    if config is not None:
        objective.bind_model(config)
    parts = {"train": Part.of([suited(objective, record) for record in records])} if records else {}
    objective.bind(RunData(tokenizer, parts))
    return objective


def prepared(objective: Objective, records: list[Record], tokenizer=TOKENIZER, seed: int = 0) -> list[Tokens]:
    return [
        tokens
        for i, record in enumerate(records)
        for tokens in objective.prepare(
            suited(objective, record), encoded(tokenizer, suited(objective, record)), np.random.default_rng(seed + i)
        )
    ]


def packed(objective: Objective, records: list[Record], tokenizer=TOKENIZER, seed: int = 0) -> PackedBatch:
    tokens = prepared(objective, records, tokenizer, seed)
    each = len(tokens) // len(records)
    return pack(tokens, [i // each for i in range(len(tokens))])


def built(objective: Objective, config: TransformerConfig) -> Model:
    """A model with every parameter drawn anew, so that no bias is 0 and no norm 1."""
    model = Model(config, objective.heads)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.heads[SYMBOLS].bias.normal_(std=2)  # far from uniform
    return model
