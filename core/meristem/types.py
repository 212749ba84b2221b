"""What crosses a floor: the frozen values that data flows through, in order.

    file -> Record -> Tokens -> (objective.prepare) Tokens -> PackedBatch -> Outputs -> LossOut, or rows of a file

Domains differ in `Tokens` alone. From `PackedBatch` on there is no padding and no batch axis: sequences lie end to end
along `T`, and a `Layout` says where each begins.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from meristem.shapes import Bool, Float, Int, Tensor

IGNORE = -100
"""The target of a token that is not scored, and the label of a class that is missing."""

MIN_ROWS = 16
"""Rows that a pack holds at least, spare ones included; `model/exact.py` says why."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a file that is read when it is needed, such as a stretch of a long sequence.

    Attributes:
        start: first symbol; what a symbol is (a byte, a letter of a sequence in the file) the domain's reader knows.
        stop: the symbol behind the last.
        strand: 1 to read as the file has it, -1 to read from the end, as the reader of the domain does that.
    """

    file: str
    start: int
    stop: int
    strand: int = 1

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "Slice":
        """A part of the slice, counted from where reading begins."""
        assert 0 <= start <= stop <= len(self)
        if self.strand < 0:
            return replace(self, start=self.stop - stop, stop=self.stop - start)
        return replace(self, start=self.start + start, stop=self.start + stop)


Payload = str | bytes | Slice
"""What a tokenizer reads: a text, or the bytes of a file; or a part of a file that is to be fetched first."""

Labels = Mapping[str, str | Sequence[str | None]]
"""What is to be predicted, by name: a word, or a list of words, one a token."""

INPUT, SOURCE = "input", "source"
"""Name of the input of records that have one, and of the side of a pack that an encoder reads for a decoder."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a domain, as its file states it.

    Attributes:
        id: the name the file gives it; need not be unique.
        inputs: payloads by name: most domains have one, `INPUT`; a pair of sentences has two.
        labels: a missing one is absent.
        source: where it came from, `file:line`, for error messages.
        group: what must stay in one part of a split, such as a patient; empty for none.
    """

    id: str
    inputs: Mapping[str, Payload]
    labels: Labels = field(default_factory=dict)
    source: str = ""
    group: str = ""

    @classmethod
    def of(cls, id: str, payload: Payload, labels: Labels | None = None, source: str = "", group: str = "") -> "Record":
        """A record of one input."""
        return cls(id, {INPUT: payload}, labels or {}, source, group)

    @property
    def payload(self) -> Payload:
        """The payload of a record that has one input."""
        (payload,) = self.inputs.values()
        return payload

    def with_payload(self, payload: Any) -> "Record":
        """The same record of one input with another payload, or with what its tokenizer takes for one."""
        return replace(self, inputs=dict.fromkeys(self.inputs, payload))


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sequence on its way to the trunk. Arrays are numpy: no tensor crosses a process boundary.

    Attributes:
        positions: `[n, A]` integer coordinates of each token on each position axis (A is 1 for a
            sequence, 2 for a grid); -1 for a row that has no place, such as a register.
        ids: `[n]` symbol of each row, -1 where the row is a patch.
        features: `[n, P]` float32 features of each patch, rows of symbols are zero; None without patches.
        spans: `[n, 2]` start and end of each token in the payload (empty spans for special rows).
        targets: `[n]` or `[n, ...]` what is to be predicted at each token, by name; `IGNORE` where unscored.
        labels: what is to be predicted for the whole record, by name: a scalar or an array.
        token_types: `[n]` kind of each token (0 for the first sentence, 1 for the second); None: all 0.
        prefix_length: first tokens that every token may see, under a pattern that has a prefix.
        side: name of the side of a pack that the sequence belongs to, such as `SOURCE`; empty for the main one.
        is_special: `[n]` whether a row stands for no part of the payload, such as a class token or a separator. Means
            and maxima leave these rows out. None: no row does.
    """

    positions: np.ndarray
    ids: np.ndarray
    features: np.ndarray | None = None
    spans: np.ndarray | None = None
    targets: Mapping[str, np.ndarray] = field(default_factory=dict)
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    token_types: np.ndarray | None = None
    prefix_length: int = 0
    side: str = ""
    is_special: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def payload_rows(self) -> np.ndarray:
        """Rows that stand for a part of the payload, in order."""
        return np.arange(len(self)) if self.is_special is None else np.flatnonzero(~self.is_special)

    @property
    def frame(self) -> tuple[int, int]:
        """Special rows before the first row of the payload, and behind its last; all are before where there is none."""
        rows = self.payload_rows
        return (int(rows[0]), len(self) - 1 - int(rows[-1])) if len(rows) else (len(self), 0)


@dataclass(frozen=True, slots=True)
class TokenColumn:
    """Many sequences as a few arrays: the fast path from an Arrow column to packs.

    Attributes:
        ids: `[sum of n]` all symbols end to end, special ones included; -1 where a row is a patch.
        offsets: `[N + 1]` where each sequence begins in `ids`.
        replaced: how many symbols of the payloads were replaced, by `"old>new"`.
        features, is_special, token_types: with a row for each symbol, as in `Tokens`.
        positions: `[sum of n, A]` as in `Tokens`; None where they count from 0 in each sequence.
        source: what an encoder reads of each record; other views of the same records are `views`.
    """

    ids: np.ndarray
    offsets: np.ndarray
    replaced: Mapping[str, int] = field(default_factory=dict)
    features: np.ndarray | None = None
    positions: np.ndarray | None = None
    is_special: np.ndarray | None = None
    token_types: np.ndarray | None = None
    source: "TokenColumn | None" = None
    views: "tuple[TokenColumn, ...]" = ()

    ROW_FIELDS: ClassVar[tuple[str, ...]] = ("features", "positions", "is_special", "token_types")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """`[N]` tokens of each sequence."""
        return np.diff(self.offsets)

    @property
    def payload_lengths(self) -> np.ndarray:
        """`[N]` rows of each sequence that are not special."""
        if self.is_special is None:
            return self.lengths
        return np.diff(np.append(0, np.cumsum(~self.is_special))[self.offsets])

    @property
    def payload_ids(self) -> np.ndarray:
        """`[sum of payload_lengths]` symbols without the special ones."""
        return self.ids if self.is_special is None else self.ids[~self.is_special]

    def take(self, rows: np.ndarray) -> "TokenColumn":
        """The sequences at `rows`, in that order; what was replaced is not counted anew."""
        index, offsets = self.index_of(np.asarray(rows))
        taken: Any = {name: of[index] for name in self.ROW_FIELDS if (of := getattr(self, name)) is not None}
        source = None if self.source is None else self.source.take(rows)
        views = tuple(view.take(rows) for view in self.views)
        return TokenColumn(self.ids[index], offsets, source=source, views=views, **taken)

    def index_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the tokens of some sequences stand, `[sum of n]`, and where each sequence begins among them."""
        lengths = self.lengths[rows].astype(np.int64)
        offsets = np.append(0, np.cumsum(lengths))
        index = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return index, offsets


@dataclass(frozen=True)
class Layout:
    """Where each sequence lies in a pack. Lengths are on the host, so that no layer waits for the device.

    Attributes:
        lengths: tokens of each sequence, in the order of the pack.
        num_spare: rows at the end that belong to no sequence; they are computed and never read.
        device: where `cu_seqlens` lives.
        prefix_lengths: tokens of each sequence's prefix; empty where there is none.
        special_rows: rows of the pack that stand for no part of a payload, ascending.
    """

    lengths: tuple[int, ...]
    num_spare: int = 0
    device: torch.device = torch.device("cpu")
    prefix_lengths: tuple[int, ...] = ()
    special_rows: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, lengths: Sequence[int] | np.ndarray, min_rows: int = MIN_ROWS, is_special: np.ndarray | None = None
    ) -> "Layout":
        """Lay out sequences of these lengths, with spare rows up to `min_rows`; `is_special` says it of each row."""
        host = tuple(int(n) for n in lengths)
        special = () if is_special is None else tuple(np.flatnonzero(is_special).tolist())
        return cls(host, num_spare=max(0, min_rows - sum(host)), special_rows=special)

    def to(self, device: torch.device, non_blocking: bool = True) -> "Layout":
        return self if device == self.device else replace(self, device=device)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        """Rows that belong to a sequence."""
        return sum(self.lengths)

    @property
    def num_rows(self) -> int:
        """`T`: rows of the pack, spare ones included."""
        return self.num_tokens + self.num_spare

    @cached_property
    def segments(self) -> tuple[int, ...]:
        """Lengths as the kernels see them: the spare rows, none or many, are a sequence of their own."""
        return (*self.lengths, self.num_spare)

    @cached_property
    def segment_prefixes(self) -> tuple[int, ...]:
        """Prefix of each segment; the spare rows have none."""
        return (*(self.prefix_lengths or (0,) * len(self.lengths)), 0)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each segment."""
        return tuple(np.concatenate([[0], np.cumsum(self.segments)[:-1]]).astype(int).tolist())

    @cached_property
    def is_even(self) -> bool:
        """All sequences are equally long, and no row is spare."""
        return not self.num_spare and len(set(self.lengths)) == 1

    @cached_property
    def max_length(self) -> int:
        return max(self.segments, default=0)

    @cached_property
    def cu_seqlens(self) -> Int[Tensor, "S_plus_2"]:
        """int32 boundaries of the segments on `device`, as variable-length kernels take them."""
        bounds = np.concatenate([[0], np.cumsum(self.segments)]).astype(np.int32)
        return torch.from_numpy(bounds).to(self.device, non_blocking=True)

    @cached_property
    def segment_of_row(self) -> Int[Tensor, "T"]:
        """Segment that each row belongs to."""
        lengths_S = torch.tensor(self.segments).to(self.device, non_blocking=True)
        # the size is known: a GPU need not be asked
        return torch.repeat_interleave(lengths_S, output_size=self.num_rows)


@dataclass(frozen=True)
class PackedBatch:
    """Many `Tokens` end to end; what has a row for each token is as there.

    Attributes:
        targets: `[T]` or `[T, ...]` token targets by name, `IGNORE` where unscored.
        labels: `[S]` or `[S, ...]` record labels by name.
        records: index of the record that each sequence came from.
        step_counts: scored targets by name in the whole optimiser step, over all its packs and ranks.
            A loss is a sum divided by these, so that packing and accumulation do not weigh it.
        sides: other sequences of the same records by the name of their side, packed, sequence for sequence. A decoder
            attends to what an encoder reads of the side `SOURCE`.
        is_repeat: another process evaluates this pack. This one runs it, so all run equally many, and counts nothing.
    """

    layout: Layout
    positions: Int[Tensor, "T A"]
    ids: Int[Tensor, "T"]
    features: Float[Tensor, "T P"] | None = None
    token_types: Int[Tensor, "T"] | None = None
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    records: tuple[int, ...] = ()
    step_counts: Mapping[str, float] = field(default_factory=dict)
    sides: Mapping[str, "PackedBatch"] = field(default_factory=dict)
    is_repeat: bool = False

    @property
    def source(self) -> "PackedBatch | None":
        """The side that an encoder reads for a decoder."""
        return self.sides.get(SOURCE)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "PackedBatch":
        """Move every tensor; Lightning's transfer hook calls this."""
        device = torch.device(device)
        return self._map(lambda one: one.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """Pin every tensor, so that transfers overlap with work."""
        return self._map(lambda one: one if isinstance(one, Layout) else one.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> "PackedBatch":
        """With every tensor and layout changed, those of the other sides too."""

        def changed(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: changed(one) for name, one in value.items()}
            if isinstance(value, PackedBatch):
                return value._map(change)
            return change(value) if isinstance(value, Tensor | Layout) else value

        return replace(self, **{one.name: changed(getattr(self, one.name)) for one in fields(self)})


@dataclass(frozen=True)
class Hidden:
    """What a stack gives back.

    Attributes:
        final: `[T, D]` after the last norm.
        layers: `[T, D]` by layer where asked for: 0 is the input of the first block, k the output of
            the k-th block; the last one is `final`, as in other libraries.
        attentions: by layer where asked for, one `[H, n, n]` map of post-softmax weights a sequence.
        routing: what the routers of expert layers did, by layer (counted from 0 through both stacks).
        source: the source side of an encoder-decoder.
    """

    final: Float[Tensor, "T D"]
    layout: Layout
    layers: Mapping[int, Float[Tensor, "T D"]] = field(default_factory=dict)
    attentions: Mapping[int, list[Tensor]] = field(default_factory=dict)
    routing: Mapping[int, "Routing"] = field(default_factory=dict)
    source: "Hidden | None" = None


@dataclass(frozen=True)
class Routing:
    """What the router of one expert layer did with the rows of a pack; spare rows are among them.

    Attributes:
        logits: `[T, X]` of every expert, fp32, with gradient.
        chosen: `[T, k]` experts that each token was sent to, the likeliest first.
        is_taken: `[T, k]` whether the expert had room; a token that it had none for is dropped there.
    """

    logits: Float[Tensor, "T X"]
    chosen: Int[Tensor, "T k"]
    is_taken: Bool[Tensor, "T k"]
    layout: Layout


@dataclass(frozen=True)
class Term:
    """A sum and what it is counted over, never a mean: exact under packing, accumulation and many ranks."""

    sum: Tensor
    count: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class LossOut:
    """Named loss terms (nats), and what a metric needs: predictions and targets by name, on the device."""

    terms: Mapping[str, Term]
    predictions: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)
