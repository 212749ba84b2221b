"""A config is a value that survives JSON, and refuses what cannot work in one line."""

import json
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest
from packs import config

from meristem.errors import ConfigError
from meristem.model.config import (
    Attention,
    AttentionPool,
    BandScaling,
    BlockSparse,
    BucketBias,
    Causal,
    Dilated,
    Embedding,
    Experts,
    FeedForward,
    Full,
    GlobalTokens,
    Init,
    InPrefix,
    LayerNorm,
    LayerRule,
    Learned,
    LinearBias,
    LinearScaling,
    Mean,
    NoNorm,
    NoPosition,
    Prefix,
    Residual,
    RMSNorm,
    Rotary,
    Sinusoidal,
    TokenHead,
    TransformerConfig,
    Window,
)
from meristem.model.heads import Readout
from meristem.model.plain import from_json, to_json

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
    config(
        position=Rotary(base=500000.0, rounding="bf16", width=4, is_interleaved=True, scaling=BandScaling(factor=8.0))
    ),
    config(
        position=Rotary(num_axes=2, scaling=LinearScaling(factor=2.0)), experts=Experts(count=3, top_k=2, capacity=7)
    ),
    config(
        position=LinearBias(), attention=Attention(num_heads=4, scale=1.0, qk_norm="full", pattern=BlockSparse(block=4))
    ),
    config(position=Sinusoidal(), attention=Attention(num_heads=4, pattern=(Causal() | InPrefix()) & Window(left=9))),
    config(position=BucketBias(), attention=Attention(num_heads=4, pattern=Dilated(left=2) | GlobalTokens(count=2))),
    config(pool=AttentionPool(num_heads=4, feedforward_width=8), residual=Residual(layer_scale=1e-5, scale=0.5)),
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
        ("norm.kind", "BatchNorm", r"architecture\.norm\.kind must be one of LayerNorm, RMSNorm, NoNorm; got"),
        ("position", 4, r"architecture\.position must be a mapping; got 4"),
        ("position", {}, r"architecture\.position\.kind must be one of Rotary, Learned, .*NoPosition; got None"),
        ("feedforward.activation", "tanh", r"architecture\.feedforward\.activation must be one of gelu, gelu_tanh, "),
        ("residual.placement", "around", r"architecture\.residual\.placement must be one of before, after, parallel"),
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
        (lambda: FeedForward(width=4, activation="tanh"), r"activation must be one of gelu, .*; got 'tanh'"),
        (lambda: FeedForward(width=4, dropout=-0.1), r"feedforward\.dropout must be in \[0, 1\); got -0\.1"),
        (lambda: Residual(placement="both"), "placement must be one of before, after, parallel; got 'both'"),
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


def parts_of(part_type: type, seen: set[type]) -> set[type]:
    """A dataclass, and all that its fields may hold, kinds included."""
    if part_type in seen or not is_dataclass(part_type):
        return seen
    seen.add(part_type)
    for hint in get_type_hints(part_type).values():
        for option in (hint, *get_args(hint)):
            if isinstance(option, type):
                for kind in (option, *option.__subclasses__()):
                    parts_of(kind, seen)
    return seen


def test_the_config_stays_within_its_budget() -> None:
    """At most 16 fields on top and 12 a part: a clear config has few knobs."""
    parts = parts_of(TransformerConfig, set())
    assert len(parts) > 30
    for part in parts:
        assert len(fields(part)) <= (16 if part is TransformerConfig else 12), part.__name__


def test_rules_of_layers_replace_parts_and_later_ones_go_first() -> None:
    near, several = Attention(num_heads=4, pattern=Window(left=3)), Experts(count=3)
    value = config(
        num_layers=6,
        num_decoder_layers=2,
        layers=(
            LayerRule(start=1, step=2, attention=near),
            LayerRule(start=3, stop=5, experts=several, attention_norm=NoNorm()),
            LayerRule(start=6, attention=Attention(num_heads=2, pattern=Causal())),
        ),
    )
    assert [value.layer(i).attention.pattern for i in range(6)] == [Full(), near.pattern] * 3
    assert [i for i in range(8) if value.layer(i).experts == several] == [3, 4]
    assert [i for i in range(8) if value.layer(i).attention_norm == NoNorm()] == [3, 4]
    assert [value.layer(i).has_source for i in range(8)] == [False] * 6 + [True] * 2
    assert value.layer(7).head_width == 16
    assert value.layer(7).attention.pattern == Causal()
    assert from_json(TransformerConfig, json.loads(json.dumps(to_json(value)))) == value


def test_drop_path_grows_evenly_to_the_last_layer() -> None:
    value = config(num_layers=5, residual=Residual(drop_path=0.2))
    assert [round(value.layer(i).drop_path, 6) for i in range(5)] == [0.0, 0.05, 0.1, 0.15, 0.2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerRule(start=1), "must name a part that it replaces; got none"),
        (lambda: LayerRule(start=2, stop=2, experts=Experts(count=2)), "stop must be above start; got 2"),
        (
            lambda: config(layers=(LayerRule(start=2, experts=Experts(count=2)),)),
            r"layers\[0\]\.start must be a layer, below 2; got 2: the rule has no effect",
        ),
        (
            lambda: config(layers=(LayerRule(position=Learned()),)),
            r"layers\[0\]\.position must act in each layer; Learned is added once",
        ),
        (lambda: config(position=Rotary(width=10)), "rotary positions need an even head width; got 10 of 8"),
        (lambda: config(position=Rotary(num_axes=3)), "rotary positions need an even head width; got 8"),
        (
            lambda: config(residual=Residual(placement="parallel"), num_decoder_layers=1),
            "placement must be before or after in an encoder-decoder",
        ),
        (lambda: Experts(count=1), "experts.count must be 2 or more"),
        (lambda: Experts(count=4, top_k=5), r"experts.top_k must be in 1\.\.count"),
        (lambda: Experts(count=4, is_normalised=True), "is_normalised needs top_k of 2 or more"),
        (lambda: TokenHead(activation=None, dense_bias=False), "dense_bias has no effect without head.activation"),
        (lambda: Embedding(vocab_size=3, feature_bias=False), "feature_bias has no effect without"),
        (lambda: BucketBias(num_buckets=7), "num_buckets must be a multiple of 4; got 7"),
        (lambda: BucketBias(num_buckets=32, max_distance=8), "max_distance must reach beyond"),
        (lambda: Dilated(left=3, step=1), "step must be 2 or more"),
        (lambda: LinearScaling(factor=0.5), "factor must be 1 or more"),
        (lambda: BandScaling(factor=2.0, low=4.0, high=1.0), "needs 0 < low < high"),
        (lambda: config(pool=AttentionPool(num_heads=5, feedforward_width=8)), "pool.num_heads must divide the width"),
    ],
)
def test_a_new_part_that_cannot_work_is_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
