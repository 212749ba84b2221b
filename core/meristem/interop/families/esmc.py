"""ESM-C (EvolutionaryScale 2024), as Hugging Face keeps it (`EsmcForMaskedLM`, `EsmcModel`).

Pre-norm with rotary positions and a gated feed-forward layer, no biases in maps; queries and keys are normed over all
heads at once, each branch is divided by sqrt(layers / 36), and the head is not tied. Its last norm and those of
queries and keys have no bias, the others have one: ours has one after the last block, which is zero.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from meristem.data.tokenizer import AlphabetTokenizer, Tokenizer
from meristem.errors import ConfigError
from meristem.interop.families.esm import RESIDUES, SPECIAL, ids_of_special, read_residues
from meristem.interop.families.llama import decoder_rows, gated_rows
from meristem.interop.family import ForeignConfig, Tensors, heads_by_prefix, sequence_family
from meristem.interop.rotary import read_rotary, write_rotary
from meristem.interop.settings import BIASES, INIT_STD, SHAPE, Field, Settings, activation, write_fields
from meristem.interop.table import KeyTable, Lacking, Rename, lm_head_rows
from meristem.interop.vocabulary import json_text
from meristem.interop.vocabulary_files import SETTINGS, WORDS
from meristem.model.config import Attention, FeedForward, LayerNorm, Residual, TokenHead, TransformerConfig

SYMBOLS = ("<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, *"XBUZO.-|", "<mask>")
"""The vocabulary of all published models: that of ESM with a symbol between chains."""

FIELDS = (
    *SHAPE,
    activation("hidden_act", "silu"),
    INIT_STD,
    *BIASES,
    Field("attention_dropout", "attention.dropout", 0.0),
)

TABLE = KeyTable(
    rows=(
        *decoder_rows("esmc"),
        *gated_rows("esmc.layers.{}"),
        Rename("trunk.final_norm.weight", "esmc.norm.weight"),
        Lacking("trunk.final_norm.bias"),
        *lm_head_rows(bias="lm_head.decoder.bias"),
    ),
)


def read_config(config: ForeignConfig, tensors: Tensors) -> TransformerConfig:
    plain = {**config, "attention_dropout": config.get("attention_dropout") or 0.0}
    found = Settings("an ESM-C", plain, FIELDS, {"max_position_embeddings": 2048})
    width, heads, num_layers = found["hidden_size"], found["num_attention_heads"], found["num_hidden_layers"]
    found.require(num_key_value_heads=heads, head_dim=width // heads, tie_word_embeddings=False)
    return found.build(
        position=read_rotary(found),
        attention=partial(Attention, qk_norm="full"),
        feedforward=partial(FeedForward, is_gated=True),
        norm=LayerNorm(eps=1e-5),  # a constant of the reference, as are the 36 layers of the model that scales nothing
        residual=Residual(scale=(36 / num_layers) ** 0.5),
        head=TokenHead(is_tied=False),
    )


def write_config(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "model_type": "esmc",
        **write_fields(architecture, FIELDS),
        **write_rotary(architecture.position),
        **ids_of_special(tokenizer),
    }


def write_tokenizer(tokenizer: Tokenizer) -> dict[str, str]:
    """Texts of the files of an `EsmcTokenizer`, by file name; its vocabulary is always the same.

    Raises:
        ConfigError: another vocabulary.
    """
    if not isinstance(tokenizer, AlphabetTokenizer) or tuple(tokenizer.vocab) != SYMBOLS:
        raise ConfigError("a tokenizer of ESM-C must have the vocabulary of the published models; got another one")
    names = {f"{role}_token": symbol for role, symbol in SPECIAL.items()}
    settings = {**names, "tokenizer_class": "EsmcTokenizer", "clean_up_tokenization_spaces": False}
    # the foreign class reads no vocabulary; ours does
    return {WORDS: "\n".join(SYMBOLS), SETTINGS: json_text(settings)}


ESMC = replace(
    sequence_family("ESM-C", "protein", "esmc", "Esmc", TABLE, read_config, write_config, "esmc.", "ForMaskedLM"),
    read_heads=heads_by_prefix(tokens="lm_head."),
    read_tokenizer=partial(read_residues, published=SYMBOLS, num_rows=64, kind="ESM-C"),
    write_tokenizer=write_tokenizer,
)
