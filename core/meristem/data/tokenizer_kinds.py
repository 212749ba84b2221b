"""The tokenizers that the core can open by itself."""

from meristem.data.kmers import KmerTokenizer
from meristem.data.patches import PatchTokenizer
from meristem.data.subwords import SubwordTokenizer
from meristem.data.tokenizer import AlphabetTokenizer, Tokenizer

_KINDS: tuple[type[Tokenizer], ...] = (AlphabetTokenizer, KmerTokenizer, PatchTokenizer, SubwordTokenizer)

TOKENIZERS: dict[str, type[Tokenizer]] = {kind.kind: kind for kind in _KINDS}
"""Tokenizers that a model directory may name, by kind."""
