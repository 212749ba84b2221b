"""DNABERT-2 (Zhou 2023, arXiv 2306.15006), which is MosaicBERT (Portes 2023, arXiv 2312.17482) on bases.

In the layout of its own published code, which no library has: post-norm as BERT, without positions but with a bias of
scores that falls with distance, queries, keys and values in one map, and a feed-forward layer gated by GELU.
"""

from functools import partial
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.interop.families import bert
from meristem.interop.family import ForeignConfig, Tensors, classes_by_head
from meristem.interop.settings import Settings, special_ids, write_fields
from meristem.interop.table import Ignored, KeyTable, Tied, block_rows
from meristem.model.config import FeedForward, LinearBias, TokenHead, TransformerConfig

CODE = {
    "AutoConfig": "configuration_bert.BertConfig",
    "AutoModel": "bert_layers.BertModel",
    "AutoModelForMaskedLM": "bert_layers.BertForMaskedLM",
}
"""The published code that a config names; it is beside the published weights and is not written."""

LAYER = "bert.encoder.layer.{}"

TABLE = KeyTable(
    rows=(
        *bert.trunk_rows("bert.", positions=False),
        *block_rows(f"{LAYER}.attention", attention_norm="output.LayerNorm", qkv="self.Wqkv", out="output.dense"),
        *block_rows(f"{LAYER}.mlp", feedforward_norm="layernorm", up="gated_layers", down="wo"),
        *bert.prediction_rows(bias=f"{bert.DECODER}.bias"),
    ),
    tied=(Tied(f"{bert.DECODER}.weight", bert.EMBEDDING), Tied("cls.predictions.bias", f"{bert.DECODER}.bias")),
    ignored=(
        Ignored(r"bert\.embeddings\.(position_ids|token_type_ids)"),
        # slopes times distances, computed anew
        Ignored(r"bert\.encoder\.alibi"),
    ),
)


def recognises(config: ForeignConfig) -> bool:
    """Whether a config is that of a MosaicBERT; its `model_type` is that of BERT."""
    code = config.get("auto_map") or {}
    named = any("bert_layers." in str(name) for name in code.values())
    return config.get("model_type") == "bert" and ("alibi_starting_size" in config or named)


def read_config(config: ForeignConfig, tensors: Tensors) -> TransformerConfig:
    found = Settings("a DNABERT-2", config, bert.FIELDS)
    return bert.read_post_norm(
        found,
        tensors,
        position=LinearBias(),
        # whatever the config says, the feed-forward layer is gated by the exact GELU
        feedforward=FeedForward(width=found["intermediate_size"], is_gated=True, in_bias=False),
        head=partial(TokenHead, activation=found.choice("hidden_act")),
    )


def write_config(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "model_type": "bert",
        **write_fields(architecture, bert.FIELDS),
        "alibi_starting_size": 512,
        "auto_map": CODE,
        **special_ids(tokenizer),
    }


DNABERT2 = bert.BERT.variant(
    name="DNABERT-2",
    domain="dna",
    read_heads=bert.SYMBOL_HEAD,
    recognises=recognises,
    read_config=read_config,
    write_config=write_config,
    table=TABLE,
    name_class=classes_by_head("BertForMaskedLM", "BertModel"),
    runner=None,
)
