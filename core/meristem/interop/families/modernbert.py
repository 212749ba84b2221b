"""ModernBERT (Warner 2024, arXiv 2412.13663): an encoder most of whose layers see a window.

As Hugging Face keeps it (`ModernBertForMaskedLM`, `ModernBertModel`): pre-norm, norms without biases, rotary
positions of two bases (one for windows, one for layers that see all), a gated feed-forward layer in one map, and no
norm before the first layer's attention.
"""

from collections.abc import Mapping
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.errors import ConfigError
from meristem.interop.family import ForeignConfig, heads_by_prefix, sequence_family
from meristem.interop.rotary import read_rotary, write_rotary
from meristem.interop.rows import block_rows, head_rows
from meristem.interop.settings import Settings, foreign_activation, special_ids
from meristem.interop.table import KeyTable, Rename, Tied
from meristem.model.config import (
    Attention,
    Embedding,
    FeedForward,
    Full,
    Init,
    LayerNorm,
    LayerRule,
    NoNorm,
    NoPosition,
    Position,
    Rotary,
    TokenHead,
    TransformerConfig,
    Window,
)
from meristem.shapes import Tensor

DEFAULTS = {
    "hidden_activation": "gelu",
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
    "norm_eps": 1e-5,
    "norm_bias": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "global_attn_every_n_layers": 3,
    "local_attention": 128,
    "embedding_dropout": 0.0,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "decoder_bias": True,
    "classifier_bias": False,
    "classifier_activation": "gelu",
    "tie_word_embeddings": True,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
}

WINDOWED, UNBOUNDED = "sliding_attention", "full_attention"
"""Names of layers that see a window, and that see every token."""

LAYER = "model.layers.{}"

TABLE = KeyTable(
    rows=(
        Rename("trunk.embedding.symbols", "model.embeddings.tok_embeddings"),
        Rename("trunk.embedding.norm", "model.embeddings.norm"),
        *block_rows(LAYER, attention_norm="attn_norm", qkv="attn.Wqkv", out="attn.Wo"),
        *block_rows(LAYER, feedforward_norm="mlp_norm", up="mlp.Wi", down="mlp.Wo"),
        Rename("trunk.final_norm", "model.final_norm"),
        *head_rows(dense="head.dense", norm="head.norm", out="decoder", bias="decoder.bias"),
    ),
    tied=(Tied("decoder.weight", "model.embeddings.tok_embeddings.weight"),),
)


def read_config(config: ForeignConfig, tensors: Mapping[str, Tensor]) -> TransformerConfig:
    """Our config of a `ModernBertConfig`."""
    found = Settings("a ModernBERT", config, DEFAULTS)
    reach = found["local_attention"] // 2
    kinds = {
        WINDOWED: (_attention(found, Window(left=reach, right=reach)), _position(found, WINDOWED, "local")),
        UNBOUNDED: (_attention(found, Full()), _position(found, UNBOUNDED, "global")),
    }
    unbounded = [layer for layer, kind in enumerate(_layer_types(found)) if kind == UNBOUNDED]
    num_layers, bias = found["num_hidden_layers"], found["mlp_bias"]
    attention, position = kinds[UNBOUNDED if len(unbounded) == num_layers else WINDOWED]
    rules = [] if len(unbounded) == num_layers else _rules(unbounded, num_layers, *kinds[UNBOUNDED])
    return TransformerConfig(
        width=found["hidden_size"],
        num_layers=num_layers,
        embedding=Embedding(vocab_size=found["vocab_size"], is_normed=True, dropout=found["embedding_dropout"]),
        position=position,
        attention=attention,
        feedforward=FeedForward(
            width=found["intermediate_size"],
            activation=found.activation("hidden_activation"),
            is_gated=True,
            in_bias=bias,
            out_bias=bias,
            dropout=found["mlp_dropout"],
        ),
        norm=LayerNorm(eps=found["norm_eps"], bias=found["norm_bias"]),
        layers=(LayerRule(stop=1, attention_norm=NoNorm()), *rules),
        head=TokenHead(
            activation=found.activation("classifier_activation"),
            dense_bias=found["classifier_bias"],
            is_tied=found["tie_word_embeddings"],
            bias=found["decoder_bias"],
        ),
        init=Init(std=found["initializer_range"], is_depth_scaled=True),
    )


def _attention(found: Settings, pattern: Full | Window) -> Attention:
    bias = found["attention_bias"]
    return Attention(
        num_heads=found["num_attention_heads"],
        qkv_bias=bias,
        out_bias=bias,
        pattern=pattern,
        dropout=found["attention_dropout"],
    )


def _position(found: Settings, kind: str, older: str) -> Rotary:
    """Rotary positions of one kind of layers, in the words of now or of before."""
    values = (found.get("rope_parameters") or {}).get(kind) or {}
    values = {"rope_theta": found[f"{older}_rope_theta"], **(found.get("rope_scaling") or {}), **values}
    length = found["max_position_embeddings"]
    return read_rotary(Settings("a ModernBERT", {"rope_parameters": values, "max_position_embeddings": length}))


def _layer_types(found: Settings) -> list[str]:
    num_layers, step = found["num_hidden_layers"], found["global_attn_every_n_layers"]
    types = found.get("layer_types") or [WINDOWED if layer % step else UNBOUNDED for layer in range(num_layers)]
    if len(types) != num_layers or not set(types) <= {WINDOWED, UNBOUNDED}:
        raise ConfigError(f"layer_types must name {num_layers} layers, {WINDOWED} or {UNBOUNDED}; got {types}")
    return list(types)


def _rules(layers: list[int], num_layers: int, attention: Attention, position: Position) -> list[LayerRule]:
    """These layers, in one rule where they are every n-th one."""
    if not layers:
        return []
    step = layers[1] - layers[0] if len(layers) > 1 else num_layers
    if layers == list(range(layers[0], num_layers, step)):
        return [LayerRule(start=layers[0], step=step, attention=attention, position=position)]
    return [LayerRule(start=layer, stop=layer + 1, attention=attention, position=position) for layer in layers]


def write_config(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The `ModernBertConfig` of ours, as far as one can say it."""
    parts = [architecture.layer(layer) for layer in range(architecture.num_layers)]
    reach = next((p.attention.pattern.left for p in parts if isinstance(p.attention.pattern, Window)), 64)
    positions: dict[str, Position] = {
        WINDOWED if isinstance(part.attention.pattern, Window) else UNBOUNDED: part.position for part in parts
    }
    head = architecture.head or TokenHead(dense_bias=False)
    return {
        "model_type": "modernbert",
        "vocab_size": architecture.embedding.vocab_size,
        "hidden_size": architecture.width,
        "intermediate_size": architecture.feedforward.width,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.attention.num_heads,
        "hidden_activation": foreign_activation(architecture.feedforward.activation),
        "max_position_embeddings": 8192,
        "initializer_range": architecture.init.std,
        "norm_eps": getattr(architecture.norm, "eps", None),
        "norm_bias": getattr(architecture.norm, "bias", None),
        "attention_bias": architecture.attention.qkv_bias,
        "attention_dropout": architecture.attention.dropout,
        "layer_types": [WINDOWED if isinstance(p.attention.pattern, Window) else UNBOUNDED for p in parts],
        "rope_parameters": {
            kind: write_rotary(positions.get(kind, NoPosition())).get("rope_parameters")
            for kind in (WINDOWED, UNBOUNDED)
        },
        "local_attention": 2 * reach,
        "embedding_dropout": architecture.embedding.dropout,
        "mlp_bias": architecture.feedforward.in_bias,
        "mlp_dropout": architecture.feedforward.dropout,
        "decoder_bias": head.bias,
        "classifier_bias": head.dense_bias,
        "classifier_activation": foreign_activation(head.activation or "gelu"),
        "tie_word_embeddings": head.is_tied,
        **special_ids(tokenizer, "bos", "eos", "pad", "cls", "sep"),
    }


HEADS = heads_by_prefix(tokens="head.")
MODERNBERT = sequence_family(
    "ModernBERT", "text", "modernbert", "ModernBert", TABLE, read_config, write_config, "model.", "ForMaskedLM", HEADS
)
