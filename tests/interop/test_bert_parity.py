"""BERT and RoBERTa give the numbers of `transformers`, forward and backward, and their mutants are caught."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

from meristem.interop.directory import read_model
from meristem.interop.families.bert import BERT, NEXT_SENTENCE, ROBERTA
from meristem.model.model import Model
from parity_checks import Case, outputs_of
from references import PlainIds, redraw, save

TOLERANCE = 1e-5
"""The same operations in fp32, over few layers."""

SHAPES: dict[str, dict[str, Any]] = {
    "3 layers of 48, 4 heads": {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    "2 layers of 60, 5 heads, ReLU, 97 symbols, 3 types": {
        "hidden_size": 60,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "hidden_act": "relu",
        "vocab_size": 97,
        "type_vocab_size": 3,
        "layer_norm_eps": 1e-5,
    },
}
FIRST, ODD = SHAPES

COMMON = {
    "vocab_size": 64,
    "intermediate_size": 80,
    "max_position_embeddings": 60,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def bert(shape: str, folder: Path, rng: np.random.Generator, kind: type = BertForPreTraining) -> Case:
    config = BertConfig(**{**COMMON, **SHAPES[shape]})
    tokenizer = PlainIds(config.vocab_size, prefix=(2,), suffix=(3,), reserved=(0, 1), mask_id=4)
    return Case.of(save(redraw(kind(config), rng, symbols=1.0), folder / "hf"), BERT, tokenizer)


def roberta(shape: str, folder: Path, rng: np.random.Generator, kind: type = RobertaForMaskedLM) -> Case:
    pad = 1 if shape == FIRST else 5
    settings = {"type_vocab_size": 1, **COMMON, **SHAPES[shape], "pad_token_id": pad}
    config = RobertaConfig(**{**settings, "type_vocab_size": 1, "bos_token_id": 0, "eos_token_id": 2})
    tokenizer = PlainIds(config.vocab_size, prefix=(0,), suffix=(2,), reserved=(pad, 3), mask_id=4)
    return Case.of(save(redraw(kind(config), rng, symbols=1.0), folder / "hf"), ROBERTA, tokenizer)


@pytest.mark.parametrize("make", [bert, roberta])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_gradients_and_export_are_those_of_the_reference(
    make: Callable[..., Case], shape: str, tmp_path: Path, rng: np.random.Generator, parity_row: Callable[..., None]
) -> None:
    case = make(shape, tmp_path, rng)
    forward = case.check_forward(rng, TOLERANCE)
    gradients = case.check_gradients(rng, tmp_path)
    export = case.check_export(rng, tmp_path, TOLERANCE)
    shape = shape if make is bert else shape.removesuffix(", 3 types")
    parity_row(case.family.name, shape, library="transformers", forward=forward, gradients=gradients, export=export)


@pytest.mark.parametrize(
    ("make", "kind", "heads", "outputs"),
    [
        (bert, BertForPreTraining, ["tokens", "next_sentence"], {"logits", "next_sentence"}),
        (bert, BertForMaskedLM, ["tokens"], {"logits"}),
        (bert, BertModel, [], {"pooled"}),
        (bert, BertForNextSentencePrediction, ["next_sentence"], set()),
        (roberta, RobertaForMaskedLM, ["tokens"], {"logits"}),
        (roberta, RobertaModel, [], {"pooled"}),
    ],
)
def test_every_class_comes_with_its_heads_and_goes_back_as_it_came(
    make: Callable[..., Case],
    kind: type,
    heads: list[str],
    outputs: set[str],
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    case = make(FIRST, tmp_path, rng, kind)
    assert list(case.imported.model.heads) == heads
    case.check_forward(rng, TOLERANCE)
    case.check_export(rng, tmp_path, TOLERANCE)
    exported = case.family.runner.load(tmp_path / "back")
    assert type(exported) is kind
    compared = outputs_of(case.compare(case.imported.model, exported, rng))
    assert set(compared) == outputs


def test_the_label_of_sentences_is_read_with_the_model_s_own_pool(tmp_path: Path, rng: np.random.Generator) -> None:
    model, _ = read_model(bert(FIRST, tmp_path, rng).folder)
    assert model.readouts == (NEXT_SENTENCE,)
    assert model.config.pool is not None


def drop_query_bias(model: Model) -> None:
    model.trunk.blocks[0].attention.qkv.bias.data[:2] = 0


def drop_pool_bias(model: Model) -> None:
    model.pool.dense.bias.data.zero_()


def swap_norms(model: Model) -> None:
    block = model.trunk.blocks[1]
    block.attention_norm, block.feedforward_norm = block.feedforward_norm, block.attention_norm


def take_tanh_gelu(model: Model) -> None:
    for block in model.trunk.blocks:
        block.feedforward.activation = lambda x: F.gelu(x, approximate="tanh")


def shift_positions(model: Model) -> None:
    position = model.trunk.embedding.position
    position.config = replace(position.config, offset=position.config.offset + 1)


def swap_types(model: Model) -> None:
    types = model.trunk.embedding.types.weight.data
    types.copy_(types.flip(0))


def swap_label(model: Model) -> None:
    out = model.heads["next_sentence"].out
    out.weight.data.copy_(out.weight.data.flip(0))


@pytest.mark.parametrize(
    ("make", "mutate"),
    [(bert, mutate) for mutate in (drop_query_bias, drop_pool_bias, swap_norms, take_tanh_gelu, swap_types, swap_label)]
    + [(roberta, mutate) for mutate in (shift_positions, drop_query_bias, swap_norms)],
)
def test_a_mutant_is_caught(
    make: Callable[..., Case], mutate: Callable[[Model], None], tmp_path: Path, rng: np.random.Generator
) -> None:
    make(FIRST, tmp_path, rng).check_mutant(rng, mutate)


def test_a_wrong_gradient_is_caught(tmp_path: Path, rng: np.random.Generator) -> None:
    """A parameter whose gradient is off by one part in a thousand."""
    case = bert(FIRST, tmp_path, rng)
    case.imported.model.trunk.blocks[0].attention.qkv.bias.register_hook(lambda grad: grad * 1.001)
    with pytest.raises(AssertionError, match=r"gradient of trunk\.blocks\.0\.attention\.qkv\.bias differs"):
        case.check_gradients(rng, tmp_path)


def test_token_types_change_the_result(tmp_path: Path, rng: np.random.Generator) -> None:
    case = bert(FIRST, tmp_path, rng)
    types = case.imported.model.trunk.embedding.types.weight
    assert types.shape == (2, 48)
    assert not torch.equal(types[0], types[1])
