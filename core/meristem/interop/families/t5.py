"""T5 and T5 v1.1 (Raffel 2020, arXiv 1910.10683; Shazeer 2020, arXiv 2002.05202), and their encoder alone.

As Hugging Face keeps them (`T5ForConditionalGeneration`, `T5EncoderModel`): two pre-norm stacks without biases that
share an embedding, scores that are not scaled, and a bias by bucket of distances, one table a stack, which looks both
ways in the encoder. v1.1 has gated feed-forward layers, and a head of its own.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from meristem.data.tokenizer import Tokenizer
from meristem.errors import ConfigError, require
from meristem.interop.family import Family, ForeignConfig, Tensors, classes_by_head, symbols_by_class
from meristem.interop.runners import PAIRS, SEQUENCES
from meristem.interop.settings import Field, Settings, activation, write_fields
from meristem.interop.table import STACKED, Ignored, KeyTable, Rename, Row, Tied, block_rows, joined
from meristem.interop.vocabulary import read_subwords, write_subwords
from meristem.model import config as arch

ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}

COPIES = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
"""Modules whose weight is the shared embedding, where it is not another tensor."""

FIELDS = (
    Field("vocab_size", "embedding.vocab_size"),
    Field("d_model", "width"),
    Field("d_kv", "attention.head_width", 64),
    Field("d_ff", "feedforward.width"),
    Field("num_heads", "attention.num_heads"),
    Field("num_layers", "num_layers"),
    Field("relative_attention_num_buckets", "position.num_buckets", 32),
    Field("relative_attention_max_distance", "position.max_distance", 128),
    Field("dropout_rate", ("residual.dropout", "attention.dropout", "feedforward.dropout", "embedding.dropout"), 0.1),
    Field("layer_norm_epsilon", "norm.eps", 1e-6),
    activation("dense_act_fn"),
)
DEFAULTS = {"num_decoder_layers": None, "is_encoder_decoder": True, "tie_word_embeddings": True}


def read_config(config: ForeignConfig, tensors: Tensors) -> arch.TransformerConfig:
    # the reference ties the head whatever tie_word_embeddings says, unless the file holds another tensor for it; the
    # setting says whether rows are scaled before the head, where scale_decoder_outputs does not
    found = Settings("a T5", config, FIELDS, {**DEFAULTS, "feed_forward_proj": "relu"}, ALIASES)
    kind = str(found["feed_forward_proj"])
    *gated, name = kind.split("-")
    require(gated in ([], ["gated"]), "feed_forward_proj must be NAME or gated-NAME in a T5 config", repr(kind))
    # `gated-gelu` means the approximation by tanh; the longer settings, where they are there, have the last word
    implied = {"dense_act_fn": "gelu_new" if gated and name == "gelu" else name, "is_gated_act": bool(gated)}
    found = Settings("a T5", {**implied, **found}, FIELDS)
    is_scaled = found.get("scale_decoder_outputs", found["tie_word_embeddings"] is not False)
    head = read_head(found, tensors, is_scaled, is_always_tied=True)
    return read_stacks(found, found["is_gated_act"], head)


def read_stacks(found: Settings, is_gated: bool, head: arch.TokenHead | None) -> arch.TransformerConfig:
    """Build one or two stacks from settings with the names of T5."""
    found.require(is_decoder=False)
    num_layers, num_decoder_layers = found["num_layers"], 0
    if not is_encoder(found):
        num_decoder_layers = num_layers if found["num_decoder_layers"] is None else found["num_decoder_layers"]
    architecture = found.build(
        position=arch.BucketBias,
        attention=partial(arch.Attention, qkv_bias=False, out_bias=False, scale=1.0),
        feedforward=partial(arch.FeedForward, is_gated=is_gated, in_bias=False, out_bias=False),
        norm=arch.RMSNorm,
        head=head,
    )
    if not num_decoder_layers:
        return architecture
    assert isinstance(architecture.position, arch.BucketBias)
    looks_back = arch.LayerRule(
        start=num_layers,
        attention=replace(architecture.attention, pattern=arch.Causal()),
        position=replace(architecture.position, is_two_sided=False),
    )
    return replace(architecture, num_decoder_layers=num_decoder_layers, layers=(looks_back,))


def is_encoder(config: ForeignConfig) -> bool:
    """Whether the model has no decoder, as `T5EncoderModel`; its config may still have settings of one."""
    classes = config.get("architectures") or ()
    return not config.get("is_encoder_decoder", True) or any(name.endswith("EncoderModel") for name in classes)


def read_head(found: Settings, tensors: Tensors, is_scaled: bool, is_always_tied: bool) -> arch.TokenHead | None:
    """Read the symbol head, which is a linear map alone; None without a decoder.

    Args:
        is_scaled: rows are scaled by `1 / sqrt(D)` before it.
        is_always_tied: it is tied wherever the tensors do not say otherwise; else where the config says so too.
    """
    if is_encoder(found):
        return None
    is_tied = bool(found["tie_word_embeddings"])
    if tensors and (is_tied or is_always_tied):
        own, shared = tensors.get("lm_head.weight"), tensors.get("shared.weight")
        is_tied = own is None or (shared is not None and torch.equal(own, shared))
    scale = float(found["d_model"]) ** -0.5 if is_scaled else 1.0
    return arch.TokenHead(activation=None, is_tied=is_tied, bias=False, scale=scale)


def write_config(architecture: arch.TransformerConfig, tokenizer: Tokenizer, num_stacks: int = 2) -> dict[str, Any]:
    feedforward, head = architecture.feedforward, architecture.head
    values = write_stacks(architecture, tokenizer, num_stacks)
    name = values["dense_act_fn"]
    return {
        "model_type": "t5",
        **values,
        "feed_forward_proj": f"gated-{name}" if feedforward.is_gated else name,
        "is_gated_act": feedforward.is_gated,
        "scale_decoder_outputs": head is None or head.scale != 1.0,
    }


def write_stacks(architecture: arch.TransformerConfig, tokenizer: Tokenizer, num_stacks: int) -> dict[str, Any]:
    """Settings of one or two stacks with the names of T5; a model with another number has another foreign class."""
    if (found := 2 if architecture.num_decoder_layers else 1) != num_stacks:
        raise ConfigError(f"a model must have {num_stacks} stacks; got num_decoder_layers={found - 1}")
    head, position = architecture.head, architecture.position
    require(isinstance(position, arch.BucketBias), "positions must be a BucketBias", type(position).__name__)
    return {
        **write_fields(architecture, FIELDS),
        "d_kv": architecture.head_width,
        "num_decoder_layers": architecture.num_decoder_layers or architecture.num_layers,
        "is_encoder_decoder": architecture.num_decoder_layers > 0,
        "tie_word_embeddings": head is None or head.is_tied,
        "pad_token_id": tokenizer.pad_id or 0,
        "decoder_start_token_id": tokenizer.pad_id or 0,
        "eos_token_id": 1 if tokenizer.eos_id is None else tokenizer.eos_id,
    }


def read_tokenizer(folder: Path, config: ForeignConfig) -> tuple[Tokenizer, list[str]]:
    """Read the tokenizer, with a note if the decoder starts from another symbol than padding, which ours uses."""
    tokenizer, notes = read_subwords(folder, config)
    start, pad = config.get("decoder_start_token_id"), tokenizer.pad_id
    if start is not None and start != pad:
        notes = [*notes, f"decoders start from the symbol of padding, {pad}; this one was used to start from {start}"]
    return tokenizer, notes


def table(architecture: arch.TransformerConfig, *_: object) -> KeyTable:
    return build_table(architecture, "DenseReluDense", Rename("trunk.embedding.symbols", "shared"))


def build_table(architecture: arch.TransformerConfig, feedforward: str, symbols: Row) -> KeyTable:
    """Key table of one stack or two; `feedforward` is the foreign name of a feed-forward layer within a layer."""
    rows = [symbols, Rename("heads.tokens.out", "lm_head")]
    is_pair = architecture.num_decoder_layers > 0
    stacks = {"trunk.encoder": "encoder", "trunk.decoder": "decoder"} if is_pair else {"trunk": "encoder"}
    for own, foreign in stacks.items():
        rows += _rows_of_stack(architecture, own, foreign, feedforward)
    return KeyTable(
        rows=tuple(rows),
        tied=tuple(Tied(f"{name}.weight", "shared.weight") for name in COPIES),
        # published files hold a table that no layer reads: attention to the source has no positions
        ignored=(Ignored(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),),
    )


def _rows_of_stack(architecture: arch.TransformerConfig, own: str, foreign: str, feedforward: str) -> list[Row]:
    block, layer = f"{own}.blocks.{{}}", f"{foreign}.block.{{}}.layer"
    is_decoder = foreign == "decoder"
    last = f"{layer}.{2 if is_decoder else 1}"
    up = (f"{feedforward}.wi_0", f"{feedforward}.wi_1") if architecture.feedforward.is_gated else f"{feedforward}.wi"
    attention = ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v")
    rows = [
        Rename(f"{own}.positions.0.table", f"{foreign}.block.0.layer.0.SelfAttention.relative_attention_bias"),
        *block_rows(f"{layer}.0", block, attention_norm="layer_norm", qkv=attention, out="SelfAttention.o"),
        *block_rows(last, block, feedforward_norm="layer_norm", up=up, down=f"{feedforward}.wo"),
        Rename(f"{block}.experts.router", f"{last}.{feedforward}.router.classifier"),
        Row(f"{block}.experts.up", (f"{last}.{feedforward}.experts.expert_{{expert}}.wi.weight",), STACKED),
        Row(f"{block}.experts.down", (f"{last}.{feedforward}.experts.expert_{{expert}}.wo.weight",), STACKED),
        Rename(f"{own}.final_norm", f"{foreign}.final_layer_norm"),
    ]
    if is_decoder:
        source = f"{layer}.1.EncDecAttention"
        rows += [
            Rename(f"{block}.cross_norm", f"{layer}.1.layer_norm"),
            Rename(f"{block}.cross.q", f"{source}.q"),
            Row(f"{block}.cross.kv", (f"{source}.k", f"{source}.v"), joined(2)),
            Rename(f"{block}.cross.out", f"{source}.o"),
        ]
    return rows


T5 = Family(
    name="T5",
    domain="text",
    recognises=lambda config: config.get("model_type") == "t5" and not is_encoder(config),
    read_config=read_config,
    write_config=write_config,
    read_tokenizer=read_tokenizer,
    write_tokenizer=write_subwords,
    table=table,
    read_heads=symbols_by_class("T5ForConditionalGeneration", "T5WithLMHeadModel"),
    name_class=classes_by_head("T5ForConditionalGeneration", "T5Model"),
    runner=PAIRS,
)

T5_ENCODER = replace(
    T5,
    name="the encoder of T5",
    recognises=lambda config: config.get("model_type") == "t5" and is_encoder(config),
    write_config=partial(write_config, num_stacks=1),
    read_heads=lambda config, names: (),
    name_class=lambda heads: "T5EncoderModel",
    runner=SEQUENCES,
)
