"""Vision transformers of timm: `vit_*`, `deit*` and their like with plain pre-norm blocks and LayerNorm.

A directory of timm says the name of an architecture, and arguments in which the model differs from what the name
stands for. Nearly all of it shows in the shapes of the tensors, so timm itself is not asked: depth and widths, special
tokens, which positions there are, norms, biases, factors of branches, gated layers. What does not show is the number
of heads, the activation and the eps of the norms: they are those of the arguments, or of the name (`timm_facts.py`);
a name that is not known is refused. The pool is the one that the config says.

A distilled model averages two classifiers, one on each of its two special tokens: here that is one linear map of both
side by side. Written, class token and registers have no rows of positions (`no_embed_class`), but in distilled models.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from meristem.data.tokenizer import Tokenizer
from meristem.errors import ConfigError, require
from meristem.interop.family import Family, ForeignConfig, Tensors
from meristem.interop.settings import Settings, write_fields
from meristem.interop.table import KeyTable, Rename, Row, Transform, block_rows
from meristem.interop.weights import open_weights
from meristem.model import config as arch
from meristem.model.heads import Readout
from meristem_domains.vision.families import timm_facts
from meristem_domains.vision.families.labels import LABEL, label_of, require_plain
from meristem_domains.vision.families.processor import IMAGENET, patches_of
from meristem_domains.vision.families.rows import embedding_rows, shaped
from meristem_domains.vision.families.runners import TIMM_IMAGES
from meristem_domains.vision.families.timm_library import TIMM
from meristem_domains.vision.patches import PatchTokenizer
from meristem_domains.vision.picture_sizes import resized_px

NORM = ("layernorm", 1e-6)
"""The norm that an argument can name, and its eps."""

CLASS, DISTILLATION, MASK = "<class>", "<distillation>", "<mask>"


def read_config(config: ForeignConfig, tensors: Tensors) -> arch.TransformerConfig:
    named, facts = timm_facts.named_of(config), timm_facts.facts_of(config, tensors)
    if facts["is_gated"] != named.is_gated:
        raise ConfigError(f"{config['architecture']} must have gated layers or not; its tensors say otherwise")
    norm = facts.get("norm_layer")
    require(norm in (None, NORM[0]), f"model_args.norm_layer must be {NORM[0]}", repr(norm))
    return facts.build(
        embedding=partial(
            arch.Embedding,
            vocab_size=facts["num_prefix"] + timm_facts.has_mask(config, facts),
            patch_features=facts["in_chans"] * facts["patch_size"] ** 2,
            feature_bias=not facts["pre_norm"],
        ),
        position=_read_position(config, facts),
        feedforward=partial(arch.FeedForward, width=facts["hidden"], is_gated=facts["is_gated"]),
        norm=arch.LayerNorm(eps=NORM[1] if norm else named.eps),
        final_norm=facts["has_final_norm"],
        pool=_read_pool(config, facts),
    )


def _read_position(config: ForeignConfig, facts: Settings) -> arch.Position:
    rows, prefix = facts["num_positions"], facts["num_prefix"]
    if not rows:
        return arch.NoPosition()
    height, width = timm_facts.image_px_of(config)
    grid = (height // facts["patch_size"], width // facts["patch_size"])
    places = math.prod(grid)
    if rows not in (places, places + prefix):
        raise ConfigError(
            f"pos_embed must have {places} rows for pictures of {height} x {width} px, or {prefix} more for "
            f"special tokens; got {rows}"
        )
    return arch.Learned(max_positions=places, grid=grid)


def _read_pool(config: ForeignConfig, facts: Settings) -> arch.Pool | None:
    kind = facts.get("global_pool", config.get("global_pool"))
    sees_prefix = bool(facts.get("pool_include_prefix"))
    is_normed = facts["has_pool_norm"]
    require(kind == "avg" or not is_normed, "global_pool must be avg where a norm follows (fc_norm)", repr(kind))
    rule = f"model_args.pool_include_prefix must be false with global_pool {kind!r}"
    require(kind == "map" or not sees_prefix, rule, "true")
    match kind:
        case "token":
            return arch.Prefix(count=2 if facts["is_distilled"] else 1)
        case "avg":
            return arch.Mean(is_normed=is_normed)
        case "max":
            return arch.Max()
        case "map":
            return arch.AttentionPool(
                num_heads=facts["num_heads"],
                feedforward_width=facts["hidden"] * (2 if facts["is_gated"] else 1),
                activation=facts.choice("act_layer", timm_facts.ACTIVATIONS),
                has_special=sees_prefix or facts["num_prefix"] == 0,
            )
        case "":
            return None
    raise ConfigError(f"global_pool must be one of token, avg, max, map; got {kind!r}")


def table(architecture: arch.TransformerConfig, foreign: ForeignConfig, names: Collection[str]) -> KeyTable:
    facts = timm_facts.facts_of(foreign, names if isinstance(names, Mapping) else {})
    counts = {"cls_token": facts["class_token"], "dist_token": facts["is_distilled"], "reg_token": facts["reg_tokens"]}
    tokens = {name: int(count) for name, count in counts.items() if count}
    rows: list[Row] = [
        *embedding_rows(
            architecture,
            tokens,
            positions="pos_embed",
            patches="patch_embed.proj",
            patch=(facts["in_chans"], facts["patch_size"]),
            folded=(facts["num_prefix"],) if facts["is_distilled"] else (0, facts["num_prefix"]),
        ),
        Rename("trunk.embedding.norm", "norm_pre"),
        *block_rows("blocks.{}", attention_norm="norm1", qkv="attn.qkv", out="attn.proj", attention_scale="ls1.gamma"),
        *block_rows("blocks.{}", feedforward_norm="norm2", up="mlp.fc1", down="mlp.fc2", feedforward_scale="ls2.gamma"),
        Rename("trunk.final_norm", "norm"),
    ]
    if isinstance(architecture.pool, arch.AttentionPool):
        rows.append(Row("pool.query", ("attn_pool.latent",), shaped(1, 1, architecture.width)))
        modules = {"q": "q", "kv": "kv", "norm": "norm", "out": "proj", "up": "mlp.fc1", "down": "mlp.fc2"}
        rows += [Rename(f"pool.{own}", f"attn_pool.{module}") for own, module in modules.items()]
    else:
        rows.append(Rename("pool.norm", "fc_norm"))
    label = f"heads.{LABEL}.out"
    rows.append(Row(label, ("head", "head_dist"), AVERAGED) if facts["is_distilled"] else Rename(label, "head"))
    return KeyTable(tuple(rows))


AVERAGED = Transform(
    read=lambda found, _: torch.cat(list(found), dim=1) / 2 if found[0].ndim > 1 else (found[0] + found[1]) / 2,
    write=lambda tensor, _: (
        [2 * half for half in tensor.chunk(2, dim=1)] if tensor.ndim > 1 else [tensor, tensor.clone()]
    ),
)
"""Two classifiers that are averaged, as one on both vectors side by side."""


def write_config(architecture: arch.TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    patches, pool = patches_of(tokenizer), architecture.pool
    is_distilled = isinstance(pool, arch.Prefix) and pool.count == 2
    feedforward = architecture.feedforward
    has_class = isinstance(pool, arch.Prefix) or patches.prefix[:1] == (CLASS,)
    pool_norm = isinstance(pool, arch.Mean) and pool.is_normed
    hidden = feedforward.width * (2 if feedforward.is_gated else 1)
    global_pool = POOLS.get(type(pool), "")
    arguments = {
        **write_fields(architecture, timm_facts.FIELDS),
        "img_size": list(patches.fixed_px),
        "patch_size": patches.patch_px,
        "in_chans": patches.num_channels,
        "global_pool": global_pool,
        # rounded down there: half a feature more keeps it from falling below
        "mlp_ratio": (hidden + 0.5) / architecture.width,
        "class_token": has_class,
        "pos_embed": "learn" if isinstance(architecture.position, arch.Learned) else "none",
        "no_embed_class": not is_distilled,
        "reg_tokens": len(patches.prefix) - has_class - is_distilled,
        "final_norm": architecture.final_norm or pool_norm,
        "fc_norm": pool_norm,
        "pool_include_prefix": isinstance(pool, arch.AttentionPool) and pool.has_special and len(patches.prefix) > 0,
    }
    if is_distilled and arguments["reg_tokens"]:
        raise ConfigError(f"a distilled model must have two special tokens; got {', '.join(patches.prefix)}")
    # its name stands for what no argument can say
    base = "vit_base_patch16_clip_224" if getattr(architecture.norm, "eps", None) == 1e-5 else "vit_base_patch16_224"
    base = "deit_tiny_distilled_patch16_224" if is_distilled else base
    return {
        "architecture": "vit_giant_patch14_dinov2" if feedforward.is_gated else base,
        "num_classes": 0,
        "num_features": architecture.width,
        "global_pool": global_pool,
        "has_mask": bool(patches.mask),
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [patches.num_channels, *patches.fixed_px],
            "fixed_input_size": True,
            "pool_size": None,
            "interpolation": patches.interpolation,
            "crop_pct": _crop_pct(patches),
            "crop_mode": patches.crop,
            "mean": list(patches.mean),
            "std": list(patches.std),
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if is_distilled else "head",
        },
    }


POOLS: Mapping[type, str] = {arch.Prefix: "token", arch.Mean: "avg", arch.Max: "max", arch.AttentionPool: "map"}


def _crop_pct(patches: PatchTokenizer) -> float:
    """The share of a picture that is cut out, which gives the size that it is resized to."""
    if patches.resize_px is None:
        return patches.crop_frac
    resized = patches.resize_px
    for share in (1.0, patches.fixed_px[0] / resized[0], patches.fixed_px[0] / (resized[0] + 0.5)):
        if resized_px(patches.fixed_px, share) == resized:
            return share
    raise ConfigError(
        f"resize_px must be image_px divided by one number; got {list(resized)} for {list(patches.fixed_px)}"
    )


def read_tokenizer(folder: Path, config: ForeignConfig) -> tuple[Tokenizer, list[str]]:
    """Read the tokenizer: patches after the special tokens, prepared as timm prepares images."""
    facts, found = timm_facts.facts_of(config, open_weights(folder)), timm_facts.preprocessing_of(config)
    tokenizer = PatchTokenizer(
        image_px=timm_facts.image_px_of(config),
        patch_px=facts["patch_size"],
        num_channels=facts["in_chans"],
        mean=tuple(found.get("mean") or IMAGENET[0]),
        std=tuple(found.get("std") or IMAGENET[1]),
        crop=found.get("crop_mode") or "center",
        crop_frac=found.get("crop_pct") or 0.875,
        interpolation=found.get("interpolation") or "bicubic",
        prefix=(
            *([CLASS] if facts["class_token"] else []),
            *([DISTILLATION] if facts["is_distilled"] else []),
            *(f"<register_{index}>" for index in range(1, facts["reg_tokens"] + 1)),
        ),
        mask=MASK if timm_facts.has_mask(config, facts) else "",
    )
    return tokenizer, []


def read_label(config: ForeignConfig, names: Collection[str]) -> tuple[Readout, ...]:
    if "head.weight" not in names:
        return ()
    trained = timm_facts.preprocessing_of(config)
    count = config.get("num_classes") or trained.get("num_classes")
    if not count:
        raise ConfigError("num_classes must be that of the classifier; the config says none")
    found = config.get("label_names") or trained.get("label_names") or [str(i) for i in range(count)]
    classes = [found[key] for key in sorted(found, key=int)] if isinstance(found, Mapping) else list(found)
    if len(classes) != count:
        raise ConfigError(f"label_names must name num_classes={count} classes; got {len(classes)}")
    return (replace(label_of(classes), dropout=timm_facts.arguments_of(config).get("drop_rate") or 0.0),)


def write_label(readouts: Sequence[Readout]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for readout in readouts:
        require_plain(readout, (None,))
        settings["num_classes"] = readout.num_outputs
        if readout.classes:
            settings["label_names"] = list(readout.classes)
    return settings


TIMM_VIT = Family(
    name="vision transformers of timm",
    domain="vision",
    recognises=lambda config: "architecture" in config and "model_type" not in config,
    read_config=read_config,
    write_config=write_config,
    read_tokenizer=read_tokenizer,
    write_tokenizer=lambda tokenizer: {},
    table=table,
    read_heads=read_label,
    write_readouts=write_label,
    runner=TIMM_IMAGES,
    library=TIMM,
)
