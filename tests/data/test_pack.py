"""Packing: every token once, shortest first, sides aligned, and the fast path equal to the slow one."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.data.pack import pack, pack_column
from meristem.data.tokenizer import AlphabetTokenizer
from meristem.framing import frame_of, payload_parts
from meristem.types import IGNORE, MIN_ROWS, SOURCE, PackedBatch, TokenColumn, Tokens

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def sequence(length: int, seed: int, **more) -> Tokens:
    rng = np.random.default_rng(seed)
    return Tokens(positions=np.arange(length)[:, None], ids=rng.integers(0, 30, length), **more)


def rows_of(batch: PackedBatch, i: int) -> slice:
    start = batch.layout.starts[i]
    return slice(start, start + batch.layout.lengths[i])


def assert_equal(one: PackedBatch, other: PackedBatch) -> None:
    assert one.layout == other.layout
    assert one.records == other.records
    assert torch.equal(one.ids, other.ids)
    assert one.ids.dtype == other.ids.dtype
    assert torch.equal(one.positions, other.positions)
    assert one.positions.dtype == other.positions.dtype


@given(LENGTHS, st.integers(0, 1000))
@settings(deadline=None)
def test_every_sequence_is_in_the_pack_once_whole_and_sorted_by_length(lengths, seed):
    sequences = [sequence(n, seed + i, targets={"token": np.arange(n)}) for i, n in enumerate(lengths)]
    batch = pack(sequences, range(100, 100 + len(lengths)))
    assert sorted(batch.records) == list(range(100, 100 + len(lengths)))
    assert list(batch.layout.lengths) == sorted(lengths)
    for i, record in enumerate(batch.records):
        tokens, rows = sequences[record - 100], rows_of(batch, i)
        assert batch.ids[rows].tolist() == tokens.ids.tolist()
        assert batch.positions[rows].tolist() == tokens.positions.tolist()
        assert batch.targets["token"][rows].tolist() == list(range(len(tokens)))
    assert batch.layout.num_rows == max(MIN_ROWS, sum(lengths)) == len(batch.ids)
    spare = slice(batch.layout.num_tokens, None)
    assert not batch.ids[spare].any()
    assert not batch.positions[spare].any()
    assert (batch.targets["token"][spare] == IGNORE).all()


@given(LENGTHS)
@settings(deadline=None)
def test_equal_lengths_keep_their_order(lengths):
    batch = pack([sequence(n, i) for i, n in enumerate(lengths)], range(len(lengths)))
    assert list(batch.records) == sorted(range(len(lengths)), key=lambda i: lengths[i])


@given(st.lists(st.text("ABCDE", max_size=30), min_size=1, max_size=12), st.data())
@settings(deadline=None)
def test_column_path_equals_the_path_of_single_sequences(payloads, data):
    tokenizer = AlphabetTokenizer(vocab=("<", ">", *"ABCDE"), prefix=("<",), suffix=(">",))
    column = tokenizer.encode_column(pa.array(payloads, pa.large_string()))
    rows = np.array(data.draw(st.permutations(range(len(payloads)))))[: len(payloads) // 2 + 1]
    slow = pack([tokenizer.encode(payloads[row]) for row in rows], (rows + 7).tolist())
    assert_equal(pack_column(column, rows, (rows + 7).tolist()), slow)


@given(LENGTHS, st.integers(0, 1000))
@settings(deadline=None)
def test_a_pack_knows_its_special_rows_and_those_of_payloads(lengths, seed):
    rng = np.random.default_rng(seed)
    masks = [rng.random(n) < rng.choice([0, 0.3, 1]) if rng.random() < 0.8 else None for n in lengths]
    layout = (batch := pack([sequence(n, 0, is_special=m) for n, m in zip(lengths, masks)], range(len(lengths)))).layout
    special = []
    for i, record in enumerate(batch.records):
        is_special = np.zeros(lengths[record], bool) if masks[record] is None else masks[record]
        special += [layout.starts[i] + j for j in range(lengths[record]) if is_special[j]]
        assert np.arange(lengths[record])[payload_parts(layout)[i]].tolist() == np.flatnonzero(~is_special).tolist()
        assert isinstance(payload_parts(layout)[i], slice) == (np.diff(np.flatnonzero(~is_special)) <= 1).all()
    assert layout.special_rows == tuple(special)
    spare = pack([sequence(3, 0)], [0]).layout
    assert spare.special_rows == ()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 2), st.integers(0, 2))
def test_the_frame_of_a_column_is_what_stands_around_each_payload(payloads, before, behind):
    offsets = np.cumsum([0, *(n + before + behind for n in payloads)])
    expected = [row for n in payloads for row in [True] * before + [False] * n + [True] * behind]
    is_special = frame_of(offsets, (before, behind))
    assert is_special.tolist() == expected
    column = TokenColumn(np.arange(len(expected)), offsets, is_special=is_special)
    assert column.payload_lengths.tolist() == payloads
    assert column.payload_ids.tolist() == np.flatnonzero(~is_special).tolist()
    taken = column.take(np.arange(len(payloads))[::-1])
    assert taken.payload_lengths.tolist() == payloads[::-1]


def test_sides_have_names_and_stay_aligned_with_the_main_side(rng):
    lengths = rng.integers(1, 20, (9, 3))
    flat, records = [], []
    for i, (n, m, k) in enumerate(lengths):
        flat += [sequence(k, 200 + i, side="rejected"), sequence(n, i), sequence(m, 100 + i, side=SOURCE)]
        records += [i] * 3
    batch = pack(flat, records).to("cpu")
    assert set(batch.sides) == {SOURCE, "rejected"}
    assert batch.source is batch.sides[SOURCE]
    for place, side in ((0, batch.sides["rejected"]), (1, batch), (2, batch.sides[SOURCE])):
        assert side.records == batch.records
        for i, record in enumerate(side.records):
            assert side.ids[rows_of(side, i)].tolist() == flat[3 * record + place].ids.tolist()
    assert list(batch.layout.lengths) == sorted(batch.layout.lengths)
    assert pack(flat[1:2], [0]).source is None
    for wrong in ([0, 0, 1], [0, 1, 0]):
        with pytest.raises(AssertionError, match="is another record's"):
            pack(flat[:3], wrong)
    with pytest.raises(AssertionError, match="1 sequences of the side 'rejected' for 2 others"):
        pack([flat[0], flat[1], flat[4]], [0, 0, 1])


def test_labels_are_stacked_in_pack_order_and_missing_ones_marked():
    batch = pack(
        [
            sequence(5, 0, labels={"site": 3, "value": 0.5, "many": np.ones(4)}),
            sequence(2, 1, labels={"site": IGNORE, "value": np.nan, "many": np.zeros(4)}),
            sequence(3, 2),
        ],
        [0, 1, 2],
    )
    assert batch.records == (1, 2, 0)
    assert batch.labels["site"].tolist() == [IGNORE, IGNORE, 3]
    assert batch.labels["value"].dtype == torch.float32
    assert [math.isnan(v) for v in batch.labels["value"].tolist()] == [True, True, False]
    assert batch.labels["many"].shape == (3, 4)


def test_features_and_several_axes_and_wide_targets_go_through():
    patch = Tokens(
        positions=np.array([[-1, -1], [0, 0], [0, 1]]),
        ids=np.array([2, -1, -1]),
        features=np.arange(12.0).reshape(3, 4),
        targets={"patch": np.full((3, 4), 0.25)},
    )
    symbols = Tokens(positions=np.array([[-1, -1]]), ids=np.array([1]))
    batch = pack([patch, symbols], [0, 1])
    assert batch.ids[:4].tolist() == [1, 2, -1, -1]
    assert batch.positions.shape == (MIN_ROWS, 2)
    assert batch.features is not None
    assert batch.features.dtype == torch.float32
    assert batch.features[1:4].tolist() == np.arange(12.0).reshape(3, 4).tolist()
    assert not batch.features[0].any()
    assert (batch.targets["patch"][0] == IGNORE).all()
    assert (batch.targets["patch"][1:4] == 0.25).all()


def test_pack_without_a_sequence_is_our_fault():
    with pytest.raises(AssertionError):
        pack([], [])
    with pytest.raises(AssertionError):
        pack_column(TokenColumn(np.zeros(0, np.int16), np.zeros(1, np.int64)), np.zeros(0, int), [])
