"""DINOv2 (Oquab 2023, arXiv 2304.07193), with registers (Darcet 2023, arXiv 2309.16588) or without.

As Hugging Face keeps it (`Dinov2Model`, `Dinov2WithRegistersModel` and their classifiers): a ViT whose branches are
scaled, at times with gated feed-forward layers. Registers stand behind the class token and have no positions. A
classifier reads the class token and the mean of the patches side by side.

Drop path is the same in all layers there; here, as in the paper, it grows from 0 to that of the last one.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.errors import require
from meristem.interop.family import ForeignConfig, Tensors, classes_by_head, of_type
from meristem.interop.settings import Field, Settings, activation
from meristem.interop.table import KeyTable, block_rows
from meristem.model.config import FeedForward, Prefix, TransformerConfig
from meristem_domains.vision.families import vit
from meristem_domains.vision.families.labels import LABEL, read_classifier, write_classes
from meristem_domains.vision.families.processor import pair, patches_of, read_processor

DINO_FIELDS = (
    *vit.FIELDS,
    Field("hidden_dropout_prob", "embedding.dropout", 0.0),
    Field("layer_norm_eps", "norm.eps", 1e-6),
    Field("layerscale_value", "residual.layer_scale", 1.0),
    Field("drop_path_rate", "residual.drop_path", 0.0),
)
HIDDEN_ACT = activation("hidden_act", "gelu")
DINO_DEFAULTS = {
    "hidden_act": HIDDEN_ACT.default,
    **vit.DEFAULTS,
    "mlp_ratio": 4,
    "patch_size": 14,
    "use_swiglu_ffn": False,
    "num_register_tokens": 0,
}
REGISTER_DEFAULTS = {**DINO_DEFAULTS, "patch_size": 16, "num_register_tokens": 4}

CLASS_MEAN = Prefix(has_mean=True)
"""What a classifier reads."""

SPELLINGS = (*vit.ATTENTION_SPELLINGS, (r"\.mlp\.down_proj\.", ".mlp.weights_out."))
"""Names that tensors have in memory since transformers 5; on disk they keep the others."""


def read_config(config: ForeignConfig, tensors: Tensors) -> TransformerConfig:
    found = _settings(config)
    height, width = pair(found["image_size"])
    # the reference stretches positions for every picture that is no square, and takes their grid for one
    require(height == width, "image_size must be a square in a DINOv2 config", f"{height} x {width}")
    gated = found["use_swiglu_ffn"]
    feedforward = FeedForward(
        width=_width(found["hidden_size"], found["mlp_ratio"], gated),
        activation="silu" if gated else found.choice("hidden_act"),
        is_gated=gated,
    )
    num_symbols = 1 + found["num_register_tokens"] + bool(found.get("use_mask_token", True))
    return vit.read_trunk(found, num_symbols, feedforward=feedforward, pool=Prefix())


def _settings(config: ForeignConfig) -> Settings:
    has_registers = config.get("model_type") == "dinov2_with_registers"
    return Settings("a DINOv2", config, DINO_FIELDS, REGISTER_DEFAULTS if has_registers else DINO_DEFAULTS)


def _width(width: int, ratio: float, is_gated: bool) -> int:
    """Hidden width, which its config says as a ratio; of a gated layer two thirds, up to the next multiple of 8."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if is_gated else hidden


def table(architecture: TransformerConfig, foreign: ForeignConfig, names: Collection[str]) -> KeyTable:
    """Key table of a `Dinov2Model` under the names that it has on disk; gated layers of either layout."""
    prefix = f"{foreign['model_type']}."
    layer = prefix + "encoder.layer.{}"
    up: str | tuple[str, ...] = "mlp.fc1"
    down = "mlp.fc2"
    if architecture.feedforward.is_gated:
        is_split = any(".mlp.gate_proj." in name for name in names)
        up, down = ("mlp.gate_proj", "mlp.up_proj") if is_split else "mlp.weights_in", "mlp.weights_out"
    rows = (
        *block_rows(layer, attention_norm="norm1", attention_scale="layer_scale1.lambda1"),
        *block_rows(layer, feedforward_norm="norm2", feedforward_scale="layer_scale2.lambda1", up=up, down=down),
    )
    found = _settings(foreign)
    has_mask = architecture.embedding.vocab_size > 1 + found["num_register_tokens"]
    # a model with registers has this tensor in any case: it is written for one of ours that has no such symbol, too
    has_tensor = has_mask or (not names and found["num_register_tokens"] > 0)
    mask = f"{prefix}embeddings.mask_token" if has_tensor else None
    return KeyTable(
        (*vit.trunk_rows(architecture, found, prefix, found["num_register_tokens"], mask, 2), *rows),
        ignored=vit.LEFT_OUT,
    )


def write_config(architecture: TransformerConfig, tokenizer: Tokenizer, has_registers: bool = False) -> dict[str, Any]:
    feedforward = architecture.feedforward
    # a whole number: 64 times the width is more than anybody has
    fits = [r for r in range(1, 65) if _width(architecture.width, r, feedforward.is_gated) == feedforward.width]
    require(bool(fits), "feedforward.width must be one that a whole mlp_ratio gives", feedforward.width)
    require(architecture.residual.layer_scale is not None, "a DINOv2 has residual.layer_scale", "none")
    kind: dict[str, Any] = {"model_type": "dinov2"}
    if has_registers:
        num_registers = len(patches_of(tokenizer).prefix) - 1
        kind = {"model_type": "dinov2_with_registers", "num_register_tokens": num_registers}
    return {
        **kind,
        **vit.write_trunk(architecture, tokenizer, DINO_FIELDS),
        "mlp_ratio": fits[0],
        "use_swiglu_ffn": feedforward.is_gated,
        "hidden_act": "gelu" if feedforward.is_gated else HIDDEN_ACT.write(architecture),
    }


def read_tokenizer(folder: Path, config: ForeignConfig) -> tuple[Tokenizer, list[str]]:
    return read_processor(folder, _settings(config), bool(config.get("use_mask_token", True)))


DINO = replace(
    vit.VIT,
    name="DINOv2",
    recognises=of_type("dinov2"),
    read_config=read_config,
    write_config=write_config,
    read_tokenizer=read_tokenizer,
    read_heads=partial(read_classifier, pool=CLASS_MEAN),
    write_readouts=lambda readouts: write_classes(readouts, (CLASS_MEAN,)),
    table=table,
    spellings=SPELLINGS,
    prefix="dinov2.",
    name_class=classes_by_head("Dinov2ForImageClassification", "Dinov2Model", LABEL),
)

DINO_REGISTERS = DINO.variant(
    name="DINOv2 with registers",
    recognises=of_type("dinov2_with_registers"),
    write_config=partial(write_config, has_registers=True),
    prefix="dinov2_with_registers.",
    name_class=classes_by_head("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersModel", LABEL),
)
