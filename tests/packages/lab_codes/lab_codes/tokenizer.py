"""Letters to pairs of letters and back."""

from itertools import product
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from meristem.data.tokenizer import RefusedSymbol, Tokenizer
from meristem.types import TokenColumn, Tokens

SPECIAL = ("<pad>", "<start>", "<end>", "<mask>")


def vocab(letters: str) -> tuple[str, ...]:
    """Special symbols, all pairs, and single letters for what is left over."""
    return (*SPECIAL, *map("".join, product(letters, repeat=2)), *letters)


class PairTokenizer(Tokenizer):
    """Two letters a token, and one for a letter that is left over.

    Args:
        letters: of the alphabet.
    """

    kind: ClassVar[str] = "letter-pairs"

    def __init__(self, letters: str):
        self.letters, self.vocab = letters, vocab(letters)
        self.index = {symbol: i for i, symbol in enumerate(self.vocab)}

    def encode(self, payload: str) -> Tokens:
        return self.tokens_at(self.encode_column(pa.array([payload], pa.large_string())), 0)

    def encode_column(self, payloads: pa.Array) -> TokenColumn:
        rows = []
        for row, payload in enumerate(payloads.to_pylist()):
            for place, letter in enumerate(payload):
                if letter not in self.letters:
                    raise RefusedSymbol(row, place, letter, f"{letter!r} is no letter of a code ({self.letters})")
            pairs = [self.index[payload[i : i + 2]] for i in range(0, len(payload), 2)]
            rows.append([self.index["<start>"], *pairs, self.index["<end>"]])
        ids = np.array([i for row in rows for i in row], np.int32)
        offsets = np.cumsum([0, *map(len, rows)])
        return TokenColumn(ids=ids, offsets=offsets, is_special=ids < len(SPECIAL))

    def widths_of(self, ids: np.ndarray) -> np.ndarray:
        return np.array([len(self.vocab[i]) for i in ids])

    def decode(self, tokens: Tokens) -> str:
        return "".join(self.vocab[i] for i in tokens.ids if i >= len(SPECIAL))

    def to_json(self) -> dict[str, Any]:
        return {"letters": self.letters}

    @property
    def num_special(self) -> tuple[int, int]:
        return 1, 1

    def id_of(self, role: str) -> int | None:
        return {"pad": 0, "bos": 1, "eos": 2, "mask": 3}.get(role)

    @property
    def random_ids(self) -> np.ndarray:
        return np.arange(len(SPECIAL), len(self.vocab))
