"""Llama, Qwen2, Qwen3 and StarCoder2 give the numbers of `transformers`, and mutants of them are caught."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_cases import (
    CaseOf,
    cases,
    drop_down_bias,
    drop_final_norm,
    drop_out_bias,
    drop_qkv_bias,
    drop_query_norm,
    drop_scaling,
    drop_up_bias,
    rotate_the_other_way,
    rotate_two_less,
    row_of,
    see_one_less,
    see_one_more,
    see_the_future,
    swap_gate_and_value,
    swap_keys_and_values,
    swap_norms,
    swap_query_and_key_norms,
    take_another_base,
    take_another_epsilon,
    take_exact_gelu,
    take_neighbouring_head,
    take_quick_gelu,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from meristem.interop.directory import read_directory
from meristem.interop.families.llama import LLAMA, QWEN2, QWEN3, STARCODER2
from meristem.model.config import LayerNorm, Rotary
from meristem.model.model import Model
from meristem.model.position import RotaryLayer, rotary_frequencies
from parity_checks import refuse_distance

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
# fewer key heads, heads wider than the width's share, an odd vocabulary
ODD = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 51,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
}
LINEAR = {"rope_type": "linear", "factor": 2.5}
BANDS = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

SHAPES = {
    "Llama": (LLAMA, "LlamaForCausalLM", SHAPE),
    "Llama odd": (
        LLAMA,
        "LlamaForCausalLM",
        {
            **ODD,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_theta": 500.0,
            "rope_scaling": BANDS,
            "hidden_act": "gelu",
        },
    ),
    "Llama linear": (LLAMA, "LlamaForCausalLM", {**SHAPE, "num_key_value_heads": 1, "rope_scaling": LINEAR}),
    "Qwen2": (QWEN2, "Qwen2ForCausalLM", SHAPE),
    "Qwen2 odd": (
        QWEN2,
        "Qwen2ForCausalLM",
        {
            **ODD,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
        },
    ),
    "Qwen3": (QWEN3, "Qwen3ForCausalLM", {**SHAPE, "head_dim": 8}),
    "Qwen3 odd": (
        QWEN3,
        "Qwen3ForCausalLM",
        {
            **ODD,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ALTERNATING,
            "rms_norm_eps": 1e-5,
        },
    ),
    "StarCoder2": (STARCODER2, "Starcoder2ForCausalLM", {**SHAPE, "sliding_window": 6}),
    "StarCoder2 odd": (
        STARCODER2,
        "Starcoder2ForCausalLM",
        {**ODD, "use_bias": False, "tie_word_embeddings": False, "rope_scaling": LINEAR},
    ),
}

every_shape = pytest.mark.parametrize("shape", list(SHAPES))


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    return cases(SHAPES, tmp_path_factory)


@every_shape
def test_layers_and_logits_are_those_of_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, parity_row: Callable[..., None]
) -> None:
    case = case_of(shape)
    parity_row(*row_of(case), library="transformers", forward=case.check_forward(rng))


@every_shape
def test_gradients_are_those_of_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path, parity_row: Callable[..., None]
) -> None:
    case = case_of(shape)
    parity_row(*row_of(case), gradients=case.check_gradients(rng, tmp_path))


@every_shape
def test_an_exported_directory_gives_the_same_in_the_reference(
    shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path, parity_row: Callable[..., None]
) -> None:
    case = case_of(shape)
    parity_row(*row_of(case), export=case.check_export(rng, tmp_path))


COMMON = [
    swap_norms,
    drop_final_norm,
    swap_keys_and_values,
    see_the_future,
    rotate_the_other_way,
    rotate_two_less,
    take_another_base,
    take_another_epsilon,
    take_neighbouring_head,
]
GATED = [*COMMON, swap_gate_and_value, take_quick_gelu, take_exact_gelu]
BIASES = [drop_qkv_bias, drop_out_bias, drop_up_bias, drop_down_bias]
WINDOWS = [see_one_more, see_one_less]
NORMS = [swap_query_and_key_norms, drop_query_norm]


def scale_all_waves(model: Model) -> None:
    """Every wave stretched, short ones too."""
    for position in model.trunk.positions:
        scaling = position.config.scaling
        position.config = Rotary(base=position.config.base, scaling=type(scaling)(factor=scaling.factor, high=1e9))


def take_layer_norm(model: Model) -> None:
    for block in model.trunk.blocks:
        block.attention_norm = torch.nn.LayerNorm(model.config.width, bias=False)


MUTANTS = [
    *(("Llama", mutant) for mutant in (*GATED, take_layer_norm)),
    *(("Llama odd", mutant) for mutant in (*BIASES, drop_scaling, scale_all_waves, take_neighbouring_head)),
    ("Llama linear", drop_scaling),
    *(("Qwen2", mutant) for mutant in (*GATED, drop_qkv_bias)),
    *(("Qwen2 odd", mutant) for mutant in (*WINDOWS, take_neighbouring_head)),
    *(("Qwen3", mutant) for mutant in (*GATED, *NORMS)),
    *(("Qwen3 odd", mutant) for mutant in (*WINDOWS, *NORMS, drop_qkv_bias, drop_out_bias)),
    *(("StarCoder2", mutant) for mutant in (*COMMON, *BIASES, *WINDOWS, take_exact_gelu)),
    ("StarCoder2 odd", drop_scaling),
]


@pytest.mark.parametrize(("shape", "mutant"), MUTANTS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_mutant_is_caught(
    shape: str, mutant: Callable[[Model], None], case_of: CaseOf, rng: np.random.Generator
) -> None:
    case_of(shape).check_mutant(rng, mutant)


@pytest.mark.parametrize("scaling", [None, LINEAR, BANDS, {**BANDS, "original_max_position_embeddings": 64}])
@pytest.mark.parametrize("head_width", [10, 64, 128])
@pytest.mark.parametrize("base", [300.0, 10000.0, 500000.0])
def test_scaled_rotations_are_those_of_the_reference(
    scaling: dict[str, Any] | None, head_width: int, base: float
) -> None:
    config = LlamaConfig(
        **{**SHAPE, "hidden_size": 2 * head_width, "num_attention_heads": 2, "num_key_value_heads": 2},
        rope_theta=base,
        rope_scaling=None if scaling is None else dict(scaling),
    )
    theirs = LlamaRotaryEmbedding(config)
    position = LLAMA.read_config(config.to_dict(), {}).position
    assert isinstance(position, Rotary)
    # the same operations in the same order, but for the blend between bands: one rounding
    torch.testing.assert_close(rotary_frequencies(position, head_width), theirs.inv_freq, rtol=1e-6, atol=0)
    places = torch.arange(300)
    cos, sin = theirs(torch.zeros(1), places[None])
    ours = RotaryLayer(position, head_width).tables(places[:, None])
    # of angles up to 300, whose last bit is 3e-5
    for table, wanted in zip(ours, (cos, sin)):
        halves = wanted[0].chunk(2, dim=-1)
        assert torch.equal(*halves)
        torch.testing.assert_close(table[:, 0], halves[0], rtol=0, atol=1e-4)


def test_frequencies_that_old_files_hold_are_left_out(case_of: CaseOf, tmp_path: Path) -> None:
    case = case_of("Llama")
    tensors = load_file(case.folder / "model.safetensors")
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (tmp_path / "old").mkdir()
    save_file(tensors, tmp_path / "old/model.safetensors")
    (tmp_path / "old/config.json").write_text((case.folder / "config.json").read_text())
    again = read_directory(tmp_path / "old", case.family)
    assert again.notes == ()
    assert again.model.config == case.imported.model.config


@pytest.mark.parametrize("shape", ["Llama", "Qwen2 odd", "Qwen3", "StarCoder2"])
def test_a_trunk_saved_alone_has_no_head(shape: str, case_of: CaseOf, rng: np.random.Generator, tmp_path: Path) -> None:
    case = case_of(shape)
    case.reference.model.save_pretrained(tmp_path / "trunk")
    imported = read_directory(tmp_path / "trunk", case.family)
    assert not imported.model.heads
    refuse_distance(case.compare(imported.model, case.family.runner.load(tmp_path / "trunk"), rng))


def test_norms_are_those_of_the_family(case_of: CaseOf) -> None:
    assert isinstance(case_of("StarCoder2").imported.model.config.norm, LayerNorm)
    model = case_of("Qwen3 odd").imported.model
    # one norm for all heads, of the width of one
    assert model.trunk.blocks[0].attention.q_norm.weight.shape == (10,)
