"""The families that are at home. A new one is a file like `esm.py` and a line here."""

from meristem.errors import CheckpointError
from meristem.interop.bert import BERT, ROBERTA
from meristem.interop.dino import DINO, DINO_REGISTERS
from meristem.interop.dnabert2 import DNABERT2
from meristem.interop.esm import ESM
from meristem.interop.esmc import ESMC
from meristem.interop.family import Family, ForeignConfig
from meristem.interop.gpt2 import GPT2, GPT_BIGCODE
from meristem.interop.gptj import CODEGEN, GPTJ
from meristem.interop.llama import LLAMA, QWEN2, QWEN3, STARCODER2
from meristem.interop.modernbert import MODERNBERT
from meristem.interop.nucleotide import NUCLEOTIDE_V1, NUCLEOTIDE_V2
from meristem.interop.switch import SWITCH, SWITCH_ENCODER
from meristem.interop.t5 import T5, T5_ENCODER
from meristem.interop.timm_vit import TIMM_VIT
from meristem.interop.vit import VIT

FAMILIES: tuple[Family, ...] = (
    NUCLEOTIDE_V2,
    NUCLEOTIDE_V1,
    ESM,
    ESMC,
    DNABERT2,
    BERT,
    ROBERTA,
    MODERNBERT,
    GPT2,
    GPT_BIGCODE,
    GPTJ,
    CODEGEN,
    LLAMA,
    QWEN2,
    QWEN3,
    STARCODER2,
    T5,
    T5_ENCODER,
    SWITCH,
    SWITCH_ENCODER,
    VIT,
    DINO,
    DINO_REGISTERS,
    TIMM_VIT,
)
"""Asked in this order, at import and at export."""


def find_family(where: object, config: ForeignConfig) -> Family:
    """The family of a foreign config.

    Raises:
        CheckpointError: none of those at home.
    """
    for family in FAMILIES:
        if family.recognises(config):
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(f"{where}: model_type must be of a family that is at home ({known}); got {_kind(config)}")


def _kind(config: ForeignConfig) -> str:
    missing = "none: is this a Hugging Face, timm or Meristem model directory?"
    return repr(config.get("model_type") or config.get("architecture") or missing)
