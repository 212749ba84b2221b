"""Compiling the blocks of a model with torch, where the machine has a compiler."""

import torch
from torch import nn

from meristem.model.attention import AttentionLayer, CrossAttentionLayer
from meristem.model.block import Block
from meristem.model.compiler import has_compiler

AS_IT_STANDS: dict[type[nn.Module], tuple[str, ...]] = {
    AttentionLayer: ("_attend",),
    CrossAttentionLayer: ("forward",),
    Block: ("_ask_experts", "_drop_sequences"),
}
"""Methods that are not compiled, by class: they depend on the lengths of sequences, which lie on the host."""


def compile_blocks(trunk: nn.Module, device: torch.device | str) -> bool:
    """Compile each block of a trunk, once for packs of any size; without a compiler, say so and leave it as it is.

    Norms, maps, rotations and activations are fused. Names of parameters do not change.

    Returns:
        Whether the blocks are compiled.
    """
    if not has_compiler(device):
        return False
    for module in trunk.modules():
        for name in AS_IT_STANDS.get(type(module), ()):
            setattr(module, name, torch.compiler.disable(getattr(module, name)))
    for module in trunk.modules():
        if isinstance(module, Block):
            module.compile(dynamic=True)
    return True
