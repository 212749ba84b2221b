"""Slots stay where they are for as long as they can."""

import numpy as np
import torch

from meristem.model.cache import Cache
from meristem.types import Layout


class Filled:
    """A cache of one layer whose keys and values say whose they are and at which place."""

    def __init__(self, lengths: list[int], room_tokens: int = 0):
        self.cache = Cache(room_tokens)
        self.owners = list(range(len(lengths)))
        self.add(lengths)

    def add(self, counts: list[int]) -> None:
        layout = Layout.of(counts)
        kept = self.cache.lengths or [0] * len(counts)
        rows = [[owner, n + i] for owner, n, more in zip(self.owners, kept, counts) for i in range(more)]
        k_TKE = torch.zeros(layout.num_rows, 1, 2)
        k_TKE[: len(rows), 0] = torch.tensor(rows, dtype=torch.float32).reshape(-1, 2)
        self.cache.begin(layout)
        self.cache.add(0, k_TKE, -k_TKE, layout)
        self.cache.end(layout)

    def select(self, sequences: list[int]) -> None:
        self.owners = [self.owners[sequence] for sequence in sequences]
        self.cache.select(sequences)

    @property
    def where(self) -> int:
        return self.cache._layers[0][0].data_ptr()

    def check(self) -> None:
        keys, values = self.cache._layers[0]
        for owner, slot, length in zip(self.owners, self.cache.slots, self.cache.lengths, strict=True):
            wanted = torch.tensor([[owner, place] for place in range(length)], dtype=torch.float32)
            assert torch.equal(keys[slot, :length, 0], wanted)
            assert torch.equal(values[slot, :length, 0], -wanted)


def test_tokens_that_have_room_move_nothing() -> None:
    filled = Filled([5, 2, 9], room_tokens=20)
    where = filled.where
    for _ in range(20):
        filled.add([1, 1, 1])
    assert filled.where == where
    filled.add([1, 1, 1])
    assert filled.where != where
    filled.check()


def test_sequences_that_leave_move_nothing_until_half_of_the_slots_are_free() -> None:
    filled = Filled([5, 2, 9, 3, 4, 8], room_tokens=9)
    where = filled.where
    for left in ([1, 2, 3, 4, 5], [4, 0, 1, 3]):
        filled.select(left)
        filled.add([1] * len(left))
        filled.check()
    assert filled.where == where
    filled.select([0, 1, 3])
    assert filled.where != where
    assert len(filled.cache._layers[0][0]) == 3
    filled.check()


def test_a_sequence_that_is_there_twice_goes_on_twice() -> None:
    filled = Filled([5, 2, 9], room_tokens=9)
    filled.select([2, 2, 0, 2])
    filled.check()
    assert sorted(filled.cache.slots) == [0, 1, 2, 3]
    filled.add([1, 3, 2, 0])
    filled.check()


def test_any_course_keeps_what_was_added(rng: np.random.Generator) -> None:
    for _ in range(20):
        filled = Filled(rng.integers(1, 9, 5).tolist(), int(rng.integers(0, 6)))
        for _ in range(12):
            count = len(filled.owners)
            match rng.integers(3):
                case 0:
                    filled.select(rng.permutation(count)[: max(1, count - int(rng.integers(0, 3)))].tolist())
                case 1:
                    filled.select(rng.integers(0, count, int(rng.integers(1, 7))).tolist())
            filled.add(rng.integers(0, 4, len(filled.owners)).tolist())
            filled.check()
