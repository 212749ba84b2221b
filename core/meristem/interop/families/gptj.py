"""GPT-J (Wang 2021) and CodeGen (Nijkamp 2022, arXiv 2203.13474), which is GPT-J with its maps in four shares.

As Hugging Face keeps them (`GPTJForCausalLM`, `CodeGenForCausalLM`): a causal stack in which attention and
feed-forward read the same norm and are added together; rotary positions turn neighbouring features, the first ones
of a head; no biases in attention; a head of its own, with a bias.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from meristem.data.tokenizer import Tokenizer
from meristem.errors import require
from meristem.interop.families.gpt2 import ALIASES, BUFFERS, COMMON, FIELDS, LAYER, TIED, read_gpt, write_gpt
from meristem.interop.family import ForeignConfig, Tensors, sequence_family
from meristem.interop.settings import Settings
from meristem.interop.table import KeyTable, Row, Transform, block_rows, head_rows
from meristem.model.config import Attention, Residual, Rotary, TokenHead, TransformerConfig
from meristem.shapes import Tensor

SHARES = 4
"""CodeGen's maps to queries, values and keys are cut for this many accelerators, whatever the model's size."""


def _joined_shares(tensors: Sequence[Tensor], config: TransformerConfig) -> Tensor:
    """Rows of queries, keys and values, of shares that hold queries, values and keys each."""
    queries, values, keys = tensors[0].unflatten(0, (SHARES, 3, -1)).unbind(1)
    return torch.stack([queries, keys, values]).flatten(0, 2)


def _cut_shares(tensor: Tensor, config: TransformerConfig) -> Sequence[Tensor]:
    """Split what `_joined_shares` joined."""
    queries, keys, values = tensor.unflatten(0, (3, SHARES, -1)).unbind(0)
    return [torch.stack([queries, values, keys], dim=1).flatten(0, 2)]


ROWS = (
    *COMMON,
    *block_rows(LAYER, out="attn.out_proj", up="mlp.fc_in", down="mlp.fc_out"),
    *head_rows(bias="lm_head.bias"),
)
TABLE = KeyTable((*ROWS, *block_rows(LAYER, qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"))), TIED, BUFFERS)
SHARED_QKV = Row("trunk.blocks.{}.attention.qkv", (f"{LAYER}.attn.qkv_proj",), Transform(_joined_shares, _cut_shares))
CODEGEN_TABLE = KeyTable((*ROWS, SHARED_QKV), TIED, BUFFERS)

MAX_POSITIONS = 2048
"""Rows of the reference's table of rotations, as the published models have them: ours has no limit to write."""

DEFAULTS = {
    "rotary_dim": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "tie_word_embeddings": False,
}


def read_config(config: ForeignConfig, tensors: Tensors, kind: str = "a GPT-J", shares: int = 1) -> TransformerConfig:
    found = Settings(kind, config, FIELDS, DEFAULTS, ALIASES)
    require(found["n_head"] % shares == 0, f"n_head must be a multiple of {shares} in {kind} config", found["n_head"])
    turned = found["rotary_dim"]
    require(bool(turned), "rotary_dim must be positive in a config of rotary positions", repr(turned))
    attention = partial(Attention, qkv_bias=False, out_bias=False)
    whole = turned == attention(num_heads=found["n_head"]).width_of_heads(found["n_embd"])
    return read_gpt(
        found,
        attention,
        position=Rotary(width=None if whole else turned, is_interleaved=True),
        residual=partial(Residual, placement="parallel"),
        head=partial(TokenHead, activation=None),
    )


def write_config(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    position = architecture.position
    turned = position.width if isinstance(position, Rotary) else None
    return {
        "model_type": "gptj",
        **write_gpt(architecture, tokenizer),
        "n_positions": MAX_POSITIONS,
        "rotary_dim": turned or architecture.head_width,
    }


def write_codegen_config(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {**write_config(architecture, tokenizer), "model_type": "codegen", "n_ctx": MAX_POSITIONS}


read_codegen_config = partial(read_config, kind="a CodeGen", shares=SHARES)
GPTJ = sequence_family("GPT-J", "text", "gptj", "GPTJ", TABLE, read_config, write_config)
CODEGEN = sequence_family(
    "CodeGen", "code", "codegen", "CodeGen", CODEGEN_TABLE, read_codegen_config, write_codegen_config, variant_of=GPTJ
)
