"""Every field of the config has a family that needs it: a knob that no family turns is one too many."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLVisionRotaryEmbedding,
    apply_rotary_pos_emb_vision,
)

from meristem.interop.family import find_family
from meristem.model.config import Learned, Mean, Prefix, Rotary, TransformerConfig
from meristem.model.position import RotaryLayer

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 8, "vocab_size": 50}
ENCODER_DECODER = {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4, "vocab_size": 50}

CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("BertForPreTraining", SMALL),
    ("RobertaForMaskedLM", {**SMALL, "type_vocab_size": 1}),
    (
        "EsmForMaskedLM",
        {**SMALL, "mask_token_id": 32, "pad_token_id": 1, "token_dropout": True, "emb_layer_norm_before": True},
    ),
    ("EsmcForMaskedLM", SMALL),
    ("ModernBertForMaskedLM", {**SMALL, "pad_token_id": 0}),
    ("GPT2LMHeadModel", {**GPT, "activation_function": "gelu_new"}),
    ("GPTBigCodeForCausalLM", GPT),
    ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 1e-5}),
    (
        "LlamaForCausalLM",
        {
            **SMALL,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 4.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 8.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    ("LlamaForCausalLM", {**SMALL, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ("Qwen2ForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    ("Qwen3ForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    ("Starcoder2ForCausalLM", {**SMALL, "num_key_value_heads": 2, "sliding_window": 7}),
    ("T5ForConditionalGeneration", {**ENCODER_DECODER, "relative_attention_num_buckets": 16}),
    (
        "T5ForConditionalGeneration",
        {
            **ENCODER_DECODER,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "relative_attention_max_distance": 50,
        },
    ),
    ("SwitchTransformersForConditionalGeneration", {**ENCODER_DECODER, "num_experts": 4, "expert_capacity": 6}),
    ("SwitchTransformersForConditionalGeneration", {**ENCODER_DECODER, "num_experts": 3, "expert_capacity": 9}),
    ("ViTForImageClassification", {**SMALL, "image_size": 12, "patch_size": 4}),
    ("Dinov2ForImageClassification", {**SMALL, "image_size": 12, "patch_size": 4, "layerscale_value": 0.2}),
]

TRAINING_ALONE = {
    "dropout",
    "drop_path",
    "jitter",
    "balance_weight",
    "z_weight",
    "Init.std",
    "Init.is_depth_scaled",
}
"""What has no part in the numbers of a model; tests of training turn them."""

OWN_ORACLES = {
    "Experts.top_k": "test_experts.py, a slow loop over tokens",
    "Experts.num_shared": "test_experts.py",
    "Experts.is_normalised": "test_experts.py",
    "Sinusoidal.base": "test_positions.py and test_original_transformer.py",
    "Embedding.scale": "test_original_transformer.py",
    "Embedding.feature_bias": "test_timm_parity.py (pre-norm)",
    "Learned.grid": "vision families, as below",
    "Rotary.num_axes": "below",
    "Rotary.rounding": "test_esm_parity.py",
    "LayerNorm.bias": "ModernBERT",
    "Prefix.count": "test_timm_parity.py (distilled)",
    "Prefix.is_dense": "test_bert_parity.py has one, test_timm_parity.py none",
    "Prefix.has_mean": "test_vit_parity.py",
    "LayerRule.feedforward": "tests/model/test_layer_widths.py",
    "TransformerConfig.experts": "test_switch_parity.py, by a rule of layers",
}


def values_of(part: Any) -> Iterator[tuple[str, Any]]:
    """`Type.field` and value of a config and all that is in it."""
    if isinstance(part, tuple):
        for item in part:
            yield from values_of(item)
    elif is_dataclass(part):
        for field in fields(part):
            value = getattr(part, field.name)
            yield f"{type(part).__name__}.{field.name}", value
            yield from values_of(value)


@pytest.fixture(scope="module")
def architectures() -> list[TransformerConfig]:
    found = []
    for name, settings in CONFIGS:
        foreign = getattr(transformers, name).config_class(**settings).to_dict() | {"architectures": [name]}
        family = find_family(name, foreign)
        tensors: dict[str, torch.Tensor] = {}
        found.append(family.read_config(foreign, tensors))
    return found


def test_every_field_takes_two_values_among_the_families(architectures: list[TransformerConfig]) -> None:
    seen: dict[str, set[str]] = defaultdict(set)
    for architecture in architectures:
        for name, value in values_of(architecture):
            seen[name].add(repr(value))
    known = {name for name in seen if name.partition(".")[0] not in ("Both", "Either")}
    assert len(known) > 45
    idle = {
        name
        for name in known
        if len(seen[name]) < 2
        and name not in TRAINING_ALONE
        and name.partition(".")[2] not in TRAINING_ALONE
        and name not in OWN_ORACLES
    }
    # of a kind that one family has, a value that differs from the default is enough
    assert idle <= {"Window.right", "BandScaling.factor", "BandScaling.low", "BandScaling.high"} | {
        "BandScaling.original_tokens",
        "LinearScaling.factor",
        "LayerRule.position",
        "TokenHead.scale",
    }, sorted(idle)


def test_kinds_of_parts_have_a_family_each(architectures: list[TransformerConfig]) -> None:
    kinds = {type(value).__name__ for architecture in architectures for _, value in values_of(architecture)}
    assert kinds >= {
        *("Rotary", "Learned", "BucketBias", "LayerNorm", "RMSNorm", "NoNorm", "Full", "Causal", "Both", "Window"),
        *("LinearScaling", "BandScaling", "NoScaling", "Experts", "TokenHead", "Prefix"),
    }
    grids = [a.position.grid for a in architectures if isinstance(a.position, Learned)]
    assert (3, 3) in grids
    assert any(isinstance(a.pool, Prefix | Mean) for a in architectures)


def test_two_axes_turn_as_in_a_reference_that_has_them(rng: np.random.Generator) -> None:
    """The rotation of Qwen2-VL's encoder of images: half of the pairs for the row, half for the column."""
    head_width, rows, columns = 24, 5, 7
    places = np.argwhere(np.ones((rows, columns)))
    layer = RotaryLayer(Rotary(num_axes=2), head_width)
    q, k = torch.randn(2, rows * columns, 3, head_width)
    tables = layer.tables(torch.from_numpy(places))
    reference = Qwen2VLVisionRotaryEmbedding(Qwen2VLVisionConfig(embed_dim=3 * head_width, num_heads=3))
    cos, sin = reference(q, torch.from_numpy(places))
    wanted = apply_rotary_pos_emb_vision(q, k, cos, sin)
    for x, want in zip((q, k), wanted):
        pairs_together = want.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        torch.testing.assert_close(layer.turn(x, tables), pairs_together, atol=1e-5, rtol=1e-5)
