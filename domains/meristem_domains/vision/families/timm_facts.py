"""What a directory of timm says about a vision transformer: its arguments, its name, the shapes of its tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meristem.errors import ConfigError
from meristem.interop.family import ForeignConfig
from meristem.interop.settings import Settings
from meristem.interop.weights import Weights
from meristem.shapes import Tensor
from meristem_domains.vision.families.timm_names import ARCHITECTURES, Named
from meristem_domains.vision.families.vit import pair

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


@dataclass(frozen=True)
class Facts:
    """What shapes say about a model.

    Attributes:
        side: of a patch.
        hidden: width of feed-forward layers.
        has_class: a class token, the first of all.
        is_distilled: a distillation token behind it, with a classifier of its own.
        registers: further special tokens.
        num_positions: rows of the table of positions; 0 for none.
        has_final_norm: a norm of all rows behind the last block.
        has_pool_norm: a norm of what pooling gives.
    """

    width: int
    depth: int
    channels: int
    side: int
    hidden: int
    is_gated: bool
    qkv_bias: bool
    proj_bias: bool
    has_class: bool
    is_distilled: bool
    registers: int
    num_positions: int
    is_normed: bool
    has_final_norm: bool
    has_pool_norm: bool
    has_layer_scale: bool

    @property
    def num_prefix(self) -> int:
        """Special tokens before the patches."""
        return self.has_class + self.is_distilled + self.registers


def facts_of(config: ForeignConfig, tensors: Mapping[str, Tensor]) -> Facts:
    """Of a model's tensors, or of its arguments where there are none yet.

    Raises:
        ConfigError: tensors that are not those of a vision transformer, or an argument that they contradict.
    """
    if "patch_embed.proj.weight" not in tensors:
        return _facts_of_arguments(config)
    shape = tensors.shape if isinstance(tensors, Weights) else lambda name: tensors[name].shape
    numbers = [int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))]
    lacking = [name for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight") if name not in tensors]
    if lacking:
        raise ConfigError(f"a vision transformer must have {lacking[0]}; it has none")
    width, channels, side, other = shape("patch_embed.proj.weight")
    if side != other:
        raise ConfigError(f"a patch must be a square; got {side} x {other}")
    hidden = shape("blocks.0.mlp.fc2.weight")[1]
    facts = Facts(
        width=width,
        depth=max(numbers) + 1,
        channels=channels,
        side=side,
        hidden=hidden,
        is_gated=shape("blocks.0.mlp.fc1.weight")[0] == 2 * hidden,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        proj_bias="blocks.0.attn.proj.bias" in tensors,
        has_class="cls_token" in tensors,
        is_distilled="dist_token" in tensors,
        registers=shape("reg_token")[1] if "reg_token" in tensors else 0,
        num_positions=shape("pos_embed")[1] if "pos_embed" in tensors else 0,
        is_normed="norm_pre.weight" in tensors,
        has_final_norm="norm.weight" in tensors,
        has_pool_norm="fc_norm.weight" in tensors,
        has_layer_scale="blocks.0.ls1.gamma" in tensors,
    )
    said = {"embed_dim": width, "depth": facts.depth, "class_token": facts.has_class, "reg_tokens": facts.registers}
    for name, value in said.items():
        if (got := arguments_of(config).get(name, value)) != value:
            raise ConfigError(f"model_args.{name} must be {value}, as the tensors say; got {got}")
    return facts


def _facts_of_arguments(config: ForeignConfig) -> Facts:
    """Of arguments that say everything, as `write_config` does."""
    found = Settings("a timm", arguments_of(config))
    pool_norm = found["final_norm"] and found["fc_norm"]
    is_gated = named_of(config).is_gated
    side, image_px = found["patch_size"], pair(found["img_size"])
    is_distilled = named_of(config).is_distilled
    places = (image_px[0] // side) * (image_px[1] // side)
    return Facts(
        width=found["embed_dim"],
        depth=found["depth"],
        channels=found["in_chans"],
        side=side,
        hidden=int(found["embed_dim"] * found["mlp_ratio"]) // (2 if is_gated else 1),
        is_gated=is_gated,
        qkv_bias=found["qkv_bias"],
        proj_bias=found["proj_bias"],
        has_class=found["class_token"],
        is_distilled=is_distilled,
        registers=found["reg_tokens"],
        num_positions=(places + (2 if is_distilled else 0)) if found["pos_embed"] == "learn" else 0,
        is_normed=found["pre_norm"],
        has_final_norm=found["final_norm"] and not pool_norm,
        has_pool_norm=pool_norm,
        has_layer_scale=bool(found["init_values"]),
    )


def arguments_of(config: ForeignConfig) -> Mapping[str, Any]:
    """Arguments in which a model differs from what its name stands for.

    Raises:
        ConfigError: an argument that no part of ours can say.
    """
    found: Mapping[str, Any] = config.get("model_args") or {}
    for name, value in found.items():
        if name in REFUSED and value not in (REFUSED[name], None):
            raise ConfigError(f"model_args.{name} must be {REFUSED[name]!r}; got {value!r}")
        if name not in REFUSED and name not in {*READ.split(), *WITHOUT_EFFECT}:
            raise ConfigError(f"model_args.{name} is not known; got {value!r}")
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


def has_mask(config: ForeignConfig, facts: Facts) -> bool:
    """Whether there is a symbol that hides patches; the setting is ours. A table of symbols has one row at least."""
    return bool(config.get("has_mask", facts.num_prefix == 0))


def image_px_of(config: ForeignConfig) -> tuple[int, int]:
    size = arguments_of(config).get("img_size") or preprocessing_of(config).get("input_size", (3, 224, 224))[1:]
    return pair(size)


def preprocessing_of(config: ForeignConfig) -> Mapping[str, Any]:
    """How pictures are brought to the model."""
    return config.get("pretrained_cfg") or {}
