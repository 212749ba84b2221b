"""Vocabularies of k-mers in foreign directories: ids equal those of `transformers`, in and out."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from meristem.data.subwords import SubwordTokenizer
from meristem.errors import CheckpointError, ConfigError
from meristem_domains.dna.kmers import KmerTokenizer
from meristem_domains.dna.nucleotide import read_kmers, write_kmers
from small_vocabularies import trained

WORDS = ["".join(word) for word in product("ATCG", repeat=6)]
V1 = ["<unk>", "<pad>", "<mask>", "<cls>", *WORDS, *"ATCGN"]
V2 = ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>", *WORDS, *"ATCGN"]
ONLY_START = {"tokenizer_class": "EsmTokenizer", "cls_token": "<cls>", "eos_token": None}


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def kmer_folder(folder: Path, vocab: list[str], settings: dict[str, Any] | None = None) -> Path:
    config = {"model_type": "esm", "vocab_size": len(vocab)}
    files = {"vocab.txt": "\n".join(vocab), "tokenizer_config.json": settings or ONLY_START, "config.json": config}
    return write(folder, files)


@pytest.mark.parametrize("vocab", [V1, V2], ids=["v1", "v2"])
def test_kmers_of_plain_dna_are_those_of_transformers(vocab: list[str], tmp_path: Path, rng: np.random.Generator):
    folder = kmer_folder(tmp_path / "in", vocab)
    tokenizer, notes = read_kmers(folder, config_of(folder))
    assert len(vocab) == {"v1": 4105, "v2": 4107}["v1" if vocab is V1 else "v2"]
    assert "lower case" in notes[0]
    assert (tokenizer.mask_id, tokenizer.pad_id) == (2, 1)
    assert tokenizer.num_special == (1, 0)
    exported = write(tmp_path / "out", {**write_kmers(tokenizer), "config.json": config_of(folder)})
    references = [AutoTokenizer.from_pretrained(place) for place in (folder, exported)]
    texts = ["", "ACGTGTACGTACGGGTTT", "N", "NNNACGT"]
    for _ in range(40):
        share = rng.choice([0, 0.02, 0.3])
        texts.append("".join(rng.choice([*"ACGTN"], rng.integers(1, 200), p=[(1 - share) / 4] * 4 + [share])))
    for text in texts:
        for reference in references:
            assert tokenizer.encode(text).ids.tolist() == reference(text)["input_ids"], text
    assert read_kmers(exported, config_of(exported))[0] == tokenizer


def test_an_end_is_put_where_the_directory_says_so(tmp_path: Path):
    folder = kmer_folder(tmp_path, V2, {**ONLY_START, "eos_token": "<eos>"})
    tokenizer, _ = read_kmers(folder, config_of(folder))
    ids = tokenizer.encode("ACGTGT").ids.tolist()
    assert ids == AutoTokenizer.from_pretrained(folder)("ACGTGT")["input_ids"]
    assert ids[-1] == 4


def test_kmer_vocabularies_must_be_whole(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"must hold vocab.txt"):
        read_kmers(tmp_path, {})
    with pytest.raises(CheckpointError, match=r"vocab.txt: .*ACGTGT"):
        read_kmers(kmer_folder(tmp_path / "a", [word for word in V2 if word != "ACGTGT"]), {})
    with pytest.raises(CheckpointError, match="<cls>"):
        read_kmers(kmer_folder(tmp_path / "b", WORDS), {})
    with pytest.raises(CheckpointError, match="vocab_size must be 4107"):
        read_kmers(kmer_folder(tmp_path / "c", V2), {"vocab_size": 4105})


def test_a_tokenizer_of_another_kind_is_not_written(tmp_path: Path):
    with pytest.raises(ConfigError, match="subwords"):
        write_kmers(SubwordTokenizer(trained("byte pairs").to_str()))
    with pytest.raises(ConfigError, match="cls before"):
        write_kmers(KmerTokenizer(tuple(V1), (), (), {"cls": "<cls>"}))
