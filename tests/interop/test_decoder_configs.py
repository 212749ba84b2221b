"""Configs of decoders: every setting of the reference is read, refused, or known to change no number."""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import PreTrainedConfig

from meristem.errors import ConfigError
from meristem.interop.families import gpt2, gptj, llama
from meristem.interop.family import find_family
from meristem.model.config import (
    BandScaling,
    Causal,
    GlobalTokens,
    Learned,
    LinearScaling,
    NoScaling,
    Rotary,
    TransformerConfig,
    Window,
)
from meristem.model.plain import from_json, to_json

Reader = Callable[[Mapping[str, Any], Mapping[str, Any]], TransformerConfig]
Writer = Callable[[TransformerConfig, Any], dict[str, Any]]

GPT2_SHAPE = {"vocab_size": 61, "n_positions": 40, "n_embd": 24, "n_layer": 3, "n_head": 4}
LLAMA_SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

FAMILIES: dict[str, tuple[Reader, Writer, dict[str, Any]]] = {
    "GPT2Config": (gpt2.read_config, gpt2.write_config, GPT2_SHAPE),
    "GPTBigCodeConfig": (gpt2.read_bigcode, gpt2.write_bigcode, GPT2_SHAPE),
    "GPTJConfig": (gptj.read_config, gptj.write_config, {**GPT2_SHAPE, "rotary_dim": 4}),
    "CodeGenConfig": (gptj.read_codegen_config, gptj.write_codegen_config, {**GPT2_SHAPE, "rotary_dim": 4}),
    "LlamaConfig": (llama.LLAMA.read_config, llama.LLAMA.write_config, LLAMA_SHAPE),
    "Qwen2Config": (llama.QWEN2.read_config, llama.QWEN2.write_config, LLAMA_SHAPE),
    "Qwen3Config": (llama.QWEN3.read_config, llama.QWEN3.write_config, {**LLAMA_SHAPE, "head_dim": 10}),
    "Starcoder2Config": (llama.STARCODER2.read_config, llama.STARCODER2.write_config, LLAMA_SHAPE),
}

every_family = pytest.mark.parametrize("name", list(FAMILIES))

CHANGES: dict[str, dict[str, Any]] = {
    "reads": {
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": False,
        "activation_function": "relu",
        "hidden_act": "relu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "use_sliding_window": True,
        "head_dim": 8,
        "num_key_value_heads": 1,
        "n_head": 8,
        "num_attention_heads": 8,
        "rotary_dim": 2,
        "n_inner": 30,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "refuses": {"add_cross_attention": True, "per_layer_config": {1: {"num_attention_heads": 2}}},
}

NO_NUMBERS = {
    # of the file, of training, of generation, of heads that are not read
    *("transformers_version", "architectures", "dtype", "output_hidden_states", "return_dict", "use_cache"),
    *("chunk_size_feed_forward", "id2label", "label2id", "problem_type", "is_encoder_decoder", "initializer_range"),
    *("tie_last_hidden_states", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    # how scores are computed in half precision
    *("reorder_and_upcast_attn", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
    # rotary positions have no longest sequence; read by the reference never, or for its buffers
    *("max_position_embeddings", "pretraining_tp", "n_ctx"),
}


def saved(config: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """As a directory holds it."""
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def made(name: str, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return saved(getattr(transformers, name)(**deepcopy({**FAMILIES[name][2], **changes})), tmp_path)


def resolved(architecture: TransformerConfig) -> dict[str, Any]:
    """With what numbers depend on, layer by layer, however it is said."""
    attention = replace(
        architecture.attention, num_kv_heads=architecture.num_kv_heads, head_width=architecture.head_width
    )
    layers = [to_json(architecture.layer(layer)) for layer in range(architecture.num_layers)]
    return {**to_json(replace(architecture, attention=attention, layers=())), "by layer": layers}


@every_family
def test_every_setting_of_the_reference_is_read_or_refused_or_changes_no_number(name: str, tmp_path: Path) -> None:
    read = FAMILIES[name][0]
    plain = made(name, tmp_path, **({"use_sliding_window": True, "max_window_layers": 2} if "Qwen" in name else {}))
    base = read(plain, {})
    unread = []
    for field in fields(getattr(transformers, name)):
        value = plain.get(field.name)
        other = CHANGES["reads"].get(field.name, CHANGES["refuses"].get(field.name))
        if other is None:
            other = {bool: lambda v: not v, int: lambda v: v * 2, float: lambda v: v / 2 + 0.01}.get(
                type(value), lambda v: "other"
            )(value)
        settings = {**plain, field.name: other}
        if field.name in ("max_window_layers", "use_sliding_window"):
            settings["layer_types"] = None
        if field.name == "use_sliding_window":
            settings["use_sliding_window"] = False
        try:
            if read(settings, {}) == base:
                unread.append(field.name)
        except (ConfigError, TypeError):
            continue
    # a longest sequence where positions are learned alone
    harmless = NO_NUMBERS if isinstance(base.position, Learned) else NO_NUMBERS | {"n_positions"}
    assert set(unread) <= harmless, set(unread) - harmless


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES),
    ("GPT2Config", {"n_inner": 31, "activation_function": "gelu", "tie_word_embeddings": False}),
    ("GPT2Config", {"scale_attn_weights": False}),
    ("GPT2Config", {"scale_attn_by_inverse_layer_idx": True}),
    ("GPT2Config", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}),
    ("GPTBigCodeConfig", {"multi_query": False}),
    ("GPTJConfig", {"rotary_dim": 6, "tie_word_embeddings": True, "activation_function": "silu"}),
    ("LlamaConfig", {"head_dim": 10, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": None}),
    ("LlamaConfig", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 7}),
    ("Qwen2Config", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    ("Qwen3Config", {"attention_bias": True, "use_sliding_window": True, "max_window_layers": 0}),
    ("Starcoder2Config", {"use_bias": False, "sliding_window": 9, "embedding_dropout": 0.25}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_what_is_written_is_read_as_the_same_architecture(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    read, write, _ = FAMILIES[name]
    architecture = read(made(name, tmp_path, **changes), {})
    # as a model directory holds it
    architecture = from_json(TransformerConfig, to_json(architecture))
    written = json.loads(json.dumps(write(architecture, None)))
    assert resolved(read(written, {})) == resolved(architecture)


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_what_is_written_says_the_same_to_the_reference(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    read, write, _ = FAMILIES[name]
    original = made(name, tmp_path, **changes)
    again = saved(getattr(transformers, name)(**write(read(original, {}), None)), tmp_path)
    silent = {"max_position_embeddings", "n_positions", "activation_function", "n_inner", "sliding_window"}
    silent |= {"head_dim", "max_window_layers"}
    for key, value in original.items():
        if key not in NO_NUMBERS | silent:
            assert again[key] == value, key


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({}, NoScaling()),
        ({"rope_scaling": None}, NoScaling()),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, LinearScaling(factor=4.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 7.0}}, LinearScaling(factor=4.0)),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
            BandScaling(factor=8.0, low=1.0, high=4.0, original_tokens=16),
        ),
        (
            {
                "max_position_embeddings": 99,
                "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 2, "high_freq_factor": 4},
            },
            BandScaling(factor=8.0, low=2.0, high=4.0, original_tokens=99),
        ),
        (
            {
                "original_max_position_embeddings": 32,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 2,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 16,
                },
            },
            BandScaling(factor=8.0, low=2.0, high=4.0, original_tokens=32),
        ),
    ],
)
def test_both_spellings_of_rotary_positions_are_read(scaling: dict[str, Any], expected: object) -> None:
    config = {"model_type": "llama", **LLAMA_SHAPE, "rope_theta": 300, **scaling}
    position = llama.LLAMA.read_config(config, {}).position
    assert isinstance(position, Rotary)
    assert position.scaling == expected
    # the inner setting goes over the outer one
    assert position.base == scaling.get("rope_parameters", {}).get("rope_theta", 300.0)
    assert not position.is_interleaved


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("GPT2Config", {"add_cross_attention": True}, "add_cross_attention must be False in a GPT-2 config; got True"),
    ("GPT2Config", {"activation_function": "gelu_fast2"}, "activation_function must be one of gelu, .*'gelu_fast2'"),
    ("GPTBigCodeConfig", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False"),
    ("GPTJConfig", {"rotary_dim": None}, "rotary_dim must be positive"),
    ("GPTJConfig", {"rotary_dim": 8}, "rotary positions need an even head width; got 8 of 6"),
    ("CodeGenConfig", {"n_head": 6}, "n_head must be a multiple of 4 in a CodeGen config; got 6"),
    ("LlamaConfig", {"num_attention_heads": 5}, "num_attention_heads must divide hidden_size; got 5 for 24"),
    ("LlamaConfig", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type must be one of .*'dynamic'"),
    ("LlamaConfig", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type must be one of .*'yarn'"),
    ("LlamaConfig", {"rope_scaling": {"type": "linear"}}, "rope_type linear takes factor; got nothing"),
    (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}},
        "rope_type default takes nothing more; got mrope_section",
    ),
    (
        "LlamaConfig",
        {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}},
        "a llama config must have max_position_embeddings",
    ),
    ("LlamaConfig", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
    (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "must turn whole heads",
    ),
    (
        "Qwen2Config",
        {"layer_types": ["sliding_attention"] * 4, "use_sliding_window": False},
        "needs sliding_window and use_sliding_window",
    ),
    ("Qwen2Config", {"layer_types": ["full_attention"] * 3}, "for each of 4 layers"),
    ("Qwen2Config", {"layer_types": ["chunked_attention"] * 4}, "layer_types must name sliding_attention or full"),
    ("Starcoder2Config", {"hidden_size": ...}, "a starcoder2 config must have hidden_size"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_no_part_of_ours_can_say_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    read, _, shape = FAMILIES[name]
    config = {key: value for key, value in {**shape, **changes}.items() if value is not ...}
    with pytest.raises(ConfigError, match=message):
        read(config, {})


@every_family
def test_a_family_is_recognised_by_its_config(name: str, tmp_path: Path) -> None:
    config = made(name, tmp_path)
    assert find_family(name, config).read_config == FAMILIES[name][0]


def test_names_of_settings_may_be_the_common_ones(tmp_path: Path) -> None:
    config = made("GPT2Config", tmp_path)
    renamed = {{name: alias for alias, name in gpt2.ALIASES.items()}.get(key, key): v for key, v in config.items()}
    assert "hidden_size" in renamed
    assert gpt2.read_config(renamed, {}) == gpt2.read_config(config, {})


def test_layers_with_a_window_become_rules(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = made("Qwen3Config", tmp_path, layer_types=kinds, use_sliding_window=True, sliding_window=6)
    architecture = llama.QWEN3.read_config(config, {})
    # the reference counts the token itself
    window = Causal() & Window(left=5)
    assert [architecture.layer(i).attention.pattern for i in range(4)] == [Causal(), window, window, Causal()]
    assert len(architecture.layers) == 1


def test_scores_divided_by_depth_become_rules(tmp_path: Path) -> None:
    config = made("GPT2Config", tmp_path, scale_attn_by_inverse_layer_idx=True)
    architecture = gpt2.read_config(config, {})
    scales = [architecture.layer(i).attention.scale for i in range(3)]
    assert scales == [None, pytest.approx(6**-0.5 / 2), pytest.approx(6**-0.5 / 3)]


@every_family
@pytest.mark.parametrize(
    "change",
    [
        lambda a: replace(a, residual=replace(a.residual, placement="after")),
        lambda a: replace(a, residual=replace(a.residual, scale=0.5)),
        lambda a: replace(a, final_norm=False),
        lambda a: replace(a, attention=replace(a.attention, pattern=GlobalTokens(count=1) | Causal())),
        lambda a: replace(a, attention=replace(a.attention, qk_norm="full", num_kv_heads=4)),
        lambda a: replace(a, embedding=replace(a.embedding, scale=2.0)),
        lambda a: replace(a, head=replace(a.head, scale=2.0)),
        lambda a: replace(a, position=Learned(max_positions=64, offset=2)),
        lambda a: replace(a, position=Rotary(is_interleaved=True, base=77.0)),
    ],
)
def test_an_architecture_that_the_reference_cannot_have_is_not_read_back(
    name: str, change: Callable[[TransformerConfig], TransformerConfig], tmp_path: Path
) -> None:
    """This is how an export finds what a family cannot say."""
    read, write, _ = FAMILIES[name]
    architecture = change(read(made(name, tmp_path), {}))
    try:
        back = read(write(architecture, None), {})
    except (ConfigError, TypeError):
        return
    assert resolved(back) != resolved(architecture)
