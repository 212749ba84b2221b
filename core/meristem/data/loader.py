"""From a record store to packs on their way to the trunk, for training and for evaluation.

What comes out is a pure function of (seed, step) and the records. Worker processes only change who computes it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from meristem.data.corrupt import crop_window
from meristem.data.order import MixedStream, PackStream, Plan, Stream, plan_in_order, record_rng
from meristem.data.pack import pack
from meristem.data.store import RecordStore
from meristem.data.tokenizer import Tokenizer
from meristem.data.views import Views
from meristem.errors import ConfigError, DataError, UserError
from meristem.types import PackedBatch, Record, Tokens

PREFETCH_STEPS = 2
"""Steps (or packs of an evaluation) that each worker has ready."""


class Prepares(Protocol):
    """What the data path asks of an objective."""

    def prepare(self, record: Record, tokens: tuple[Tokens, ...], rng: np.random.Generator) -> tuple[Tokens, ...]: ...

    def counts(self, batch: PackedBatch) -> Mapping[str, float]: ...

    def lengths(self, lengths: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class PackMaker:
    """Reads, tokenises, crops and prepares the records of a pack.

    Attributes:
        store: of the records.
        rows: `[N]` rows of the store that take part, as in one part of a split.
        tokenizer: of the domain.
        objective: corrupts and labels.
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

    def __post_init__(self) -> None:
        least = sum(self.tokenizer.num_special) + 1
        if self.max_tokens_per_record is not None and self.max_tokens_per_record < least:
            raise ConfigError(
                f"max_tokens_per_record must leave room for one token beside the {least - 1} special ones; "
                f"got {self.max_tokens_per_record}"
            )

    def full_lengths(self) -> np.ndarray:
        """`[N]` tokens of each record before cropping.

        Raises:
            DataError: a payload that the tokenizer refuses, by file and line.
        """
        return np.asarray(self.store.token_lengths(self.tokenizer, self.rows))

    def lengths(self) -> np.ndarray:
        """`[N]` rows of each record as it reaches a pack."""
        cropped = np.minimum(self.full_lengths(), self.max_tokens_per_record or np.iinfo(np.int32).max)
        return self.objective.lengths(cropped) * (self.views.num_views if self.views and self.is_training else 1)

    @property
    def _has_views(self) -> bool:
        """Records are not taken as they are."""
        return self.views is not None and (self.is_training or not self.views.is_training_only)

    def num_cropped(self) -> int:
        """Records that are longer than `max_tokens_per_record`."""
        if self.max_tokens_per_record is None:
            return 0
        return int((self.full_lengths() > self.max_tokens_per_record).sum())

    def make(self, epoch: int, members: np.ndarray) -> PackedBatch:
        """The pack of these `members` of `rows`, as they are in `epoch`."""
        rows = self.rows[members]
        rngs = [record_rng(self.seed, epoch, row) for row in rows.tolist()]
        cuts = self._cuts(rows, members, rngs)
        records = self.store.records(rows, cuts.stops < 0)
        seen: list[tuple[Record, ...]] = [(record,) for record in records]
        if self._has_views:
            assert self.views is not None
            seen = [self.views.views(record, rng if self.is_training else None) for record, rng in zip(records, rngs)]
            column = self.tokenizer.encode_values([view.payload for views in seen for view in views])
        else:
            column = self.tokenizer.encode_column(cuts.payloads(self.store, rows))
        sequences: list[Tokens] = []
        indices: list[int] = []
        place = 0
        for i, (row, rng, views) in enumerate(zip(rows.tolist(), rngs, seen)):
            for view in views:
                tokens = self.tokenizer.tokens_at(column, place)
                if not self._has_views:
                    tokens = cuts.placed(tokens, i)
                if self.max_tokens_per_record is not None:
                    tokens = crop_window(tokens, self.max_tokens_per_record, rng)
                prepared = self.objective.prepare(view, (tokens,), rng)
                sequences += prepared
                indices += [row] * len(prepared)
                place += 1
        return pack(sequences, indices)

    def _cuts(self, rows: np.ndarray, members: np.ndarray, rngs: Sequence[np.random.Generator]) -> "Cuts":
        """Where records that are too long are cut before they are encoded, each place equally likely."""
        cuts = Cuts(np.zeros(len(rows), np.int64), np.full(len(rows), -1, np.int64), np.zeros(len(rows), np.int64))
        per_token, most = self.tokenizer.symbols_per_token, self.max_tokens_per_record
        if most is None or per_token is None or self._has_views:
            return cuts
        long = np.flatnonzero(self._lengths[members] > most)
        if len(long):
            cuts.sizes[long] = self.store.sizes(rows[long])
            width = (most - sum(self.tokenizer.num_special)) * per_token
            for i in long.tolist():
                cuts.starts[i] = rngs[i].integers(max(int(cuts.sizes[i]) - width, 0) + 1)
            cuts.stops[long] = np.minimum(cuts.starts[long] + width, cuts.sizes[long])
        return cuts

    @cached_property
    def _lengths(self) -> np.ndarray:
        return self.full_lengths()


@dataclass(frozen=True)
class Cuts:
    """Windows of the records of a pack.

    Attributes:
        starts: `[N]` first symbol of each window.
        stops: `[N]` the symbol behind its last; -1 where the record is taken whole.
        sizes: `[N]` symbols of the record, where it is cut.
    """

    starts: np.ndarray
    stops: np.ndarray
    sizes: np.ndarray

    def payloads(self, store: RecordStore, rows: np.ndarray) -> pa.Array:
        """The payloads of `rows`, of those that are cut their windows alone."""
        is_cut = self.stops >= 0
        if not is_cut.any():
            return store.payloads(rows)
        whole = store.payloads(rows[~is_cut])
        cut = store.stretches(rows[is_cut], self.starts[is_cut], self.stops[is_cut])
        order = np.argsort(np.concatenate([np.flatnonzero(~is_cut), np.flatnonzero(is_cut)]))
        return pa.concat_arrays([whole, cut.cast(whole.type)]).take(pa.array(order))

    def placed(self, tokens: Tokens, i: int) -> Tokens:
        """The tokens of record `i`, with the places that they have in the whole record."""
        if self.stops[i] < 0 or tokens.spans is None:
            return tokens
        before, behind = tokens.frame
        spans = tokens.spans + self.starts[i]
        spans[:before] = 0
        spans[len(spans) - behind :] = self.sizes[i]
        return replace(tokens, spans=spans)


class TrainLoader:
    """The packs of one rank, step after step, without end.

    Each pack bears in `step_counts` what the terms of the loss count in this rank's packs of its step.

    Args:
        store: of the records.
        rows: rows of the store to train on.
        tokenizer: of the domain.
        objective: bound already.
        seed: of the run.
        tokens_per_pack: tokens that a pack holds at most, but for a single longer record.
        packs_per_step: packs of an optimiser step over all ranks and accumulation.
        rank: of this process.
        world_size: processes that share each step.
        num_workers: processes that prepare steps ahead; 0 prepares in this one. Without effect on what comes.
        max_tokens_per_record: longer records are cropped to a random window each epoch (`num_cropped`).
        views: of the records; None for the records as they are.
        weights: share of the tokens of each source of the store (`MixedStream`); None: records come in random order,
            whatever their source, each once an epoch.
        start_step: asked when iteration begins: the optimiser step to begin with.

    Raises:
        ConfigError: ranks cannot share a step evenly, a number that must be positive is not, no records.
        DataError: a payload that the tokenizer refuses, by file and line.
    """

    def __init__(
        self,
        store: RecordStore,
        rows: np.ndarray,
        tokenizer: Tokenizer,
        objective: Prepares,
        *,
        seed: int,
        tokens_per_pack: int,
        packs_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        max_tokens_per_record: int | None = None,
        views: Views | None = None,
        weights: Sequence[float] | None = None,
        start_step: Callable[[], int] = lambda: 0,
    ):
        _check_shares(rank, world_size, num_workers)
        if packs_per_step % world_size:
            nearest = max(1, round(packs_per_step / world_size)) * world_size
            raise ConfigError(
                f"packs_per_step must be a multiple of the number of processes ({world_size}); "
                f"got {packs_per_step}; nearest: {nearest}"
            )
        self.maker = PackMaker(store, np.asarray(rows), tokenizer, objective, seed, max_tokens_per_record, views)
        lengths = self.maker.lengths()
        self.stream: Stream
        if weights is None:
            self.stream = PackStream(lengths, tokens_per_pack=tokens_per_pack, packs_per_step=packs_per_step, seed=seed)
        else:
            sources = store.source_of(self.maker.rows)
            self.stream = MixedStream(
                lengths, sources, weights, tokens_per_pack=tokens_per_pack, packs_per_step=packs_per_step, seed=seed
            )
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.start_step = start_step

    @property
    def num_cropped(self) -> int:
        """Records that are cropped to a random window each epoch, for being too long."""
        return self.maker.num_cropped()

    def __iter__(self) -> Iterator[PackedBatch]:
        steps = _Steps(self.maker, self.stream, self.rank, self.world_size, self.start_step())
        for packs in _InWorkers(steps, self.num_workers):
            yield from packs


class EvalLoader:
    """One pass over records, the same each time: shortest first, corrupted as in epoch 0 always.

    Args:
        store: of the records.
        rows: rows of the store.
        tokenizer: of the domain.
        objective: bound already.
        seed: of the run.
        tokens_per_pack: tokens that a pack holds at most, but for a single longer record.
        rank: takes each `world_size`-th pack, from its own number on.
        world_size: processes that share the pass.
        num_workers: processes that prepare packs ahead; without effect on what comes.
        max_tokens_per_record: longer records are cropped to a window, the same each time (`num_cropped`).
        views: of the records; None for the records as they are.
    """

    def __init__(
        self,
        store: RecordStore,
        rows: np.ndarray,
        tokenizer: Tokenizer,
        objective: Prepares,
        *,
        seed: int,
        tokens_per_pack: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        max_tokens_per_record: int | None = None,
        views: Views | None = None,
    ):
        _check_shares(rank, world_size, num_workers)
        if tokens_per_pack < 1:
            raise ConfigError(f"tokens_per_pack must be at least 1; got {tokens_per_pack}")
        self.maker = PackMaker(
            store, np.asarray(rows), tokenizer, objective, seed, max_tokens_per_record, views, is_training=False
        )
        self.plan = plan_in_order(self.maker.lengths(), tokens_per_pack)
        self.rank, self.world_size = rank, world_size
        self._packs = _InWorkers(_Packs(self.maker, self.plan, rank, world_size), num_workers)

    @property
    def num_cropped(self) -> int:
        """Records that are cropped to a window, for being too long."""
        return self.maker.num_cropped()

    def __len__(self) -> int:
        return len(range(self.rank, len(self.plan), self.world_size))

    def __iter__(self) -> Iterator[PackedBatch]:
        return iter(self._packs)


class _Steps(IterableDataset):
    """The steps of one rank, each whole, so that its counts are known before its first pack leaves.

    Worker w of W has each W-th step from the w-th on; the loader takes from the workers in turn.
    """

    def __init__(self, maker: PackMaker, stream: Stream, rank: int, world_size: int, start: int):
        self.maker, self.stream, self.start = maker, stream, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        worker, num_workers = _who()
        step = self.start + worker
        while True:
            own = self.stream.step(step)[self.rank :: self.world_size]
            packs = [self.maker.make(epoch, members) for epoch, members in own]
            counts: dict[str, float] = {}
            for batch in packs:
                for name, count in self.maker.objective.counts(batch).items():
                    counts[name] = counts.get(name, 0.0) + float(count)
            yield [replace(batch, step_counts=counts) for batch in packs]
            step += num_workers


class _Packs(IterableDataset):
    """The packs of one rank in one pass."""

    def __init__(self, maker: PackMaker, plan: Plan, rank: int, world_size: int):
        self.maker, self.plan = maker, plan
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[PackedBatch]:
        worker, num_workers = _who()
        own = range(self.rank, len(self.plan), self.world_size)
        for i in own[worker::num_workers]:
            yield self.maker.make(0, self.plan[i])


class _Carried(IterableDataset):
    """A data set whose user errors arrive as they are: torch would wrap them in a worker's traceback."""

    def __init__(self, inner: IterableDataset):
        self.inner = inner

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.inner
        except DataError as error:
            yield DataError(str(error))  # of the plain class, which travels
        except UserError as error:
            yield error


class _InWorkers:
    """Iterates over a data set in worker processes. The global generators of torch stay untouched."""

    def __init__(self, dataset: IterableDataset, num_workers: int):
        self.loader = DataLoader(
            _Carried(dataset),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            prefetch_factor=PREFETCH_STEPS if num_workers else None,
            # not persistent: torch 2.15 waits 5 s for each worker that is done when a loader is given up
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Any]:
        for item in self.loader:
            if isinstance(item, UserError):
                raise item
            yield item


def _as_it_is(item: Any) -> Any:
    return item


def _who() -> tuple[int, int]:
    """Number of this worker, and how many there are."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _check_shares(rank: int, world_size: int, num_workers: int) -> None:
    assert 0 <= rank < world_size
    if num_workers < 0:
        raise ConfigError(f"num_workers must be 0 or more; got {num_workers}")
