"""Subwords: the ids of the library, spans that point at the text, and a tokenizer that survives being written."""

import json
import os
import pickle
import signal
import sys
from dataclasses import replace
from unicodedata import category, normalize

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer as Library

from meristem.data import subwords
from meristem.data.pack import pack_column
from meristem.data.subwords import SubwordTokenizer, TextColumn
from meristem.data.tokenizer import RefusedSymbol
from meristem.errors import CheckpointError, ConfigError, DataError
from meristem.registry import find
from meristem.types import TokenColumn
from small_vocabularies import BYTE_KINDS, KINDS, random_texts, trained

SPECIAL = {
    "word pieces": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "byte pairs": {"eos": "<|endoftext|>", "bos": "<|endoftext|>"},
    "framed byte pairs": {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"},
    "unigrams": {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
    "byte fallback": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "regex byte pairs": {"eos": "<|endoftext|>", "pad": "<|endoftext|>"},
}
NUM_SPECIAL = {"word pieces": (1, 1), "framed byte pairs": (1, 1), "unigrams": (0, 1), "byte fallback": (1, 0)}


def made(kind: str) -> SubwordTokenizer:
    return SubwordTokenizer(trained(kind).to_str(), SPECIAL[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_library_one_by_one_and_in_columns(kind: str, rng: np.random.Generator):
    tokenizer, texts = made(kind), random_texts(rng)
    column = tokenizer.encode_column(pa.chunked_array([texts[:7], texts[7:]]))
    assert len(column) == len(texts)
    for row, text in enumerate(texts):
        expected = trained(kind).encode(text).ids
        tokens = tokenizer.encode(text)
        assert tokens.ids.tolist() == expected
        assert column.ids[column.offsets[row] : column.offsets[row + 1]].tolist() == expected
        assert tokens.positions.tolist() == [[i] for i in range(len(expected))]
    assert tokenizer.num_special == NUM_SPECIAL.get(kind, (0, 0))
    binary = tokenizer.encode_column(pa.array([text.encode() for text in texts]))
    np.testing.assert_array_equal(binary.ids, column.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_spans_point_at_the_text_also_from_a_column_and_after_taking_rows(kind: str, rng: np.random.Generator):
    tokenizer, texts = made(kind), random_texts(rng, 30)
    column = tokenizer.encode_column(pa.array(texts))
    rows = rng.permutation(len(texts))[:20]
    taken = column.take(rows)
    before, behind = tokenizer.num_special
    for place, row in enumerate(rows.tolist()):
        tokens, text = tokenizer.tokens_at(taken, place), texts[row]
        np.testing.assert_array_equal(tokens.spans, tokenizer.tokens_at(column, row).spans)
        spans = tokens.spans.tolist()
        assert spans[:before] == [[0, 0]] * before
        assert spans[len(spans) - behind :] == [[len(text)] * 2] * behind
        inner = spans[before : len(spans) - behind]
        assert inner == sorted(inner)
        assert all(0 <= start <= stop <= len(text) for start, stop in inner)
        # whatever no span covers is space, or an accent or joiner that a vocabulary leaves out
        left = np.ones(len(text), bool)
        for start, stop in inner:
            left[start:stop] = False
        assert all(text[i] == "\u2581" or category(text[i])[0] in "ZCM" for i in np.flatnonzero(left))
    bare = TokenColumn(column.ids, column.offsets)
    assert tokenizer.tokens_at(bare, 3).spans is None


def test_a_span_holds_the_letters_of_its_token():
    tokens = made("word pieces").encode("Meristem, the MODEL")
    for i, (start, stop) in list(zip(tokens.ids, tokens.spans))[1:-1]:
        symbol = made("word pieces").vocab[i].removeprefix("##")
        assert "Meristem, the MODEL"[start:stop].lower() == symbol


@pytest.mark.parametrize("kind", KINDS)
def test_writing_and_reading_keeps_the_tokenizer(kind: str, rng: np.random.Generator):
    tokenizer, texts = made(kind), random_texts(rng, 20)
    again = find("meristem.tokenizers", "subwords").from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again == tokenizer
    assert again.fingerprint == tokenizer.fingerprint
    column = pa.array(texts)
    for other in (again, pickle.loads(pickle.dumps(tokenizer))):
        np.testing.assert_array_equal(other.encode_column(column).ids, tokenizer.encode_column(column).ids)
        assert other.mask_id == tokenizer.mask_id


def test_every_change_of_a_definition_changes_the_fingerprint():
    tokenizer = made("word pieces")
    values = json.loads(tokenizer.definition)
    values["normalizer"]["lowercase"] = False
    cased = SubwordTokenizer(json.dumps(values), tokenizer.special)
    without_mask = replace(tokenizer, special={"pad": "[PAD]"})
    assert len({tokenizer.fingerprint, cased.fingerprint, without_mask.fingerprint}) == 3
    # and a folded case is seen by ids: the mutant of a lost normaliser
    assert cased.encode("THE").ids.tolist() != tokenizer.encode("THE").ids.tolist()


def test_truncation_and_padding_are_switched_off():
    library = Library.from_str(trained("word pieces").to_str())
    library.enable_truncation(4)
    library.enable_padding(length=9)
    tokenizer = SubwordTokenizer(library.to_str(), SPECIAL["word pieces"])
    assert len(library.encode("one two three four five six").ids) == 9
    assert tokenizer == made("word pieces")
    assert len(tokenizer.encode("one two three four five six")) > 9


@pytest.mark.parametrize("kind", KINDS)
def test_special_symbols_are_known_by_role_and_never_drawn(kind: str):
    tokenizer = made(kind)
    for role in ("pad", "bos", "eos", "mask"):
        symbol = SPECIAL[kind].get(role)
        expected = None if symbol is None else trained(kind).token_to_id(symbol)
        assert getattr(tokenizer, f"{role}_id") == expected
    assert len(tokenizer.vocab) == trained(kind).get_vocab_size()
    special = {i for i, symbol in enumerate(tokenizer.vocab) if symbol in SPECIAL[kind].values() or "extra" in symbol}
    assert set(tokenizer.special_ids) == special
    assert set(tokenizer.random_ids) == set(range(len(tokenizer.vocab))) - special


@pytest.mark.parametrize("kind", BYTE_KINDS)
def test_byte_vocabularies_give_back_the_very_text(kind: str, rng: np.random.Generator):
    tokenizer = made(kind)
    for text in random_texts(rng):
        if not any(symbol in text for symbol in SPECIAL[kind].values()):
            expected = normalize("NFC", text) if kind == "regex byte pairs" else text
            assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_decoding_takes_ids_and_shows_special_symbols_on_request():
    tokenizer = made("framed byte pairs")
    ids = tokenizer.encode("a model").ids
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == "a model"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>a model</s>"


def test_unknown_text_is_counted():
    tokenizer = made("word pieces")
    column = tokenizer.encode_column(pa.array(["the \u4e2d\u6587", "\U0001f642 the", "the"]))
    assert column.replaced == {"unknown text>[UNK]": 3}
    assert made("byte pairs").encode_column(pa.array(["\u4e2d <|endoftext|>"])).replaced == {}


def test_columns_are_packed_like_any_other():
    tokenizer = made("word pieces")
    column = tokenizer.encode_column(pa.array(["the model", "a", ""]))
    batch = pack_column(column, np.array([0, 2, 1]), [0, 2, 1])
    assert batch.layout.lengths == tuple(sorted(column.lengths.tolist()))
    assert isinstance(column, TextColumn)
    assert len(tokenizer.encode_column(pa.array([], pa.string()))) == 0


def test_long_columns_are_encoded_in_slices(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator):
    tokenizer, texts = made("byte pairs"), random_texts(rng, 30)
    whole = tokenizer.encode_column(pa.array(texts))
    for size in (1, 50, 700):
        monkeypatch.setattr(subwords, "BATCH_BYTES", size)
        sliced = tokenizer.encode_column(pa.array(["x", *texts]).slice(1))
        np.testing.assert_array_equal(sliced.ids, whole.ids)
        np.testing.assert_array_equal(sliced.offsets, whole.offsets)


def test_what_is_no_text_is_refused_by_row():
    tokenizer = made("byte pairs")
    with pytest.raises(RefusedSymbol) as caught:
        tokenizer.encode_column(pa.array([b"fine", b"ab\xff"]))
    assert (caught.value.row, caught.value.offset) == (1, 2)
    with pytest.raises(DataError, match="missing"):
        tokenizer.encode_column(pa.array(["a", None]))
    with pytest.raises(DataError, match="whole characters"):
        tokenizer.encode("\ud800")


@pytest.mark.parametrize(
    ("definition", "special", "match"),
    [
        ("{", {}, "JSON"),
        ("[]", {}, "JSON"),
        ("{}", {}, "Model missing"),
        (None, {"mask": "<nowhere>"}, "<nowhere>"),
        (None, {"chief": "[MASK]"}, "chief"),
    ],
)
def test_damaged_definitions_are_refused(definition: str | None, special: dict[str, str], match: str):
    with pytest.raises(CheckpointError, match=match) as caught:
        SubwordTokenizer(definition or trained("word pieces").to_str(), special)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="definition"):
        SubwordTokenizer.from_json({"special": {}})


def test_without_the_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"meristem\[text\]"):
        SubwordTokenizer(trained("byte pairs").to_str())


def test_a_forked_worker_encodes_after_its_parent_did():
    """The library's threads do not survive a fork; a worker must not wait for them."""
    tokenizer, column = made("byte pairs"), pa.array(["a model"] * 200)
    expected = tokenizer.encode_column(column).ids
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        os._exit(int(not np.array_equal(tokenizer.encode_column(column).ids, expected)))
    assert os.waitpid(pid, 0)[1] == 0
