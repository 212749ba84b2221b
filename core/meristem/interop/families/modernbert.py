"""ModernBERT (Warner 2024, arXiv 2412.13663): an encoder most of whose layers see a window.

As Hugging Face keeps it (`ModernBertForMaskedLM`, `ModernBertModel`): pre-norm, norms without biases, rotary
positions of two bases (one for windows, one for layers that see all), a gated feed-forward layer in one map, and no
norm before the first layer's attention.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.errors import ConfigError
from meristem.interop.families.llama import UNBOUNDED, WINDOWED
from meristem.interop.family import ForeignConfig, Tensors, heads_by_prefix, sequence_family
from meristem.interop.rotary import read_rotary, write_rotary
from meristem.interop.settings import BIASES, COMMON, Field, Settings, activation, special_ids, write_fields
from meristem.interop.table import KeyTable, Rename, Tied, block_rows, head_rows
from meristem.model import config as arch

FIELDS = (
    *COMMON,
    activation("hidden_activation", "gelu"),
    Field("norm_eps", "norm.eps", 1e-5),
    Field("norm_bias", "norm.bias", False),
    *BIASES,
    Field("attention_dropout", "attention.dropout", 0.0),
    Field("embedding_dropout", "embedding.dropout", 0.0),
    Field("mlp_dropout", "feedforward.dropout", 0.0),
    Field("decoder_bias", "head.bias", True, absent=True),
    Field("classifier_bias", "head.dense_bias", False, absent=False),
    activation("classifier_activation", "gelu", "head.activation", absent="gelu"),
)
DEFAULTS = {
    "max_position_embeddings": 8192,
    "global_attn_every_n_layers": 3,
    "local_attention": 128,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
}

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


def read_config(config: ForeignConfig, tensors: Tensors) -> arch.TransformerConfig:
    found = Settings("a ModernBERT", config, FIELDS, DEFAULTS)
    reach = found["local_attention"] // 2
    window, local_position = arch.Window(left=reach, right=reach), _position(found, WINDOWED, "local")
    global_position = _position(found, UNBOUNDED, "global")
    num_layers, step = found["num_hidden_layers"], found["global_attn_every_n_layers"]
    types = found.get("layer_types") or [WINDOWED if layer % step else UNBOUNDED for layer in range(num_layers)]
    if len(types) != num_layers or not set(types) <= {WINDOWED, UNBOUNDED}:
        raise ConfigError(f"layer_types must name {num_layers} layers, {WINDOWED} or {UNBOUNDED}; got {types}")
    unbounded = [layer for layer, kind in enumerate(types) if kind == UNBOUNDED]
    has_window = len(unbounded) < len(types)
    architecture = found.build(
        embedding=partial(arch.Embedding, is_normed=True),
        position=local_position if has_window else global_position,
        attention=partial(arch.Attention, pattern=window if has_window else arch.Full()),
        feedforward=partial(arch.FeedForward, is_gated=True),
        init=partial(arch.Init, is_depth_scaled=True),
    )
    sees_all = replace(architecture.attention, pattern=arch.Full())
    rules = _rules(unbounded, len(types), sees_all, global_position) if has_window else []
    return replace(architecture, layers=(arch.LayerRule(stop=1, attention_norm=arch.NoNorm()), *rules))


def _position(found: Settings, kind: str, older: str) -> arch.Rotary:
    """Rotary positions of one kind of layers, in the words of now or of before."""
    values = (found.get("rope_parameters") or {}).get(kind) or {}
    values = {"rope_theta": found[f"{older}_rope_theta"], **(found.get("rope_scaling") or {}), **values}
    length = found["max_position_embeddings"]
    return read_rotary(Settings("a ModernBERT", {"rope_parameters": values, "max_position_embeddings": length}))


def _rules(
    layers: list[int], num_layers: int, attention: arch.Attention, position: arch.Position
) -> list[arch.LayerRule]:
    """These layers, in one rule where they are every n-th one."""
    if not layers:
        return []
    step = layers[1] - layers[0] if len(layers) > 1 else num_layers
    if layers == list(range(layers[0], num_layers, step)):
        return [arch.LayerRule(start=layers[0], step=step, attention=attention, position=position)]
    return [arch.LayerRule(start=layer, stop=layer + 1, attention=attention, position=position) for layer in layers]


def write_config(architecture: arch.TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    parts = [architecture.layer(layer) for layer in range(architecture.num_layers)]
    reach = next((p.attention.pattern.left for p in parts if isinstance(p.attention.pattern, arch.Window)), 64)
    kinds = [WINDOWED if isinstance(p.attention.pattern, arch.Window) else UNBOUNDED for p in parts]
    positions = {kind: part.position for kind, part in zip(kinds, parts)}
    return {
        "model_type": "modernbert",
        **write_fields(architecture, FIELDS),
        "max_position_embeddings": 8192,
        "layer_types": kinds,
        "rope_parameters": {
            kind: write_rotary(positions.get(kind, arch.NoPosition())).get("rope_parameters")
            for kind in (WINDOWED, UNBOUNDED)
        },
        "local_attention": 2 * reach,
        **special_ids(tokenizer, "bos", "eos", "pad", "cls", "sep"),
    }


MODERNBERT = replace(
    sequence_family(
        "ModernBERT", "text", "modernbert", "ModernBert", TABLE, read_config, write_config, "model.", "ForMaskedLM"
    ),
    read_heads=heads_by_prefix(tokens="head."),
)
