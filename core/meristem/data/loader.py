"""From a record store to packs on their way to the trunk, for training and for evaluation.

What comes out is a pure function of (seed, step) and the records. Worker processes only change who computes it.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from meristem.data.order import MixedStream, PackStream, Plan, Stream, plan_in_order
from meristem.data.pack_maker import PackMaker
from meristem.errors import DataError, UserError, require
from meristem.types import PackedBatch

PREFETCH_STEPS = 2
"""Steps (or packs of an evaluation) that each worker has ready."""


class TrainLoader:
    """The packs of one rank, step after step, without end.

    Each pack bears in `step_counts` what the terms of the loss count in this rank's packs of its step.

    Args:
        maker: makes the packs, for training; its random seed is that of the order of records too.
        tokens_per_batch: tokens that a pack holds at most, but for a single longer record.
        packs_per_step: packs of an optimiser step over all ranks and accumulation.
        world_size: processes that share each step.
        workers: processes that prepare steps ahead; 0 prepares in this one. Without effect on what comes.
        weights: share of the tokens of each source of the store (`MixedStream`); None: records come in random order,
            whatever their source, each once an epoch.
        start_step: asked when iteration begins: the optimiser step to begin with.

    Raises:
        ConfigError: ranks cannot share a step evenly, a number that must be positive is not, no records.
        DataError: a payload that the tokenizer refuses, by file and line.
    """

    def __init__(
        self,
        maker: PackMaker,
        *,
        tokens_per_batch: int,
        packs_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        weights: Sequence[float] | None = None,
        start_step: Callable[[], int] = lambda: 0,
    ):
        _check_shares(rank, world_size, workers)
        nearest = max(1, round(packs_per_step / world_size)) * world_size
        rule = f"packs_per_step must be a multiple of the number of processes ({world_size})"
        require(packs_per_step % world_size == 0, rule, f"{packs_per_step}; nearest: {nearest}")
        assert maker.is_training
        self.maker, lengths = maker, maker.lengths()
        packing = {"tokens_per_batch": tokens_per_batch, "packs_per_step": packs_per_step, "seed": maker.seed}
        self.stream: Stream = PackStream(lengths, **packing)
        if weights is not None:
            self.stream = MixedStream(lengths, maker.store.source_of(maker.rows), weights, **packing)
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.start_step = start_step

    def __iter__(self) -> Iterator[PackedBatch]:
        steps = partial(_steps, self.maker, self.stream, self.rank, self.world_size, self.start_step())
        for packs in _in_workers(steps, self.workers):
            yield from packs


class EvalLoader:
    """One pass over records, the same each time: shortest first, corrupted as in epoch 0 always.

    Every process has equally many packs, since running a model may be collective: where the packs do not come out even,
    some get one that another process has, marked as `is_repeat`. Other arguments are those of `TrainLoader`.

    Args:
        rank: takes each `world_size`-th pack, from its own number on.
        limit: packs to take, the first ones, over all processes: a number, or (a float) a share of them.

    Raises:
        ConfigError: a number that is out of range, or a share that leaves no pack.
    """

    def __init__(
        self,
        maker: PackMaker,
        *,
        tokens_per_batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        limit: int | float = 1.0,
    ):
        _check_shares(rank, world_size, workers)
        require(tokens_per_batch >= 1, "tokens_per_batch must be at least 1", tokens_per_batch)
        assert not maker.is_training
        self.plan = _first_packs(plan_in_order(maker.lengths(), tokens_per_batch), limit)
        self.maker, self.rank, self.world_size, self.workers = maker, rank, world_size, workers

    def __len__(self) -> int:
        return -(-len(self.plan) // self.world_size)

    def __iter__(self) -> Iterator[PackedBatch]:
        packs = partial(_packs, self.maker, self.plan, self.rank, self.world_size)
        return _in_workers(packs, self.workers)


def _steps(
    maker: PackMaker, stream: Stream, rank: int, world_size: int, start: int, worker: int, workers: int
) -> Iterator[list[PackedBatch]]:
    """The steps of one rank, each whole, so that its counts are known before its first pack leaves.

    Worker w of W has each W-th step from the w-th on; the loader takes from the workers in turn.
    """
    for step in itertools.count(start + worker, workers):
        packs = [maker.make(epoch, members) for epoch, members in stream.step(step)[rank::world_size]]
        counts: dict[str, float] = {}
        for batch in packs:
            for name, count in maker.objective.counts(batch).items():
                counts[name] = counts.get(name, 0.0) + float(count)
        yield [replace(batch, step_counts=counts) for batch in packs]


def _packs(
    maker: PackMaker, plan: Plan, rank: int, world_size: int, worker: int, workers: int
) -> Iterator[PackedBatch]:
    """The packs of one rank in one pass."""
    num = len(plan)
    for i in range(rank, -(-num // world_size) * world_size, world_size)[worker::workers]:
        batch = maker.make(0, plan[i % num])
        yield batch if i < num else replace(batch, is_repeat=True)


class _Made(IterableDataset):
    """What `make` gives, called with the number of this worker and how many there are.

    User errors arrive as they are: torch would wrap them in a worker's traceback.
    """

    def __init__(self, make: Callable[[int, int], Iterator[Any]]):
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        try:
            yield from self.make(info.id, info.num_workers) if info else self.make(0, 1)
        except DataError as error:
            yield DataError(str(error))  # of the plain class, which travels
        except UserError as error:
            yield error


def _in_workers(make: Callable[[int, int], Iterator[Any]], workers: int) -> Iterator[Any]:
    """What `make` gives, made in worker processes. The global generators of torch stay untouched."""
    loader = DataLoader(
        _Made(make),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH_STEPS if workers else None,
        # not persistent: torch 2.15 waits 5 s for each worker that is done when a loader is given up
        generator=torch.Generator(),
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def _first_packs(plan: Plan, limit: int | float) -> Plan:
    is_share = isinstance(limit, float)
    count = int(limit * len(plan)) if is_share else min(int(limit), len(plan))
    is_wrong = limit < 0 or (is_share and limit > 1) or (len(plan) and limit and not count)
    rule = "trainer.limit_val_batches must be a number of packs, 0 or more, or a share of them up to 1.0"
    require(not is_wrong, f"{rule} that leaves one or more", f"{limit} of {len(plan)} packs")
    return Plan(plan.records, plan.starts[:count], plan.stops[:count])


def _check_shares(rank: int, world_size: int, workers: int) -> None:
    assert 0 <= rank < world_size
    require(workers >= 0, "workers must be 0 or more", workers)
