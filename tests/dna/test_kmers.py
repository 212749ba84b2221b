"""k-mers: equal to an obvious loop, nothing lost or merged, and a chromosome in one go."""

import json
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pyarrow as pa
import pytest

from meristem.data.tokenizer import RefusedSymbol
from meristem.errors import CheckpointError, ConfigError
from meristem.registry import find
from meristem_domains.dna import kmers
from meristem_domains.dna.kmers import AMBIGUOUS, KmerTokenizer

SPECIAL = {"unk": "<unk>", "pad": "<pad>", "mask": "<mask>", "cls": "<cls>", "eos": "<eos>", "bos": "<bos>"}


def made(k: int = 6, suffix: tuple[str, ...] = (), **changes) -> KmerTokenizer:
    words = ["".join(word) for word in product("ATCG", repeat=k)] if k > 1 else []
    return KmerTokenizer((*SPECIAL.values(), *words, *"ATCGN"), ("<cls>",), suffix, SPECIAL, **changes)


def slow_symbols(text: str, k: int) -> list[str]:
    """Symbols of a text, cut one after another."""
    plain = "".join(AMBIGUOUS.get(letter, letter) for letter in text.upper())
    symbols: list[str] = []
    at = 0
    while at < len(plain):
        word = plain[at : at + k]
        is_whole = len(word) == k and "N" not in word
        symbols.append(word if is_whole and plain[at] != "N" else plain[at])
        at += len(symbols[-1])
        if not is_whole:  # the rest of this piece is single bases
            while at < len(plain) and plain[at] != "N" and symbols[-1] != "N":
                symbols.append(plain[at])
                at += 1
    return symbols


def symbols_of(tokenizer: KmerTokenizer, text: str) -> list[str]:
    return [tokenizer.vocab[i] for i in tokenizer.encode(text).ids]


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        ("ACGTGTACGTACGGGTTT", "ACGTGT ACGTAC GGGTTT"),
        ("ACGTGTacgtacGGGTTT", "ACGTGT ACGTAC GGGTTT"),
        ("ACGTGTACGTGCACGGACGACTAGTCAGCA", "ACGTGT ACGTGC ACGGAC GACTAG TCAGCA"),
        ("ACGTGTACNTGCACGGANCGACTAGTCTGA", "ACGTGT A C N TGCACG G A N CGACTA GTCTGA"),
        ("NNACGTGTANNAC", "N N ACGTGT A N N A C"),
        ("ACGUGT", "ACGTGT"),
        ("ACGRYT", "A C G N N T"),
        ("acgtn", "A C G T N"),
        ("NNNN", "N N N N"),
        ("", ""),
    ],
)
def test_examples(text: str, symbols: str):
    assert symbols_of(made(), text) == ["<cls>", *symbols.split()]


def test_ids_of_the_published_layout():
    tokenizer = made()
    assert len(tokenizer.vocab) == 4107
    # A, T, C, G counted in base 4, behind six special symbols
    assert tokenizer.encode("AAAAAAAAAAATTTTTTTGGGGGGN").ids.tolist() == [3, 6, 7, 6 + 1365, 6 + 4095, 4106]


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("suffix", [(), ("<eos>",)])
def test_a_column_equals_a_loop_over_letters(k: int, suffix: tuple[str, ...], rng: np.random.Generator):
    tokenizer = made(k, suffix)
    letters = [*"ACGTacgtNn", *AMBIGUOUS, "r", "u"]
    texts = ["", "N", ""]
    for _ in range(60):
        share = rng.choice([0.0, 0.02, 0.5])
        weights = [(1 - share) / 8] * 8 + [share / (len(letters) - 8)] * (len(letters) - 8)
        texts.append("".join(rng.choice(letters, rng.integers(0, 60), p=weights)))
    column = tokenizer.encode_column(pa.array(["skipped", *texts], pa.string()).slice(1))
    for row, text in enumerate(texts):
        ids = column.ids[column.offsets[row] : column.offsets[row + 1]]
        expected = ["<cls>", *slow_symbols(text, k), *suffix]
        assert [tokenizer.vocab[i] for i in ids] == expected
        tokens = tokenizer.tokens_at(column, row)
        assert tokens.ids.tolist() == ids.tolist() == tokenizer.encode(text).ids.tolist()
        stops = np.cumsum([0 if "<" in symbol else len(symbol) for symbol in expected])
        assert tokens.spans[:, 1].tolist() == stops.tolist()
        assert tokens.spans[1:, 0].tolist() == stops[:-1].tolist()
        plain = "".join(AMBIGUOUS.get(letter, letter) for letter in text.upper())
        assert tokenizer.decode(tokens) == plain
    counts = Counter("".join(texts).upper())
    assert column.replaced == {f"{old}>{new}": counts[old] for old, new in AMBIGUOUS.items() if counts[old]}


def test_a_cut_at_the_wrong_base_or_a_merged_run_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    text = "ACGTGTANNACGTGTGG"
    expected = ["<cls>", *slow_symbols(text, 6)]
    assert symbols_of(made(), text) == expected
    honest = kmers._runs

    def without_breaks(codes: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return honest(np.where(codes == 4, np.int8(0), codes), bounds)

    monkeypatch.setattr(kmers, "_runs", without_breaks)
    assert symbols_of(made(), text) != expected


@pytest.mark.parametrize(("symbol", "at"), [("X", 5), ("-", 0), (" ", 2), ("\u00e9", 1)])
def test_other_symbols_are_refused_by_place(symbol: str, at: int):
    text = "ACGTACGT"
    with pytest.raises(RefusedSymbol) as caught:
        made().encode_column(pa.array(["ACG", "", text[:at] + symbol + text[at:]]))
    assert (caught.value.row, caught.value.offset, caught.value.symbol) == (2, at, symbol)
    strict = made(replace={})
    with pytest.raises(RefusedSymbol, match="'R'"):
        strict.encode("ACGRT")
    assert strict.encode("acgtn").ids.tolist() == made().encode("ACGTN").ids.tolist()


def test_special_symbols_are_never_drawn_and_survive_json():
    tokenizer = made()
    assert (tokenizer.mask_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (2, 1, 5, 4)
    assert tokenizer.random_ids.tolist() == list(range(6, 4106))  # words and bases, without N
    again = find("meristem.tokenizers", "k-mers").from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again == tokenizer
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("ACGTGTNA").ids.tolist() == tokenizer.encode("ACGTGTNA").ids.tolist()
    others = [replace(tokenizer, replace={}), replace(tokenizer, prefix=()), made(3)]
    assert len({other.fingerprint for other in (tokenizer, *others)}) == 4


def test_vocabularies_that_cannot_work_are_refused():
    vocab = made(2).vocab
    with pytest.raises(ConfigError, match="AT"):
        KmerTokenizer(tuple(symbol for symbol in vocab if symbol != "AT"))
    with pytest.raises(ConfigError, match="once"):
        KmerTokenizer((*vocab, "AT"))
    with pytest.raises(ConfigError, match="the longest has 0"):
        KmerTokenizer(("<cls>",))
    with pytest.raises(ConfigError, match="<nowhere>"):
        KmerTokenizer(vocab, ("<nowhere>",))
    with pytest.raises(ConfigError, match="replace"):
        KmerTokenizer(vocab, replace={"R": "X"})
    with pytest.raises(CheckpointError, match="k-mers"):
        KmerTokenizer.from_json({"vocab": vocab, "odd": 1})


def test_half_a_genome_takes_seconds_and_no_loop_over_bases(rng: np.random.Generator):
    bases = np.frombuffer(b"ACGTacgtN", np.uint8)
    text = rng.choice(bases, 3_000_000, p=[0.15] * 4 + [0.0999] * 4 + [0.0004]).tobytes().decode()
    tokenizer = made()
    column = tokenizer.encode_column(pa.array([text, text[:1000]], pa.large_string()))
    assert tokenizer.decode(tokenizer.tokens_at(column, 0)) == text.upper()
    assert column.lengths[0] < len(text) / 5
