"""A config is a value that survives JSON, and refuses what cannot work in one line."""

import json
from typing import Any

import pytest
from packs import config

from meristem.errors import ConfigError
from meristem.model.config import (
    Attention,
    Causal,
    Embedding,
    FeedForward,
    Init,
    LayerNorm,
    Learned,
    Mean,
    NoPosition,
    Prefix,
    Residual,
    RMSNorm,
    Rotary,
    TokenHead,
    TransformerConfig,
)
from meristem.model.plain import from_json, to_json
from meristem.model.readout import Readout

CONFIGS = [
    config(),
    config(head=None, pool=Prefix(), position=Learned(max_positions=70, offset=2, grid=(8, 8)), norm=RMSNorm(eps=1e-5)),
    config(
        position=NoPosition(),
        residual=Residual(placement="after", dropout=0.1),
        final_norm=False,
        attention=Attention(num_heads=8, num_kv_heads=2, head_width=6, qkv_bias=False, pattern=Causal(), dropout=0.1),
        feedforward=FeedForward(width=7, activation="silu", is_gated=True, out_bias=False),
        embedding=Embedding(vocab_size=9, patch_features=3, is_normed=True, dropout=0.2),
        head=TokenHead(activation="relu", is_tied=False, bias=False),
        pool=Mean(),
        init=Init(std=1.0, is_depth_scaled=True),
        norm=LayerNorm(eps=1e-12, bias=False),
    ),
    config(position=Rotary(base=500000.0, rounding="bf16")),
]


@pytest.mark.parametrize("value", CONFIGS)
def test_a_config_survives_json(value: TransformerConfig) -> None:
    assert from_json(TransformerConfig, json.loads(json.dumps(to_json(value)))) == value


def test_a_readout_survives_json() -> None:
    readout = Readout(name="fold", level="token", classes=("a", "b", "c"), pool=Prefix(), hidden_width=4, dropout=0.5)
    assert from_json(Readout, json.loads(json.dumps(to_json(readout)))) == readout


def with_change(path: str, value: Any) -> dict[str, Any]:
    values = to_json(config())
    *parents, last = path.split(".")
    part = values
    for parent in parents:
        part = part[parent]
    if value is KeyError:
        del part[last]
    else:
        part[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("heads", 3, r"architecture takes width, num_layers, .*; got heads"),
        ("attention.num_head", 3, r"architecture\.attention takes num_heads, .*; got num_head"),
        ("width", KeyError, r"architecture needs width; got no value"),
        ("attention.num_heads", KeyError, r"architecture\.attention needs num_heads"),
        ("width", "32", r"architecture\.width must be int; got '32'"),
        ("width", True, r"architecture\.width must be int; got True"),
        ("width", None, r"architecture\.width must be set; got null"),
        ("width", 32.5, r"architecture\.width must be int; got 32\.5"),
        ("final_norm", 1, r"architecture\.final_norm must be bool; got 1"),
        ("norm.kind", "BatchNorm", r"architecture\.norm\.kind must be one of LayerNorm, RMSNorm; got BatchNorm"),
        ("position", 4, r"architecture\.position must be a mapping; got 4"),
        ("position", {}, r"architecture\.position\.kind must be one of Rotary, Learned, NoPosition; got None"),
        ("feedforward.activation", "tanh", r"architecture\.feedforward\.activation must be one of gelu, relu, silu"),
        ("residual.placement", "around", r"architecture\.residual\.placement must be one of before, after"),
    ],
)
def test_what_json_cannot_mean_is_refused_in_one_line(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        from_json(TransformerConfig, with_change(path, value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: config(width=500, attention=Attention(num_heads=12)),
            r"width must be divisible by num_heads; got width=500, num_heads=12; nearest: 504 \(architecture\.width\)",
        ),
        (lambda: config(width=0), "width must be positive; got 0"),
        (lambda: config(num_layers=0), "num_layers must be positive; got 0"),
        (lambda: config(width=36, attention=Attention(num_heads=4)), "rotary positions need an even head width; got 9"),
        (lambda: Attention(num_heads=0), "num_heads must be positive; got 0"),
        (
            lambda: Attention(num_heads=6, num_kv_heads=4),
            "num_kv_heads must divide num_heads; got num_heads=6, num_kv_",
        ),
        (lambda: Attention(num_heads=6, head_width=0), "head_width must be positive; got 0"),
        (lambda: Attention(num_heads=6, dropout=1.0), r"attention\.dropout must be in \[0, 1\); got 1\.0"),
        (lambda: FeedForward(width=0), r"feedforward\.width must be positive"),
        (lambda: FeedForward(width=4, activation="tanh"), r"activation must be one of gelu, relu, silu; got 'tanh'"),
        (lambda: FeedForward(width=4, dropout=-0.1), r"feedforward\.dropout must be in \[0, 1\); got -0\.1"),
        (lambda: Residual(placement="both"), "placement must be before or after; got 'both'"),
        (lambda: Residual(dropout=2.0), r"residual\.dropout must be in"),
        (lambda: Embedding(vocab_size=0), "vocab_size must be positive"),
        (lambda: Embedding(vocab_size=4, mask_dropout_frac=0.1), "mask_dropout_frac needs embedding.mask_id"),
        (lambda: Embedding(vocab_size=4, mask_id=1), "mask_id has no effect without embedding.mask_dropout_frac"),
        (lambda: Embedding(vocab_size=4, mask_id=4, mask_dropout_frac=0.1), "mask_id must be a symbol; got 4"),
        (lambda: Embedding(vocab_size=4, patch_features=-1), "patch_features must be 0 or more"),
        (lambda: Learned(max_positions=4, offset=4), "offset must be within the table; got 4"),
        (lambda: Learned(max_positions=16, offset=1, grid=(4, 4)), "must hold the grid behind the offset; got max_pos"),
        (lambda: Rotary(base=0.0), "base must be positive"),
        (lambda: Rotary(rounding="int8"), "rounding must be one of fp32, fp16, bf16; got 'int8'"),
        (lambda: Readout(name="x", classes=("a",)), "label 'x' must have two classes or more"),
    ],
)
def test_a_value_that_cannot_work_is_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_max_length_is_what_positions_leave() -> None:
    assert config().max_length is None
    assert config(position=Learned(max_positions=1026, offset=2)).max_length == 1024
