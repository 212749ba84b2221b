"""Families live beside each other: one model is of one family, and no family stumbles over a model of another."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from references import redraw, save
from transformers import (
    BertConfig,
    BertForPreTraining,
    EsmcConfig,
    EsmcForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
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
from meristem.data.tokenizer import AlphabetTokenizer
from meristem.errors import CheckpointError, ConfigError
from meristem.interop.directory import read_config_file, read_model
from meristem.interop.families import FAMILIES, find_family
from meristem.model.model import Model
from meristem.model.plain import from_json, to_json

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
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
    assert [family.name for family in FAMILIES if family.recognises(config)] == [name]
    family = find_family(folder, config)
    assert family.name == name
    model, _ = read_model(folder)
    tokenizer = AlphabetTokenizer(vocab=("<cls>", "<pad>", "<eos>", "<unk>", *"ACGT", "<mask>"))
    # each family says what it can of a model of another: it may refuse, and nothing else
    for other in FAMILIES:
        with suppress(ConfigError):
            written = other.write_config(model.config, tokenizer)
            json.dumps(written)
            other.read_config(written, {})


@pytest.mark.parametrize("name", MODELS)
def test_what_a_config_says_survives_a_model_directory(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model, _ = read_model(save(redraw(MODELS[name](), rng), tmp_path / "hf"))
    plain = json.loads(json.dumps(to_json(model.config)))
    assert from_json(type(model.config), plain) == model.config
    again = Model(model.config, tuple(h for h in model.heads if h in ("tokens", "contacts")), model.readouts)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_families_have_names_and_domains_of_their_own() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert {family.domain for family in FAMILIES} <= {"text", "protein", "dna", "vision", "code"}
    assert {family.library for family in FAMILIES} == {"hf", "timm"}


def test_a_family_that_is_not_at_home_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match=r"must be of a family that is at home \(.*BERT.*Llama.*\); got 'mamba'"):
        read_model(tmp_path)
    assert main(["import", str(tmp_path), str(tmp_path / "own")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
