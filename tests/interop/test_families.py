"""Families live beside each other: one model is of one family, and no family stumbles over a model of another."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForPreTraining,
    CodeGenConfig,
    EsmcConfig,
    EsmcForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTJConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from meristem.cli.main import main
from meristem.data.subwords import SubwordTokenizer
from meristem.data.tokenizer import AlphabetTokenizer
from meristem.errors import CheckpointError, ConfigError
from meristem.interop import family as family_module
from meristem.interop.directory import read_config_file, read_model, write_directory
from meristem.interop.family import find_family, installed_families
from meristem.model.model import Model
from meristem.model.plain import from_json, to_json
from model_runs import specs
from references import redraw, save
from small_vocabularies import trained

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 50, "vocab_size": 500}
WORDS = {**SMALL, "vocab_size": 40, "pad_token_id": 0}

MODELS: dict[str, Callable[[], Any]] = {
    "BERT": lambda: BertForPreTraining(BertConfig(**WORDS)),
    "ESM-1b and ESM-2": lambda: EsmForMaskedLM(
        EsmConfig(**{**WORDS, "vocab_size": 33}, mask_token_id=32, position_embedding_type="rotary")
    ),
    "ESM-C": lambda: EsmcForMaskedLM(EsmcConfig(**SMALL)),
    "ModernBERT": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**WORDS, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    ),
    "GPT-2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=50, bos_token_id=0, eos_token_id=0)
    ),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**WORDS, num_key_value_heads=2)),
    "T5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "ViT": lambda: ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_directory_is_of_one_family_and_no_other_stumbles_over_it(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = save(redraw(MODELS[name](), rng), tmp_path / "hf")
    config = read_config_file(folder)
    family = find_family(folder, config)
    assert family.name == name
    model, _ = read_model(folder)
    tokenizer = AlphabetTokenizer(vocab=("<cls>", "<pad>", "<eos>", "<unk>", *"ACGT", "<mask>"))
    # each family says what it can of a model of another: it may refuse, and nothing else
    for other in installed_families():
        with suppress(ConfigError):
            written = other.write_config(model.config, tokenizer)
            json.dumps(written)
            other.read_config(written, {})


@pytest.mark.parametrize("name", MODELS)
def test_what_a_config_says_survives_a_model_directory(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model, _ = read_model(save(redraw(MODELS[name](), rng), tmp_path / "hf"))
    plain = json.loads(json.dumps(to_json(model.config)))
    assert from_json(type(model.config), plain) == model.config
    again = Model(model.config, model.specs)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


EXPORTED = {
    "GPT-J": (GPTJConfig, GPT | {"rotary_dim": 4}, "GPT-J"),
    "CodeGen, which GPT-J can say": (CodeGenConfig, GPT | {"rotary_dim": 4}, "GPT-J"),
    "GPTBigCode, which GPT-2 can say": (GPTBigCodeConfig, GPT | {"multi_query": False}, "GPT-2"),
    "GPTBigCode, one key head": (GPTBigCodeConfig, GPT, "GPTBigCode"),
    "Llama, scaled": (
        LlamaConfig,
        {**WORDS, "vocab_size": 500, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "Llama",
    ),
}


@pytest.mark.parametrize("shape", EXPORTED)
def test_a_model_is_exported_as_the_most_general_family_that_can_say_it(shape: str, tmp_path: Path) -> None:
    kind, settings, wanted = EXPORTED[shape]
    tokenizer = SubwordTokenizer(trained("byte pairs").to_str())
    foreign = kind(**settings).to_dict()
    architecture = find_family(shape, foreign).read_config(foreign, {})
    model = Model(architecture, specs(("tokens",)))
    write_directory(tmp_path / "out", architecture, tokenizer, model)
    assert find_family(shape, read_config_file(tmp_path / "out")).name == wanted
    again = read_model(tmp_path / "out")[0].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_families_have_names_and_domains_of_their_own() -> None:
    families = installed_families()
    assert len({family.name for family in families}) == len(families) == 24
    assert {family.domain for family in families} <= {"text", "protein", "dna", "vision", "code"}
    assert {family.library.name for family in families} == {"Hugging Face", "timm"}


def test_a_variant_is_imported_before_and_exported_behind_the_family_it_is_a_variant_of() -> None:
    families = installed_families()
    for place, family in enumerate(families):
        assert all(other in families[:place] for other in family.general)
    plain = {"model_type": "bert", "vocab_size": 40}
    variant = {**plain, "alibi_starting_size": 512}
    assert [family.name for family in families if family.recognises(variant)] == ["BERT", "DNABERT-2"]
    assert (find_family("", plain).name, find_family("", variant).name) == ("BERT", "DNABERT-2")


def test_names_and_order_of_entry_points_change_no_answer(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator):
    families = installed_families()
    configs = [{"model_type": "bert", "alibi_starting_size": 512}, {"model_type": "esm", "vocab_size": 4107}]
    wanted = [find_family("", config).name for config in configs]
    shuffled = {str(place): families[place] for place in rng.permutation(len(families))}
    monkeypatch.setattr(family_module, "find_all", lambda group: shuffled)
    assert [find_family("", config).name for config in configs] == wanted == ["DNABERT-2", "Nucleotide Transformer v1"]


@pytest.mark.parametrize("is_variant", [True, False])
def test_two_families_that_recognise_one_config_must_be_variants_of_each_other(
    is_variant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bert = find_family("", {"model_type": "bert"})
    ours = replace(bert, name="BERT of a laboratory", variant_of=bert if is_variant else None)
    monkeypatch.setattr(family_module, "find_all", lambda group: {"a": ours, "bert": bert})
    if is_variant:
        assert find_family("", {"model_type": "bert"}) is ours
        return
    with pytest.raises(CheckpointError, match=r"exactly one installed family must .*; BERT of .* and BERT do"):
        find_family("here", {"model_type": "bert"})


def test_a_family_that_is_not_installed_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match=r"must be of a supported family \(.*BERT.*Llama.*\); got 'mamba'"):
        read_model(tmp_path)
    assert main(["import", str(tmp_path), str(tmp_path / "own")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
