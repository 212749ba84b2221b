"""Llama (Touvron 2023, arXiv 2302.13971), Qwen2, Qwen3 and StarCoder2: one reader, and a value for what differs.

As Hugging Face keeps them (`LlamaForCausalLM` and so on): a causal pre-norm stack with rotary positions in halves
and fewer key heads than query heads. They differ in norms, in the feed-forward layer, in which maps have biases, in
which layers see a window, and in a norm of queries and keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.errors import ConfigError, require
from meristem.interop.family import Family, ForeignConfig, Tensors, sequence_family
from meristem.interop.rotary import read_rotary, write_rotary
from meristem.interop.settings import BIASES, COMMON, Field, Settings, activation, special_ids, write_fields
from meristem.interop.table import Ignored, KeyTable, Rename, Row, Tied, block_rows, head_rows
from meristem.model import config as arch
from meristem.model.config.layer import QueryKeyNorm

FIELDS = (
    *COMMON,
    Field("num_key_value_heads", "attention.num_kv_heads", None),
    activation("hidden_act", "silu"),
    Field("attention_dropout", "attention.dropout", 0.0),
)
DEFAULTS = {"head_dim": None, "tie_word_embeddings": False}

LAYER = "model.layers.{}"


def decoder_rows(model: str) -> tuple[Row, ...]:
    """Rows for the embedding, and for attention and norms of blocks; `model` is the foreign name of the trunk."""
    return (
        Rename("trunk.embedding.symbols", f"{model}.embed_tokens"),
        *block_rows(
            f"{model}.layers.{{}}",
            attention_norm="input_layernorm",
            qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            q_norm="self_attn.q_norm",
            k_norm="self_attn.k_norm",
            out="self_attn.o_proj",
            feedforward_norm="post_attention_layernorm",
        ),
    )


def gated_rows(layer: str) -> tuple[Row, ...]:
    return block_rows(layer, up=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj")


ROWS = (*decoder_rows("model"), Rename("trunk.final_norm", "model.norm"), *head_rows(out="lm_head"))
TIED = (Tied("lm_head.weight", "model.embed_tokens.weight"),)
# computed from the config, by the reference too
BUFFERS = (Ignored(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),)

WINDOWED, UNBOUNDED = "sliding_attention", "full_attention"
"""Names of layers that see a window, and that have no bound."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What distinguishes one of these families from the others.

    Attributes:
        fields: settings beside those that all have.
        defaults: what settings mean that are not there, where it is not what they mean in most of these families.
        qkv_bias: whether queries, keys and values have biases where no setting says so. Other maps have none.
        norm: class of all its norms.
        has_window: whether a setting may bound what every layer sees.
        has_layer_types: whether the bound holds only in layers that another setting names.
        must_divide: whether the reference refuses a config in which heads do not divide the width.
    """

    model_type: str
    fields: tuple[Field, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    norm: type[arch.RMSNorm] | type[arch.LayerNorm] = arch.RMSNorm
    is_gated: bool = True
    qk_norm: QueryKeyNorm | None = None
    has_window: bool = False
    has_layer_types: bool = False
    must_divide: bool = False

    def family(self, name: str, domain: str, stem: str) -> Family:
        """Make the family of this kind; arguments as of `sequence_family`."""
        rows = gated_rows(LAYER) if self.is_gated else block_rows(LAYER, up="mlp.c_fc", down="mlp.c_proj")
        table = KeyTable((*ROWS, *rows), TIED, BUFFERS)
        return sequence_family(
            name, domain, self.model_type, stem, table, self.read_config, self.write_config, prefix="model."
        )

    def read_config(self, config: ForeignConfig, tensors: Tensors) -> arch.TransformerConfig:
        fields, defaults = (*FIELDS, *self.fields), {**DEFAULTS, **self.defaults}
        found = Settings(f"a {self.model_type}", config, fields, defaults)
        width, heads, head_width = found["hidden_size"], found["num_attention_heads"], found["head_dim"]
        found.require(per_layer_config={})
        divides = not self.must_divide or width % heads == 0
        require(divides, "num_attention_heads must divide hidden_size", f"{heads} for {width}")
        windows = self._read_windows(found)
        common = windows[0] if len(set(windows)) == 1 else None
        architecture = found.build(
            position=read_rotary(found),
            attention=partial(
                arch.Attention,
                head_width=None if head_width is None or head_width * heads == width else head_width,
                qkv_bias=self.qkv_bias,
                out_bias=False,
                qk_norm=self.qk_norm,
                pattern=_pattern(common),
            ),
            feedforward=partial(arch.FeedForward, is_gated=self.is_gated, in_bias=False, out_bias=False),
            norm=self.norm,
            head=partial(arch.TokenHead, activation=None, bias=False),
        )
        starts = [layer for layer, window in enumerate(windows) if layer == 0 or window != windows[layer - 1]]
        rules = [
            arch.LayerRule(
                start=start, stop=stop, attention=replace(architecture.attention, pattern=_pattern(windows[start]))
            )
            for start, stop in pairwise([*starts, len(windows)])
            if windows[start] != common
        ]
        return replace(architecture, layers=tuple(rules))

    def _read_windows(self, found: Settings) -> list[int | None]:
        """Of each layer, the tokens it sees, itself included; None for all earlier ones."""
        depth = found["num_hidden_layers"]
        if not self.has_window:
            return [None] * depth
        window = found["sliding_window"]
        if not self.has_layer_types:
            return [window] * depth
        if not found["use_sliding_window"]:
            window = None
        kinds = found["layer_types"]
        if kinds is None:
            first = depth if window is None else found["max_window_layers"]
            kinds = [UNBOUNDED if layer < first else WINDOWED for layer in range(depth)]
        if len(kinds) != depth or not set(kinds) <= {WINDOWED, UNBOUNDED}:
            raise ConfigError(
                f"layer_types must name {WINDOWED} or {UNBOUNDED} for each of {depth} layers; got {kinds}"
            )
        if WINDOWED in kinds and window is None:
            raise ConfigError(f"layer_types with {WINDOWED} needs sliding_window and use_sliding_window; got neither")
        return [window if kind == WINDOWED else None for kind in kinds]

    def write_config(self, architecture: arch.TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            **write_fields(architecture, (*FIELDS, *self.fields)),
            "num_key_value_heads": architecture.num_kv_heads,
            "head_dim": architecture.head_width,
            **write_rotary(architecture.position),
            **self._write_windows(architecture),
            **special_ids(tokenizer),
        }

    def _write_windows(self, architecture: arch.TransformerConfig) -> dict[str, Any]:
        if not self.has_window:
            return {}
        depth = architecture.num_layers
        patterns = [architecture.layer(layer).attention.pattern for layer in range(depth)]
        # a pattern that `_pattern` never gives is read as no window, and found by reading back
        parts = [pattern.parts if isinstance(pattern, arch.Both) else () for pattern in patterns]
        windows = [next((one.left + 1 for one in both if isinstance(one, arch.Window)), None) for both in parts]
        widths = [window for window in windows if window is not None]
        settings: dict[str, Any] = {"sliding_window": widths[0] if widths else None}
        if self.has_layer_types:
            settings["use_sliding_window"] = bool(widths)
            settings["max_window_layers"] = windows.index(widths[0]) if widths else depth
            settings["layer_types"] = [UNBOUNDED if window is None else WINDOWED for window in windows]
        return settings


def _pattern(window: int | None) -> arch.Pattern:
    """Of a causal layer that sees `window` tokens, itself included."""
    return arch.Causal() if window is None else arch.Causal() & arch.Window(left=window - 1)


RMS_EPS = Field("rms_norm_eps", "norm.eps", 1e-6)

LLAMA = Kind(model_type="llama", fields=(RMS_EPS, *BIASES), must_divide=True).family("Llama", "text", "Llama")

QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

QWEN2 = Kind(
    model_type="qwen2",
    fields=(RMS_EPS,),
    defaults=QWEN_DEFAULTS,
    qkv_bias=True,
    has_window=True,
    has_layer_types=True,
).family("Qwen2", "text", "Qwen2")

QWEN3 = Kind(
    model_type="qwen3",
    fields=(RMS_EPS, BIASES[0]),
    defaults={**QWEN_DEFAULTS, "head_dim": 128},
    qk_norm="head",
    has_window=True,
    has_layer_types=True,
).family("Qwen3", "text", "Qwen3")

STARCODER2 = Kind(
    model_type="starcoder2",
    fields=(
        Field("norm_epsilon", "norm.eps", 1e-5),
        Field("use_bias", (*BIASES[0].own, *BIASES[1].own), True),
        Field("residual_dropout", "residual.dropout", 0.0),
        Field("embedding_dropout", "embedding.dropout", 0.0),
    ),
    defaults={
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.018042,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    norm=arch.LayerNorm,
    is_gated=False,
    has_window=True,
).family("StarCoder2", "code", "Starcoder2")
