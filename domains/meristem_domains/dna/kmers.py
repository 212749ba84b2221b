"""Tokenize DNA as k-mers: words of k bases that do not overlap.

As the Nucleotide Transformer cuts (Dalla-Torre 2024, doi 10.1038/s41592-024-02523-z): a sequence is split at every N,
each piece is cut into words from left to right, and what is left of a piece becomes single bases. Unlike there, lower
case is read as upper case, and other letters are replaced one by one and counted, or refused: a run of them never
becomes one symbol.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from meristem.data.tokenizer import RefusedSymbol, Tokenizer, column_bytes, frozen_symbols
from meristem.errors import ConfigError
from meristem.framing import frame_of
from meristem.types import TokenColumn, Tokens

BASES = "ATCG"
"""In the order in which vocabularies list words."""

GAP = "N"
"""The base that is not known: always a symbol of its own."""

AMBIGUOUS = {"U": "T", **dict.fromkeys("RYSWKMBDHV", GAP)}
"""IUPAC letters beside those of the vocabulary, and what they are read as."""

MAX_K = 12
"""Longest words: the vocabulary holds all `4 ** k` of them."""


@dataclass(frozen=True)
class KmerTokenizer(Tokenizer):
    """Tokenizer with one token for k bases, one for each base left over, and one for each N.

    Attributes:
        vocab: symbols in the order of their ids: all words of k bases, A, T, C, G and N, and special symbols. k is the
            length of its longest word.
        prefix: special symbols put before every payload.
        suffix: special symbols put behind every payload.
        special: special symbols by role, such as `mask`, `pad`, `bos`, `eos`.
        replace: letters that are read as another base, and counted; letters that are not here are refused.
    """

    kind: ClassVar[str] = "k-mers"

    vocab: tuple[str, ...]
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    special: Mapping[str, str] = field(default_factory=dict)
    replace: Mapping[str, str] = field(default_factory=lambda: dict(AMBIGUOUS))

    k: int = field(init=False, repr=False, compare=False)
    _index: dict[str, int] = field(init=False, repr=False, compare=False)
    _codes: np.ndarray = field(init=False, repr=False, compare=False)
    _singles: np.ndarray = field(init=False, repr=False, compare=False)
    _words: np.ndarray = field(init=False, repr=False, compare=False)
    _widths: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        index = frozen_symbols(self)
        k = max((len(symbol) for symbol in index if set(symbol) <= set(BASES)), default=0)
        if not 1 <= k <= MAX_K:
            raise ConfigError(f"vocab must hold words of 1 to {MAX_K} of the bases {BASES}; the longest has {k}")
        words = ["".join(word) for word in product(BASES, repeat=k)]
        named = [*words, *BASES, GAP, *self.prefix, *self.suffix, *self.special.values()]
        if absent := [symbol for symbol in named if symbol not in index]:
            raise ConfigError(f"vocab must hold all words of {k} bases, each base, N and what is named; no {absent[0]}")
        if wrong := [old for old, new in self.replace.items() if new not in BASES + GAP or old in BASES + GAP]:
            raise ConfigError(f"replace must give a base or N for a letter that is none; got it for {wrong[0]!r}")
        codes = np.full(256, -1, np.int8)
        for code, base in enumerate(BASES + GAP):
            codes[[ord(base), ord(base.lower())]] = code
        for old, new in self.replace.items():
            codes[[ord(old.upper()), ord(old.lower())]] = (BASES + GAP).index(new)
        widths = np.zeros(len(self.vocab), np.int64)
        for symbol in (*words, *BASES, GAP):
            widths[index[symbol]] = len(symbol)
        object.__setattr__(self, "k", k)
        object.__setattr__(self, "_index", index)
        object.__setattr__(self, "_codes", codes)
        object.__setattr__(self, "_singles", np.array([index[base] for base in BASES + GAP], np.int32))
        object.__setattr__(self, "_words", np.array([index[word] for word in words], np.int32))
        object.__setattr__(self, "_widths", widths)

    @property
    def num_special(self) -> tuple[int, int]:
        return len(self.prefix), len(self.suffix)

    def id_of(self, role: str) -> int | None:
        return self._index[self.special[role]] if role in self.special else None

    @property
    def symbols_per_token(self) -> int:
        return self.k

    @property
    def random_ids(self) -> np.ndarray:
        return np.unique(np.concatenate([self._words, self._singles[: len(BASES)]])).astype(np.int64)

    def encode_column(self, payloads: pa.Array) -> TokenColumn:
        text, bounds = column_bytes(payloads)
        codes = self._codes[text]
        if codes.size and codes.min() < 0:
            self._raise_refused(text, bounds, int(np.argmin(codes)))
        firsts, lengths = _runs(codes, bounds)
        # a run of n bases is n // k words and n % k single bases; an N is a run of its own
        words = np.where(codes[firsts] == len(BASES), 0, lengths // self.k)
        counts = words + lengths - words * self.k
        ends = np.concatenate([[0], np.cumsum(counts)])
        place = np.arange(ends[-1]) - np.repeat(ends[:-1], counts)  # of a token within its run
        past = np.maximum(place - np.repeat(words, counts), 0)  # single bases before it
        starts = np.repeat(firsts, counts) + (place - past) * self.k + past
        is_word = place < np.repeat(words, counts)
        body = self._singles[codes[starts]]
        value = np.zeros(int(is_word.sum()), np.int32)
        for i in range(self.k):
            value = value * len(BASES) + codes[starts[is_word] + i]
        body[is_word] = self._words[value]

        # tokens before each bound: a run never crosses one
        inner = ends[np.searchsorted(firsts, bounds)]
        offsets = inner + np.arange(len(bounds)) * sum(self.num_special)
        is_special = frame_of(offsets, self.num_special)
        ids = np.empty(offsets[-1], np.int32)
        frame = [self._index[symbol] for symbol in (*self.prefix, *self.suffix)]
        ids[is_special] = np.tile(frame, len(payloads))
        ids[~is_special] = body
        return TokenColumn(ids=ids, offsets=offsets, replaced=self._count_replaced(text), is_special=is_special)

    def widths_of(self, ids: np.ndarray) -> np.ndarray:
        return self._widths[ids]

    def decode(self, tokens: Tokens) -> str:
        return "".join(self.vocab[i] for i in tokens.ids if self._widths[i])

    def to_json(self) -> dict[str, Any]:
        names = ("vocab", "prefix", "suffix", "special", "replace")
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else dict(value) for name, value in values.items()}

    def _count_replaced(self, text: np.ndarray) -> dict[str, int]:
        if not self.replace or not text.size:
            return {}
        counts = np.bincount(text, minlength=256)
        found = {old: counts[ord(old.upper())] + counts[ord(old.lower())] for old in self.replace}
        return {f"{old}>{self.replace[old]}": int(count) for old, count in found.items() if count}

    def _raise_refused(self, text: np.ndarray, bounds: np.ndarray, at: int) -> None:
        row = int(np.searchsorted(bounds, at, side="right")) - 1
        symbol = bytes(text[at : at + 4]).decode("utf-8", "replace")[0]
        allowed = BASES + GAP + "".join(self.replace)
        raise RefusedSymbol(row, at - int(bounds[row]), symbol, f"{symbol!r} is not in the alphabet ({allowed})")


def _runs(codes: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where pieces without N begin, each N being a piece of its own, and how long they are."""
    begins = np.zeros(len(codes) + 1, bool)
    begins[bounds] = True
    is_gap = codes == len(BASES)
    begins[:-1] |= is_gap
    begins[1:] |= is_gap
    edges = np.flatnonzero(begins)
    return edges[:-1], np.diff(edges)
