"""ModernBERT gives the numbers of `transformers`, and its mutants are caught."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel

from meristem.interop.families.modernbert import MODERNBERT
from meristem.model.config import Full, NoNorm, Rotary, Window
from meristem.model.model import Model
from meristem.model.position import RotaryLayer
from parity_checks import Case
from references import PlainIds, redraw, save

TOLERANCE = 1e-4
"""The same operations in fp32; pre-norm sums grow over the layers, to about 1e-5 in the last ones and the logits."""

SHAPES: dict[str, dict[str, Any]] = {
    "7 layers of 48, 4 heads, window 4": {"hidden_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4},
    "4 layers of 60, 3 heads, window 3, biases, SiLU, 61 symbols, untied": {
        "hidden_size": 60,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "vocab_size": 61,
        "local_attention": 7,
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "classifier_bias": True,
        "classifier_activation": "silu",
        "hidden_activation": "silu",
        "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    },
}
FIRST, ODD = SHAPES

COMMON = {
    "vocab_size": 64,
    "intermediate_size": 72,
    "local_attention": 8,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "cls_token_id": 2,
    "eos_token_id": 3,
    "sep_token_id": 3,
    # small bases, so that one is not like the other over a few tokens
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 700.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    },
}


def modernbert(shape: str, folder: Path, rng: np.random.Generator, kind: type = ModernBertForMaskedLM) -> Case:
    config = ModernBertConfig(**{**COMMON, **SHAPES[shape]})
    tokenizer = PlainIds(config.vocab_size, prefix=(2,), suffix=(3,), reserved=(0, 1), mask_id=4)
    return Case.of(save(redraw(kind(config), rng, sharp=1.4, symbols=1.5), folder / "hf"), MODERNBERT, tokenizer)


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_gradients_and_export_are_those_of_the_reference(
    shape: str, tmp_path: Path, rng: np.random.Generator, parity_row: Callable[..., None]
) -> None:
    case = modernbert(shape, tmp_path, rng)
    forward = case.check_forward(rng, TOLERANCE)
    gradients = case.check_gradients(rng, tmp_path)
    export = case.check_export(rng, tmp_path, TOLERANCE)
    parity_row("ModernBERT", shape, library="transformers", forward=forward, gradients=gradients, export=export)


def test_a_trunk_saved_alone_comes_and_goes(tmp_path: Path, rng: np.random.Generator) -> None:
    case = modernbert(FIRST, tmp_path, rng, ModernBertModel)
    assert list(case.imported.model.heads) == []
    case.check_forward(rng, TOLERANCE)
    case.check_export(rng, tmp_path, TOLERANCE)
    assert type(MODERNBERT.runner.load(tmp_path / "back")) is ModernBertModel


def test_settings_of_before_mean_the_same() -> None:
    """Checkpoints of the first release have no `layer_types` and two settings of bases."""
    old = {
        "model_type": "modernbert",
        "vocab_size": 50368,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "local_attention": 128,
    }
    architecture = MODERNBERT.read_config(old, {})
    assert architecture == MODERNBERT.read_config(ModernBertConfig().to_dict(), {})
    for layer in range(22):
        parts = architecture.layer(layer)
        is_global = layer % 3 == 0
        assert parts.attention.pattern == (Full() if is_global else Window(left=64, right=64))
        assert parts.position == Rotary(base=160000.0 if is_global else 10000.0)
        assert isinstance(parts.attention_norm, NoNorm) == (layer == 0)


def widen_windows(model: Model) -> None:
    for block in model.trunk.blocks:
        pattern = block.attention.config.pattern
        if isinstance(pattern, Window):
            wider = replace(pattern, left=pattern.left + 1)
            block.attention.config = replace(block.attention.config, pattern=wider)


def swap_bases(model: Model) -> None:
    first, second = model.trunk.positions
    model.trunk.positions = nn.ModuleList([second, first])


def take_one_base(model: Model) -> None:
    width = model.config.head_width
    model.trunk.positions[1] = RotaryLayer(Rotary(base=21.0), width)
    model.trunk.positions[0] = RotaryLayer(Rotary(base=701.0), width)


def norm_the_first_layer(model: Model) -> None:
    model.trunk.blocks[0].attention_norm = nn.LayerNorm(model.config.width, bias=False)


def swap_gate_and_value(model: Model) -> None:
    up = model.trunk.blocks[2].feedforward.up.weight.data
    up.copy_(torch.cat(up.chunk(2)[::-1]))


def take_tanh_gelu(model: Model) -> None:
    for block in model.trunk.blocks:
        block.feedforward.activation = lambda x: F.gelu(x, approximate="tanh")


def drop_symbol_bias(model: Model) -> None:
    model.heads["tokens"].bias = None


MUTANTS = [
    widen_windows,
    swap_bases,
    take_one_base,
    norm_the_first_layer,
    swap_gate_and_value,
    take_tanh_gelu,
    drop_symbol_bias,
]


@pytest.mark.parametrize("mutate", MUTANTS)
def test_a_mutant_is_caught(mutate: Callable[[Model], None], tmp_path: Path, rng: np.random.Generator) -> None:
    modernbert(FIRST, tmp_path, rng).check_mutant(rng, mutate)
