"""From payloads to symbols and back.

`Tokenizer` is what every domain gives; `AlphabetTokenizer` serves each alphabet in which one byte is one
token (residues, bases): encoding a column is one table look-up over bytes, whatever the number of records.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from meristem.errors import CheckpointError, ConfigError, DataError
from meristem.types import TokenColumn, Tokens

PAYLOAD_COLUMN_ERROR = "payloads must be an Arrow column of strings or bytes; got {}"


class Tokenizer(ABC):
    """Turns payloads into symbols, and symbols back into the same payloads.

    Nothing is dropped or merged unseen: every token keeps its span in the payload, and what is replaced
    is counted by the column path.
    """

    kind: ClassVar[str]
    """Names the class in a model directory; unique among tokenizers."""

    vocab: tuple[str, ...]
    """Symbols in the order of their ids."""

    @abstractmethod
    def encode(self, payload: Any) -> Tokens:
        """Encode one payload.

        Raises:
            DataError: a symbol that the tokenizer refuses; the message says where in the payload.
        """

    @abstractmethod
    def encode_column(self, payloads: pa.Array) -> TokenColumn:
        """Encode a column of payloads without a Python loop over symbols.

        Raises:
            DataError: as `encode`; `row` of the error is the row of the column.
        """

    def tokens_at(self, column: TokenColumn, row: int) -> Tokens:
        """Row `row` of a column of `encode_column`, as `encode` gives it.

        Here each token but the special ones is one symbol of the payload; another tokenizer overrides this.
        """
        ids = column.ids[column.offsets[row] : column.offsets[row + 1]].astype(np.int64)
        before, behind = self.num_special
        # of a token at place i, spans run from i to i + 1, but for the special ones at the ends
        spans = np.arange(-before, len(ids) - before)[:, None] + np.array([0, 1])
        spans[:before] = 0
        spans[len(ids) - behind :] = len(ids) - before - behind
        return Tokens(positions=np.arange(len(ids))[:, None], ids=ids, spans=spans)

    def encode_values(self, values: Sequence[Any]) -> TokenColumn:
        """Encode payloads that a program hands over, as `encode_column`."""
        return self.encode_column(pa.array(values, pa.large_string()))

    def lengths(self, payloads: pa.Array) -> np.ndarray:
        """`[N]` tokens of each payload, special ones included.

        Raises:
            DataError: as `encode_column`.
        """
        return self.encode_column(payloads).lengths

    def estimate_lengths(self, payloads: pa.Array) -> np.ndarray:
        """`[N]` tokens of each payload without the special ones, about, without a look at what is in it."""
        return np.diff(column_bytes(payloads)[1])

    @property
    def num_features(self) -> int:
        """Features of a patch (P); 0 where every token is a symbol."""
        return 0

    @property
    def num_axes(self) -> int:
        """Position axes (A)."""
        return 1

    @property
    def grid(self) -> tuple[int, ...]:
        """Places along each position axis, where all payloads have the same; else empty."""
        return ()

    def adapted(self, wanted: "Tokenizer", asked: Collection[str]) -> "Tokenizer":
        """This tokenizer, which a model was trained with, with what the data asks for that leaves the model valid.

        Args:
            wanted: as the data would have it; symbols must have the same numbers.
            asked: options that were set for it.

        Raises:
            ConfigError: the model cannot be trained on with what is asked for.
        """
        if wanted.vocab != self.vocab:
            raise ConfigError(
                "model.init_from must be of the same alphabet as data.domain; "
                f"got {len(self.vocab)} symbols for {len(wanted.vocab)}"
            )
        return wanted if wanted.fingerprint == self.fingerprint else self

    @abstractmethod
    def decode(self, tokens: Tokens) -> Any:
        """The payload that `tokens` came from (after replacements)."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Everything `from_json` needs, as plain values."""

    @classmethod
    @abstractmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer that wrote `values`."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever an id could; stored with a model and checked when it is loaded."""
        text = json.dumps({"kind": self.kind, **self.to_json()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    @abstractmethod
    def num_special(self) -> tuple[int, int]:
        """Special rows before and behind the payload's own tokens."""

    @property
    @abstractmethod
    def mask_id(self) -> int | None:
        """The symbol that hides a token in masked modelling; None where there is none."""

    @property
    @abstractmethod
    def random_ids(self) -> np.ndarray:
        """Ids that a corrupted token may be replaced with: payload symbols, not special ones."""

    def text_of(self, ids: Sequence[int]) -> str:
        """What ids spell as they are generated; symbols in angle brackets are special and left out."""
        symbols = (self.vocab[i] for i in ids)
        return "".join(symbol for symbol in symbols if not (symbol.startswith("<") and symbol.endswith(">")))

    @property
    def pad_id(self) -> int | None:
        """The symbol of padding, which is in no pack, but from which encoder-decoders start; None for none."""
        return None

    @property
    def bos_id(self) -> int | None:
        """The symbol that a generated text starts from; None where there is none."""
        return None

    @property
    def eos_id(self) -> int | None:
        """The symbol that ends a generated text; None where there is none."""
        return None


class RefusedSymbol(DataError):
    """A symbol that the tokenizer does not take.

    Attributes:
        row: row of the column it stands in (0 for a single payload).
        offset: byte of the payload.
        symbol: what was found.
    """

    def __init__(self, row: int, offset: int, symbol: str, reason: str):
        super().__init__(f"{reason} at position {offset + 1}")
        self.row, self.offset, self.symbol = row, offset, symbol


@dataclass(frozen=True)
class AlphabetTokenizer(Tokenizer):
    """One token a character, always.

    Attributes:
        vocab: symbols in the order of their ids; those of one character are the alphabet.
        prefix: special symbols put before every payload.
        suffix: special symbols put behind every payload.
        mask: the symbol that hides a token; empty for none.
        replace: characters that are read as another one, and counted.
        refuse: characters of the vocabulary that are refused nevertheless.
        is_case_sensitive: whether lower case differs from upper case.
        random: characters that masked modelling may put in the place of another.
    """

    kind: ClassVar[str] = "alphabet"

    vocab: tuple[str, ...]
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    mask: str = ""
    replace: Mapping[str, str] = field(default_factory=dict)
    refuse: str = ""
    is_case_sensitive: bool = False
    random: str = ""

    def __post_init__(self) -> None:
        # JSON gives lists; the tokenizer compares and hashes by value
        for name in ("vocab", "prefix", "suffix"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        index = {symbol: i for i, symbol in enumerate(self.vocab)}
        if len(index) != len(self.vocab):
            raise ConfigError("vocab must hold each symbol once")
        named = [
            *self.prefix,
            *self.suffix,
            *self.random,
            *self.replace.values(),
            *([self.mask] * bool(self.mask)),
        ]
        unknown = [symbol for symbol in named if symbol not in index]
        if unknown:
            raise ConfigError(f"every symbol that is named must be in the vocab; got {unknown[0]!r}")
        table = np.full(256, -1, dtype=np.int16)
        for symbol, i in index.items():
            if len(symbol) == 1 and symbol.isascii() and symbol not in self.refuse:
                table[ord(symbol)] = i
        for old, new in self.replace.items():
            table[ord(old)] = index[new]
        if not self.is_case_sensitive:
            for upper in range(ord("A"), ord("Z") + 1):
                if table[upper + 32] < 0:
                    table[upper + 32] = table[upper]
        object.__setattr__(self, "_index", index)
        object.__setattr__(self, "_table", table)
        object.__setattr__(self, "_prefix_ids", np.array([index[s] for s in self.prefix], np.int16))
        object.__setattr__(self, "_suffix_ids", np.array([index[s] for s in self.suffix], np.int16))

    _index: dict[str, int] = field(init=False, repr=False, compare=False)
    _table: np.ndarray = field(init=False, repr=False, compare=False)
    _prefix_ids: np.ndarray = field(init=False, repr=False, compare=False)
    _suffix_ids: np.ndarray = field(init=False, repr=False, compare=False)

    @property
    def num_special(self) -> tuple[int, int]:
        return len(self.prefix), len(self.suffix)

    @property
    def mask_id(self) -> int | None:
        return self._index[self.mask] if self.mask else None

    @property
    def random_ids(self) -> np.ndarray:
        return np.array([self._index[symbol] for symbol in self.random], dtype=np.int64)

    @property
    def bos_id(self) -> int | None:
        return self._index[self.prefix[-1]] if self.prefix else None

    @property
    def eos_id(self) -> int | None:
        return self._index[self.suffix[0]] if self.suffix else None

    def encode(self, payload: str) -> Tokens:
        return self.tokens_at(self.encode_column(pa.array([payload], pa.large_string())), 0)

    def encode_column(self, payloads: pa.Array) -> TokenColumn:
        text, bounds = column_bytes(payloads)
        symbols = self._table[text]
        if symbols.size and symbols.min() < 0:
            self._raise_refused(text, bounds, int(np.argmin(symbols)))
        before, behind = self.num_special
        lengths = np.diff(bounds)
        offsets = np.concatenate([[0], np.cumsum(lengths + before + behind)]).astype(np.int64)
        ids = np.empty(offsets[-1], dtype=np.int16)
        is_payload = np.ones(len(ids), dtype=bool)
        for i in range(before):
            ids[offsets[:-1] + i] = self._prefix_ids[i]
            is_payload[offsets[:-1] + i] = False
        for i in range(behind):
            ids[offsets[1:] - behind + i] = self._suffix_ids[i]
            is_payload[offsets[1:] - behind + i] = False
        ids[is_payload] = symbols
        return TokenColumn(ids=ids, offsets=offsets, replaced=self._count_replaced(text))

    def decode(self, tokens: Tokens) -> str:
        before, behind = self.num_special
        body = tokens.ids[before : len(tokens.ids) - behind]
        return "".join(self.vocab[i] for i in body)

    def to_json(self) -> dict[str, Any]:
        values = {key: value for key, value in asdict(self).items() if not key.startswith("_")}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "AlphabetTokenizer":
        try:
            return cls(**values)
        except (TypeError, ConfigError) as error:
            raise CheckpointError(f"tokenizer.json does not describe an alphabet: {error}") from error

    def _count_replaced(self, text: np.ndarray) -> dict[str, int]:
        if not self.replace or not text.size:
            return {}
        counts = np.bincount(text, minlength=256)
        if not self.is_case_sensitive:
            counts[ord("A") : ord("Z") + 1] += counts[ord("a") : ord("z") + 1]
        return {f"{old}>{new}": int(counts[ord(old)]) for old, new in self.replace.items() if counts[ord(old)]}

    def _raise_refused(self, text: np.ndarray, bounds: np.ndarray, at: int) -> None:
        row = int(np.searchsorted(bounds, at, side="right")) - 1
        symbol = bytes(text[at : at + 4]).decode("utf-8", "replace")[0]
        reason = "is refused here" if symbol.upper() in self.refuse else "is not in the alphabet"
        allowed = "".join(symbol for symbol in self.vocab if len(symbol) == 1 and symbol not in self.refuse)
        raise RefusedSymbol(row, at - int(bounds[row]), symbol, f"{symbol!r} {reason} ({allowed})")


def column_bytes(payloads: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a string or binary column and the `[N + 1]` bounds of its rows, without a copy.

    Raises:
        DataError: not a column of strings or bytes, or one with missing values.
    """
    if isinstance(payloads, pa.ChunkedArray):
        payloads = payloads.combine_chunks()
    if pa.types.is_string(payloads.type) or pa.types.is_binary(payloads.type):
        width: Any = np.int32
    elif pa.types.is_large_string(payloads.type) or pa.types.is_large_binary(payloads.type):
        width = np.int64
    else:
        raise DataError(PAYLOAD_COLUMN_ERROR.format(payloads.type))
    if payloads.null_count:
        raise DataError(PAYLOAD_COLUMN_ERROR.format(f"{payloads.null_count} missing values"))
    _, offsets, data = payloads.buffers()
    bounds = np.frombuffer(offsets, dtype=width)[payloads.offset : payloads.offset + len(payloads) + 1]
    bounds = bounds.astype(np.int64) if len(bounds) else np.zeros(1, np.int64)
    text = np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, np.uint8)
    return text[bounds[0] : bounds[-1]], bounds - bounds[0]
