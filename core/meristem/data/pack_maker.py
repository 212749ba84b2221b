"""Making one pack: read the records, cut and tokenize their inputs, and have the objective prepare them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from meristem.data.corrupt import crop_window
from meristem.data.cuts import Cuts
from meristem.data.order import record_rng
from meristem.data.pack import pack
from meristem.data.parts import Encoder
from meristem.data.store import RecordStore
from meristem.data.tokenizer import Tokenizer
from meristem.data.views import Views
from meristem.errors import require
from meristem.types import PackedBatch, Record, TokenColumn, Tokens


class Prepares(Protocol):
    """What the data path asks of an objective."""

    inputs: tuple[str, ...]
    payload_inputs: tuple[str, ...]

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]: ...

    def counts(self, batch: PackedBatch) -> Mapping[str, float]: ...

    def lengths(self, lengths: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class PackMaker:
    """Reads, tokenises, crops and prepares the records of a pack.

    Attributes:
        rows: `[N]` rows of the store that take part, as in one part of a split.
        tokenizer: of every input that is not in `others`.
        seed: what happens to a record depends on (seed, epoch, row) alone.
        max_tokens_per_record: longer records are cropped to a random window, another one each epoch;
            special tokens are counted and kept. None crops nothing.
        views: of the records; None for the records as they are.
        is_training: views are drawn anew each epoch; else each record has one, the same each time.
    """

    store: RecordStore
    rows: np.ndarray
    tokenizer: Tokenizer
    objective: Prepares
    seed: int
    max_tokens_per_record: int | None = None
    views: Views | None = None
    is_training: bool = True
    others: Mapping[str, Tokenizer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_special, most = sum(self.tokenizer.num_special), self.max_tokens_per_record
        rule = f"max_tokens_per_record must leave room for one token beside the {num_special} special ones"
        require(most is None or most > num_special, rule, most)

    @cached_property
    def full_lengths(self) -> np.ndarray:
        """`[N]` tokens of the first input of each record, before cropping; refuses as `RecordStore.token_lengths`."""
        return self._lengths_of(self.main)

    def _lengths_of(self, name: str) -> np.ndarray:
        return np.asarray(self.store.token_lengths(self.tokenizers[name], self.rows, name=name))

    @property
    def main(self) -> str:
        """The input that windows are cut from."""
        return self.objective.inputs[0]

    @cached_property
    def tokenizers(self) -> Mapping[str, Tokenizer]:
        """Tokenizer of each input."""
        return {name: self.others.get(name, self.tokenizer) for name in self.objective.inputs}

    def lengths(self) -> np.ndarray:
        """`[N]` rows of each record as it reaches a pack."""
        own = np.minimum(self.full_lengths, self.max_tokens_per_record or np.iinfo(np.int32).max)
        lengths = sum(map(self._lengths_of, self.objective.inputs[1:]), start=own)
        return self.objective.lengths(lengths) * (self.views.num_views if self.views and self.is_training else 1)

    @property
    def _has_views(self) -> bool:
        return self.views is not None and (self.is_training or not self.views.is_training_only)

    def make(self, epoch: int, members: np.ndarray) -> PackedBatch:
        """The pack of these `members` of `rows`, as they are in `epoch`."""
        rows = self.rows[members]
        rngs = [record_rng(self.seed, epoch, row) for row in rows.tolist()]
        cuts = self._cuts(rows, members, rngs)
        records = self.store.records(rows, ~cuts.is_cut)
        seen: list[tuple[Record, ...]] = [(record,) for record in records]
        if self._has_views:
            assert self.views is not None
            seen = [self.views.views(record, rng if self.is_training else None) for record, rng in zip(records, rngs)]
        columns = self._columns(seen, rows, cuts)
        sequences: list[Tokens] = []
        indices: list[int] = []
        place = 0
        for i, (row, rng, views) in enumerate(zip(rows.tolist(), rngs, seen)):
            for view in views:
                ready = {name: self.tokenizers[name].tokens_at(column, place) for name, column in columns.items()}
                if (tokens := ready.get(self.main)) is not None:
                    tokens = cuts.window(tokens, i, self.store, row)
                    most = self.max_tokens_per_record
                    ready[self.main] = tokens if most is None else crop_window(tokens, most, rng)
                prepared = self.objective.prepare(view, Encoder(ready, self.tokenizers), rng)
                sequences += prepared
                indices += [row] * len(prepared)
                place += 1
        return pack(sequences, indices)

    def _columns(self, seen: list[tuple[Record, ...]], rows: np.ndarray, cuts: Cuts) -> dict[str, TokenColumn]:
        """Tokens of each input that the objective reads as tokens, view after view."""
        columns = {}
        for name, tokenizer in self.tokenizers.items():
            if name in self.objective.payload_inputs:
                continue
            if self._has_views:
                columns[name] = tokenizer.encode_values([view.inputs[name] for views in seen for view in views])
            else:
                payloads = cuts.payloads(self.store, rows) if name == self.main else self.store.payloads(rows, name)
                columns[name] = tokenizer.encode_column(payloads)
        return columns

    def _cuts(self, rows: np.ndarray, members: np.ndarray, rngs: Sequence[np.random.Generator]) -> Cuts:
        """Where records that are too long are cut before they are encoded."""
        most, name = self.max_tokens_per_record, self.main
        if most is None or self._has_views or name in self.objective.payload_inputs:
            return Cuts.none(len(rows), name)
        return Cuts.draw(self.store, rows, self.full_lengths[members] > most, self.tokenizers[name], most, rngs, name)
