"""Order and randomness as pure functions: what is in the n-th batch, and what is drawn for a record.

Nothing here depends on workers, ranks or where a run was stopped, so going on is computing where to go on.
Generators are Philox (Salmon et al. 2011), whose key and counter say what they are for: two purposes, epochs or
records never share a stream, and making one costs microseconds.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meristem.errors import require

WINDOW_RECORDS = 4096
"""Records that are sorted by length together: enough that lengths in a pack are alike, few enough that
which records meet in a pack is anew at random in every epoch."""

_RECORD, _RECORD_ORDER, _PACK_ORDER = range(3)


def record_rng(seed: int, epoch: int, record: int) -> np.random.Generator:
    """The generator for all that happens to a record in an epoch; arguments in [0, 2**64)."""
    return _generator(seed, _RECORD, epoch, record)


def _generator(seed: int, purpose: int, epoch: int, record: int = 0) -> np.random.Generator:
    key = np.array([seed, purpose], np.uint64)
    # the first word of the counter is left to the draws
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, epoch, record, 0], np.uint64)))


@dataclass(frozen=True, eq=False)
class Plan(Sequence[np.ndarray]):
    """Packs of records, each an array of record indices.

    Attributes:
        records: `[N]` indices, those of a pack side by side.
        starts, stops: `[packs]` where each pack begins and ends in `records`.
    """

    records: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]
        return self.records[self.starts[i] : self.stops[i]]


def plan_epoch(lengths: np.ndarray, *, tokens_per_batch: int, seed: int, epoch: int) -> Plan:
    """Every record once, in packs of like lengths, records and packs in an order of their own each epoch.

    A record longer than `tokens_per_batch` is a pack of its own.
    """
    num = len(lengths)
    order = _generator(seed, _RECORD_ORDER, epoch).permutation(num)
    full = num - num % WINDOW_RECORDS
    windows = [order[:full].reshape(-1, WINDOW_RECORDS), order[full:].reshape(1, -1)]
    for window in windows:
        by_length = np.argsort(lengths[window], axis=1, kind="stable")
        window[:] = np.take_along_axis(window, by_length, axis=1)
    # every second window falls in length, so that a pack that reaches into the next window stays alike
    windows[0][1::2] = windows[0][1::2, ::-1].copy()
    if len(windows[0]) % 2:
        windows[1][:] = windows[1][:, ::-1].copy()
    starts, stops = _fill(lengths[order], tokens_per_batch)
    shuffled = _generator(seed, _PACK_ORDER, epoch).permutation(len(starts))
    return Plan(order, starts[shuffled], stops[shuffled])


def plan_in_order(lengths: np.ndarray, tokens_per_batch: int) -> Plan:
    """Every record once, shortest first, equal lengths in their own order; for evaluation and embedding.

    A record longer than `tokens_per_batch` is a pack of its own.
    """
    order = np.argsort(lengths, kind="stable")
    return Plan(order, *_fill(lengths[order], tokens_per_batch))


class Stream(ABC):
    """An endless sequence of packs, cut into optimiser steps."""

    packs_per_step: int

    def step(self, n: int) -> list[tuple[int, np.ndarray]]:
        """The packs of optimiser step `n`, each as the epoch (of its source) and its records."""
        return [self.pack(i) for i in range(n * self.packs_per_step, (n + 1) * self.packs_per_step)]

    @abstractmethod
    def pack(self, i: int) -> tuple[int, np.ndarray]:
        """The `i`-th pack of all, as its epoch and its records."""


class PackStream(Stream):
    """The endless sequence of packs that a run trains on, cut into optimiser steps.

    Step n is the packs `[n * packs_per_step, (n + 1) * packs_per_step)` of the epochs' plans laid end to
    end, so an epoch may begin within a step, and no pack is dropped. Finding step n means planning the
    epochs before it once (a second for some millions of records and epochs together).

    Args:
        lengths: `[N]` tokens of each record.
        tokens_per_batch: as in `plan_epoch`.
        packs_per_step: packs of a step over all ranks and accumulation.

    Raises:
        ConfigError: there is no record, or a number that must be positive is not.
    """

    def __init__(self, lengths: np.ndarray, *, tokens_per_batch: int, packs_per_step: int, seed: int):
        require(len(lengths) > 0, "there must be at least one record to train on", "none")
        require(tokens_per_batch >= 1, "tokens_per_batch must be at least 1", tokens_per_batch)
        require(packs_per_step >= 1, "packs_per_step must be at least 1", packs_per_step)
        require(0 <= seed < 2**64, "seed must be in [0, 2**64)", seed)
        self.lengths, self.seed = lengths, seed
        self.tokens_per_batch, self.packs_per_step = tokens_per_batch, packs_per_step
        self._begins = [0]  # first pack of each epoch
        self._plans: dict[int, Plan] = {}

    def pack(self, i: int) -> tuple[int, np.ndarray]:
        while self._begins[-1] <= i:
            self._begins.append(self._begins[-1] + len(self._plan(len(self._begins) - 1)))
        epoch = bisect_right(self._begins, i) - 1
        return epoch, self._plan(epoch)[i - self._begins[epoch]]

    def _plan(self, epoch: int) -> Plan:
        if epoch not in self._plans:
            while len(self._plans) > 1:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = plan_epoch(
                self.lengths, tokens_per_batch=self.tokens_per_batch, seed=self.seed, epoch=epoch
            )
        return self._plans[epoch]


class MixedStream(Stream):
    """The endless sequence of packs of several sources, of which each has its share of the tokens.

    Each source has a `PackStream` of its own, whose packs are taken in their order: no record of a source comes again
    before all of them have come. The next pack is one of the source that lacks most tokens of its share (the first of
    equals), so the tokens of a source are never further from its share than two packs, and step n is a function of the
    seed, the lengths and n alone.

    Args:
        lengths: `[N]` tokens of each record.
        source_of: `[N]` source of each record, counted from 0.
        weights: share of the tokens of each source; they need not add up to 1.

    Raises:
        ConfigError: a source without a record, or a weight that is not above 0; or as `PackStream`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        source_of: np.ndarray,
        weights: Sequence[float],
        *,
        tokens_per_batch: int,
        packs_per_step: int,
        seed: int,
    ):
        counts = np.bincount(source_of, minlength=len(weights))
        are_right = len(counts) == len(weights) and bool(counts.all()) and min(weights) > 0
        rule = "weights must be one number above 0 for each source, and each source must have a record for training"
        require(are_right, rule, f"weights {list(weights)} for sources of {counts.tolist()} records")
        self.packs_per_step = packs_per_step
        self._shares = np.array(weights, float) / sum(weights)
        self._lengths, self._rows = lengths, [np.flatnonzero(source_of == i) for i in range(len(weights))]
        # another seed for each source: two of equal size are not in step
        self._streams = [
            PackStream(lengths[rows], tokens_per_batch=tokens_per_batch, packs_per_step=1, seed=(seed + i) % 2**64)
            for i, rows in enumerate(self._rows)
        ]
        # as far as it is known: the source of each pack, and its number among those of the source
        self._order: list[tuple[int, int]] = []
        self._num_packs = [0] * len(weights)
        self._num_tokens = np.zeros(len(weights))

    def pack(self, i: int) -> tuple[int, np.ndarray]:
        while len(self._order) <= i:
            lacking = self._shares * (self._num_tokens.sum() + 1) - self._num_tokens
            source = int(np.argmax(lacking))
            place = self._num_packs[source]
            self._num_tokens[source] += self._lengths[self._members(source, place)[1]].sum()
            self._num_packs[source] += 1
            self._order.append((source, place))
        return self._members(*self._order[i])

    def _members(self, source: int, place: int) -> tuple[int, np.ndarray]:
        epoch, members = self._streams[source].pack(place)
        return epoch, self._rows[source][members]


def _fill(lengths: np.ndarray, tokens_per_batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut records into packs in their order, each as full as it goes; where each begins and ends."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts, at, used = [], 0, 0
    while at < len(lengths):
        starts.append(at)
        at = max(at + 1, int(np.searchsorted(ends, used + tokens_per_batch, side="right")))
        used = int(ends[at - 1])
    return np.array(starts, np.int64), np.array([*starts[1:], len(lengths)][: len(starts)], np.int64)
