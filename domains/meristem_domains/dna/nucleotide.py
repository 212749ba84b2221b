"""Nucleotide Transformer (Dalla-Torre 2024, doi 10.1038/s41592-024-02523-z) v1 and v2: ESM over words of six bases.

v1 is an ESM-1b, which `transformers` has; v2 is an ESM-2 whose feed-forward layer is gated by SiLU and has no biases.
v2 is kept in the layout of its own published code, which no library has: many of its configs name no `model_type`.
"""

from dataclasses import replace
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.interop.families import esm
from meristem.interop.families.esm import ESM
from meristem.interop.family import ForeignConfig, Tensors
from meristem.model.config import FeedForward, TransformerConfig
from meristem.shapes import Tensor
from meristem_domains.dna.vocabulary import read_kmers, write_kmers

CODE = {
    "AutoConfig": "esm_config.EsmConfig",
    "AutoModelForMaskedLM": "modeling_esm.EsmForMaskedLM",
}
"""The published code that a config names; it is beside the published weights and is not written."""


def read_config(config: ForeignConfig, tensors: Tensors) -> TransformerConfig:
    """Convert the config of a v2 to a `TransformerConfig`."""
    bias = bool(config["add_bias_fnn"])
    plain = {name: value for name, value in config.items() if name not in ("add_bias_fnn", "hidden_act")}
    architecture = esm.read_config(plain, tensors)
    feedforward = FeedForward(
        width=architecture.feedforward.width, activation="silu", is_gated=True, in_bias=bias, out_bias=bias
    )
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
