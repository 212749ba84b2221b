"""Codes of an instrument: words over A, B, C and D, in files of a format of their own."""

from pathlib import Path

from lab_codes.reading import CodeReader
from lab_codes.tokenizer import PairTokenizer, vocab
from lab_codes.views import Mirrored
from meristem.domain import Domain
from meristem.model.config import Attention, Embedding, FeedForward, Rotary, TokenHead, TransformerConfig
from meristem.objectives.objective import Objective

PRESETS = {
    "tiny": TransformerConfig(
        width=32,
        num_layers=2,
        embedding=Embedding(vocab_size=len(vocab("ABCD"))),
        position=Rotary(),
        attention=Attention(num_heads=4),
        feedforward=FeedForward(width=64),
        head=TokenHead(),
    )
}


def tokenizer(letters: str = "ABCD") -> PairTokenizer:
    """Two letters a token."""
    return PairTokenizer(letters)


def sample_objective() -> Objective:
    """What a model is trained for on the sample."""
    from lab_codes.objective import TellSequels

    return TellSequels()


domain = Domain(
    "lab-codes",
    CodeReader(),
    tokenizer,
    PRESETS,
    sample=Path(__file__).parent / "sample.codes",
    sample_options={"views": {"rate": 0.5}},
    sample_objective=sample_objective,
    views=Mirrored,
)
