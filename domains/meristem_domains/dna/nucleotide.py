"""Nucleotide Transformer (Dalla-Torre 2024, doi 10.1038/s41592-024-02523-z) v1 and v2: ESM over words of six bases.

v1 is an ESM-1b, which `transformers` has; v2 is an ESM-2 whose feed-forward layer is gated by SiLU and has no biases.
v2 is kept in the layout of its own published code, which no library has: many of its configs name no `model_type`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from meristem.data.subwords import ROLES
from meristem.data.tokenizer import Tokenizer
from meristem.errors import CheckpointError, ConfigError
from meristem.interop.families import esm
from meristem.interop.families.esm import ESM
from meristem.interop.family import ForeignConfig, Tensors
from meristem.interop.vocabulary import SPECIAL_MAP, json_text, symbol_of
from meristem.interop.vocabulary_files import SETTINGS, WORDS, read_lines, read_object
from meristem.model.config import TransformerConfig
from meristem.shapes import Tensor
from meristem_domains.dna.kmers import KmerTokenizer

CODE = {
    "AutoConfig": "esm_config.EsmConfig",
    "AutoModelForMaskedLM": "modeling_esm.EsmForMaskedLM",
}
"""The published code that a config names; it is beside the published weights and is not written."""


def read_config(config: ForeignConfig, tensors: Tensors) -> TransformerConfig:
    bias = bool(config["add_bias_fnn"])
    plain = {name: value for name, value in config.items() if name not in ("add_bias_fnn", "hidden_act")}
    architecture = esm.read_config(plain, tensors)
    feedforward = replace(architecture.feedforward, activation="silu", is_gated=True, in_bias=bias, out_bias=bias)
    return replace(architecture, feedforward=feedforward)


def write_config(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    config = esm.write_config(architecture, tokenizer)
    del config["model_type"], config["hidden_act"]
    return {**config, "add_bias_fnn": architecture.feedforward.in_bias, "auto_map": CODE}


def derived(architecture: TransformerConfig) -> dict[str, Tensor]:
    """Buffers of rotary frequencies, which the published code keeps for each layer."""
    found = esm.derived(architecture).values()
    return {
        f"{esm.LAYER.format(layer)}.attention.self.{esm.FREQUENCIES}": frequencies.clone()
        for layer in range(architecture.num_layers)
        for frequencies in found
    }


def read_kmers(folder: Path, config: ForeignConfig) -> tuple[KmerTokenizer, list[str]]:
    """Read a k-mer tokenizer from `vocab.txt` of a directory of another library; also returns notes for the user.

    Raises:
        CheckpointError: no vocabulary, or one that is damaged or larger than `vocab_size`.
    """
    file = folder / WORDS
    vocab = read_lines(file)
    stated = {**read_object(folder / SPECIAL_MAP), **read_object(folder / SETTINGS)}
    named = {role: symbol_of(folder, stated.get(f"{role}_token") or f"<{role}>")["content"] for role in ROLES}
    special = {role: symbol for role, symbol in named.items() if symbol in vocab}
    if "cls" not in special:
        raise CheckpointError(f"{file} must hold {named['cls']}, which begins each sequence; it does not")
    if len(vocab) > config.get("vocab_size", len(vocab)):
        raise CheckpointError(f"{file}: vocab_size must be {len(vocab)} or more; got {config['vocab_size']}")
    # of these models, none was trained with an end; a directory has one only where it says so
    suffix = (special["eos"],) if stated.get("eos_token") and "eos" in special else ()
    try:
        tokenizer = KmerTokenizer(tuple(vocab), (special["cls"],), suffix, special)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return tokenizer, ["lower case is read as upper case, U as T, and each letter but A, C, G and T as one N"]


def write_kmers(tokenizer: Tokenizer) -> dict[str, str]:
    """Texts of the files of a k-mer tokenizer, by file name.

    Raises:
        ConfigError: a tokenizer of another kind, or one that puts around a sequence what the files cannot say.
    """
    if not isinstance(tokenizer, KmerTokenizer):
        raise ConfigError(f"a tokenizer must be one of k-mers to be written as one; got one of {tokenizer.kind}")
    special = dict(tokenizer.special)
    if tokenizer.prefix != (special.get("cls"),) or tokenizer.suffix not in ((), (special.get("eos"),)):
        raise ConfigError(
            "a tokenizer of k-mers must put cls before a sequence, and eos or nothing behind it, to be written; "
            f"got {tokenizer.prefix} and {tokenizer.suffix}"
        )
    names: dict[str, str | None] = {f"{role}_token": symbol for role, symbol in special.items()}
    if not tokenizer.suffix:
        names["eos_token"] = None
    # the foreign class splits at spaces and at symbols of its vocabulary, and takes the longest that fits
    settings = {**names, "clean_up_tokenization_spaces": False, "tokenizer_class": "EsmTokenizer"}
    stated = {name: symbol for name, symbol in names.items() if symbol}
    return {WORDS: "\n".join(tokenizer.vocab), SETTINGS: json_text(settings), SPECIAL_MAP: json_text(stated)}


def _is_v1(config: ForeignConfig) -> bool:
    size = config.get("vocab_size")
    # an ESM with a symbol for each word of six bases is no model of proteins
    return ESM.recognises(config) and isinstance(size, int) and size > 4**6


NUCLEOTIDE_V1 = ESM.variant(
    name="Nucleotide Transformer v1",
    domain="dna",
    recognises=_is_v1,
    read_tokenizer=read_kmers,
    write_tokenizer=write_kmers,
)

NUCLEOTIDE_V2 = NUCLEOTIDE_V1.variant(
    name="Nucleotide Transformer v2",
    recognises=lambda config: "add_bias_fnn" in config,
    read_config=read_config,
    write_config=write_config,
    derived=derived,
    runner=None,
)
