"""CodeNet: models of codes as another program of the laboratory keeps them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab_codes.tokenizer import PairTokenizer
from meristem.data.tokenizer import Tokenizer
from meristem.interop.family import Family, ForeignConfig, heads_by_prefix, of_type
from meristem.interop.table import KeyTable, Rename, block_rows, head_rows
from meristem.model.config import TransformerConfig
from meristem.model.plain import from_json, to_json
from meristem.shapes import Tensor

ALPHABET = "alphabet.json"

TABLE = KeyTable(
    rows=(
        Rename("trunk.embedding.symbols", "codes"),
        *block_rows(
            "rings.{}", attention_norm="calm_1", qkv="look", out="say", feedforward_norm="calm_2", up="up", down="down"
        ),
        Rename("trunk.final_norm", "calm"),
        *head_rows(dense="guess.dense", norm="guess.calm", out="guess.out", bias="guess.bias"),
    )
)


def read_config(config: ForeignConfig, tensors: Mapping[str, Tensor]) -> TransformerConfig:
    """CodeNet says the shape of a model in our words."""
    return from_json(TransformerConfig, config["shape"])


def write_config(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The config of a model of codes; of another tokenizer there is none."""
    kind = "codenet" if isinstance(tokenizer, PairTokenizer) else "none of ours"
    return {"model_type": kind, "shape": to_json(architecture)}


def read_tokenizer(folder: Path, config: ForeignConfig) -> tuple[Tokenizer, list[str]]:
    """The alphabet lies in a file of its own."""
    return PairTokenizer.from_json(json.loads((folder / ALPHABET).read_text("utf-8"))), []


CODENET = Family(
    name="CodeNet",
    domain="lab-codes",
    recognises=of_type("codenet"),
    read_config=read_config,
    write_config=write_config,
    table=TABLE,
    read_heads=heads_by_prefix(tokens="guess."),
    read_tokenizer=read_tokenizer,
    write_tokenizer=lambda tokenizer: {ALPHABET: json.dumps(tokenizer.to_json())},
    name_class=lambda heads: "CodeNet",
)
