"""Records that are too long are cut before they are encoded: the same windows, and nothing beside them is read."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from harness import peak_bytes
from lines import RESIDUES, TOKENIZER, LinesReader, random_payloads

import meristem.data.payloads as payloads
from labelled import ready
from meristem.data.corrupt import crop_at, crop_window
from meristem.data.cuts import Cuts
from meristem.data.order import record_rng
from meristem.data.pack import pack
from meristem.data.pack_maker import PackMaker
from meristem.data.payloads import SLICES
from meristem.data.reading.reader import Reader
from meristem.data.records import ReadOptions, Source, batch_of
from meristem.data.store import RecordStore
from meristem.data.subwords import SubwordTokenizer
from meristem.data.tokenizer import AlphabetTokenizer, RefusedSymbol
from meristem.errors import ConfigError, DataError
from meristem.types import INPUT, PackedBatch, Slice
from meristem_domains.dna.kmers import KmerTokenizer
from small_vocabularies import trained


def kmer_vocabulary(k: int) -> tuple[str, ...]:
    return ("<cls>", "<eos>", *("".join(word) for word in itertools.product("ATCG", repeat=k)), *"ATCGN")


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
        column = pa.array([asdict(one) for one in slices], SLICES)
        yield batch_of(ids, {"input": column}, source.name, np.arange(1, len(slices) + 1))

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
    monkeypatch.setattr("meristem.data.store." + function, mutant(getattr(payloads, function)))
    made, objective = maker(store, 40)
    try:
        made.make(1, np.arange(6))
    except (pa.ArrowException, DataError):
        return
    assert objective.seen != slowly(store, TOKENIZER, 40, 1, np.arange(6))


def test_spans_left_as_those_of_the_window_would_be_noticed(rng, make_store, monkeypatch):
    store = make_store(["".join(rng.choice(list(RESIDUES), 200)) for _ in range(6)])
    monkeypatch.setattr(Cuts, "window", lambda self, tokens, i, store, row: tokens)
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
        made.lengths()


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
    lengths = made.full_lengths
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


@pytest.mark.parametrize("kind", ["alphabet", "subwords"])
def test_memory_of_a_window_does_not_depend_on_the_length_of_the_record(rng, tmp_path, kind):
    tokenizer = TOKENIZER if kind == "alphabet" else SubwordTokenizer(trained("word pieces").to_str())
    texts = [("ACDEFGHIKL" if kind == "alphabet" else "a model of text ") * n for n in (200, 200_000)]
    made, _ = maker(text_store(texts, tmp_path), 128, tokenizer)
    made.lengths()
    for row in (0, 1):  # what is known once is known
        made.make(0, np.array([row]))
    short, long = (peak_bytes(lambda row=row: made.make(1, np.array([row]))) for row in (0, 1))
    assert long < 2 * short


# --- tokens of several bytes -----------------------------------------------------------------------------------------

WORDS = ["gene", "kinase", "a", "\u00e9t\u00e9", "\u4e2d\u6587", "of", "\U0001f642", "binding", "the", "-"]


def random_text(rng: np.random.Generator, num_words: int) -> str:
    return " ".join(rng.choice(WORDS, num_words))


def text_store(texts: Sequence[str], folder: Path) -> RecordStore:
    (folder / "texts.txt").write_text("".join(f"t{i}\t{text}\n" for i, text in enumerate(texts)), encoding="utf-8")
    source = Source(str(folder / "texts.txt"))
    return RecordStore.build(LinesReader(), [source], ReadOptions(), name="lines", cache_dir=folder / "cache")


@pytest.mark.parametrize("kind", ["word pieces", "framed byte pairs", "unigrams"])
def test_windows_of_subwords_are_tokens_of_the_whole_text_in_their_places(rng, tmp_path, kind):
    tokenizer = SubwordTokenizer(trained(kind).to_str())
    texts = [random_text(rng, int(n)) for n in rng.integers(1, 2_000, 6)]
    store = text_store(texts, tmp_path)
    most = int(rng.integers(sum(tokenizer.num_special) + 1, 40))
    made, objective = maker(store, most, tokenizer)
    num_cut, num_torn = 0, 0
    for epoch in range(12):
        objective.seen.clear()
        made.make(epoch, np.arange(6))
        for (_, ids, spans, _), text in zip(objective.seen, texts):
            whole = tokenizer.encode(text)
            before, behind = tokenizer.num_special
            assert len(ids) == min(most, len(whole))
            assert ids[:before] == whole.ids[:before].tolist()
            assert ids[len(ids) - behind :] == whole.ids[len(whole) - behind :].tolist()
            assert all(span == [0, 0] for span in spans[:before])
            assert all(span == [len(text)] * 2 for span in spans[len(ids) - behind :])
            own, inner = (
                list(zip(ids, map(tuple, spans)))[before : len(ids) - behind],
                range(before, len(whole) - behind),
            )
            known = {(int(whole.ids[i]), tuple(whole.spans[i].tolist())) for i in inner}
            num_cut += len(ids) < len(whole)
            num_torn += not set(own) <= known
            starts = [span[0] for _, span in own]
            assert starts == sorted(starts)
    assert num_cut > 12
    assert num_torn == 0, "context is long enough that no word of these texts is cut in two"


def test_windows_of_subwords_reach_both_ends_and_no_character_is_cut(rng, tmp_path):
    tokenizer = SubwordTokenizer(trained("unigrams").to_str())
    text = "\u4e2d " + random_text(rng, 40) + " \U0001f642"
    made, objective = maker(text_store([text], tmp_path), 6, tokenizer)
    for epoch in range(2_500):
        made.make(epoch, np.array([0]))
    covered = np.zeros(len(text), int)
    for _, _, spans, _ in objective.seen:
        for start, stop in spans:
            covered[start:stop] += 1
    assert covered[np.flatnonzero([not c.isspace() for c in text])].min() > 0
    # the last window comes about as often as all that begin in it together
    assert covered[-10:].mean() < 3 * covered[20:-20].mean()


@pytest.mark.parametrize("trial", range(4))
def test_windows_of_kmers_are_as_long_as_asked_for_and_lie_where_they_say(rng, tmp_path, trial):
    tokenizer = KmerTokenizer(vocab=kmer_vocabulary(3), prefix=("<cls>",))
    payloads = ["".join(rng.choice(list("ACGTN"), int(n), p=[0.24] * 4 + [0.04])) for n in rng.integers(1, 3_000, 8)]
    made, objective = maker(text_store(payloads, tmp_path), 25, tokenizer)
    made.make(trial, np.arange(8))
    for (_, ids, spans, _), payload in zip(objective.seen, payloads):
        assert len(ids) == min(25, len(tokenizer.encode(payload)))
        assert [payload[a:b] for a, b in spans] == ["", *(tokenizer.vocab[i] for i in ids[1:])]


def test_lengths_of_long_payloads_are_counted_in_pieces_and_what_is_refused_is_found(rng, monkeypatch):
    monkeypatch.setattr("meristem.data.tokenizer.PIECE_BYTES", 100)
    tokenizer = KmerTokenizer(vocab=kmer_vocabulary(3), suffix=("<eos>",))
    payloads = ["".join(rng.choice(list("ACGT"), int(n))) for n in rng.integers(1, 900, 10)]
    exact = np.array([len(tokenizer.encode(payload)) for payload in payloads])
    got = tokenizer.lengths(pa.array(payloads, pa.large_string()))
    # a piece of 100 bases is 33 words and a base
    assert (np.abs(got - exact) <= 3 * np.array([len(payload) // 100 for payload in payloads])).all()
    at = int(rng.integers(500, 600))
    payloads[4] = "A" * at + "1" + "A" * 400
    with pytest.raises(RefusedSymbol, match=f"'1' is not in the alphabet .* at position {at + 1}$") as caught:
        tokenizer.lengths(pa.array(payloads, pa.large_string()))
    assert (caught.value.row, caught.value.offset) == (4, at)
    words = SubwordTokenizer(trained("word pieces").to_str())
    texts = [random_text(rng, 200) for _ in range(3)]
    whole = np.array([len(words.encode(text)) for text in texts])
    assert (np.abs(words.lengths(pa.array(texts, pa.large_string())) - whole) <= whole / 5 + 2).all()


SUBWORD_MUTANTS = {
    "bytes for characters": ("meristem.data.store.RecordStore.characters", lambda self, row, byte, name="": byte),
    "no context": ("meristem.data.cuts.CONTEXT_BYTES", 0),
    "the last tokens": ("meristem.data.cuts.crop_at", lambda tokens, most, first: crop_at(tokens, most, len(tokens))),
}


@pytest.mark.parametrize("name", ["bytes for characters", "no context"])
def test_subwords_that_lie_elsewhere_would_be_noticed(rng, tmp_path, monkeypatch, name):
    monkeypatch.setattr(*SUBWORD_MUTANTS[name])
    with pytest.raises(AssertionError):
        test_windows_of_subwords_are_tokens_of_the_whole_text_in_their_places(rng, tmp_path, "word pieces")


def test_windows_that_never_reach_the_beginning_would_be_noticed(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(*SUBWORD_MUTANTS["the last tokens"])
    with pytest.raises(AssertionError):
        test_windows_of_subwords_reach_both_ends_and_no_character_is_cut(rng, tmp_path)
