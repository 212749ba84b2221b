"""What a directory of timm says about a vision transformer: its arguments, its name, the shapes of its tensors.

`timm_architectures.csv` says what the names of architectures stand for where neither a config nor the shape of a tensor
does: facts of timm 1.0.31, all architectures that are supported: plain pre-norm blocks with LayerNorm. A test compares
every one of them with the models that timm builds.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
from pyarrow.csv import ConvertOptions, read_csv

from meristem.errors import ConfigError, require
from meristem.interop.family import ForeignConfig, Tensors
from meristem.interop.settings import Field, Settings
from meristem.interop.weights import Weights
from meristem.model.config import Activation
from meristem_domains.vision.families.processor import pair


@dataclass(frozen=True)
class Named:
    """What the name of an architecture says about its models.

    Attributes:
        num_heads: heads of attention, in the trunk and in an attention pool.
        eps: epsilon of every norm.
        is_gated: whether feed-forward layers are gated, by the first half of their packed map.
        is_distilled: whether there is a distillation token, and a classifier on it.
    """

    num_heads: int
    activation: Activation
    eps: float
    is_gated: bool
    is_distilled: bool


_TYPES = {"is_gated": pa.bool_(), "is_distilled": pa.bool_()}
_ROWS = read_csv(
    Path(__file__).with_name("timm_architectures.csv"), convert_options=ConvertOptions(column_types=_TYPES)
)

ARCHITECTURES: Mapping[str, Named] = {row.pop("name"): Named(**row) for row in _ROWS.to_pylist()}
"""What each name stands for."""

READ = """
    img_size patch_size in_chans num_classes global_pool embed_dim depth num_heads mlp_ratio qkv_bias proj_bias
    init_values class_token pos_embed no_embed_class reg_tokens pre_norm final_norm fc_norm pool_include_prefix
    drop_rate pos_drop_rate proj_drop_rate attn_drop_rate drop_path_rate norm_layer act_layer
"""
"""Arguments that are read, or that shapes say."""

WITHOUT_EFFECT = {"dynamic_img_size", "strict_img_size", "weight_init", "fix_init"}
"""Arguments that change no number of a model with weights, at its own size of pictures."""

REFUSED = {
    **{"qk_norm": False, "scale_attn_norm": False, "scale_mlp_norm": False, "dynamic_img_pad": False},
    **{"patch_drop_rate": 0, "embed_layer": None, "embed_norm_layer": None, "block_fn": None, "mlp_layer": None},
    "attn_layer": "",
}
"""Arguments that must have this one value, or none."""

ACTIVATIONS: Mapping[str, Activation] = {**{name: name for name in get_args(Activation)}, "swish": "silu"}
"""Our activations by their names in timm."""

FIELDS = (
    Field("embed_dim", "width"),
    Field("depth", "num_layers"),
    Field("num_heads", "attention.num_heads"),
    Field("qkv_bias", "attention.qkv_bias"),
    Field("proj_bias", ("attention.out_bias", "feedforward.in_bias", "feedforward.out_bias")),
    Field("init_values", "residual.layer_scale"),
    Field("pre_norm", "embedding.is_normed"),
    Field("act_layer", "feedforward.activation", names=ACTIVATIONS),
    Field("pos_drop_rate", "embedding.dropout", 0.0),
    Field("attn_drop_rate", "attention.dropout", 0.0),
    Field("proj_drop_rate", ("residual.dropout", "feedforward.dropout"), 0.0),
    Field("drop_path_rate", "residual.drop_path", 0.0),
)
"""Arguments that are fields of ours."""


def facts_of(config: ForeignConfig, tensors: Tensors) -> Settings:
    """Describe a model by arguments of timm. Shapes of tensors take precedence over the config.

    Beside arguments of timm there are `hidden` (width of feed-forward layers), `num_positions` (rows of the table of
    positions; 0 for none), `num_prefix` (special tokens before the patches), `is_gated`, `is_distilled`,
    `has_final_norm` (a norm of all rows after the last block) and `has_pool_norm` (a norm of what pooling gives).

    Args:
        tensors: tensors of the model; none where its config says everything, as one that is written does.

    Raises:
        ConfigError: tensors that are not those of a vision transformer, or an argument that they contradict.
    """
    named = named_of(config)
    given = {name: value for name, value in arguments_of(config).items() if value is not None}
    found = Settings(
        "a timm", {"init_values": None, "num_heads": named.num_heads, "act_layer": named.activation, **given}
    )
    shown = _of_tensors(found, tensors) if "patch_embed.proj.weight" in tensors else _of_arguments(found, named)
    num_prefix = shown["class_token"] + shown["is_distilled"] + shown["reg_tokens"]
    return Settings("a timm", {**found, **shown, "num_prefix": num_prefix}, FIELDS)


def _of_tensors(found: Settings, tensors: Tensors) -> dict[str, Any]:
    shape = tensors.shape if isinstance(tensors, Weights) else lambda name: tensors[name].shape
    numbers = [int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))]
    lacking = [name for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight") if name not in tensors]
    if lacking:
        raise ConfigError(f"a vision transformer must have {lacking[0]}; it has none")
    width, channels, side, other = shape("patch_embed.proj.weight")
    require(side == other, "a patch must be a square", f"{side} x {other}")
    hidden = shape("blocks.0.mlp.fc2.weight")[1]
    shown = {
        "embed_dim": width,
        "depth": max(numbers) + 1,
        "class_token": "cls_token" in tensors,
        "reg_tokens": shape("reg_token")[1] if "reg_token" in tensors else 0,
    }
    for name, value in shown.items():
        got = found.get(name, value)
        require(got == value, f"model_args.{name} must be {value}, as the tensors say", got)
    return shown | {
        "in_chans": channels,
        "patch_size": side,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "proj_bias": "blocks.0.attn.proj.bias" in tensors,
        "init_values": (found["init_values"] or 1e-5) if "blocks.0.ls1.gamma" in tensors else None,
        "pre_norm": "norm_pre.weight" in tensors,
        "hidden": hidden,
        "num_positions": shape("pos_embed")[1] if "pos_embed" in tensors else 0,
        "is_gated": shape("blocks.0.mlp.fc1.weight")[0] == 2 * hidden,
        "is_distilled": "dist_token" in tensors,
        "has_final_norm": "norm.weight" in tensors,
        "has_pool_norm": "fc_norm.weight" in tensors,
    }


def _of_arguments(found: Settings, named: Named) -> dict[str, Any]:
    side, (height, width) = found["patch_size"], pair(found["img_size"])
    places = (height // side) * (width // side) + (2 if named.is_distilled else 0)
    has_pool_norm = found["final_norm"] and found["fc_norm"]
    return {
        "class_token": found["class_token"],
        "reg_tokens": found["reg_tokens"],
        "init_values": found["init_values"] or None,
        "hidden": int(found["embed_dim"] * found["mlp_ratio"]) // (2 if named.is_gated else 1),
        "num_positions": places if found["pos_embed"] == "learn" else 0,
        "is_gated": named.is_gated,
        "is_distilled": named.is_distilled,
        "has_final_norm": found["final_norm"] and not has_pool_norm,
        "has_pool_norm": has_pool_norm,
    }


def arguments_of(config: ForeignConfig) -> Mapping[str, Any]:
    """Arguments in which a model differs from the architecture that its name stands for.

    Raises:
        ConfigError: an argument that no part of ours can say.
    """
    found: Mapping[str, Any] = config.get("model_args") or {}
    for name, value in found.items():
        if name in REFUSED:
            require(value in (REFUSED[name], None), f"model_args.{name} must be {REFUSED[name]!r}", repr(value))
        else:
            require(name in {*READ.split(), *WITHOUT_EFFECT}, f"model_args.{name} is not known", repr(value))
    return found


def named_of(config: ForeignConfig) -> Named:
    """What the name of an architecture stands for.

    Raises:
        ConfigError: it is not a supported one.
    """
    name = config["architecture"]
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"architecture must be a supported vision transformer of timm, one of {len(ARCHITECTURES)} such as "
            f"vit_base_patch16_224 and deit_tiny_distilled_patch16_224; got {name!r}"
        )
    return ARCHITECTURES[name]


def has_mask(config: ForeignConfig, facts: Settings) -> bool:
    """Whether there is a mask symbol. The setting is ours; without special tokens there must be one symbol."""
    return bool(config.get("has_mask", facts["num_prefix"] == 0))


def image_px_of(config: ForeignConfig) -> tuple[int, int]:
    size = arguments_of(config).get("img_size") or preprocessing_of(config).get("input_size", (3, 224, 224))[1:]
    return pair(size)


def preprocessing_of(config: ForeignConfig) -> Mapping[str, Any]:
    return config.get("pretrained_cfg") or {}
