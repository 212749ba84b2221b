"""ViT (Dosovitskiy 2020, arXiv 2010.11929), and what other models of images in `transformers` have in common with it.

As Hugging Face keeps it (`ViTModel`, `ViTForImageClassification`): a picture is cut into patches, a class token stands
before them, positions are learned, a classifier reads the class token. Here the class token and the token that hides
a patch are symbols, and the row of positions for the class token is part of its symbol.
"""

import math
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.interop.family import Family, ForeignConfig, Tensors, classes_by_head, of_type
from meristem.interop.settings import INIT_STD, Field, Settings, activation, write_fields
from meristem.interop.table import Ignored, KeyTable, Rename, Row, block_rows
from meristem.model.config import Attention, Embedding, Learned, Prefix, TransformerConfig
from meristem_domains.vision.families.labels import LABEL, read_classifier, write_classes
from meristem_domains.vision.families.processor import pair, patches_of, read_processor, side_of, write_processor
from meristem_domains.vision.families.rows import embedding_rows
from meristem_domains.vision.families.runners import HF_IMAGES

FIELDS = (
    Field("hidden_size", "width", 768),
    Field("num_hidden_layers", "num_layers", 12),
    Field("num_attention_heads", "attention.num_heads", 12),
    Field("attention_probs_dropout_prob", "attention.dropout", 0.0),
    Field("qkv_bias", "attention.qkv_bias", True),
    INIT_STD,
)
VIT_FIELDS = (
    *FIELDS,
    Field("hidden_dropout_prob", ("residual.dropout", "embedding.dropout"), 0.0),
    Field("intermediate_size", "feedforward.width", 3072),
    activation("hidden_act", "gelu"),
    Field("layer_norm_eps", "norm.eps", 1e-12),
)
DEFAULTS = {"image_size": 224, "num_channels": 3, "patch_size": 16}
_settings = partial(Settings, "a ViT", fields=VIT_FIELDS, defaults=DEFAULTS)
LEFT_OUT = (
    Ignored(r".*\.pooler\.dense\.(weight|bias)", "the pooler is left out: the classifier does not read it"),
    Ignored(r"decoder\.0\.(weight|bias)", "the decoder that draws hidden patches is left out"),
    Ignored(r".*\.embeddings\.mask_token"),
)


def read_vit_config(config: ForeignConfig, tensors: Tensors) -> TransformerConfig:
    found = _settings(config)
    has_pooler = "vit.pooler.dense.weight" in tensors and "classifier.weight" not in tensors
    if has_pooler:
        found.require(pooler_act="tanh", pooler_output_size=found["hidden_size"])
    return read_trunk(found, num_symbols=1 + _has_mask(config), pool=Prefix(is_dense=has_pooler))


def _has_mask(config: ForeignConfig) -> bool:
    """Whether there is a token that hides patches; the setting is ours, the class alone says it there."""
    is_masked = "ViTForMaskedImageModeling" in (config.get("architectures") or ())
    return bool(config.get("use_mask_token", is_masked))


def read_trunk(found: Settings, num_symbols: int, **parts: Any) -> TransformerConfig:
    """Build an image encoder; `parts`, as in `Settings.build`, are those that the families read differently."""
    (height, width), side = pair(found["image_size"]), side_of(found)
    grid = (height // side, width // side)
    return found.build(
        embedding=partial(Embedding, vocab_size=num_symbols, patch_features=found["num_channels"] * side**2),
        position=Learned(max_positions=math.prod(grid), grid=grid),
        attention=partial(Attention, head_width=found.get("head_dim")),
        **parts,
    )


def vit_table(architecture: TransformerConfig, foreign: ForeignConfig, names: Collection[str]) -> KeyTable:
    layer = "vit.encoder.layer.{}"
    rows = (
        *block_rows(layer, attention_norm="layernorm_before", feedforward_norm="layernorm_after"),
        *block_rows(layer, up="intermediate.dense", down="output.dense"),
        Rename("pool.dense", "vit.pooler.dense"),
    )
    mask = "vit.embeddings.mask_token"
    shared = trunk_rows(architecture, _settings(foreign), "vit.", 0, mask if mask in names else None, mask_axes=3)
    return KeyTable((*shared, *rows), ignored=LEFT_OUT)


def trunk_rows(
    architecture: TransformerConfig, found: Settings, prefix: str, num_registers: int, mask: str | None, mask_axes: int
) -> tuple[Row, ...]:
    """Rows for tensors that have the same names in all these families."""
    layer, embeddings = prefix + "encoder.layer.{}.attention", f"{prefix}embeddings"
    tokens = {f"{embeddings}.cls_token": 1}
    if num_registers:
        tokens[f"{embeddings}.register_tokens"] = num_registers
    return (
        *embedding_rows(
            architecture,
            tokens,
            positions=f"{embeddings}.position_embeddings",
            patches=f"{embeddings}.patch_embeddings.projection",
            patch=(found["num_channels"], side_of(found)),
            folded=(1,),
            mask=mask,
            mask_axes=mask_axes,
        ),
        *block_rows(layer, qkv=("attention.query", "attention.key", "attention.value"), out="output.dense"),
        Rename("trunk.final_norm", f"{prefix}layernorm"),
        Rename(f"heads.{LABEL}.out", "classifier"),
    )


ATTENTION_SPELLINGS = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
VIT_SPELLINGS = (
    (r"^(vit\.)?layers\.", r"\1encoder.layer."),
    *ATTENTION_SPELLINGS,
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
"""Names that tensors have in memory since transformers 5; on disk they keep the others."""


def write_vit_config(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "model_type": "vit",
        **write_trunk(architecture, tokenizer, VIT_FIELDS),
        "pooler_output_size": architecture.width,
        "pooler_act": "tanh",
        "encoder_stride": patches_of(tokenizer).patch_px,
    }


def write_trunk(architecture: TransformerConfig, tokenizer: Tokenizer, fields: Sequence[Field]) -> dict[str, Any]:
    """Settings that have the same names in all these families."""
    patches = patches_of(tokenizer)
    return {
        **write_fields(architecture, fields),
        "image_size": patches.fixed_px[0] if len(set(patches.fixed_px)) == 1 else list(patches.fixed_px),
        "patch_size": patches.patch_px,
        "num_channels": patches.num_channels,
        "use_mask_token": bool(patches.mask),
    }


def read_vit_tokenizer(folder: Path, config: ForeignConfig) -> tuple[Tokenizer, list[str]]:
    return read_processor(folder, _settings(config), _has_mask(config))


VIT = Family(
    name="ViT",
    domain="vision",
    table=vit_table,
    recognises=of_type("vit"),
    read_config=read_vit_config,
    write_config=write_vit_config,
    read_tokenizer=read_vit_tokenizer,
    write_tokenizer=write_processor,
    read_heads=read_classifier,
    write_readouts=lambda readouts: write_classes(readouts, (None,)),
    spellings=VIT_SPELLINGS,
    prefix="vit.",
    name_class=classes_by_head("ViTForImageClassification", "ViTModel", LABEL),
    runner=HF_IMAGES,
)
