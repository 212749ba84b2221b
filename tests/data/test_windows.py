"""Records that are too long are cut before they are encoded: the same windows, and nothing beside them is read."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from lines import RESIDUES, TOKENIZER, random_payloads

import meristem.data.pack_maker as maker_module
import meristem.data.stretches as stretches
from labelled import ready
from meristem.data.corrupt import crop_window
from meristem.data.order import record_rng
from meristem.data.pack import pack
from meristem.data.pack_maker import PackMaker
from meristem.data.reading.reader import Reader
from meristem.data.records import ReadOptions, Source, batch_of
from meristem.data.store import RecordStore
from meristem.data.stretches import slice_column
from meristem.data.tokenizer import AlphabetTokenizer
from meristem.errors import ConfigError, DataError
from meristem.types import INPUT, PackedBatch, Slice

COMPLEMENT = str.maketrans("ACDE", "EDCA")


class Kept:
    """Tokens as they are, and what was seen of each record."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    inputs, payload_inputs = (INPUT,), ()

    def prepare(self, record, encode, rng):
        one = encode(INPUT)
        self.seen.append((record.id, one.ids.tolist(), one.spans.tolist(), rng.random()))
        return (one,)

    def counts(self, batch):
        return {}

    def lengths(self, lengths):
        return lengths


class SlicesReader(Reader):
    """One record for each line `start stop strand` of a file, a slice of the letters in the file beside it."""

    def __init__(self) -> None:
        self.num_read = 0

    def read(self, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
        letters = str(Path(source.path).with_suffix(".letters"))
        slices = [Slice(letters, *map(int, line.split())) for line in Path(source.path).read_text().splitlines()]
        ids = pa.array([f"s{i}" for i in range(len(slices))])
        yield batch_of(ids, {"input": slice_column(slices)}, source.name, np.arange(1, len(slices) + 1))

    def fetch(self, slices: Sequence[Slice]) -> pa.Array:
        found = []
        for one in slices:
            with open(one.file) as file:
                file.seek(one.start)
                text = file.read(len(one))
            self.num_read += len(text)
            found.append(text[::-1].translate(COMPLEMENT) if one.strand < 0 else text)
        return pa.array(found, pa.large_string())


def slowly(store: RecordStore, tokenizer: AlphabetTokenizer, most: int, epoch: int, members: np.ndarray) -> list[tuple]:
    """Whole payloads, encoded whole, then cropped."""
    objective = Kept()
    for record, row in zip(store.records(members), members.tolist()):
        rng = record_rng(3, epoch, row)
        payload = record.payload
        if isinstance(payload, Slice):
            payload = store.reader.fetch([payload])[0].as_py()
        tokens = crop_window(tokenizer.encode(payload), most, rng)
        objective.prepare(record, ready(tokens), rng)
    return objective.seen


def maker(store: RecordStore, most: int | None, tokenizer: AlphabetTokenizer = TOKENIZER) -> tuple[PackMaker, Kept]:
    objective = Kept()
    return PackMaker(store, np.arange(len(store)), tokenizer, objective, 3, most), objective


def random_tokenizer(rng: np.random.Generator) -> AlphabetTokenizer:
    before, behind = rng.integers(0, 3, 2)
    names = [f"<s{i}>" for i in range(before + behind)]
    return AlphabetTokenizer(
        vocab=(*names, *RESIDUES), prefix=tuple(names[:before]), suffix=tuple(names[before:]), random=RESIDUES
    )


@pytest.mark.parametrize("trial", range(8))
def test_windows_are_those_of_the_whole_record_encoded_and_cropped(rng, make_store, trial):
    store, tokenizer = make_store(random_payloads(rng, 40, 1, 90)), random_tokenizer(rng)
    most = int(rng.integers(sum(tokenizer.num_special) + 1, 60))
    made, objective = maker(store, most, tokenizer)
    members = rng.permutation(len(store))[: rng.integers(1, 41)]
    epoch = int(rng.integers(5))
    batch = made.make(epoch, members)
    assert objective.seen == slowly(store, tokenizer, most, epoch, members)
    assert isinstance(batch, PackedBatch)
    assert max(batch.layout.lengths) <= most


def test_windows_reach_every_place_and_are_drawn_anew_each_epoch(rng, make_store):
    store = make_store(["".join(rng.choice(list(RESIDUES), 30))])
    made, objective = maker(store, 12)
    for epoch in range(300):
        made.make(epoch, np.array([0]))
    starts = {spans[1][0] for _, _, spans, _ in objective.seen}
    assert starts == set(range(21))


MUTANTS = {
    "one symbol beside": ("bytes_at", lambda real: lambda column, row, a, b: real(column, row, max(a - 1, 0), b)),
    "the record before": ("bytes_at", lambda real: lambda column, row, a, b: real(column, max(row - 1, 0), a, b)),
    "from the beginning": ("bytes_at", lambda real: lambda column, row, a, b: real(column, row, 0, b - a)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_window_that_is_cut_elsewhere_would_be_noticed(rng, make_store, monkeypatch, name):
    store = make_store(["".join(rng.choice(list(RESIDUES), 200)) for _ in range(6)])
    function, mutant = MUTANTS[name]
    monkeypatch.setattr("meristem.data.store." + function, mutant(getattr(stretches, function)))
    made, objective = maker(store, 40)
    try:
        made.make(1, np.arange(6))
    except (pa.ArrowException, DataError):
        return
    assert objective.seen != slowly(store, TOKENIZER, 40, 1, np.arange(6))


def test_spans_left_as_those_of_the_window_would_be_noticed(rng, make_store, monkeypatch):
    store = make_store(["".join(rng.choice(list(RESIDUES), 200)) for _ in range(6)])
    monkeypatch.setattr(maker_module.Cuts, "placed", lambda self, tokens, i: tokens)
    made, objective = maker(store, 40)
    made.make(1, np.arange(6))
    assert objective.seen != slowly(store, TOKENIZER, 40, 1, np.arange(6))


def test_a_record_that_is_cut_gives_its_length_and_not_its_payload(rng, make_store):
    payloads = ["".join(rng.choice(list(RESIDUES), n)) for n in (10, 500)]
    short, long = make_store(payloads).records(np.arange(2), np.array([True, False]))
    assert short.payload == payloads[0]
    assert len(long.payload) == 500
    assert isinstance(long.payload, Slice)


def test_a_symbol_that_is_refused_is_found_wherever_it_stands(rng, make_store):
    payloads = ["".join(rng.choice(list(RESIDUES), 400)) for _ in range(4)]
    at = int(rng.integers(400))
    payloads[2] = payloads[2][:at] + "1" + payloads[2][at + 1 :]
    made, _ = maker(make_store(payloads), 50)
    with pytest.raises(DataError, match=rf":3: '1' is not in the alphabet .* at position {at + 1}$"):
        made.full_lengths()


@pytest.fixture
def sliced(rng, tmp_path) -> tuple[RecordStore, str]:
    letters = "".join(rng.choice(list("ACDE"), 50_000))
    (tmp_path / "a.letters").write_text(letters)
    lines = []
    for _ in range(20):
        start, stop = sorted(rng.integers(0, 50_001, 2).tolist())
        lines.append(f"{start} {stop + 1 if start == stop else stop} {rng.choice([1, -1])}")
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    store = RecordStore.build(
        SlicesReader(), [Source(str(tmp_path / "a.txt"))], ReadOptions(), name="slices", cache_dir=tmp_path / "cache"
    )
    return store, letters


def test_slices_are_not_read_to_know_their_lengths_and_only_their_windows_to_train(sliced, rng):
    store, _ = sliced
    made, objective = maker(store, 100)
    lengths = made.full_lengths()
    assert store.reader.num_read == 0
    assert store.path.stat().st_size < 20_000, "the letters are not copied into the store"
    members = rng.permutation(len(store))
    made.make(2, members)
    assert store.reader.num_read == int(np.minimum(lengths - 2, 98).sum())
    assert objective.seen == slowly(store, TOKENIZER, 100, 2, members)


def test_a_slice_of_the_other_strand_is_cut_from_its_own_beginning(rng):
    one = Slice("f", 100, 200, -1)
    assert one.part(0, 10) == Slice("f", 190, 200, -1)
    assert one.part(90, 100) == Slice("f", 100, 110, -1)
    inner = one.part(20, 60)
    assert inner.part(5, 10) == one.part(25, 30)
    assert Slice("f", 100, 200).part(20, 60).part(5, 10) == Slice("f", 125, 130)


def test_splits_go_by_what_slices_hold(sliced):
    store, _ = sliced
    whole = store.payloads(np.arange(len(store))).to_pylist()
    hashes = store.payload_hashes(0)
    assert len(set(hashes.tolist())) == len(set(whole))


def test_a_tokenizer_that_cannot_tell_lengths_refuses_slices(sliced, monkeypatch):
    store, _ = sliced
    monkeypatch.setattr(AlphabetTokenizer, "symbols_per_token", None)
    with pytest.raises(ConfigError, match="slices of files need a tokenizer"):
        store.token_lengths(TOKENIZER)


def test_lengths_of_an_alphabet_are_those_of_encoding(rng):
    tokenizer = random_tokenizer(rng)
    payloads = pa.array(random_payloads(rng, 50, 1, 200), pa.large_string())
    assert np.array_equal(tokenizer.lengths(payloads), tokenizer.encode_column(payloads).lengths)
    batch = pack([tokenizer.encode(payload.as_py()) for payload in payloads], range(50))
    assert sorted(batch.layout.lengths) == sorted(tokenizer.lengths(payloads).tolist())
