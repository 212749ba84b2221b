"""GPT-J (Wang 2021) and CodeGen (Nijkamp 2022, arXiv 2203.13474), which is GPT-J with its maps in four shares.

As Hugging Face keeps them (`GPTJForCausalLM`, `CodeGenForCausalLM`): a causal stack in which attention and
feed-forward read the same norm and are added together; rotary positions turn neighbouring features, the first ones
of a head; no biases in attention; a head of its own, with a bias.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from meristem.data.tokenizer import Tokenizer
from meristem.errors import ConfigError
from meristem.interop.families.gpt2 import ALIASES, BUFFERS, TIED
from meristem.interop.family import Family, ForeignConfig, classes_by_head, symbols_but_for
from meristem.interop.runners import SEQUENCES
from meristem.interop.settings import Settings, foreign_activation, special_ids
from meristem.interop.table import FuseHeads, KeyTable, Rename, Row, Transform
from meristem.interop.vocabulary import read_subwords, write_subwords
from meristem.model.config import (
    Attention,
    Causal,
    Embedding,
    FeedForward,
    Init,
    LayerNorm,
    Residual,
    Rotary,
    TokenHead,
    TransformerConfig,
)
from meristem.shapes import Tensor

SHARES = 4
"""CodeGen's maps to queries, values and keys are cut for this many accelerators, whatever the model's size."""

LAYER = "transformer.h.{}"


def _joined_shares(tensors: Sequence[Tensor], config: TransformerConfig) -> Tensor:
    """Rows of queries, keys and values, of shares that hold queries, values and keys each."""
    queries, values, keys = tensors[0].unflatten(0, (SHARES, 3, -1)).unbind(1)
    return torch.stack([queries, keys, values]).flatten(0, 2)


def _cut_shares(tensor: Tensor, config: TransformerConfig) -> Sequence[Tensor]:
    """The inverse of `_joined_shares`."""
    queries, keys, values = tensor.unflatten(0, (3, SHARES, -1)).unbind(0)
    return [torch.stack([queries, values, keys], dim=1).flatten(0, 2)]


COMMON = (
    Rename("trunk.embedding.symbols", "transformer.wte"),
    Rename("trunk.blocks.{}.attention_norm", f"{LAYER}.ln_1"),
    Rename("trunk.blocks.{}.attention.out", f"{LAYER}.attn.out_proj"),
    Rename("trunk.blocks.{}.feedforward.up", f"{LAYER}.mlp.fc_in"),
    Rename("trunk.blocks.{}.feedforward.down", f"{LAYER}.mlp.fc_out"),
    Rename("trunk.final_norm", "transformer.ln_f"),
    Rename("heads.tokens.out", "lm_head"),
    Rename("heads.tokens.bias", "lm_head.bias"),
)

TABLE = KeyTable(
    rows=(
        *COMMON,
        FuseHeads(
            "trunk.blocks.{}.attention.qkv", f"{LAYER}.attn.q_proj", f"{LAYER}.attn.k_proj", f"{LAYER}.attn.v_proj"
        ),
    ),
    tied=TIED,
    ignored=BUFFERS,
)

CODEGEN_TABLE = KeyTable(
    rows=(
        *COMMON,
        Row("trunk.blocks.{}.attention.qkv", (f"{LAYER}.attn.qkv_proj",), Transform(_joined_shares, _cut_shares)),
    ),
    tied=TIED,
    ignored=BUFFERS,
)

MAX_POSITIONS = 2048
"""Rows of the reference's table of rotations, as the published models have them: ours has no limit to write."""

DEFAULTS = {
    "rotary_dim": 64,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}


def read_config(config: ForeignConfig, tensors: Mapping[str, Tensor]) -> TransformerConfig:
    """Our config of a `GPTJConfig`.

    Raises:
        ConfigError: a setting that no part of ours can say.
    """
    return _read(Settings("a GPT-J", config, DEFAULTS, ALIASES))


def read_codegen_config(config: ForeignConfig, tensors: Mapping[str, Tensor]) -> TransformerConfig:
    """Our config of a `CodeGenConfig`.

    Raises:
        ConfigError: a setting that no part of ours can say.
    """
    found = Settings("a CodeGen", config, DEFAULTS, ALIASES)
    if found["n_head"] % SHARES:
        raise ConfigError(f"n_head must be a multiple of {SHARES} in a CodeGen config; got {found['n_head']}")
    return _read(found)


def _read(found: Settings) -> TransformerConfig:
    """What both have in common."""
    width, turned = found["n_embd"], found["rotary_dim"]
    if not turned:
        raise ConfigError(f"rotary_dim must be positive in a config of rotary positions; got {turned!r}")
    attention = Attention(
        num_heads=found["n_head"], qkv_bias=False, out_bias=False, pattern=Causal(), dropout=found["attn_pdrop"]
    )
    return TransformerConfig(
        width=width,
        num_layers=found["n_layer"],
        embedding=Embedding(vocab_size=found["vocab_size"], dropout=found["embd_pdrop"]),
        position=Rotary(width=None if turned == attention.width_of_heads(width) else turned, is_interleaved=True),
        attention=attention,
        feedforward=FeedForward(
            width=4 * width if found["n_inner"] is None else found["n_inner"],
            activation=found.activation("activation_function"),
        ),
        norm=LayerNorm(eps=found["layer_norm_epsilon"]),
        residual=Residual(placement="parallel", dropout=found["resid_pdrop"]),
        head=TokenHead(activation=None, is_tied=found["tie_word_embeddings"]),
        init=Init(std=found["initializer_range"]),
    )


def write_config(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The `GPTJConfig` of ours, as far as one can say it."""
    return {"model_type": "gptj", **_write(architecture, tokenizer)}


def write_codegen_config(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The `CodeGenConfig` of ours, as far as one can say it."""
    return {"model_type": "codegen", **_write(architecture, tokenizer), "n_ctx": MAX_POSITIONS}


def _write(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    position, feedforward = architecture.position, architecture.feedforward
    turned = position.width if isinstance(position, Rotary) else None
    return {
        "vocab_size": architecture.embedding.vocab_size,
        "n_positions": MAX_POSITIONS,
        "n_embd": architecture.width,
        "n_layer": architecture.num_layers,
        "n_head": architecture.attention.num_heads,
        "n_inner": feedforward.width,
        "rotary_dim": turned or architecture.head_width,
        "activation_function": foreign_activation(feedforward.activation),
        "resid_pdrop": architecture.residual.dropout,
        "embd_pdrop": architecture.embedding.dropout,
        "attn_pdrop": architecture.attention.dropout,
        "layer_norm_epsilon": getattr(architecture.norm, "eps", None),
        "initializer_range": architecture.init.std,
        "tie_word_embeddings": architecture.head is None or architecture.head.is_tied,
        **special_ids(tokenizer),
    }


GPTJ = Family(
    name="GPT-J",
    domain="text",
    recognises=lambda config: config.get("model_type") == "gptj",
    read_config=read_config,
    write_config=write_config,
    read_tokenizer=read_subwords,
    write_tokenizer=write_subwords,
    table=TABLE,
    read_heads=symbols_but_for("GPTJModel"),
    prefix="transformer.",
    name_class=classes_by_head("GPTJForCausalLM", "GPTJModel"),
    runner=SEQUENCES,
)

CODEGEN = Family(
    name="CodeGen",
    variant_of=GPTJ,
    domain="code",
    recognises=lambda config: config.get("model_type") == "codegen",
    read_config=read_codegen_config,
    write_config=write_codegen_config,
    read_tokenizer=read_subwords,
    write_tokenizer=write_subwords,
    table=CODEGEN_TABLE,
    read_heads=symbols_but_for("CodeGenModel"),
    prefix="transformer.",
    name_class=classes_by_head("CodeGenForCausalLM", "CodeGenModel"),
    runner=SEQUENCES,
)
