"""Windows of long records, cut out of their payloads before these are encoded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from meristem.data.corrupt import crop_at
from meristem.data.store import RecordStore
from meristem.data.tokenizer import Tokenizer
from meristem.types import Tokens

CONTEXT_BYTES = 64
"""Bytes before a window that are encoded with it where a token may be several bytes: its first token is then no part of
a word that was cut in two."""


@dataclass(frozen=True)
class Cuts:
    """Which part of each record of a pack is encoded.

    A window begins at a byte drawn uniformly from those at which the window would still fit if every byte were a token.
    It is the first `max_tokens` tokens from there on, or the last ones of the payload where fewer follow. Where each
    byte is a token, each window is equally likely.

    Attributes:
        starts: `[N]` first byte (first symbol, of a slice) of the payload that is encoded.
        stops: `[N]` the byte behind the last; -1 where the record is taken whole.
        places: `[N]` byte at which the window begins.
        name: of the input that is cut.
        max_tokens: tokens of a window, special ones included.
        has_characters: places in the payload are counted in characters, which may be several bytes.
    """

    starts: np.ndarray
    stops: np.ndarray
    places: np.ndarray
    name: str
    max_tokens: int = 0
    has_characters: bool = False

    @classmethod
    def none(cls, count: int, name: str) -> "Cuts":
        """Of records whose input `name` is taken whole."""
        return cls(np.zeros(count, np.int64), np.full(count, -1, np.int64), np.zeros(count, np.int64), name)

    @classmethod
    def draw(
        cls,
        store: RecordStore,
        rows: np.ndarray,
        is_long: np.ndarray,
        tokenizer: Tokenizer,
        max_tokens: int,
        rngs: Sequence[np.random.Generator],
        name: str,
    ) -> "Cuts":
        """Windows of an input of the records that are too long, where they can be cut.

        Args:
            is_long: `[N]` which of `rows` have more than `max_tokens` tokens.
            rngs: one for each of `rows`, which is drawn from where its record is cut.
        """
        cuts, per_token = cls.none(len(rows), name), tokenizer.symbols_per_token
        if per_token is None or not is_long.any():
            return cuts
        has_characters = per_token > 1 and store.is_text(name)
        cuts = replace(cuts, max_tokens=max_tokens, has_characters=has_characters)
        room, context = max_tokens - sum(tokenizer.num_special), CONTEXT_BYTES if per_token > 1 else 0
        width = room * per_token + context
        long = np.flatnonzero(is_long)
        for i, size in zip(long.tolist(), store.sizes(rows[long], name).tolist()):
            if size > width or per_token == 1:
                cuts.places[i] = rngs[i].integers(size - room + 1)
                cuts.starts[i] = min(max(cuts.places[i] - context, 0), size - width)
                cuts.stops[i] = cuts.starts[i] + width
        return cuts

    @property
    def is_cut(self) -> np.ndarray:
        return self.stops >= 0

    def payloads(self, store: RecordStore, rows: np.ndarray) -> pa.Array:
        """The payloads of `rows`, of those that are cut what is to be encoded alone."""
        if not self.is_cut.any():
            return store.payloads(rows, self.name)
        whole = store.payloads(rows[~self.is_cut], self.name)
        cut = store.stretches(rows[self.is_cut], self.starts[self.is_cut], self.stops[self.is_cut], self.name)
        order = np.argsort(np.concatenate([np.flatnonzero(~self.is_cut), np.flatnonzero(self.is_cut)]))
        return pa.concat_arrays([whole, cut.cast(whole.type)]).take(pa.array(order))

    def window(self, tokens: Tokens, i: int, store: RecordStore, row: int) -> Tokens:
        """The window of record `i`, which is this row of the store, with the places of its tokens in the whole record.

        Args:
            tokens: of what `payloads` gave for it; returned as they are where the record is taken whole.
        """
        if self.stops[i] < 0:
            return tokens
        assert tokens.spans is not None, "a tokenizer whose payloads may be cut says where each token lies"
        start, place, size = int(self.starts[i]), int(self.places[i]), int(store.sizes(np.array([row]), self.name)[0])
        if self.has_characters:
            start, place, size = (store.characters(row, byte, self.name) for byte in (start, place, size))
        before, behind = tokens.frame
        spans = tokens.spans + start
        spans[:before] = 0
        spans[len(spans) - behind :] = size
        first = int(np.searchsorted(spans[before : len(spans) - behind, 0], place))
        return crop_at(replace(tokens, spans=spans), self.max_tokens, first)
