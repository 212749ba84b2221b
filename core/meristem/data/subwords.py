"""Text to subwords and back: byte pairs, word pieces and unigrams, as the `tokenizers` library has them.

What the library's `tokenizer.json` says is the tokenizer, so ids are those of every program that reads that file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa

from meristem.data.payloads import is_text
from meristem.data.tokenizer import RefusedSymbol, Tokenizer, column_bytes
from meristem.errors import CheckpointError, ConfigError
from meristem.framing import frame_of
from meristem.types import TokenColumn, Tokens

ROLES = ("pad", "bos", "eos", "unk", "cls", "sep", "mask")
"""What a special symbol may be for, in the words of the files of foreign tokenizers."""

BATCH_BYTES = 1 << 22
"""Text that is encoded at once: enough for all cores, and what the library makes of it stays within some 100 MB."""


@dataclass(frozen=True, slots=True)
class TextColumn(TokenColumn):
    """A column that still has its texts, since where a subword lies in one cannot be told from ids."""

    texts: pa.Array | None = None

    def take(self, rows: np.ndarray) -> "TextColumn":
        taken = TokenColumn.take(self, rows)
        texts = None if self.texts is None else self.texts.take(pa.array(np.asarray(rows)))
        return TextColumn(ids=taken.ids, offsets=taken.offsets, is_special=taken.is_special, texts=texts)


@dataclass(frozen=True)
class SubwordTokenizer(Tokenizer):
    """Pieces of words, with ids that agree with `tokenizer.json` exactly.

    A special symbol that is spelled out in a text becomes that symbol, and symbols that the vocabulary cannot say
    become the unknown one (counted) or, in a byte-pair vocabulary that has neither unknown symbol nor all bytes,
    vanish: the library has it so, and other ids would not be those that a model was trained with.

    Attributes:
        definition: the text of `tokenizer.json`. Truncation and padding in it are switched off.
        special: special symbols by role (`ROLES`); the rest are those that the definition calls special.
    """

    kind: ClassVar[str] = "subwords"

    definition: str
    special: Mapping[str, str] = field(default_factory=dict)

    vocab: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _backend: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            values = json.loads(self.definition)
            values["truncation"] = values["padding"] = None
            text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"a definition of subwords must be a JSON object: {error}") from error
        backend = _open_backend(text)
        ids = backend.get_vocab(with_added_tokens=True)
        symbols = {i: symbol for symbol, i in ids.items()}
        if unknown := [role for role in self.special if role not in ROLES]:
            raise CheckpointError(f"roles of special symbols must be of {', '.join(ROLES)}; got {unknown[0]!r}")
        if absent := [symbol for symbol in self.special.values() if symbol not in ids]:
            raise CheckpointError(f"special symbols must be in the vocabulary; got {absent[0]!r}")
        object.__setattr__(self, "definition", text)
        object.__setattr__(self, "special", dict(self.special))
        # an id that no symbol has stays empty
        object.__setattr__(self, "vocab", tuple(symbols.get(i, "") for i in range(max(symbols, default=-1) + 1)))
        object.__setattr__(self, "_backend", backend)

    def __reduce__(self) -> tuple[Any, ...]:
        return SubwordTokenizer, (self.definition, self.special)

    @cached_property
    def num_special(self) -> tuple[int, int]:
        # whatever frames a text that is not empty frames each text
        for probe in ("a", "A", "0", ".", "\u4e00"):
            owner = self._backend.encode(probe).sequence_ids
            own = [i for i, sequence in enumerate(owner) if sequence is not None]
            if own:
                return own[0], len(owner) - 1 - own[-1]
        if self._backend.encode("").ids:
            raise CheckpointError("a definition of subwords must have a symbol for one of a, A, 0 and .; it has none")
        return 0, 0

    def id_of(self, role: str) -> int | None:
        symbol = self.special.get(role)
        return None if symbol is None else self._backend.token_to_id(symbol)

    @cached_property
    def special_ids(self) -> np.ndarray:
        """Ids of all special symbols, in order: those with a role, and those that the definition calls special."""
        named = [self._backend.token_to_id(symbol) for symbol in self.special.values()]
        called = [i for i, token in self._backend.get_added_tokens_decoder().items() if token.special]
        return np.unique(np.array([*named, *called], np.int64))

    @cached_property
    def random_ids(self) -> np.ndarray:
        there = [i for i, symbol in enumerate(self.vocab) if symbol]
        return np.setdiff1d(np.array(there, np.int64), self.special_ids)

    @property
    def symbols_per_token(self) -> int:
        """Most texts have 3 to 6 bytes a token; a window of a text with more than 16 has fewer tokens than it may."""
        return 16

    def length_of(self, sizes: np.ndarray) -> np.ndarray:
        return -(-sizes // 4) + sum(self.num_special)

    def encode(self, payload: str) -> Tokens:
        try:
            encoding = self._backend.encode(payload)
        except TypeError as error:  # half of a surrogate pair, or no text at all
            raise RefusedSymbol(0, 0, "", "a text must be a string of whole characters: refused") from error
        before, behind = self.num_special
        ids = np.array(encoding.ids, np.int64)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        spans[:before] = 0
        spans[len(ids) - behind :] = len(payload)
        is_special = frame_of(np.array([0, len(ids)]), self.num_special)
        return Tokens(positions=np.arange(len(ids))[:, None], ids=ids, spans=spans, is_special=is_special)

    def encode_column(self, payloads: pa.Array) -> TextColumn:
        texts = _as_texts(payloads)
        parts = [np.zeros(0, np.int32)]
        lengths: list[int] = []
        for batch in _batches(texts):
            # the fast one leaves out where each token lies; ids are the same
            rows = [encoding.ids for encoding in self._backend.encode_batch_fast(batch.to_pylist())]
            parts.append(np.fromiter(chain.from_iterable(rows), np.int32))
            lengths += map(len, rows)
        ids = np.concatenate(parts)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        unknown, symbol = self._unknown or (-1, "")
        count = int((ids == unknown).sum())
        replaced = {f"unknown text>{symbol}": count} if count else {}
        return TextColumn(ids, offsets, replaced, is_special=frame_of(offsets, self.num_special), texts=texts)

    def tokens_at(self, column: TokenColumn, row: int) -> Tokens:
        """Row `row` of a column of `encode_column`; a column that lost its texts gives tokens without spans."""
        if isinstance(column, TextColumn) and column.texts is not None:
            return self.encode(column.texts[row].as_py())
        return replace(super().tokens_at(column, row), spans=None)

    def decode(self, tokens: Tokens | np.ndarray | Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of tokens, or of ids as they are generated.

        A vocabulary of bytes gives back the very text. Others give it back as far as they keep it: many fold case,
        strip accents or join spaces.
        """
        ids = tokens.ids if isinstance(tokens, Tokens) else tokens
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def text_of(self, ids: Sequence[int]) -> str:
        return self.decode(list(ids))

    def to_json(self) -> dict[str, Any]:
        return {"definition": json.loads(self.definition), "special": dict(self.special)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        if set(values) != {"definition", "special"} or not isinstance(values["special"], Mapping):
            raise CheckpointError(f"tokenizer.json must hold definition and special; got {', '.join(values)}")
        return cls(json.dumps(values["definition"], ensure_ascii=False), values["special"])

    @cached_property
    def _unknown(self) -> tuple[int, str] | None:
        """What the model puts in the place of symbols that it does not know."""
        model = json.loads(self.definition)["model"]
        if isinstance(model.get("unk_id"), int):
            return model["unk_id"], self.vocab[model["unk_id"]]
        symbol = model.get("unk_token")
        i = self._backend.token_to_id(symbol) if symbol else None
        return None if i is None else (i, symbol)


def _open_backend(definition: str) -> Any:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise ConfigError(
            "tokenizers of subwords need the package tokenizers; install it: pip install 'meristem[text]'"
        ) from error
    try:
        return Backend.from_str(definition)
    except Exception as error:  # the library raises nothing more special
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"a definition of subwords must be one of the tokenizers library: {reason}") from error


def _as_texts(payloads: pa.Array) -> pa.Array:
    """A column of strings, of one of strings or of bytes; refuses what is neither, is missing, or is no UTF-8."""
    if isinstance(payloads, pa.ChunkedArray):
        payloads = payloads.combine_chunks()
    column_bytes(payloads)  # refuses what is no column of text
    try:
        return payloads if is_text(payloads.type) else payloads.cast(pa.large_string())
    except pa.ArrowInvalid as error:
        for row, payload in enumerate(payloads.to_pylist()):
            try:
                payload.decode("utf-8")
            except UnicodeDecodeError as wrong:
                symbol = payload[wrong.start : wrong.start + 1]
                raise RefusedSymbol(row, wrong.start, repr(symbol), f"{symbol!r} is not UTF-8") from error
        raise


def _batches(texts: pa.Array) -> Iterator[pa.Array]:
    """The column in slices of about `BATCH_BYTES`."""
    _, bounds = column_bytes(texts)
    start = 0
    while start < len(texts):
        stop = int(np.searchsorted(bounds, bounds[start] + BATCH_BYTES, side="right")) - 1
        stop = min(max(stop, start + 1), len(texts))
        yield texts.slice(start, stop - start)
        start = stop
