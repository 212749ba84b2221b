"""GPT-2 (Radford 2019) and GPTBigCode (Ben Allal 2023, arXiv 2301.03988), which is GPT-2 with one key head.

As Hugging Face keeps them (`GPT2LMHeadModel`, `GPTBigCodeForCausalLM`): a causal pre-norm stack with biases
everywhere, the tanh form of GELU, a learned table of positions, a head tied to the embedding. GPT-2 keeps its maps
transposed. GPTBigCode with a key head for each query head keeps queries, keys and values of one head together.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.interop.family import ForeignConfig, Tensors, sequence_family
from meristem.interop.settings import INIT_STD, IS_TIED, Field, Settings, activation, special_ids, write_fields
from meristem.interop.table import Ignored, KeyTable, Rename, Row, Tied, Transform, Transposed, block_rows, head_rows
from meristem.model.config import Attention, Causal, FeedForward, Init, LayerRule, Learned, TokenHead, TransformerConfig
from meristem.shapes import Tensor

LAYER = "transformer.h.{}"


def _by_kind(tensors: Sequence[Tensor], config: TransformerConfig) -> Tensor:
    """Rows of queries, keys and values, of rows kept head after head where each head has all three."""
    heads = config.attention.num_heads
    if config.num_kv_heads != heads:
        return tensors[0]
    return tensors[0].unflatten(0, (heads, 3, config.head_width)).transpose(0, 1).flatten(0, 2)


def _by_head(tensor: Tensor, config: TransformerConfig) -> Sequence[Tensor]:
    """The inverse of `_by_kind`."""
    heads = config.attention.num_heads
    if config.num_kv_heads != heads:
        return [tensor]
    return [tensor.unflatten(0, (3, heads, config.head_width)).transpose(0, 1).flatten(0, 2)]


COMMON = (
    Rename("trunk.embedding.symbols", "transformer.wte"),
    Rename("trunk.embedding.position.table", "transformer.wpe"),
    *block_rows(LAYER, attention_norm="ln_1", feedforward_norm="ln_2"),
    Rename("trunk.final_norm", "transformer.ln_f"),
    *head_rows(out="lm_head"),
)
TIED = (Tied("lm_head.weight", "transformer.wte.weight"),)
BUFFERS = (Ignored(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|causal_mask)"),)
"""Masks, which old checkpoints hold."""

TABLE = KeyTable(
    rows=(
        *COMMON,
        Transposed("trunk.blocks.{}.attention.qkv", f"{LAYER}.attn.c_attn"),
        Transposed("trunk.blocks.{}.attention.out", f"{LAYER}.attn.c_proj"),
        Transposed("trunk.blocks.{}.feedforward.up", f"{LAYER}.mlp.c_fc"),
        Transposed("trunk.blocks.{}.feedforward.down", f"{LAYER}.mlp.c_proj"),
    ),
    tied=TIED,
    ignored=BUFFERS,
)

BIGCODE_ROWS = (
    *COMMON,
    Row("trunk.blocks.{}.attention.qkv", (f"{LAYER}.attn.c_attn",), Transform(_by_kind, _by_head)),
    *block_rows(LAYER, out="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj"),
)
BIGCODE_TABLE = KeyTable(BIGCODE_ROWS, TIED, BUFFERS)

ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

FIELDS = (
    Field("vocab_size", "embedding.vocab_size"),
    Field("n_embd", "width"),
    Field("n_layer", "num_layers"),
    Field("n_head", "attention.num_heads"),
    activation("activation_function", "gelu_new"),
    Field("resid_pdrop", "residual.dropout", 0.1),
    Field("embd_pdrop", "embedding.dropout", 0.1),
    Field("attn_pdrop", "attention.dropout", 0.1),
    Field("layer_norm_epsilon", "norm.eps", 1e-5),
    INIT_STD,
    IS_TIED,
)
DEFAULTS = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}


def read_config(config: ForeignConfig, tensors: Tensors) -> TransformerConfig:
    # reorder_and_upcast_attn says how scores are computed in half precision, and not what they are
    found = Settings("a GPT-2", config, FIELDS, DEFAULTS, ALIASES)
    architecture = _read(found)
    if not found["scale_attn_by_inverse_layer_idx"]:
        return architecture
    # layer i divides its scores by i + 1
    attention = architecture.attention
    base = architecture.head_width**-0.5 if attention.scale is None else attention.scale
    rules = [
        LayerRule(start=layer, stop=layer + 1, attention=replace(attention, scale=base / (layer + 1)))
        for layer in range(1, architecture.num_layers)
    ]
    return replace(architecture, layers=tuple(rules))


def read_bigcode(config: ForeignConfig, tensors: Tensors) -> TransformerConfig:
    defaults = {**DEFAULTS, "activation_function": "gelu_pytorch_tanh", "multi_query": True}
    found = Settings("a GPTBigCode", config, FIELDS, defaults, ALIASES)
    found.require(scale_attn_by_inverse_layer_idx=False)
    return _read(found, num_kv_heads=1 if found["multi_query"] else found["n_head"])


def _read(found: Settings, num_kv_heads: int | None = None) -> TransformerConfig:
    """What GPT-2 and GPTBigCode have in common."""
    found.require(add_cross_attention=False)
    return read_gpt(
        found,
        partial(Attention, num_kv_heads=num_kv_heads, scale=None if found["scale_attn_weights"] else 1.0),
        position=Learned(max_positions=found["n_positions"]),
        head=partial(TokenHead, activation=None, bias=False),
        init=partial(Init, is_depth_scaled=True),
    )


def read_gpt(found: Settings, attention: partial[Attention], **parts: Any) -> TransformerConfig:
    """Build a causal stack from settings with the names of GPT-2; `parts` as in `Settings.build`."""
    width = found.get("n_inner")
    return found.build(
        attention=partial(attention, pattern=Causal()),
        feedforward=partial(FeedForward, width=4 * found["n_embd"] if width is None else width),
        **parts,
    )


def write_config(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    last = architecture.layer(architecture.num_layers - 1).attention
    is_by_layer = last.scale != architecture.attention.scale
    return {
        "model_type": "gpt2",
        **_write(architecture, tokenizer),
        "scale_attn_by_inverse_layer_idx": is_by_layer,
        "reorder_and_upcast_attn": False,
    }


def write_bigcode(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    is_multi_query = architecture.num_kv_heads == 1 and architecture.attention.num_heads > 1
    return {"model_type": "gpt_bigcode", **_write(architecture, tokenizer), "multi_query": is_multi_query}


def _write(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    position = architecture.position
    return {
        **write_gpt(architecture, tokenizer),
        "n_positions": position.max_positions if isinstance(position, Learned) else 1024,
        "scale_attn_weights": architecture.attention.scale is None,
        "add_cross_attention": False,
    }


def write_gpt(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Settings of a causal stack with the names of GPT-2, without those of positions and attention scores."""
    return {
        **write_fields(architecture, FIELDS),
        "n_inner": architecture.feedforward.width,
        **special_ids(tokenizer),
    }


GPT2 = sequence_family("GPT-2", "text", "gpt2", "GPT2", TABLE, read_config, write_config, suffix="LMHeadModel")
GPT_BIGCODE = sequence_family(
    "GPTBigCode", "code", "gpt_bigcode", "GPTBigCode", BIGCODE_TABLE, read_bigcode, write_bigcode, variant_of=GPT2
)
