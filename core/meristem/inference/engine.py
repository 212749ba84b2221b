"""From token columns to vectors; knows no file.

Sequences of like lengths are packed up to a budget, run longest first, and put back in order. On a CPU in fp32 a
vector does not depend on what it is packed with (`model/exact.py`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np
import torch
from torch.nn import functional as F

from meristem.data.budget import Budget, give_back_memory
from meristem.data.pack import pack_column
from meristem.errors import ConfigError, DataError
from meristem.framing import payload_parts
from meristem.inference.memory import fitting_tokens
from meristem.inference.trunks import compiled_trunk, first_blocks, runnable_trunk, with_runnable_heads
from meristem.inference.windows import cut
from meristem.model.config import Max, Mean, Pool, Prefix
from meristem.model.model import Model
from meristem.model.outputs import Outputs, Wanted
from meristem.model.pool import PoolLayer
from meristem.shapes import Float, Tensor
from meristem.types import Hidden, Layout, PackedBatch, TokenColumn, Tokens

PLAIN_POOLS: dict[str, Pool] = {"mean": Mean(), "cls": Prefix(), "max": Max()}

POOLS = (*PLAIN_POOLS, "own", "none")
"""Poolings as the command line names them: own is the model's, with its weights; none is one vector a token."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

ROWS_ALONE = Wanted(is_source_only=True)

Advance = Callable[[int, int], None]
"""Told of records and payload tokens as they are done."""


def unheard(records: int, tokens: int) -> None:
    """An `Advance` that tells nobody."""


def best_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def best_precision(precision: str, device: str) -> str:
    """What `auto` means on a device; other words mean themselves."""
    if precision != "auto":
        return precision
    return "bf16" if device == "cuda" else "fp32"


class NotFinite(DataError):
    """A vector that is not finite.

    Attributes:
        row: of the column.
    """

    def __init__(self, row: int):
        super().__init__(f"the vector of record {row + 1} is not finite")
        self.row = row


def check_finite(values: np.ndarray, ends: np.ndarray) -> None:
    """Refuse values that are not finite.

    Args:
        ends: where the rows of each record end.

    Raises:
        NotFinite: names the first record that has some.
    """
    # a sum is finite when all its terms are, or nearly always: look closer where it is not
    with np.errstate(invalid="ignore"):
        is_finite = np.isfinite(values.sum(dtype=np.float64))
    if not is_finite:
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            raise NotFinite(int(np.searchsorted(ends, bad[0], side="right")))


@dataclass(frozen=True)
class Rows:
    """What a model gave for whole sequences.

    Attributes:
        records: row of the column that each sequence is.
    """

    outputs: Outputs
    records: tuple[int, ...]

    @property
    def values(self) -> Float[Tensor, "T D"]:
        """Hidden rows, spare ones at the end."""
        return self.outputs.hidden.final

    @property
    def layout(self) -> Layout:
        """Of the hidden rows."""
        return self.outputs.hidden.layout

    def place(self, values: np.ndarray, into: np.ndarray, ends: np.ndarray | None) -> None:
        """Copy what was made of these sequences to where it belongs among that of all records of the column.

        Args:
            values: one row a sequence, or one a row of the pack.
            into: one row a record, or those of the tokens of all payloads, end to end.
            ends: where the rows of each record end in `into`; None for one row a record.
        """
        if ends is None:
            into[list(self.records)] = values
            return
        parts = zip(self.records, self.layout.starts, self.layout.lengths, payload_parts(self.layout))
        for record, start, length, part in parts:
            own = values[start : start + length][part]
            into[ends[record] - len(own) : ends[record]] = own


def views_of(column: TokenColumn, is_per_token: bool = False) -> tuple[TokenColumn, ...]:
    """The views of the records of a column, each as a column of its own.

    Args:
        is_per_token: what is said of each token of the payload is to be averaged.

    Raises:
        ConfigError: then, views of a record that are not equally long.
    """
    views = (replace(column, views=()), *column.views)
    if is_per_token and any((view.payload_lengths != column.payload_lengths).any() for view in column.views):
        raise ConfigError("results for each token need views of a record that have equally many; some have others")
    return views


class TrunkRunner:
    """Runs the trunk over columns, within a token budget.

    Args:
        model: moved to `device`.
        layer: whose rows are wanted; counted from the last where negative. Blocks behind it are not run.
        tokens_per_batch: tokens that a pack holds at most, but for a single longer sequence; None for as many as
            suit the device and the memory at hand. It is halved when a pack does not fit after all.
        dtype: of the trunk's weights and activations.
        is_compiled: blocks are compiled, where the machine has a compiler.

    Raises:
        ConfigError: a layer that the model does not have, or a budget below 1.
    """

    def __init__(
        self,
        model: Model,
        layer: int = -1,
        tokens_per_batch: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        is_compiled: bool = False,
    ):
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.layer = model.trunk.resolve_layer(layer)
        self.is_cut = self.layer != model.trunk.resolve_layer(-1)
        trunk = compiled_trunk(model, dtype) if is_compiled else runnable_trunk(model, dtype)
        self.runnable = with_runnable_heads(self.model).over(first_blocks(trunk, self.layer) if self.is_cut else trunk)
        if tokens_per_batch is None:
            tokens_per_batch = fitting_tokens(model.config, self.device, dtype)
        self.budget = Budget(tokens_per_batch, self.device)

    @property
    def tokens_per_batch(self) -> int:
        """Current token budget of a pack."""
        return self.budget.tokens

    @torch.inference_mode()
    def run(self, column: TokenColumn, wanted: Wanted | None = None) -> Iterator[Rows]:
        """Outputs for every sequence of the column, in packs, in no particular order.

        A sequence longer than positions allow is run in windows and comes in a pack of its own.

        Args:
            wanted: pools and heads to run on the rows of this runner's layer, and `is_source_only`, since vectors are
                those of inputs; None for the rows alone.
        """
        wanted = wanted or ROWS_ALONE
        limit = self.model.config.max_length
        lengths = column.lengths
        is_long = lengths > limit if limit is not None else np.zeros(len(lengths), bool)
        yield from self._run_packs(column, np.flatnonzero(~is_long), wanted)
        for row in np.flatnonzero(is_long):
            batch = pack_column(column, np.array([row]), [int(row)]).to(self.device)
            hidden = self._run_windows(column, int(row), batch)
            yield Rows(self.runnable(batch, wanted.but(hidden=hidden)), batch.records)

    def _run_packs(self, column: TokenColumn, rows: np.ndarray, wanted: Wanted) -> Iterator[Rows]:
        return self.budget.run(column.lengths[rows], lambda numbers: self._run_pack(column, rows[numbers], wanted))

    def _run_pack(self, column: TokenColumn, rows: np.ndarray, wanted: Wanted) -> Rows:
        is_pinned = self.device.type == "cuda"
        batch = pack_column(column, rows, rows.tolist(), is_pinned=is_pinned).to(self.device)
        return self.run_batch(batch, wanted)

    @torch.inference_mode()
    def run_batch(self, batch: PackedBatch, wanted: Wanted) -> Rows:
        """Outputs for one pack that is on the device; of the first rows alone where no others are made."""
        return Rows(self.runnable(batch, wanted), batch.records)

    def _run_windows(self, column: TokenColumn, row: int, batch: PackedBatch) -> Hidden:
        limit = self.model.config.max_length
        assert limit is not None
        own = slice(column.offsets[row], column.offsets[row + 1])
        is_special = None if column.is_special is None else column.is_special[own]
        ids = column.ids[own]
        windows = cut(Tokens(positions=np.arange(len(ids))[:, None], ids=ids, is_special=is_special), limit)
        made: dict[int, Tensor] = {}
        for rows in self._run_packs(windows.column, np.arange(len(windows.column)), ROWS_ALONE):
            for index, start, length in zip(rows.records, rows.layout.starts, rows.layout.lengths):
                made[index] = rows.values[start : start + length]
        mean = windows.mean([made[index] for index in range(len(made))])
        return Hidden(F.pad(mean, (0, 0, 0, batch.layout.num_spare)), batch.layout)


class Embedder:
    """Vectors of the sequences of a column, in its order.

    Args:
        pool: how the rows of a sequence become one vector, one of `POOLS`.

    Raises:
        ConfigError: no such pooling, or one that this model does not have.
    """

    def __init__(self, trunk: TrunkRunner, pool: str):
        if pool not in POOLS:
            raise ConfigError(f"pool must be one of {', '.join(POOLS)}; got {pool!r}")
        if pool == "own" and trunk.model.pool is None:
            raise ConfigError("pool own needs a model that has a pooling of its own, and this one has none; use mean")
        width = trunk.model.config.width
        plain = PLAIN_POOLS.get(pool)
        self.trunk = trunk
        self.pool = None if plain is None else PoolLayer(plain, width)
        pooled_by = trunk.model.pool if pool == "own" else self.pool
        self.is_pooled = pooled_by is not None
        self.width = width if pooled_by is None else pooled_by.width
        # the last block of the model alone may leave out rows
        self._num_first = None if pooled_by is None or trunk.is_cut else pooled_by.num_first
        self._is_own, self._reads_class = pool == "own", pool == "cls"

    def num_vectors(self, column: TokenColumn) -> np.ndarray:
        """`[N]` vectors that each sequence gets."""
        if self.is_pooled:
            return np.ones(len(column), np.int64)
        return column.payload_lengths

    @torch.inference_mode()
    def embed(self, column: TokenColumn, advance: Advance = unheard) -> np.ndarray:
        """`[N, D]` float32, or `[sum of payload tokens, D]` where there is no pooling.

        Raises:
            ConfigError: pool cls, and a sequence that begins with no special row.
            NotFinite: names the first sequence whose vector is not finite.
        """
        if self._reads_class and (column.is_special is None or not column.is_special[column.offsets[:-1]].all()):
            raise ConfigError("pool cls needs a class row before the payload and this model has none; use mean")
        if column.views:
            return np.mean([self.embed(view, advance) for view in views_of(column, not self.is_pooled)], axis=0)
        lengths, ends = column.payload_lengths, np.cumsum(self.num_vectors(column))
        values = np.empty((int(ends[-1]) if len(ends) else 0, self.width), np.float32)
        wanted = Wanted(is_pooled=self._is_own, num_first=self._num_first, is_source_only=True)
        running = ((rows, self._vectors(rows)) for rows in self.trunk.run(column, wanted))
        # each when the next one is there: a GPU works on that while this one is fetched
        for ready, _ in pairwise(chain(running, [None])):
            assert ready is not None
            rows, made = ready
            rows.place(made.float().cpu().numpy(), values, None if self.is_pooled else ends)
            advance(len(rows.records), int(lengths[list(rows.records)].sum()))
        check_finite(values, ends)
        give_back_memory()
        return values

    def _vectors(self, rows: Rows) -> Tensor:
        if rows.outputs.pooled is not None:
            return rows.outputs.pooled
        return rows.values if self.pool is None else self.pool(rows.values, rows.layout)
