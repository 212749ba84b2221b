"""A model as it is run for vectors: in the precision asked for, and as fast as the machine allows."""

import copy
from typing import Any

import torch
from torch import nn

from meristem.inference.memory import USED_FRAC, available_bytes
from meristem.model.block import compile_blocks
from meristem.model.heads.labels import LabelHead
from meristem.model.model import Model
from meristem.model.reordered import can_reorder, has_foreign, remembered, reordered
from meristem.model.transformer import Encoder, EncoderDecoder


def runnable_trunk(model: Model, dtype: torch.dtype) -> Encoder | EncoderDecoder:
    """A model's trunk as it runs fastest; made once as long as the model stays as it is.

    On a CPU weights are reordered where memory allows it and, in fp32, the results stay exact (`model/exact.py`).
    """

    def make() -> Encoder | EncoderDecoder | None:
        # in another precision a copy: rounded weights must not find their way back into the model
        trunk = model.trunk if dtype == torch.float32 else copy.deepcopy(model.trunk).to(dtype)
        at_hand = available_bytes(torch.device("cpu"))
        has_room = at_hand is None or sum(one.nbytes for one in trunk.parameters()) < USED_FRAC * at_hand
        is_worth_it = can_reorder(trunk) and has_room
        fast = reordered(trunk, must_round_alike=dtype == torch.float32) if is_worth_it else None
        return fast or (trunk if trunk is not model.trunk else None)

    # in another precision foreign layers are copied as well, and nothing tells when what they do has changed
    is_fixed = dtype == torch.float32 or not has_foreign(model.trunk)
    return (remembered(model.trunk, f"embedding in {dtype}", make) if is_fixed else make()) or model.trunk


def with_runnable_heads(model: Model) -> Model:
    """A model whose pools and heads of labels have reordered weights on a CPU (`model/exact.py`)."""

    def make() -> Model | None:
        others = [model.trunk, *(head for head in model.heads.values() if not isinstance(head, LabelHead))]
        return reordered(model, others) if can_reorder(model) else None

    return remembered(model, "heads", make) or model


def compiled_trunk(model: Model, dtype: torch.dtype) -> Encoder | EncoderDecoder:
    """A model's trunk, compiled where the machine can; a copy, so that the model stays as it is."""
    trunk = copy.deepcopy(model.trunk).to(dtype)
    compile_blocks(trunk, model.device)
    return trunk


def first_blocks(trunk: Encoder | EncoderDecoder, count: int) -> Encoder | EncoderDecoder:
    """The trunk with its first blocks alone, of the first stack where there are two, and without the last norm.

    It shares its layers with `trunk`. All rows of it are computed: it must not be asked for a few.
    """
    stack = trunk.encoder if isinstance(trunk, EncoderDecoder) else trunk
    short: Any = copy.copy(stack)
    short._modules = {**stack._modules, "blocks": stack.blocks[:count], "final_norm": nn.Identity()}
    if not isinstance(trunk, EncoderDecoder):
        return short
    other = copy.copy(trunk)
    other._modules = {**trunk._modules, "encoder": short}
    return other
