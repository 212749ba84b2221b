"""Llama (Touvron 2023, arXiv 2302.13971), Qwen2, Qwen3 and StarCoder2: one reader, and a value for what differs.

As Hugging Face keeps them (`LlamaForCausalLM` and so on): a causal pre-norm stack with rotary positions in halves
and fewer key heads than query heads. They differ in norms, in the feed-forward layer, in which maps have biases, in
which layers see a window, and in a norm of queries and keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.errors import ConfigError
from meristem.interop.family import Family, ForeignConfig, sequence_family
from meristem.interop.rotary import read_rotary, write_rotary
from meristem.interop.rows import block_rows, head_rows
from meristem.interop.settings import Settings, foreign_activation, special_ids
from meristem.interop.table import Ignored, KeyTable, Rename, Row, Tied
from meristem.model.config import (
    Attention,
    Both,
    Causal,
    Embedding,
    FeedForward,
    Init,
    LayerNorm,
    LayerRule,
    Pattern,
    Residual,
    RMSNorm,
    TokenHead,
    TransformerConfig,
    Window,
)
from meristem.model.config.layer import QueryKeyNorm
from meristem.shapes import Tensor

DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}

LAYER = "model.layers.{}"


def decoder_rows(model: str) -> tuple[Row, ...]:
    """Rows of embedding, attention and norms of blocks.

    Args:
        model: foreign name of the trunk.
    """
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
    """Rows of a feed-forward layer with a gate."""
    return block_rows(layer, up=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj")


COMMON = (*decoder_rows("model"), Rename("trunk.final_norm", "model.norm"), *head_rows(out="lm_head"))
TIED = (Tied("lm_head.weight", "model.embed_tokens.weight"),)
# computed from the config, by the reference too
BUFFERS = (Ignored(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),)
GATED_TABLE = KeyTable((*COMMON, *gated_rows(LAYER)), TIED, BUFFERS)
PLAIN_TABLE = KeyTable((*COMMON, *block_rows(LAYER, up="mlp.c_fc", down="mlp.c_proj")), TIED, BUFFERS)

WINDOWED = "sliding_attention"
UNBOUNDED = "full_attention"
"""Names of layers that see a window, and that see every earlier token."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What sets one of these families apart.

    Attributes:
        model_type: in its config.
        defaults: of its settings, where they are not those of most.
        biases: of queries, keys and values; of attention's output; of the feed-forward layer: a setting, or what
            they always are.
        norm: kind of all its norms.
        eps: setting of their epsilon.
        is_gated: the feed-forward layer has a gate.
        qk_norm: of queries and keys.
        has_window: a setting may bound what a layer sees: every layer,
        has_layer_types: or those layers alone that another setting names.
        must_divide: its config is refused by the reference where heads do not divide the width.
    """

    model_type: str
    defaults: Mapping[str, Any]
    biases: tuple[str | bool, str | bool, str | bool]
    norm: type[RMSNorm] | type[LayerNorm] = RMSNorm
    eps: str = "rms_norm_eps"
    is_gated: bool = True
    qk_norm: QueryKeyNorm | None = None
    has_window: bool = False
    has_layer_types: bool = False
    must_divide: bool = False

    def family(self, name: str, domain: str, stem: str) -> Family:
        """The family of this kind.

        Args:
            name: as reports call it.
            domain: that reads its inputs.
            stem: of the names of its foreign classes.
        """
        table = GATED_TABLE if self.is_gated else PLAIN_TABLE
        return sequence_family(
            name, domain, self.model_type, stem, table, self.read_config, self.write_config, prefix="model."
        )

    def read_config(self, config: ForeignConfig, tensors: Mapping[str, Tensor]) -> TransformerConfig:
        """Our config of a foreign one."""
        found = Settings(f"a {self.model_type}", config, {**DEFAULTS, **self.defaults})
        width, heads, head_width = found["hidden_size"], found["num_attention_heads"], found["head_dim"]
        found.require(per_layer_config={})
        if self.must_divide and width % heads:
            raise ConfigError(f"num_attention_heads must divide hidden_size; got {heads} for {width}")
        qkv_bias, out_bias, feedforward_bias = (found[bias] if isinstance(bias, str) else bias for bias in self.biases)
        attention = Attention(
            num_heads=heads,
            num_kv_heads=found["num_key_value_heads"],
            head_width=None if head_width is None or head_width * heads == width else head_width,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=self.qk_norm,
            pattern=Causal(),
            dropout=found["attention_dropout"],
        )
        windows = self._read_windows(found)
        common = windows[0] if len(set(windows)) == 1 else None
        return TransformerConfig(
            width=width,
            num_layers=found["num_hidden_layers"],
            embedding=Embedding(vocab_size=found["vocab_size"], dropout=found["embedding_dropout"]),
            position=read_rotary(found),
            attention=replace(attention, pattern=_pattern(common)),
            feedforward=FeedForward(
                width=found["intermediate_size"],
                activation=found.activation("hidden_act"),
                is_gated=self.is_gated,
                in_bias=feedforward_bias,
                out_bias=feedforward_bias,
            ),
            norm=self.norm(eps=found[self.eps]),
            residual=Residual(dropout=found["residual_dropout"]),
            layers=tuple(
                LayerRule(start=start, stop=stop, attention=replace(attention, pattern=_pattern(window)))
                for start, stop, window in _runs(windows)
                if window != common
            ),
            head=TokenHead(activation=None, is_tied=found["tie_word_embeddings"], bias=False),
            init=Init(std=found["initializer_range"]),
        )

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

    def write_config(self, architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """The foreign config of ours, as far as one can say it."""
        attention, feedforward = architecture.attention, architecture.feedforward
        biases = (attention.qkv_bias, attention.out_bias, feedforward.in_bias)
        return {
            "model_type": self.model_type,
            "vocab_size": architecture.embedding.vocab_size,
            "hidden_size": architecture.width,
            "intermediate_size": feedforward.width,
            "num_hidden_layers": architecture.num_layers,
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": architecture.num_kv_heads,
            "head_dim": architecture.head_width,
            "hidden_act": foreign_activation(feedforward.activation),
            self.eps: getattr(architecture.norm, "eps", None),
            **write_rotary(architecture.position),
            **self._write_windows(architecture),
            **{name: value for name, value in zip(self.biases, biases, strict=True) if isinstance(name, str)},
            "attention_dropout": attention.dropout,
            **{
                name: value
                for name, value in (
                    ("residual_dropout", architecture.residual.dropout),
                    ("embedding_dropout", architecture.embedding.dropout),
                )
                if name in self.defaults
            },
            "initializer_range": architecture.init.std,
            "tie_word_embeddings": architecture.head is None or architecture.head.is_tied,
            **special_ids(tokenizer),
        }

    def _write_windows(self, architecture: TransformerConfig) -> dict[str, Any]:
        if not self.has_window:
            return {}
        depth = architecture.num_layers
        windows = [_window_of(architecture.layer(layer).attention.pattern) for layer in range(depth)]
        widths = [window for window in windows if window is not None]
        settings: dict[str, Any] = {"sliding_window": widths[0] if widths else None}
        if self.has_layer_types:
            settings["use_sliding_window"] = bool(widths)
            settings["max_window_layers"] = windows.index(widths[0]) if widths else depth
            settings["layer_types"] = [UNBOUNDED if window is None else WINDOWED for window in windows]
        return settings


LLAMA_KIND = Kind(
    model_type="llama",
    biases=("attention_bias", "attention_bias", "mlp_bias"),
    defaults={"attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-6},
    must_divide=True,
)

QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

QWEN2_KIND = Kind(
    model_type="qwen2",
    biases=(True, False, False),
    defaults=QWEN_DEFAULTS,
    has_window=True,
    has_layer_types=True,
)

QWEN3_KIND = Kind(
    model_type="qwen3",
    biases=("attention_bias", "attention_bias", False),
    defaults={**QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False},
    qk_norm="head",
    has_window=True,
    has_layer_types=True,
)

STARCODER2_KIND = Kind(
    model_type="starcoder2",
    biases=("use_bias", "use_bias", "use_bias"),
    defaults={
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "initializer_range": 0.018042,
        "use_bias": True,
        "sliding_window": None,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "tie_word_embeddings": True,
    },
    norm=LayerNorm,
    eps="norm_epsilon",
    is_gated=False,
    has_window=True,
)


def _pattern(window: int | None) -> Pattern:
    """Of a causal layer that sees `window` tokens, itself included."""
    return Causal() if window is None else Causal() & Window(left=window - 1)


def _window_of(pattern: Pattern) -> int | None:
    """The inverse of `_pattern`; what it never gives is read as no window, and found by reading back."""
    reaches = [part.left for part in pattern.parts if isinstance(part, Window)] if isinstance(pattern, Both) else []
    return reaches[0] + 1 if reaches else None


def _runs(windows: list[int | None]) -> list[tuple[int, int, int | None]]:
    """Layers with the same window one after the other: the first, the one behind the last, and the window."""
    found, start = [], 0
    for window, run in groupby(windows):
        stop = start + len(list(run))
        found.append((start, stop, window))
        start = stop
    return found


LLAMA = LLAMA_KIND.family("Llama", "text", "Llama")
QWEN2 = QWEN2_KIND.family("Qwen2", "text", "Qwen2")
QWEN3 = QWEN3_KIND.family("Qwen3", "text", "Qwen3")
STARCODER2 = STARCODER2_KIND.family("StarCoder2", "code", "Starcoder2")
