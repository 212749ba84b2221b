"""One token a residue, always; what is replaced is counted; ids are those of the published models."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.data.tokenizer import AlphabetTokenizer, RefusedSymbol
from meristem.errors import ConfigError
from meristem_domains.protein.alphabet import NONSTANDARD, STANDARD, VOCAB, tokenizer
from meristem_domains.protein.presets import PRESETS

ALL = STANDARD + NONSTANDARD
payloads = st.lists(st.text(alphabet=ALL + ALL.lower(), max_size=30), min_size=1, max_size=8)


def test_the_vocabulary_is_that_of_esm() -> None:
    expected = {"<cls>": 0, "<pad>": 1, "<eos>": 2, "<unk>": 3, "L": 4, "C": 23, "X": 24, "B": 25, "U": 26, "Z": 27}
    expected |= {"O": 28, ".": 29, "-": 30, "<null_1>": 31, "<mask>": 32}
    assert {symbol: VOCAB.index(symbol) for symbol in expected} == expected
    assert len(VOCAB) == 33
    assert sorted(STANDARD) == sorted("ACDEFGHIKLMNPQRSTVWY")
    assert tokenizer().mask_id == 32
    assert tokenizer().random_ids.tolist() == list(range(4, 24))


@given(texts=payloads, policy=st.sampled_from(["keep", "x"]))
def test_every_residue_is_one_token_and_comes_back(texts: list[str], policy: str) -> None:
    tok = tokenizer(policy)
    read_as_x = "J*" if policy == "keep" else NONSTANDARD.replace("X", "")
    column = tok.encode_column(pa.array(texts, pa.large_string()))
    assert column.lengths.tolist() == [len(text) + 2 for text in texts]
    counts = Counter("".join(texts).upper())
    assert column.replaced == {f"{old}>X": counts[old] for old in read_as_x if counts[old]}
    for row, text in enumerate(texts):
        tokens = tok.encode(text)
        assert tokens.ids.tolist() == column.ids[column.offsets[row] : column.offsets[row + 1]].tolist()
        assert tokens.ids[0] == 0
        assert tokens.ids[-1] == 2
        expected = "".join("X" if residue in read_as_x else residue for residue in text.upper())
        assert tok.decode(tokens) == expected
        assert tokens.spans is not None
        assert tokens.spans[1:-1].tolist() == [[i, i + 1] for i in range(len(text))]


def test_a_run_of_unknown_residues_stays_as_long_as_it_is() -> None:
    assert tokenizer().encode("MKJJJV").ids.tolist() == [0, 20, 15, 24, 24, 24, 7, 2]
    assert tokenizer().encode("mktv").ids.tolist() == tokenizer().encode("MKTV").ids.tolist()


@pytest.mark.parametrize("symbol", [*NONSTANDARD, *"xuzobj"])
def test_refuse_takes_standard_residues_only(symbol: str) -> None:
    tok = tokenizer("refuse")
    with pytest.raises(RefusedSymbol) as caught:
        tok.encode_column(pa.array([STANDARD, "", "MK" + symbol + "V"]))
    assert (caught.value.row, caught.value.offset, caught.value.symbol) == (2, 2, symbol)
    assert tok.encode(STANDARD.lower()).ids[1:-1].tolist() == list(range(4, 24))


def test_policies_differ_by_fingerprint_and_survive_json() -> None:
    toks = [tokenizer(policy) for policy in ("keep", "x", "refuse")]
    assert len({tok.fingerprint for tok in toks}) == 3
    for tok in toks:
        again = AlphabetTokenizer.from_json(json.loads(json.dumps(tok.to_json())))
        assert again.fingerprint == tok.fingerprint
        np.testing.assert_array_equal(again.encode("MKV").ids, tok.encode("MKV").ids)
    with pytest.raises(ConfigError, match="keep, x, refuse"):
        tokenizer("drop")


def test_ids_are_those_of_transformers(tmp_path: Path, rng: np.random.Generator) -> None:
    from transformers import EsmTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    reference = EsmTokenizer(str(tmp_path / "vocab.txt"))
    letters = list(STANDARD + "XBUZO")
    for _ in range(20):
        text = "".join(rng.choice(letters, rng.integers(1, 200)))
        assert tokenizer().encode(text).ids.tolist() == reference(text)["input_ids"]


def test_presets_have_the_published_numbers_of_parameters() -> None:
    published_millions = {"esm2_8m": 8, "esm2_35m": 34, "esm2_150m": 148, "esm2_650m": 651, "esm2_3b": 2840}
    published_millions["esm1b"] = 652
    assert set(PRESETS) == set(published_millions)
    for name, millions in published_millions.items():
        config = PRESETS[name]
        d, f, v = config.width, config.feedforward.width, config.embedding.vocab_size
        block = 4 * (d * d + d) + (2 * d * f + f + d) + 2 * 2 * d
        total = config.num_layers * block + 2 * d + v * d + (d * d + d + 2 * d + v)
        if name == "esm1b":
            total += 1026 * d + 2 * d
        assert round(total / 1e6) == pytest.approx(millions, abs=1)
    assert PRESETS["esm1b"].max_length == 1024
    assert PRESETS["esm2_8m"].max_length is None
