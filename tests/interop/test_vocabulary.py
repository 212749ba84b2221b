"""Tokenizers of foreign directories: ids equal those of `transformers`, on the way in and on the way out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from meristem.data.subwords import SubwordTokenizer
from meristem.data.tokenizer import AlphabetTokenizer
from meristem.errors import CheckpointError, ConfigError
from meristem.interop.vocabulary import read_subwords, write_subwords
from small_vocabularies import KINDS, random_texts, trained

CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "word pieces": ("bert", "BertTokenizer", {"do_lower_case": True}),
    "byte pairs": ("gpt2", "GPT2Tokenizer", {}),
    "framed byte pairs": ("roberta", "RobertaTokenizer", {}),
    "unigrams": ("t5", "PreTrainedTokenizerFast", {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
    "byte fallback": ("llama", "PreTrainedTokenizerFast", {"bos_token": "<s>", "eos_token": "</s>"}),
    "regex byte pairs": ("qwen2", "Qwen2Tokenizer", {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}),
}
"""Type of model, class of tokenizer and settings, by kind of vocabulary."""


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder


def saved(folder: Path, kind: str, **settings: Any) -> Path:
    """A directory with `tokenizer.json`."""
    model_type, name, own = CLASSES[kind]
    config = {"model_type": model_type, "vocab_size": 512}
    stated = {"tokenizer_class": name, **own, **settings}
    files = {"tokenizer.json": trained(kind).to_str(), "tokenizer_config.json": stated, "config.json": config}
    return write(folder, files)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def check(folder: Path, texts: list[str], tokenizer: SubwordTokenizer | None = None) -> SubwordTokenizer:
    """Ids of `transformers` for the directory are ours; returns our tokenizer."""
    reference = AutoTokenizer.from_pretrained(folder)
    tokenizer = tokenizer or read_subwords(folder, config_of(folder))[0]
    column = tokenizer.encode_column(pa.array(texts))
    for row, text in enumerate(texts):
        expected = reference(text)["input_ids"]
        assert column.ids[column.offsets[row] : column.offsets[row + 1]].tolist() == expected, repr(text)
    for role in ("pad", "eos", "bos", "mask"):
        assert getattr(tokenizer, f"{role}_id") == getattr(reference, f"{role}_token_id"), role
    assert set(tokenizer.special_ids) == set(reference.all_special_ids) | {
        i for i, token in reference.added_tokens_decoder.items() if token.special
    }
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers_and_stay_so_when_written(kind: str, tmp_path: Path, rng: np.random.Generator):
    texts = random_texts(rng)
    folder = saved(tmp_path / "in", kind)
    tokenizer = check(folder, texts)
    exported = write(tmp_path / "out", {**write_subwords(tokenizer), "config.json": config_of(folder)})
    check(exported, texts, tokenizer)
    again, notes = read_subwords(exported, config_of(exported))
    assert again.fingerprint == tokenizer.fingerprint
    assert notes == []
    column = tokenizer.encode_column(pa.array(texts))
    reference = PreTrainedTokenizerFast.from_pretrained(exported)
    for row, text in enumerate(texts[:20]):
        ids = column.ids[column.offsets[row] : column.offsets[row + 1]]
        for skip in (True, False):
            expected = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected, text


def vocabulary_files(kind: str) -> dict[str, Any]:
    """What directories of old hold."""
    model = json.loads(trained(kind).to_str())["model"]
    if kind == "word pieces":
        return {"vocab.txt": "\n".join(sorted(model["vocab"], key=model["vocab"].__getitem__)) + "\n"}
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    return {"vocab.json": model["vocab"], "merges.txt": f"#version: 0.2\n{merges}\n"}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("word pieces", None),
        ("word pieces", {"do_lower_case": False}),
        ("word pieces", {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False}),
        ("word pieces", {"cls_token": "[SEP]", "tokenizer_class": "BertTokenizer"}),
        ("byte pairs", None),
        ("byte pairs", {"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"}),
        ("byte pairs", {"pad_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
        ("framed byte pairs", None),
        ("framed byte pairs", {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True}),
    ],
)
def test_vocabulary_files_make_the_tokenizer_of_transformers(
    kind: str, settings: dict[str, Any] | None, tmp_path: Path, rng: np.random.Generator
):
    model_type = CLASSES[kind][0]
    config = {"model_type": model_type, "vocab_size": 512}
    stated = {} if settings is None else {"tokenizer_config.json": settings}
    folder = write(tmp_path / "in", {**vocabulary_files(kind), **stated, "config.json": config})
    texts = random_texts(rng)
    tokenizer = check(folder, texts)
    check(write(tmp_path / "out", {**write_subwords(tokenizer), "config.json": config}), texts, tokenizer)


def made_by_class(name: str) -> Any:
    """A tokenizer of a class of `transformers` itself."""
    import transformers

    kind = {
        "BertTokenizer": "word pieces",
        "RobertaTokenizer": "framed byte pairs",
        "T5Tokenizer": "unigrams",
        "LlamaTokenizer": "byte fallback",
        "Qwen2Tokenizer": "regex byte pairs",
    }.get(name, "byte pairs")
    model = json.loads(trained(kind).to_str())["model"]
    if kind == "unigrams":
        parts: dict[str, Any] = {"vocab": [tuple(piece) for piece in model["vocab"]], "extra_ids": 10}
    else:
        parts = {"vocab": model["vocab"]}
    if "merges" in model:
        parts["merges"] = [tuple(pair) for pair in model["merges"]]
    return getattr(transformers, name)(**parts)


SAVED_CLASSES = {
    "BertTokenizer": "bert",
    "RobertaTokenizer": "roberta",
    "T5Tokenizer": "t5",
    "LlamaTokenizer": "llama",
    "Qwen2Tokenizer": "qwen2",
    "GPT2Tokenizer": "gpt2",
    "CodeGenTokenizer": "codegen",
}


@pytest.mark.parametrize("name", SAVED_CLASSES)
def test_what_a_class_of_transformers_saves_is_read_with_its_ids(name: str, tmp_path: Path, rng: np.random.Generator):
    folder, texts = tmp_path / "in", random_texts(rng)
    reference = made_by_class(name)
    reference.save_pretrained(folder)
    write(folder, {"config.json": {"model_type": SAVED_CLASSES[name], "vocab_size": 600}})
    tokenizer, notes = read_subwords(folder, config_of(folder))
    assert notes == []
    for text in texts:
        assert tokenizer.encode(text).ids.tolist() == reference(text)["input_ids"], repr(text)
    check(folder, texts, tokenizer)
    exported = write(tmp_path / "out", {**write_subwords(tokenizer), "config.json": config_of(folder)})
    check(exported, texts, tokenizer)


def test_settings_go_before_the_definition_as_in_transformers(tmp_path: Path, rng: np.random.Generator):
    texts = random_texts(rng, 30)
    cased = check(saved(tmp_path / "cased", "word pieces", do_lower_case=False), texts)
    assert cased.encode("THE").ids.tolist() != cased.encode("the").ids.tolist()
    check(saved(tmp_path / "space", "byte pairs", add_prefix_space=True), texts)


@pytest.mark.parametrize("ends", [{"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}, {}])
def test_symbols_around_a_text_are_those_of_transformers(ends: dict[str, bool], tmp_path: Path):
    stated = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", **ends}
    files = {**vocabulary_files("framed byte pairs"), "tokenizer_config.json": stated}
    folder = write(tmp_path / "files", {**files, "config.json": {"model_type": "gpt2", "vocab_size": 512}})
    reference = AutoTokenizer.from_pretrained(folder)
    tokenizer, _ = read_subwords(folder, config_of(folder))
    for text in ("", "a model"):
        assert tokenizer.encode(text).ids.tolist() == reference(text)["input_ids"]
    assert tokenizer.num_special == tuple(int(ends.get(f"add_{end}_token", False)) for end in ("bos", "eos"))
    # beside a definition, such settings count for nothing
    whole = check(saved(tmp_path / "whole", "byte fallback", add_bos_token=False, add_eos_token=True), ["", "a model"])
    assert whole.num_special == (1, 0)


def test_added_symbols_and_flags_are_those_of_transformers(tmp_path: Path, rng: np.random.Generator):
    texts = [*random_texts(rng, 30), "one <new> two<new>", "a <odd>b", "x [PAD] y"]
    flags = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": False}
    decoder = {
        "500": {"content": "<odd>", "special": False, **flags},
        "501": {"content": "<new>", "special": True, **flags},
    }
    folder = saved(tmp_path / "a", "byte fallback", added_tokens_decoder=decoder, pad_token="[PAD]")
    tokenizer = check(folder, texts)
    assert tokenizer.pad_id == 502
    exported = write(tmp_path / "out", {**write_subwords(tokenizer), "config.json": config_of(folder)})
    check(exported, texts, tokenizer)


def test_symbols_beyond_the_model_are_left_out_and_told(tmp_path: Path):
    folder = saved(tmp_path, "byte fallback", pad_token="[PAD]")
    tokenizer, notes = read_subwords(folder, {"vocab_size": 500})
    assert tokenizer.pad_id is None
    assert len(tokenizer.vocab) == 500
    assert "[PAD]" in notes[0]
    with pytest.raises(CheckpointError, match="vocab_size must be 500"):
        read_subwords(folder, {"vocab_size": 499})


def test_the_config_names_roles_that_no_file_names(tmp_path: Path):
    folder = write(tmp_path, {"tokenizer.json": trained("unigrams").to_str()})
    tokenizer, _ = read_subwords(folder, {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 17})
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, None)  # 17 is a word


def test_a_dropped_normaliser_or_frame_would_be_seen(tmp_path: Path, rng: np.random.Generator):
    texts = random_texts(rng, 30)
    folder = saved(tmp_path, "word pieces")
    tokenizer = check(folder, texts)
    for part in ("normalizer", "post_processor"):
        values = json.loads(tokenizer.definition)
        values[part] = None
        with pytest.raises(AssertionError):
            check(folder, texts, SubwordTokenizer(json.dumps(values), tokenizer.special))


def test_flags_of_a_mask_reach_the_other_library(tmp_path: Path):
    folder = saved(tmp_path / "in", "framed byte pairs")
    tokenizer, _ = read_subwords(folder, config_of(folder))
    exported = write(tmp_path / "out", {**write_subwords(tokenizer), "config.json": config_of(folder)})
    [mask] = [t for t in AutoTokenizer.from_pretrained(exported).added_tokens_decoder.values() if t.content == "<mask>"]
    assert isinstance(mask, AddedToken)
    assert mask.lstrip


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "must hold a tokenizer, one of tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json must be JSON"),
        ({"tokenizer.json": "[]"}, "tokenizer.json must be a JSON object"),
        ({"tokenizer.json": "{}"}, "tokenizer.json must say what its model is"),
        ({"tokenizer.json": {"model": {"type": "BPE"}}}, "tokenizer.json .*lacks 'vocab'"),
        ({"tokenizer.json": {"model": {"type": "BPE", "vocab": {"a": "x"}}}}, "no integer"),
        ({"tokenizer.json": {"model": {"type": "Odd", "vocab": {"a": 0}}}}, "tokenizer.json: a definition"),
        ({"vocab.txt": "a\nb\n"}, r"vocab.txt must hold \[UNK\]"),
        ({"vocab.txt": "a\n", "tokenizer_config.json": {"tokenizer_class": "OddTokenizer"}}, "OddTokenizer cannot"),
        ({"vocab.json": {"a": 0, "b": 1}, "merges.txt": "a b c\n"}, "merges.txt: a line must hold two"),
        ({"vocab.json": {"a": 0, "b": 1}, "merges.txt": "a c\n"}, "vocab.json: a definition"),
        ({"vocab.json": {"a": 0}}, "must hold a tokenizer"),
        ({"spiece.model": "x"}, "spiece.model must be a model of sentencepiece"),
        ({"tokenizer.json": None, "tokenizer_config.json": "nonsense"}, "tokenizer_config.json must be JSON"),
        ({"tokenizer.json": None, "special_tokens_map.json": {"pad_token": 3}}, "special symbol"),
        ({"tokenizer.json": None, "added_tokens.json": {"<a>": "x", "<b>": 3}}, "tokenizer.json must be"),
    ],
)
def test_damaged_directories_are_refused_in_one_line(files: dict[str, Any], match: str, tmp_path: Path):
    files = {name: trained("byte pairs").to_str() if value is None else value for name, value in files.items()}
    with pytest.raises(CheckpointError, match=match) as caught:
        read_subwords(write(tmp_path, files), {})
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_of_another_kind_is_not_written():
    with pytest.raises(ConfigError, match="got one of alphabet"):
        write_subwords(AlphabetTokenizer(vocab=("A", "C")))
